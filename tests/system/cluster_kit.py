"""What the system tests share: a pair of nodes under load, loop devices, a slow disk, real mdadm.

A test tells a story: make a pair, put load on it, let something happen, and then `settle` it, which
is where everything is checked that must hold at the end of every story.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.testing.crash import Crash, crash
from clustermd.testing.disks import all_clear, differing_blocks, dirty_chunks, look
from clustermd.testing.judge import Verdict, judge, nbd_reader
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.nbd_client import NbdClient
from clustermd.testing.waiting import wait_until

MIB = 1 << 20
DISK_BYTES = 64 * MIB
CHUNK_BYTES = 64 << 10
BLOCKS_PER_CHUNK = CHUNK_BYTES // 4096
CREATE = ("-l1", "-n2", "-b", "clustered", "--nodes=4", "--delay=1", f"--bitmap-chunk={CHUNK_BYTES >> 10}K")
LOAD = ("--rate", "1500", "--depth", "32", "--hot-blocks", "512")
EVERY_BIT_CLEAR_S = 30.0
TAKEOVER_S = 15.0


@dataclass
class Pair:
    """Two nodes that run one clustered RAID1. Their loads write blocks that are nobody else's."""

    cluster: LocalCluster
    disks: list[str]
    one: Node
    two: Node
    loads: dict[str, Load] = field(default_factory=dict)

    def other(self, node: Node) -> Node:
        return self.two if node is self.one else self.one

    def load(self, node: Node) -> Load:
        return self.loads[node.name]

    @property
    def logs(self) -> list[Path]:
        return [load.log for load in self.loads.values()]

    def judge_through(self, node: Node) -> Verdict:
        """What the judge says of all blocks, read through that node."""
        with NbdClient(node.socket()) as client:
            return judge(self.logs, nbd_reader(client))

    def wait_for_takeover(self, slot: int, timeout_s: float = TAKEOVER_S) -> None:
        """Wait until the bits of a dead node's slot are gone from all disks."""
        wait_until(
            lambda: not dirty_chunks(self.disks, slot),
            f"slot {slot} to be taken over",
            timeout_s,
            last_words=self.cluster.logs,
        )

    def crash_that_counts(self, victim: Node, load: tuple[str, ...] = LOAD, tries: int = 8) -> Crash:
        """Kill `victim` under load, again and again, until halves could be made to differ by it.

        The survivor's own load, if any, is the caller's. Each kill but the last is settled.
        """
        survivor = self.other(victim)
        for _ in range(tries):
            self.load(victim).start(*load)
            happened = crash(self.load(victim), [survivor], self.disks)
            if happened.counts:
                return happened
            self.wait_for_takeover(happened.slot)
            victim.run("-A", "md0", *self.disks)
        raise AssertionError(f"none of {tries} kills met a write in flight under a dirty bit")

    def settle(self, node: Node) -> None:
        """No load runs any more: wait until every bit is clear, then all that must hold must hold."""
        wait_until(
            lambda: all_clear(self.disks),
            "every bit to be clear",
            EVERY_BIT_CLEAR_S,
            last_words=lambda: f"dirty: {[look(disk).dirty for disk in self.disks]}\n{self.cluster.logs()}",
        )
        self.check(node)

    def check(self, node: Node) -> None:
        """The halves are equal byte by byte, and the judge is content with what `node` reads."""
        assert differing_blocks(self.disks) == []
        verdict = self.judge_through(node)
        assert verdict.good, verdict
        assert verdict.acknowledged > 0


def make_pair(cluster: LocalCluster, disks: list[str] | None = None, *options: str) -> Pair:
    """Create on node1, assemble on node2. Each load has a third of the blocks; the last third is free."""
    disks = disks if disks is not None else cluster.images(2, DISK_BYTES)
    pair = Pair(cluster, disks, cluster.node("node1"), cluster.node("node2"))
    pair.one.run("-CR", "md0", *CREATE, "--assume-clean", *options, *disks)
    pair.two.run("-A", "md0", *disks)
    third = look(disks[0]).size_bytes // 4096 // 3
    for number, node in enumerate((pair.one, pair.two)):
        pair.loads[node.name] = Load(node, number + 1, number * third, (number + 1) * third)
    wait_for_clear_bits(pair)
    return pair


