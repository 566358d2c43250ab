"""ext4 on an array (nbdfuse, loop device): a takeover leaves a clean file system and all files."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_kit import Pair, loop_device, make_pair, nbd_file

from clustermd.testing.disks import all_clear, differing_blocks
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

FILES = 40


def shell(*command: str, expect: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    assert done.returncode in expect, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@contextmanager
def disk_of(node: Node) -> Iterator[str]:
    """The array as a block device, through this node."""
    with nbd_file(node.cluster, node.socket()) as path, loop_device(path) as device:
        yield device


@contextmanager
def mounted(device: str, where: Path) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    shell("mount", "-t", "ext4", device, str(where))
    try:
        yield where
    finally:
        shell("umount", str(where))


def write_files(where: Path, first: int, count: int) -> dict[str, str]:
    """Files of random content, each with its digest; all are on the disk when this returns."""
    digests = {}
    for number in range(first, first + count):
        data = random.Random(number).randbytes(4096 * (1 + number % 40) + number)
        (where / f"file{number}").write_bytes(data)
        digests[f"file{number}"] = hashlib.sha256(data).hexdigest()
    directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    os.sync()
    os.close(directory)
    return digests


def check_files(where: Path, digests: dict[str, str]) -> None:
    found = {name: hashlib.sha256((where / name).read_bytes()).hexdigest() for name in digests}
    assert found == digests


@pytest.mark.needs("root", "loop", "fuse", "nbdfuse", "mkfs.ext4")
def test_ext4_survives_the_death_of_its_node(cluster: LocalCluster) -> None:
    pair = make_pair(cluster)
    where = cluster.directory / "mounted"
    with disk_of(pair.one) as device:
        shell("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", device)
        with mounted(device, where):
            synced = write_files(where, 0, FILES)
            # These are on their way when the node dies; nobody was promised anything about them.
            for number in range(FILES, 2 * FILES):
                (where / f"file{number}").write_bytes(bytes(100_000))
            slot = pair.one.slot()
            pair.one.kill()
    pair.wait_for_takeover(slot)
    check_and_use(pair, where, synced)


def check_and_use(pair: Pair, where: Path, synced: dict[str, str]) -> None:
    with disk_of(pair.two) as device:
        # As after any crash: the journal is replayed (exit status 1), then nothing may be wrong.
        shell("e2fsck", "-p", device, expect=(0, 1))
        shell("e2fsck", "-f", "-n", device)
        with mounted(device, where):
            check_files(where, synced)
            synced |= write_files(where, 1000, FILES)
            check_files(where, synced)
        shell("e2fsck", "-f", "-n", device)
    wait_until(lambda: all_clear(pair.disks), "every bit to be clear", 30, last_words=pair.cluster.logs)
    assert differing_blocks(pair.disks) == []
