"""An array of one node: writes reach every member, crashes are made good, errors are contained."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from array_kit import BLOCK, data_of, dirty_chunks, make_images, poke, running, set_bits, superblock_of

from clustermd.array.request import Kind
from clustermd.errors import Refused
from clustermd.ondisk.create import BitmapKind
from clustermd.ondisk.superblock import MAX_SECTOR, ROLE_FAULTY

KINDS = [BitmapKind.INTERNAL, BitmapKind.NONE]


@pytest.mark.parametrize("bitmap", KINDS)
def test_what_is_written_is_read_and_on_both_members(tmp_path: Path, bitmap: BitmapKind) -> None:
    paths = make_images(tmp_path, bitmap=bitmap)

    async def story() -> None:
        async with running(paths) as (array, client):
            chooser = random.Random(1)
            expected = {}
            for _ in range(200):
                block = chooser.randrange(array.size_bytes // BLOCK)
                expected[block] = chooser.randbytes(BLOCK)
                await client.write(block * BLOCK, expected[block])
            await client.do(Kind.FLUSH)
            for block, content in expected.items():
                assert await client.read(block * BLOCK, BLOCK) == content
            assert array.status().clean is False

    asyncio.run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    for path in paths:
        assert superblock_of(path).resync_offset == MAX_SECTOR, "a clean stop marks the array clean"
    if bitmap is BitmapKind.INTERNAL:
        assert dirty_chunks(paths[0]) == dirty_chunks(paths[1]) == []


def test_a_steady_writer_costs_no_bitmap_write(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths) as (array, client):
            await client.write(0, b"a" * BLOCK)
            before = array.status().counters["bitmap_writes"]
            for turn in range(100):
                await client.write(turn % 16 * BLOCK, bytes([turn]) * BLOCK)
            assert array.status().counters["bitmap_writes"] == before

    asyncio.run(story())


def test_bits_are_on_disk_before_data_and_go_lazily(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths) as (array, client):
            await client.write(5 * (64 << 10), b"x" * BLOCK)
            assert dirty_chunks(paths[0]) == dirty_chunks(paths[1]) == [5]
            gone = asyncio.Event()
            array.state.trace.listen(lambda name, _: gone.set() if name == "sweep.cleared" else None)
            await asyncio.wait_for(gone.wait(), 10)
            await array.bitmap_writer.flush()
            assert dirty_chunks(paths[0]) == dirty_chunks(paths[1]) == []

    asyncio.run(story())


@pytest.mark.parametrize("chunks", [[0], [3, 7], [239]])
def test_bits_left_by_a_crash_are_resynced_and_nothing_else(tmp_path: Path, chunks: list[int]) -> None:
    paths = make_images(tmp_path)

    async def start_and_stop() -> None:
        async with running(paths) as (array, _):
            await asyncio.wait_for(array.idle(), 20)

    asyncio.run(start_and_stop())
    chunk_bytes = 64 << 10
    for chunk in chunks:
        poke(paths[1], chunk * chunk_bytes + 512, b"stale" * 100)
    poke(paths[1], 20 * chunk_bytes, b"nobody said so")
    set_bits(paths[0], 0, chunks[:1])  # a bitmap write that reached one member only still counts
    set_bits(paths[1], 0, chunks)
    asyncio.run(start_and_stop())
    first, second = data_of(paths[0]), data_of(paths[1])
    differing = {
        at // chunk_bytes
        for at in range(0, len(first), BLOCK)
        if first[at : at + BLOCK] != second[at : at + BLOCK]
    }
    assert differing == {20}
    assert dirty_chunks(paths[0]) == dirty_chunks(paths[1]) == []


def test_a_new_array_is_resynced_from_its_first_member(tmp_path: Path) -> None:
    paths = make_images(tmp_path, assume_clean=False)
    poke(paths[0], 0, os.urandom(1 << 20))
    poke(paths[1], 4 << 20, os.urandom(1 << 20))

    async def story() -> None:
        async with running(paths) as (array, _):
            await asyncio.wait_for(array.idle(), 20)

    asyncio.run(story())
    first = data_of(paths[0])
    assert first == data_of(paths[1])
    assert first[4 << 20 : 5 << 20] == bytes(1 << 20)


def test_without_a_bitmap_a_crash_means_a_whole_resync(tmp_path: Path) -> None:
    paths = make_images(tmp_path, bitmap=BitmapKind.NONE)

    async def crash() -> None:
        async with running(paths, stop=False) as (array, client):
            await client.write(0, b"x" * BLOCK)
            await array.state.submitter.drained()

    asyncio.run(crash())
    assert superblock_of(paths[0]).resync_offset == 0
    poke(paths[1], 9 << 20, b"different")

    async def story() -> None:
        async with running(paths) as (array, _):
            await asyncio.wait_for(array.idle(), 20)

    asyncio.run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_degraded_needs_run_and_keeps_its_bits(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def refuse() -> None:
        with pytest.raises(Refused) as refused:
            async with running(paths[:1]):
                pass
        assert refused.value.code == "degraded"

    async def story() -> None:
        async with running(paths[:1], allow_degraded=True) as (array, client):
            await client.write(3 * (64 << 10), b"x" * BLOCK)
            assert array.status().degraded == 1

    asyncio.run(refuse())
    assert superblock_of(paths[0]).events == superblock_of(paths[1]).events
    asyncio.run(story())
    assert dirty_chunks(paths[0]) == [3]
    superblock = superblock_of(paths[0])
    assert superblock.dev_roles[:2] == (0, ROLE_FAULTY)


def test_trim_and_zeroes_leave_zeroes_everywhere(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths) as (_array, client):
            await client.write(0, b"x" * (4 << 20))
            await client.do(Kind.TRIM, 0, 1 << 20)
            await client.do(Kind.WRITE_ZEROES, 1 << 20, 1 << 20)
            await client.do(Kind.WRITE_ZEROES, 2 << 20, 1 << 20, no_hole=True)
            assert await client.read(0, 4 << 20) == bytes(3 << 20) + b"x" * (1 << 20)

    asyncio.run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_overlapping_writes_end_in_one_order_on_all_members(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths) as (_, client):
            chooser = random.Random(7)
            answers = []
            for turn in range(400):
                start = chooser.randrange(32) * BLOCK
                length = chooser.randrange(1, 5) * BLOCK
                answers.append(client.send(Kind.WRITE, start, bytes([turn % 256]) * length))
            for answer in await asyncio.gather(*answers):
                assert answer.error == 0

    asyncio.run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    set_bits(paths[0], 0, [1])
    before = [path.read_bytes() for path in paths]

    async def story() -> None:
        async with running(paths, read_only=True) as (_, client):
            await client.read(0, BLOCK)
            with pytest.raises(PermissionError):
                await client.write(0, b"x" * BLOCK)

    asyncio.run(story())
    assert [path.read_bytes() for path in paths] == before
