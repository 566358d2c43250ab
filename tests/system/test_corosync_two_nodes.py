"""Clusters of two: votes prove nothing there, so only fencing tells who may go on."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import pytest
from corosync_arrays import NONE, PATIENCE_S, ArrayCluster, Machine, array_cluster
from corosync_kit import Options

from clustermd.testing.exerciser import DISCONNECTED
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

TOKEN_MS = 1000
DETECTION_S = 2.2 * TOKEN_MS / 1000
STARTUP_S = 6.0
LOAD = ("--rate", "300", "--depth", "8", "--hot-blocks", "512")
TWO = Options(token_ms=TOKEN_MS, two_node=True)


def go_on(cluster: ArrayCluster, victim: Machine, slot: int, began_s: float, what: str) -> None:
    """The other one takes over and writes on; the victim's load has lost its server."""
    (survivor,) = cluster.others(victim)
    taken_s = cluster.wait_for_takeover(slot) - began_s
    cluster.wait_for_writes(survivor)
    assert survivor.load.stop().errors == []
    assert victim.load.report().ended == DISCONNECTED
    print(f"{what}: taken over after {taken_s:.2f} s (2.2 x token: {DETECTION_S:.2f} s)")


def come_back(cluster: ArrayCluster, victim: Machine) -> None:
    victim.boot()
    cluster.wait_for_members(*cluster.nodes)
    victim.assemble()
    cluster.settle(*cluster.nodes)


def digests(cluster: ArrayCluster) -> list[str]:
    return [hashlib.sha256(Path(disk).read_bytes()).hexdigest() for disk in cluster.disks]


def assembling(cluster: ArrayCluster, machine: Machine) -> tuple[object, Path]:
    """`clustermd -A` on its way on that machine, and what it says."""
    command = [str(Path(sys.executable).with_name("clustermd")), "-A", "md0", *cluster.disks]
    program = cluster.local.start(machine.words(command), machine.node.environment, log="assembling.log")
    return program, cluster.local.directory / "assembling.log"


def test_two_nodes_with_fencing() -> None:
    """Power is lost, the link is cut, and one is started alone."""
    with array_cluster(2, options=TWO, agent=True) as cluster:
        one, two = cluster.nodes
        cluster.put_load(options=LOAD)
        slot, began_s = two.node.slot(), time.time()
        two.off()
        go_on(cluster, two, slot, began_s, "two nodes, one lost its power")
        assert cluster.fenced == ["off node2 0"]
        come_back(cluster, two)

        cluster.journal.unlink()
        cluster.put_load(options=LOAD)
        slot, began_s = two.node.slot(), time.time()
        cluster.machines.network.split([1], [2])
        go_on(cluster, two, slot, began_s, "two nodes, link cut")
        assert cluster.fenced == ["off node2 0"], "both would end each other, did not the first one go first"
        assert "quorum    yes, by corosync's rules (two_node" in one.node.run("cluster", "status")
        cluster.machines.network.heal()
        two.off()
        come_back(cluster, two)

        for machine in cluster.nodes:
            machine.node.run("-S", "md0")
            machine.off()
        before = digests(cluster)
        cluster.journal.unlink()
        one.boot()
        program, said = assembling(cluster, one)
        wait_until(
            lambda: "no quorum, it lacks node2" in said.read_text(),
            "the command to say what it waits for",
            PATIENCE_S,
            cluster.logs,
        )
        print(said.read_text().splitlines()[-1])
        assert digests(cluster) == before and cluster.fenced == []
        two.boot()
        wait_until(lambda: program.poll() == 0, "the array to start", PATIENCE_S, cluster.logs)


def test_two_nodes_without_fencing_go_on_at_once() -> None:
    with array_cluster(2, NONE, TWO) as cluster:
        _, two = cluster.nodes
        cluster.put_load(options=LOAD)
        slot, began_s = two.node.slot(), time.time()
        two.off()
        go_on(cluster, two, slot, began_s, 'two nodes, fence = "none", one lost its power')
        come_back(cluster, two)


def test_a_node_that_starts_alone_waits_for_its_peer_and_then_for_fencing() -> None:
    """As where somebody switched off that corosync waits for all: both sides of a start would be quorate."""
    options = Options(token_ms=TOKEN_MS, two_node=True, wait_for_all=False)
    with array_cluster(2, options=options, start=False) as cluster:
        cluster.fence_with_agent(f"startup_s = {STARTUP_S}")
        cluster.start()
        cluster.make_array()
        for machine in cluster.nodes:
            machine.off()
        before, (one, _) = digests(cluster), cluster.nodes
        one.boot()
        began_s = time.time()
        program, said = assembling(cluster, one)
        wait_until(
            lambda: "node2 writes nothing" in said.read_text(),
            "the command to name who it waits for",
            PATIENCE_S,
            cluster.logs,
        )
        print(said.read_text().splitlines()[-1])
        assert digests(cluster) == before and cluster.fenced == []
        wait_until(lambda: program.poll() == 0, "the array to start", PATIENCE_S, cluster.logs)
        assert time.time() - began_s > STARTUP_S
        assert cluster.fenced == ["off node2 0"]
        cluster.put_load(one, options=LOAD)
        assert one.load.stop().errors == []
        cluster.settle(one)