def wait_for_clear_bits(pair: Pair) -> None:
    """A new array has all bits of slot 0 set, as mdadm makes it; load would not show among them."""
    wait_until(lambda: all_clear(pair.disks), "the bits of creation to be cleared", EVERY_BIT_CLEAR_S)


@contextmanager
def loop_device(path: str | Path, direct_io: bool = False) -> Iterator[str]:
    """A loop device on a file, given back at the end."""
    command = ["losetup", "--find", "--show", f"--direct-io={'on' if direct_io else 'off'}", str(path)]
    device = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=20)
        name = Path(device).name
        wait_until(lambda: not Path(f"/sys/block/{name}/loop/backing_file").exists(), f"{device} to be free")


@contextmanager
def nbd_file(cluster: LocalCluster, socket: str) -> Iterator[Path]:
    """An NBD export as a file (nbdfuse)."""
    path = cluster.directory / "export"
    path.touch()
    program = cluster.start(["nbdfuse", str(path), f"nbd+unix:///?socket={socket}"], log="nbdfuse.log")
    wait_until(lambda: os.path.ismount(path), "nbdfuse to mount", last_words=cluster.logs)
    try:
        yield path
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(path)], check=True, timeout=20)
        program.wait(20)
        path.unlink()


class SlowWrites:
    """A control group whose writes to one block device crawl; everybody else's are as fast as ever.

    What a process of the group has in flight when it is killed still lands, seconds later: the block
    layer keeps the requests (cgroup-v1 blkio-controller "throttling", cgroup-v2 "io.max").
    """

    V1 = Path("/sys/fs/cgroup/blkio")
    V2 = Path("/sys/fs/cgroup")

    def __init__(self, name: str) -> None:
        self._v1 = (self.V1 / "cgroup.procs").exists()
        self._group = (self.V1 if self._v1 else self.V2) / f"clustermd-test-{os.getpid()}-{name}"
        if not self._v1:
            (self.V2 / "cgroup.subtree_control").write_text("+io")
        self._group.mkdir()

    def add(self, pid: int) -> None:
        (self._group / "cgroup.procs").write_text(str(pid))

    def limit(self, device: str, bytes_per_s: int) -> None:
        numbers = Path(f"/sys/block/{Path(device).name}/dev").read_text().strip()
        if self._v1:
            (self._group / "blkio.throttle.write_bps_device").write_text(f"{numbers} {bytes_per_s}")
        else:
            (self._group / "io.max").write_text(f"{numbers} wbps={bytes_per_s}")

    def close(self) -> None:
        """Remove the group; whatever was in it has ended."""
        wait_until(lambda: not (self._group / "cgroup.procs").read_text(), "the slow processes to end")
        self._group.rmdir()


def mdadm(*arguments: str) -> str:
    """What the real mdadm prints; it must succeed."""
    command = ["mdadm", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def mdadm_examine(paths: Sequence[str]) -> list[str]:
    """`mdadm -E` of each disk: it must find the checksum correct."""
    texts = [mdadm("-E", path) for path in paths]
    for text in texts:
        assert re.search(r"Checksum : [0-9a-f]+ - correct", text), text
    return texts


def mdadm_dirty_bits(paths: Sequence[str]) -> list[list[int]]:
    """How many bits `mdadm -X` counts as dirty, per disk and slot; on loop devices, as it wants them."""
    with ExitStack() as devices:
        found = []
        for path in paths:
            device = path if path.startswith("/dev/") else devices.enter_context(loop_device(path))
            found.append([int(count) for count in re.findall(r"chunks\), (\d+) dirty", mdadm("-X", device))])
        return found
