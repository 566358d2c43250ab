"""What clients of two nodes saw, from the first write over a death and a takeover to the end, is one history.

Both nodes write blocks of their own and read each other's, also while a write is under way. One node is killed,
taken over and comes back. Every sector of every block must have been a register all the time. The array is a
mirror, so reads beside an unfinished write may meet either copy (`register_history`, `mirrored`).
"""

from __future__ import annotations

import time

import pytest
from cluster_kit import BLOCKS_PER_CHUNK, Pair, make_pair

from clustermd.testing.exerciser import DISCONNECTED
from clustermd.testing.history_log import Action, Operation, Value, read_of
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.register_history import History, Rule, check

pytestmark = pytest.mark.system

BLOCKS = 2 * BLOCKS_PER_CHUNK  # of each node: few, so that reads meet writes
LOAD = ("--rate", "1500", "--depth", "32", "--cross-read-percent", "40", "--cross-blocks", f"0..{2 * BLOCKS}")
ONLY_READ = ("--rate", "3000", "--read-percent", "0", "--flush-percent", "0", "--cross-read-percent", "100")


def run_on(pair: Pair, records: int) -> None:
    """Let both loads go on until each has logged so many records more."""
    wanted = {load.number: load.records + records for load in pair.loads.values()}
    for load in pair.loads.values():
        load.wait_for_records(wanted[load.number])


def read_all(pair: Pair) -> None:
    """Clients of both nodes read everything; nobody writes."""
    for load in pair.loads.values():
        load.launch(
            *ONLY_READ, "--cross-blocks", f"0..{2 * BLOCKS}", "--max-blocks", "32", "--seconds", "0.5"
        )
    for load in pair.loads.values():
        assert load.report().errors == []


def test_clients_see_one_history_over_a_death_and_a_takeover(cluster: LocalCluster) -> None:
    pair = make_pair(cluster)
    for number, node in enumerate((pair.one, pair.two)):
        pair.loads[node.name] = Load(node, number + 1, number * BLOCKS, (number + 1) * BLOCKS)
        pair.load(node).start(*LOAD)
    run_on(pair, 1000)
    victim, survivor = pair.one, pair.two
    slot = victim.slot()
    victim.kill()
    dead = pair.load(victim).report()
    pair.wait_for_takeover(slot)
    taken_over_ns = time.monotonic_ns()
    pair.load(survivor).wait_for_records(pair.load(survivor).records + 500)
    victim.run("-A", "md0", *pair.disks)
    pair.load(victim).start(*LOAD)
    run_on(pair, 1000)
    for load in pair.loads.values():
        report = load.stop()
        assert report.errors == [], cluster.logs()
        assert report.cross_reads > 100
    read_all(pair)
    pair.settle(survivor)

    history = History.read_from_logs(pair.logs)
    history.fence(pair.load(victim).number, taken_over_ns)
    faults = history.check(mirrored=True)
    assert not faults, "\n".join(map(str, faults))
    assert dead.ended == DISCONNECTED
    reads, met, across = count(history)
    assert min(reads, across) > 1000
    assert met > 20, "reads were to meet writes under way"
    print(
        f"{len(history.operations)} operations, {reads} reads, {across} of the other node's, {met} met a write"
    )

    stale = one_stale_read(history)
    (fault,) = check([*history.operations, stale], history.fences, mirrored=True)
    assert (fault.rule, fault.block, fault.operations[0]) == (Rule.STALE, stale.block, stale)
    print(fault)


def count(history: History) -> tuple[int, int, int]:
    """Reads, reads that overlap a write of the same block, reads of what the other node writes."""
    writes: dict[int, list[Operation]] = {}
    for each in history.operations:
        if each.action is Action.WRITE:
            writes.setdefault(each.block, []).append(each)
    reads = [each for each in history.operations if each.action is Action.READ and each.end_ns is not None]
    met = sum(
        any(
            write.start_ns <= (read.end_ns or 0) and (write.end_ns or write.start_ns) >= read.start_ns
            for write in writes.get(read.block, [])
        )
        for read in reads
    )
    return len(reads), met, sum(read.block // BLOCKS != read.node - 1 for read in reads)


def one_stale_read(history: History) -> Operation:
    """A read of the other node's last but one write of a block, long after its last was acknowledged."""
    last = max(
        (
            each
            for each in history.operations
            if each.action is Action.WRITE and each.node == 1 and each.end_ns
        ),
        key=lambda write: write.values[0].generation if write.values[0] else 0,
    )
    assert last.values[0] is not None and last.values[0].generation > 1
    since = (last.end_ns or 0) + 1000
    return read_of(2, last.block, since, since + 1000, Value(1, last.values[0].generation - 1))
