"""A real array process behind a real lease: when it ends, nothing is written; when it is renewed, all goes on.

lockd runs without a cluster of machines here; the lease file is the test's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cluster_kit import CREATE

from clustermd.device.lease import UNBOUNDED_NS, LeaseFile
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.nbd_client import Command, NbdClient
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

BLOCK = 4096
QUIET_S = 0.5
NOW_NS = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)


class Leased:
    """One node with an array whose lease the test holds."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.disks = cluster.images(2, 64 << 20)
        self.node: Node = cluster.node("node1")
        self.node.run("-CR", "md0", *CREATE, "--home-cluster=here", "--assume-clean", *self.disks)
        self.node.run("-S", "md0")
        self.lease = LeaseFile.make(self.node.rundir.lease, NOW_NS)
        conf = cluster.directory / "clustermd.conf"
        conf.write_text('fence = "lease"\nlease_s = 2\n')
        # only what starts from here on: the lockd that runs already is one of this machine
        cluster.environment |= {"CLUSTERMD_ENGINE": "corosync", "CLUSTERMD_CONF": str(conf)}

    def assemble(self) -> None:
        self.node.run("-A", "md0", "--home-cluster=here", *self.disks)

    def on_disk(self, data: bytes) -> list[bool]:
        """Whether each disk has that block anywhere."""
        return [data in Path(disk).read_bytes() for disk in self.disks]

    def held(self) -> str:
        return self.node.status().held


@pytest.fixture
def leased(cluster: LocalCluster) -> Iterator[Leased]:
    cluster.environment |= {"CLUSTERMD_LINGER_S": "120"}
    leased = Leased(cluster)
    yield leased
    leased.lease.renew(UNBOUNDED_NS)
    leased.node.run("-S", "md0", "--force", expect=None)
    leased.lease.close()


def _block(number: int) -> bytes:
    return b"block %08d of the lease's test; " % number * (BLOCK // 32)


def test_an_array_writes_only_while_its_lease_runs(leased: Leased) -> None:
    leased.lease.renew(UNBOUNDED_NS)
    leased.assemble()
    with NbdClient(leased.node.socket()) as client:
        client.call(Command.WRITE, 0, data=_block(0))
        assert leased.on_disk(_block(0)) == [True, True]

        leased.lease.expire()
        for number in (1, 2):  # a chunk with its bit on disk, and a clean one
            client.send(Command.WRITE, number * 8 << 20, data=_block(number))
        client.send(Command.READ, 0, BLOCK)
        assert not client.readable(QUIET_S)
        assert leased.on_disk(_block(1)) == leased.on_disk(_block(2)) == [False, False]
        assert "lease is over" in leased.held()
        assert "lease is over" in leased.node.files().log.read_text()

        leased.lease.renew(NOW_NS() + int(60e9))
        assert [client.receive().error for _ in range(3)] == [0, 0, 0]
        assert leased.on_disk(_block(1)) == leased.on_disk(_block(2)) == [True, True]
        wait_until(lambda: not leased.held(), "the array to say that it serves again")


def test_a_lease_ends_by_the_clock_without_a_word_from_anybody(leased: Leased) -> None:
    leased.lease.renew(UNBOUNDED_NS)
    leased.assemble()
    with NbdClient(leased.node.socket()) as client:
        leased.lease.expire()
        leased.lease.renew(NOW_NS() + int(0.3e9))
        written = 0
        while True:
            client.send(Command.WRITE, 0, data=_block(written))
            if not client.readable(QUIET_S):
                break
            assert client.receive().error == 0
            written += 1
        assert written > 0 and NOW_NS() >= leased.lease.until_ns
        assert leased.on_disk(_block(written)) == [False, False]
        leased.lease.renew(UNBOUNDED_NS)
        assert client.receive().error == 0
        assert leased.on_disk(_block(written)) == [True, True]


def test_a_process_that_slept_through_the_end_of_its_lease_writes_nothing(leased: Leased) -> None:
    leased.lease.renew(UNBOUNDED_NS)
    leased.assemble()
    (array,) = [process for process in leased.node.processes() if process.role == "array"]
    with NbdClient(leased.node.socket()) as client:
        client.call(Command.WRITE, 0, data=_block(0))
        array.send(signal.SIGSTOP)
        wait_until(lambda: array.still, "the array process to stand still")
        client.send(Command.WRITE, 0, data=_block(1))
        leased.lease.expire()
        array.send(signal.SIGCONT)
        assert not client.readable(QUIET_S)
        assert leased.on_disk(_block(1)) == [False, False]
        leased.lease.renew(UNBOUNDED_NS)
        assert client.receive().error == 0


def test_without_a_lease_file_no_array_starts(leased: Leased) -> None:
    leased.node.rundir.lease.unlink()
    text = leased.node.run("-A", "md0", "--home-cluster=here", *leased.disks, expect=1)
    assert "the lease of this node" in text and "cannot be opened" in text
