"""The daemons a node starts by itself die: the sequencer twenty times, then a lockd. Nothing is lost."""

from __future__ import annotations

import pytest
from cluster_kit import LOAD, make_pair

from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

KILLS = 20
STALL_BOUND_S = 5.0


def test_twenty_deaths_of_the_sequencer_under_load(cluster: LocalCluster) -> None:
    """Gates shut, requests are held, connections stay; a new sequencer starts and all go on."""
    pair = make_pair(cluster)
    arrays = [pair.one.pid(), pair.two.pid()]
    loads = [pair.load(pair.one), pair.load(pair.two)]
    for load in loads:
        load.start(*LOAD)
    for _ in range(KILLS):
        (old,) = wait_until(
            lambda: cluster.processes(role="sequencer"), "a sequencer", last_words=cluster.logs
        )
        cluster.kill([old])
        wait_until(lambda: cluster.processes(role="sequencer"), "a new sequencer", last_words=cluster.logs)
        for load in loads:
            load.wait_for_records(load.records + 200)
    for load in loads:
        report = load.stop()
        assert (report.errors, report.in_flight_at_end) == ([], 0)
        print(f"longest stall of node {load.number}: {report.longest_stall_s():.3f} s")
        assert report.longest_stall_s() < STALL_BOUND_S
    assert [pair.one.pid(), pair.two.pid()] == arrays, "an array process did not live through it"
    pair.settle(pair.one)


def test_the_death_of_a_lockd_under_load(cluster: LocalCluster) -> None:
    """Its arrays hold, come back or are taken over; the other node goes on, and nothing is lost."""
    pair = make_pair(cluster)
    for node in (pair.one, pair.two):
        pair.load(node).start(*LOAD)
    cluster.kill(cluster.processes(node=pair.one.name, role="lockd"))
    survivor = pair.load(pair.two)
    survivor.wait_for_records(survivor.records + 3000)
    report = survivor.stop()
    assert report.errors == [], cluster.logs()
    assert report.longest_stall_s() < STALL_BOUND_S

    victim = pair.load(pair.one)
    came_back = victim.running and pair.one.processes()
    if came_back:
        victim.wait_for_records(victim.records + 500)
        assert victim.stop().errors == []
    else:
        victim.report()
        pair.one.run("-A", "md0", *pair.disks)
        victim.start(*LOAD)
        assert victim.stop().errors == []
    pair.settle(pair.two)


def test_the_death_of_an_array_process_takes_nothing_else_down(cluster: LocalCluster) -> None:
    """One array of two dies on node1: the other one there goes on, and node2 repairs what died."""
    pair = make_pair(cluster)
    others = [str(cluster.directory / f"other{number}.img") for number in range(2)]
    for path in others:
        with open(path, "xb") as image:
            image.truncate(32 << 20)
    pair.one.run("-CR", "md1", "-l1", "-n2", "-b", "clustered", "--nodes=4", "--assume-clean", *others)
    untouched = pair.one.pid("md1")
    lockd = cluster.processes(node=pair.one.name, role="lockd")
    pair.load(pair.one).start(*LOAD)
    slot = pair.one.slot()
    cluster.kill([process for process in pair.one.processes() if process.pid == pair.one.pid()])
    pair.load(pair.one).report()
    pair.wait_for_takeover(slot)
    assert pair.one.pid("md1") == untouched
    assert cluster.processes(node=pair.one.name, role="lockd") == lockd
    pair.settle(pair.two)
