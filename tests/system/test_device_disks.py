"""Real block devices: loop devices stand for disks."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clustermd.device.direct import claim_exclusive, identity, open_member, probe_exclusive
from clustermd.device.helpers import read_bytes, write_bytes
from clustermd.device.in_use import in_use_by_kernel
from clustermd.device.member_device import Op
from clustermd.device.submitter import make_submitter
from clustermd.device.witness import WITNESS_BASE, hold, probe
from clustermd.errors import DeviceRefused

pytestmark = [pytest.mark.system, pytest.mark.needs("root", "loop")]

SIZE_BYTES = 32 << 20


def attach(path: Path, *options: str) -> str:
    command = ["losetup", "--find", "--show", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE_BYTES)
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[str]:
    loop = attach(image)
    yield loop
    subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_disk_is_opened_direct_and_does_all_operations(disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        device = open_member(disk, clustered=True)
        submitter = make_submitter(pool_bytes=16 << 20)
        assert device.block and device.direct
        assert (device.size_sectors, device.logical_block_bytes) == (SIZE_BYTES // 512, 512)
        data = os.urandom(1 << 20)
        await write_bytes(submitter, device, 1 << 20, data, fua=True)
        assert await submitter.run(device, Op.FLUSH, 0, 0) == 0
        assert await read_bytes(submitter, device, 1 << 20, 1 << 20) == data
        assert device.discard_zeroes
        assert await submitter.run(device, Op.DISCARD, 1 << 20, 65536) == 0
        assert await read_bytes(submitter, device, 1 << 20, 1 << 20) == bytes(65536) + data[65536:]
        buffer = submitter.pool.take(4096)
        assert await submitter.run(device, Op.READ, SIZE_BYTES, 4096, buffer) == 0
        assert await submitter.run(device, Op.WRITE, SIZE_BYTES, 4096, buffer) == -errno.ENOSPC
        assert await submitter.run(device, Op.READ, 100, 512, buffer) == -errno.EINVAL
        await submitter.close()
        device.close()

    for how in ("uring", "threads"):
        monkeypatch.setenv("CLUSTERMD_IO", how)
        asyncio.run(asyncio.wait_for(story(), 20))


def test_a_disk_of_4096_byte_blocks_says_so(image: Path) -> None:
    loop = attach(image, "--sector-size", "4096")
    try:
        device = open_member(loop)
        assert device.logical_block_bytes == 4096
        device.close()
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_disk_without_direct_io_is_refused_for_a_clustered_array_only(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def no_direct(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags)

    monkeypatch.setattr("clustermd.device.direct.os.open", no_direct)
    with pytest.raises(DeviceRefused) as refused:
        open_member(disk, clustered=True)
    assert refused.value.code == "no-direct-io"
    open_member(disk).close()


def test_an_exclusive_opener_keeps_the_next_out_and_lets_readers_and_nodes_in(disk: str) -> None:
    holder = open_member(disk)
    for attempt in (lambda: open_member(disk), lambda: claim_exclusive(disk), lambda: probe_exclusive(disk)):
        with pytest.raises(DeviceRefused) as refused:
            attempt()
        assert refused.value.code == "device-busy"
    open_member(disk, read_only=True).close()
    holder.close()

    probe_exclusive(disk)
    claim = claim_exclusive(disk)
    node1, node2 = open_member(disk, clustered=True), open_member(disk, clustered=True)
    with pytest.raises(DeviceRefused):
        open_member(disk)
    for device in (node1, node2):
        device.close()
    os.close(claim)
    open_member(disk).close()


def test_witness_locks_belong_to_the_device_node(disk: str, tmp_path: Path) -> None:
    node1 = open_member(disk, clustered=True)
    assert hold(node1.fd, WITNESS_BASE + 1)
    assert not probe(disk, *identity(disk), WITNESS_BASE + 1)
    second = tmp_path / "second"
    os.mknod(second, 0o600 | 0o060000, os.stat(disk).st_rdev)
    # same disk, other inode: a lock there says nothing about this one, and identity tells them apart
    assert identity(str(second)) != identity(disk)
    assert identity(str(second))[0] == identity(disk)[0]
    node1.close()
    assert probe(disk, *identity(disk), WITNESS_BASE + 1)


def test_a_file_below_a_loop_device_is_in_use(image: Path, tmp_path: Path) -> None:
    assert in_use_by_kernel(str(image)) is None
    loop = attach(image)
    hard = tmp_path / "hard"
    os.link(image, hard)
    try:
        assert in_use_by_kernel(str(image)) == f"the backing file of {loop}"
        with pytest.raises(DeviceRefused, match=loop) as refused:
            open_member(str(image), clustered=True)
        assert refused.value.code == "device-busy"
        open_member(str(image), read_only=True).close()
        assert in_use_by_kernel(str(hard)) == f"the backing file of {loop}"
        assert in_use_by_kernel(loop) is None
        # the name it was attached by is gone: only the inode tells
        image.unlink()
        assert in_use_by_kernel(str(hard)) == f"the backing file of {loop}"
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    assert in_use_by_kernel(str(hard)) is None


def test_a_read_only_loop_device_over_a_file_only_looks_on(image: Path) -> None:
    loop = attach(image, "--read-only")
    try:
        assert in_use_by_kernel(str(image)) is None
        open_member(str(image), clustered=True).close()
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.mark.needs("mkfs.ext4")
def test_a_mounted_disk_is_in_use_and_says_where(disk: str, tmp_path: Path) -> None:
    where = tmp_path / "a place"
    where.mkdir()
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", disk, where], check=True)
    try:
        assert in_use_by_kernel(disk) == f"mounted on {where}"
        for clustered in (False, True):
            with pytest.raises(DeviceRefused, match="mounted on") as refused:
                open_member(disk, clustered=clustered)
            assert refused.value.code == "device-busy"
    finally:
        subprocess.run(["umount", where], check=True)
    assert in_use_by_kernel(disk) is None
