"""A node stands still under load: the other goes on within the bound, the still one never writes again."""

from __future__ import annotations

import signal

import pytest
from cluster_kit import LOAD, make_pair

from clustermd.testing.disks import dirty_chunks, look
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

UNRESPONSIVE_S = 2.0
GO_ON_WITHIN_S = UNRESPONSIVE_S + 2.0


@pytest.mark.parametrize("cluster", [{"CLUSTERMD_UNRESPONSIVE_S": str(UNRESPONSIVE_S)}], indirect=True)
@pytest.mark.parametrize("stopped", ["node", "array"])
def test_a_node_that_stands_still_is_put_to_death_and_replaced(cluster: LocalCluster, stopped: str) -> None:
    pair = make_pair(cluster)
    for node in (pair.one, pair.two):
        pair.load(node).start(*LOAD)
    slot = pair.one.slot()
    still = [process for process in pair.one.processes() if stopped == "node" or process.role == "array"]
    for process in still:
        process.send(signal.SIGSTOP)
    # The array process must be proved dead before its bits are touched: that is what is waited for.
    array = pair.one.pid()
    wait_until(
        lambda: not any(process.alive for process in still if process.pid == array),
        "the end of the process that stands still",
        GO_ON_WITHIN_S + 5,
        last_words=cluster.logs,
    )
    pair.load(pair.one).report()
    survivor = pair.load(pair.two)
    survivor.wait_for_records(survivor.records + 500)
    report = survivor.stop()
    assert report.errors == []
    print(f"longest stall of the survivor: {report.longest_stall_s():.3f} s")
    assert report.longest_stall_s() < GO_ON_WITHIN_S
    wait_until(lambda: not dirty_chunks(pair.disks, slot), "the takeover", 15, last_words=cluster.logs)
    pair.settle(pair.two)

    before = blocks_of(pair.load(pair.one), pair.disks)
    for process in still:
        process.send(signal.SIGCONT)
    # node2 works on: whatever the stopped one had left to say would be said by now.
    pair.load(pair.two).start(*LOAD)
    assert pair.load(pair.two).stop().errors == []
    pair.settle(pair.two)
    assert blocks_of(pair.load(pair.one), pair.disks) == before, "a node that was replaced wrote again"


def blocks_of(load: Load, disks: list[str]) -> list[bytes]:
    """What each half holds where that load writes."""
    first, end = load.blocks
    found = []
    for disk in disks:
        with open(disk, "rb") as image:
            image.seek(look(disk).data_offset_bytes + first * 4096)
            found.append(image.read((end - first) * 4096))
    return found


def test_a_short_pause_is_no_death(cluster: LocalCluster) -> None:
    """A node held for less than the bound goes on as if nothing had been."""
    pair = make_pair(cluster)
    for node in (pair.one, pair.two):
        pair.load(node).start(*LOAD)
    arrays = [pair.one.pid(), pair.two.pid()]
    with pair.one.held():
        survivor = pair.load(pair.two)
        survivor.wait_for_records(survivor.records + 1000)
    for node in (pair.one, pair.two):
        load = pair.load(node)
        load.wait_for_records(load.records + 300)
        assert load.stop().errors == []
    assert [pair.one.pid(), pair.two.pid()] == arrays
    pair.settle(pair.one)
