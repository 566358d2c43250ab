"""What dies on a machine of a real cluster, and what the others do about it; with how long it took.

All nodes write all the time. A fence agent ends lost machines, and its journal says which. Recovery is detection
(2.2 x token), fencing, and the takeover of the dead node's dirty regions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from corosync_arrays import PATIENCE_S, ArrayCluster, Machine, array_cluster
from corosync_kit import Options

from clustermd.testing.exerciser import DISCONNECTED
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

LOAD = ("--rate", "400", "--depth", "8", "--hot-blocks", "512")
TOKEN_MS = 1000
DETECTION_S = 2.2 * TOKEN_MS / 1000
SURVIVORS_WAIT_S = 2 * DETECTION_S + 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[ArrayCluster]:
    """Three machines with an array on each, for all tests of this file: each leaves it as it found it."""
    with array_cluster(3, options=Options(token_ms=TOKEN_MS), agent=True) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def story(cluster: ArrayCluster) -> Iterator[None]:
    """Loads on all. Afterwards all machines run the array, nobody's writes were refused, and halves are equal."""
    cluster.journal.unlink(missing_ok=True)
    cluster.put_load(options=LOAD)
    yield
    for machine in cluster.nodes:
        if machine.load.running:
            assert machine.load.stop().errors == [], cluster.logs()
    cluster.wait_for_members(*cluster.nodes)
    cluster.settle(*cluster.nodes)


def tell_recovery(
    cluster: ArrayCluster, victim: Machine, what: str, began_s: float, since: int, slot: int
) -> None:
    """Wait until a lost machine's regions are taken over, and print how long each step took."""
    witness = cluster.others(victim)[0]
    taken_s = cluster.wait_for_takeover(slot) - began_s
    detected_s = cluster.wait_for_log(witness, "view (", since) - began_s
    fenced_s = cluster.wait_for_log(witness, f"fenced {victim.name} (", since) - began_s
    print(
        f"{what}: detected after {detected_s:.2f} s, fenced after {fenced_s:.2f} s, taken over after {taken_s:.2f} s"
        f" (2.2 x token of {TOKEN_MS} ms: {DETECTION_S:.2f} s)"
    )


def replace(cluster: ArrayCluster, victim: Machine) -> None:
    """The others write on; the fenced machine boots and takes part again."""
    cluster.wait_for_writes(*cluster.others(victim))
    for survivor in cluster.others(victim):
        report = survivor.load.stop()
        assert report.errors == []
        assert report.longest_stall_s() < SURVIVORS_WAIT_S
    assert victim.load.report().ended == DISCONNECTED
    victim.boot()
    cluster.wait_for_members(*cluster.nodes)
    victim.assemble()


@pytest.mark.parametrize("number", [3, 1])
def test_a_machine_that_loses_its_power_is_fenced_once_and_taken_over(
    cluster: ArrayCluster, number: int
) -> None:
    victim = cluster[number]
    slot, since, began_s = victim.node.slot(), len(cluster.others(victim)[0].log), time.time()
    victim.off()
    tell_recovery(cluster, victim, f"{victim.name} lost its power", began_s, since, slot)
    assert cluster.fenced == [f"off {victim.name} 0"]
    replace(cluster, victim)


def test_a_machine_whose_corosync_is_killed_is_fenced(cluster: ArrayCluster) -> None:
    victim = cluster[2]
    slot, since, began_s = victim.node.slot(), len(cluster[1].log), time.time()
    victim.corosync.kill()
    tell_recovery(cluster, victim, "corosync was killed", began_s, since, slot)
    assert cluster.fenced == ["off node2 0"]
    assert not victim.node.processes(), "the agent ended all of it"
    victim.off()
    replace(cluster, victim)


def test_an_array_process_that_is_killed_is_witnessed_and_nobody_is_fenced(cluster: ArrayCluster) -> None:
    victim = cluster[2]
    slot, views, began_s = victim.node.slot(), cluster[1].log.count("view ("), time.time()
    victim.node.kill_array()
    taken_s = cluster.wait_for_takeover(slot) - began_s
    print(f"the array process was killed: taken over after {taken_s:.2f} s")
    assert taken_s < DETECTION_S, "a witness needs no detection by silence"
    assert victim.load.report().ended == DISCONNECTED
    cluster.wait_for_writes(cluster[1], cluster[3])
    assert cluster[1].log.count("view (") == views
    assert cluster.fenced == []
    victim.assemble()


def test_a_lockd_that_is_killed_gets_a_successor_which_proves_the_end(cluster: ArrayCluster) -> None:
    victim = cluster[3]
    array, began_s = victim.node.pid(), time.time()
    victim.kill_lockd()
    cluster.wait_for_log(victim, "proved the end of the former life", 0)
    cluster.wait_for_members(*cluster.nodes)
    victim.load.connect_anew()
    cluster.wait_for_writes(*cluster.nodes)
    print(f"lockd was killed: all nodes write again after {time.time() - began_s:.2f} s")
    assert victim.node.pid() == array
    assert cluster.fenced == []


def test_all_machines_are_restarted_one_after_the_other_and_nobody_waits_or_is_fenced(
    cluster: ArrayCluster,
) -> None:
    for machine in cluster.nodes:
        assert machine.load.stop().errors == []
        machine.node.run("-S", "md0")
        machine.stop_lockd()
        machine.corosync.stop()
        cluster.wait_for_writes(*cluster.others(machine))
        cluster.wait_for_members(*cluster.others(machine))
        machine.corosync.start()
        cluster.machines.wait(timeout_s=PATIENCE_S)
        machine.node.start_lockd()
        cluster.wait_for_members(*cluster.nodes)
        machine.assemble()
        machine.load.start(*LOAD)
    for machine in cluster.nodes:
        report = machine.load.stop()
        assert report.errors == []
        print(f"rolling restart: {machine.name} waited {report.longest_stall_s():.2f} s at most")
        assert report.longest_stall_s() < SURVIVORS_WAIT_S
    assert cluster.fenced == []


def test_a_corosync_that_is_stopped_under_a_running_array_is_a_loss(cluster: ArrayCluster) -> None:
    victim = cluster[1]
    slot, since, began_s = victim.node.slot(), len(cluster[2].log), time.time()
    victim.corosync.stop()
    tell_recovery(cluster, victim, "corosync was stopped", began_s, since, slot)
    assert cluster.fenced == ["off node1 0"]
    wait_until(lambda: not victim.node.processes(), "the end of node1")
    victim.off()
    replace(cluster, victim)
