"""Members with logical blocks of 4096 bytes: they refuse whatever is not a multiple of them, as O_DIRECT does."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from array_kit import BLOCK, data_of, disks_of, make_images, poke, run, running, superblock_of
from faulty_submitter import Fault, Io

from clustermd.array.request import Kind
from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.member_device import Op


def opener(coarse: list[Path]) -> Callable[[str], DirectDevice]:
    """Opens members; those in `coarse` have blocks of 4096 bytes."""

    def open_one(path: str) -> DirectDevice:
        device = open_member(path, exclusive=False)
        if Path(path) in coarse:
            device.logical_block_bytes = BLOCK
        return device

    return open_one


def unaligned(io: Io) -> bool:
    return (io.offset | io.length) % BLOCK > 0


def test_an_array_starts_and_stops_and_takes_whole_blocks_only(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        refused = Fault(only=unaligned, error=errno.EINVAL)
        async with running(paths, opener=opener(paths), faulty=[refused]) as (array, client):
            await client.write(BLOCK, b"g" * BLOCK)
            for kind in (Kind.READ, Kind.WRITE, Kind.WRITE_ZEROES):
                for offset, length in ((512, BLOCK), (0, 512)):
                    with pytest.raises(OSError, match="Invalid argument"):
                        await client.do(kind, offset, length)
            assert await client.read(0, 2 * BLOCK) == bytes(BLOCK) + b"g" * BLOCK
            assert not any(member.faulty for member in array.members())
        assert not refused.hits

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_repair_reads_whole_blocks_of_a_good_copy_with_larger_ones(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    bad = superblock_of(paths[0]).data_offset * 512 + 512

    async def story() -> None:
        refused = Fault(member="disk1", only=unaligned, error=errno.EINVAL)
        async with running(paths, opener=opener(paths[1:]), faulty=[refused]) as (array, client):
            await client.write(0, b"g" * BLOCK)
            poke(paths[0], 512, b"b" * 512)
            disks_of(array).fault(
                member="disk0", ops=(Op.READ,), lo=bad, hi=bad + 512, error=errno.EIO, until_written=True
            )
            assert await client.read(0, BLOCK) == b"g" * BLOCK
            task = array.repair._task
            assert task is not None
            await asyncio.wait_for(task, 10)
            assert array.status().counters["read_errors_corrected"] == 1, "left unreadable"
            assert not any(member.faulty for member in array.members())

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
