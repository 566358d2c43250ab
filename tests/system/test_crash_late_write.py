"""A killed node's writes land seconds after its death, and do no harm.

A SIGKILL ends a process at once, but not the requests the kernel has: on a slow disk they arrive when
others have long gone on. Here one disk crawls for node1 only. Had node2 taken over at once and written
the same blocks again, the late write would put an old generation over a newer one on that half.
"""

from __future__ import annotations

import signal
import time

import pytest
from cluster_kit import LOAD, SlowWrites, loop_device, make_pair

from clustermd.testing.disks import dirty_chunks, writers_of
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

CRAWL_BYTES_PER_S = 32 << 10
STALL_BOUND_S = 2.0
LEAST_LATE_S = 1.0


@pytest.mark.needs("root", "loop", "throttle")
def test_a_write_that_lands_seconds_after_the_kill_does_no_harm(cluster: LocalCluster) -> None:
    first, second = cluster.images(2, 64 << 20)
    with loop_device(first, direct_io=True) as fast, loop_device(second, direct_io=True) as slow:
        disks = [fast, slow]
        pair = make_pair(cluster, disks)
        crawl = SlowWrites("late-write")
        try:
            for node in (pair.one, pair.two):
                pair.load(node).start(*LOAD)
            slot = pair.one.slot()
            everybody = writers_of(slow)
            for process in pair.one.processes():
                crawl.add(process.pid)
            crawl.limit(slow, CRAWL_BYTES_PER_S)
            # Requests pile up at the slow disk until the load has nothing left to send.
            load = pair.load(pair.one)
            wait_until(lambda: standstill(load), "the load of node1 to wait for the slow disk")
            killed = time.monotonic()
            for process in pair.one.processes():
                process.send(signal.SIGKILL)
            wait_until(
                lambda: len(writers_of(slow)) < len(everybody) or not dirty_chunks(disks, slot),
                "the last write of the dead node to land",
                60,
                last_words=cluster.logs,
            )
            landed = time.monotonic()
            assert len(writers_of(slow)) < len(everybody), (
                "the bits were taken over before the last write landed"
            )
            late_s = landed - killed
            assert late_s > LEAST_LATE_S, f"the write landed {late_s:.1f} s after the kill: nothing was late"
            load.report()
            pair.wait_for_takeover(slot)
            survivor = pair.load(pair.two).stop()
            assert survivor.errors == []
            stall = survivor.longest_stall_s([(int(killed * 1e9), int(landed * 1e9))])
            print(f"writes landed {late_s:.1f} s after the kill; the longest other stall was {stall:.3f} s")
            assert stall < STALL_BOUND_S
            # The dead node's blocks are written again at once, through the survivor.
            heir = Load(pair.two, 1, *load.blocks)
            heir.start(*LOAD)
            assert heir.stop().errors == []
            pair.settle(pair.two)
        finally:
            cluster.kill(cluster.processes())
            crawl.close()


def standstill(load: Load) -> bool:
    """Whether nothing was acknowledged for a while."""
    before = load.records
    time.sleep(0.3)
    return load.records == before
