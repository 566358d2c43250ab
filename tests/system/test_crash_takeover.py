"""A node dies under load, twenty times; the other goes on and the halves are equal again.

Each time the survivor is held while the disks are looked at, and what the dead node had in flight is
left old on one half and new on the other (`clustermd.testing.crash_states`). A run counts only if
bits were dirty, a write was in flight, and halves did differ.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cluster_kit import LOAD, Pair, make_pair, mdadm_dirty_bits, mdadm_examine

from clustermd.testing.crash import Crash, crash
from clustermd.testing.disks import differing_blocks
from clustermd.testing.load import start_fio
from clustermd.testing.local_cluster import LocalCluster, Node

pytestmark = pytest.mark.system

KILLS = 20
MOST_TRIES = 40
STALL_BOUND_S = 2.0
NO_COPY = Path(__file__).parent / "no_copy"


def kill_under_load(pair: Pair, victim: Node, whole_node: bool, after_records: int) -> Crash:
    """Load on both nodes, then one dies. Returns with the survivor running and its load stopped, in time."""
    survivor = pair.other(victim)
    for node in (pair.one, pair.two):
        pair.load(node).start(*LOAD)
    pair.load(victim).wait_for_records(pair.load(victim).records + after_records)
    return crash(pair.load(victim), [survivor], pair.disks, whole_node=whole_node)


def check_survivor(pair: Pair, survivor: Node, crash: Crash) -> float:
    """End the survivor's load: no error, no long stall. Returns the longest stall, the hold taken off."""
    report = pair.load(survivor).stop()
    assert report.errors == [], pair.cluster.logs()
    assert report.in_flight_at_end == 0
    stall = report.longest_stall_s([(crash.held_ns, crash.released_ns)])
    assert stall < STALL_BOUND_S, f"the survivor stood still for {stall:.2f} s\n{pair.cluster.logs()}"
    return stall


@pytest.mark.needs("mdadm", "fio", "loop")
def test_twenty_kills_of_either_node_lose_nothing(cluster: LocalCluster) -> None:
    pair = make_pair(cluster)
    chance = random.Random(1)
    counted = 0
    stalls = []
    for _ in range(MOST_TRIES):
        victim = chance.choice((pair.one, pair.two))
        survivor = pair.other(victim)
        third = pair.load(pair.two).blocks[1] * 4096
        fio = start_fio(cluster, survivor.socket(), 2, 8 << 20, third, rate_iops=300)
        happened = kill_under_load(pair, victim, chance.random() < 0.5, chance.randrange(200, 2000))
        pair.wait_for_takeover(happened.slot)
        stalls.append(check_survivor(pair, survivor, happened))
        assert fio.wait(20) == 0, cluster.logs()
        pair.settle(survivor)
        if happened.counts:
            counted += 1
            assert happened.differing, "the halves were to differ before the takeover"
        if counted == KILLS:
            break
        victim.run("-A", "md0", *pair.disks)
    assert counted == KILLS, f"only {counted} of {len(stalls)} kills met a write in flight under a dirty bit"
    print(f"{counted} kills counted of {len(stalls)}; longest stall of a survivor {max(stalls):.3f} s")
    survivor.run("-S", "md0")
    mdadm_examine(pair.disks)
    assert mdadm_dirty_bits(pair.disks) == [[0] * 4] * 2


@pytest.mark.parametrize("cluster", [{"PYTHONPATH": str(NO_COPY)}], indirect=True)
def test_without_the_copy_the_halves_stay_different(cluster: LocalCluster) -> None:
    """The test above can fail: here the takeover clears the bits and copies nothing."""
    pair = make_pair(cluster)
    happened = pair.crash_that_counts(pair.one)
    pair.wait_for_takeover(happened.slot)
    assert differing_blocks(pair.disks), "nothing was copied, so the halves must still differ"
    with pytest.raises(AssertionError):
        pair.check(pair.two)


def test_a_survivor_that_never_wrote_repairs_at_once(cluster: LocalCluster) -> None:
    pair = make_pair(cluster)
    happened = pair.crash_that_counts(pair.one)
    assert happened.differing
    pair.wait_for_takeover(happened.slot)
    pair.settle(pair.two)
