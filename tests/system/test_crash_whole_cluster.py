"""Both nodes die at once; one comes back alone and honours the bits of both slots (F1), chunk 0 too (F2)."""

from __future__ import annotations

import pytest
from cluster_kit import BLOCKS_PER_CHUNK, LOAD, Pair, make_pair, mdadm_dirty_bits

from clustermd.testing.crash_states import Change, make_halves_differ
from clustermd.testing.disks import differing_blocks, dirty_chunks, look
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.write_log import knowledge_of_logs

pytestmark = pytest.mark.system


def kill_both(pair: Pair) -> tuple[list[set[int]], list[list[Change]]]:
    """Everything dies at once, sequencer too. Returns dirty chunks and changes, per node's load."""
    slots = [pair.one.slot(), pair.two.slot()]
    pair.cluster.kill(pair.cluster.processes())
    loads = [pair.load(pair.one), pair.load(pair.two)]
    for load in loads:
        load.report()
    dirty = [dirty_chunks(pair.disks, slot) for slot in slots]
    disk = look(pair.disks[0])
    changes = [
        make_halves_differ(
            knowledge_of_logs([load.log]), pair.disks, disk.data_offset_bytes, chunks, disk.chunk_bytes
        )
        for load, chunks in zip(loads, dirty, strict=True)
    ]
    return dirty, changes


@pytest.mark.needs("mdadm", "loop")
@pytest.mark.parametrize("returns", ["node1", "node2"])
def test_bits_of_both_slots_are_honoured(cluster: LocalCluster, returns: str) -> None:
    pair = make_pair(cluster)
    back = cluster.node(returns)
    for _ in range(8):
        for node in (pair.one, pair.two):
            pair.load(node).start(*LOAD)
        dirty, changes = kill_both(pair)
        assert all(dirty)
        assert bool(differing_blocks(pair.disks)) == any(changes)
        back.run("-A", "md0", *pair.disks)
        pair.settle(back)
        if all(changes):
            break
        pair.other(back).run("-A", "md0", *pair.disks)
    assert all(changes), "no crash left halves different in both slots"
    back.run("-S", "md0")
    assert mdadm_dirty_bits(pair.disks) == [[0] * 4] * 2


def test_chunk_0_alone_is_honoured(cluster: LocalCluster) -> None:
    """Linux takes "lowest dirty chunk is 0" for "nothing to do" (F2)."""
    pair = make_pair(cluster)
    half = BLOCKS_PER_CHUNK // 2
    for number, node in enumerate((pair.one, pair.two)):
        pair.loads[node.name] = Load(node, number + 1, number * half, (number + 1) * half)
    for _ in range(8):
        for node in (pair.one, pair.two):
            pair.load(node).start(
                "--rate", "1500", "--depth", str(half), "--max-blocks", "1", "--read-percent", "0"
            )
        dirty, changes = kill_both(pair)
        assert dirty == [{0}, {0}]
        pair.two.run("-A", "md0", *pair.disks)
        pair.settle(pair.two)
        if any(changes):
            return
        pair.one.run("-A", "md0", *pair.disks)
    pytest.fail("no crash left halves different in chunk 0")


def test_chunk_0_of_one_dead_node_is_honoured_by_the_survivor(cluster: LocalCluster) -> None:
    pair = make_pair(cluster)
    pair.loads[pair.one.name] = Load(pair.one, 1, 0, BLOCKS_PER_CHUNK)
    happened = pair.crash_that_counts(
        pair.one, ("--rate", "1500", "--max-blocks", "1", "--read-percent", "0")
    )
    assert happened.dirty == {0}
    assert happened.differing
    pair.wait_for_takeover(happened.slot)
    pair.settle(pair.two)
