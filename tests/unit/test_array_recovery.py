"""Recovery, spares and bad blocks: what is read and written where, alone and in a cluster."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    MIB,
    clustered,
    data_of,
    dirty_chunks,
    disks_of,
    make_images,
    poke,
    run,
    running,
    superblock_of,
    until,
)
from cluster_in_process import cluster_of, settled
from faulty_submitter import FaultySubmitter, Io

from clustermd.array import resync
from clustermd.device.member_device import Op
from clustermd.ondisk import bad_blocks
from clustermd.ondisk.create import BitmapKind
from clustermd.ondisk.superblock import ROLE_FAULTY, ROLE_SPARE, FeatureMap, location

pytestmark = pytest.mark.usefixtures("quick_retries")


def recovering(path: Path, filled_bytes: int) -> None:
    """Make a member one that is filled up to there."""
    superblock = superblock_of(path)
    changed = replace(
        superblock,
        feature_map=superblock.feature_map | FeatureMap.RECOVERY_OFFSET,
        recovery_offset=filled_bytes // 512,
    )
    with open(path, "r+b") as file:
        file.seek(superblock.super_offset * 512)
        file.write(changed.to_bytes())


def different_halves(paths: list[Path], filled_bytes: int) -> None:
    """Random data on the first member; the second has it as far as it is filled."""
    content = random.Random(1).randbytes(superblock_of(paths[0]).size * 512)
    poke(paths[0], 0, content)
    poke(paths[1], 0, content[:filled_bytes])


def data_ios(disks: FaultySubmitter, op: Op, path: Path) -> list[Io]:
    """Requests in the data area, but for the look at where a superblock of version 1.0 would be."""
    superblock = superblock_of(path)
    start = superblock.data_offset * 512
    ios = disks.ios(op, str(path), start, start + superblock.size * 512)
    return [io for io in ios if io.offset != old_place(path)]


def old_place(path: Path) -> int:
    return location(0, path.stat().st_size // 512) * 512


@pytest.mark.parametrize("bitmap", [BitmapKind.INTERNAL, BitmapKind.NONE])
def test_a_recovery_goes_on_from_its_offset(tmp_path: Path, bitmap: BitmapKind) -> None:
    paths = make_images(tmp_path, bitmap=bitmap)
    different_halves(paths, 5 * MIB)
    recovering(paths[1], 5 * MIB)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, _):
            await asyncio.wait_for(array.idle(), 20)
            disks = disks_of(array)
            start = superblock_of(paths[0]).data_offset * 512
            written = data_ios(disks, Op.WRITE, paths[1])
            assert min(io.offset for io in written) == start + 5 * MIB
            assert max(io.end for io in written) == start + superblock_of(paths[0]).size * 512
            assert sum(io.length for io in written) == superblock_of(paths[0]).size * 512 - 5 * MIB
            assert not data_ios(disks, Op.READ, paths[1]) and not data_ios(disks, Op.WRITE, paths[0])
            assert [member.in_sync for member in array.members()] == [True, True]

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    assert not superblock_of(paths[1]).feature_map & FeatureMap.RECOVERY_OFFSET


def test_a_recovering_member_is_read_only_where_it_is_filled_and_nobody_else_can(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    different_halves(paths, 5 * MIB)
    recovering(paths[1], 5 * MIB)

    async def story() -> None:
        async with running(paths, faulty=True, limits=lambda: (1, 1)) as (array, client):
            disks = disks_of(array)
            for _ in range(8):
                await client.read(MIB, BLOCK)
            assert not data_ios(disks, Op.READ, paths[1])
            at = superblock_of(paths[0]).data_offset * 512
            disks.fault(member="disk0", ops=(Op.READ,), lo=at, error=errno.EIO)
            assert await client.read(MIB, BLOCK) == data_of(paths[0])[MIB : MIB + BLOCK]
            with pytest.raises(OSError, match="Input/output"):
                await client.read(12 * MIB, BLOCK)
            disks.well()

    run(story())


def test_a_stop_records_how_far_a_recovery_came(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    different_halves(paths, 0)
    recovering(paths[1], 0)

    async def first() -> None:
        async with running(paths, limits=lambda: (4000, 4000)) as (array, _):
            await until(lambda: array.members()[1].recovery_offset >= 2 * MIB // 512)

    async def second() -> None:
        async with running(paths, faulty=True) as (array, _):
            await asyncio.wait_for(array.idle(), 20)
            start = superblock_of(paths[0]).data_offset * 512
            assert min(io.offset for io in data_ios(disks_of(array), Op.WRITE, paths[1])) >= start + 2 * MIB

    run(first())
    assert 2 * MIB // 512 <= superblock_of(paths[1]).recovery_offset < 15 * MIB // 512
    run(second())
    assert data_of(paths[0]) == data_of(paths[1])


def test_an_old_checkpoint_does_not_take_back_what_was_filled_since(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths) as (array, _):
            await array.resync._record([array.members()[1]], 4096)
            assert array.members()[1].in_sync

    run(story())
    assert not superblock_of(paths[1]).feature_map & FeatureMap.RECOVERY_OFFSET


def test_writes_during_a_recovery_are_on_both_members_and_their_bits_go_after_it(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)
    different_halves(paths, 0)
    recovering(paths[1], 0)

    async def story() -> None:
        async with running(paths, limits=lambda: (8000, 20000)) as (array, client):
            chooser = random.Random(2)
            while array.status().degraded:
                block = chooser.randrange(array.size_bytes // BLOCK)
                await client.write(block * BLOCK, chooser.randbytes(BLOCK))
            await asyncio.wait_for(array.idle(), 20)
            for _ in range(3):
                await array.sweep.once()
            assert dirty_chunks(paths[0]) == dirty_chunks(paths[1]) == []

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_target_that_refuses_a_copy_is_failed_and_the_array_goes_on(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    different_halves(paths, 0)
    recovering(paths[1], 0)

    async def story() -> None:
        at = superblock_of(paths[0]).data_offset * 512
        async with running(paths, faulty=True, limits=lambda: (1, 1)) as (array, client):
            disks_of(array).fault(member="disk1", ops=(Op.WRITE,), lo=at + 2 * MIB, error=errno.EIO)
            array.resync.limits = array.resync._pace._limits = lambda: (10**6, 10**6)
            await until(lambda: superblock_of(paths[0]).dev_roles[1] == ROLE_FAULTY)
            await client.write(0, b"x" * BLOCK)
            await asyncio.wait_for(array.idle(), 20)

    run(story())


def test_a_source_that_cannot_be_read_leaves_the_target_recovering(tmp_path: Path) -> None:
    """A member that lacks a block must not become in sync: it would answer with what was there before."""
    paths = make_images(tmp_path)
    different_halves(paths, 0)
    recovering(paths[1], 0)
    at = superblock_of(paths[0]).data_offset * 512

    async def story() -> None:
        async with running(paths, faulty=True, limits=lambda: (1, 1)) as (array, client):
            fault = disks_of(array).fault(
                member="disk0", ops=(Op.READ,), lo=at + 9 * MIB, hi=at + 9 * MIB + 512, error=errno.EIO
            )
            array.resync.limits = array.resync._pace._limits = lambda: (10**6, 10**6)
            await until(lambda: len(fault.hits) >= 3)
            assert [member.in_sync for member in array.members()] == [True, False]
            assert not any(member.faulty for member in array.members())
            await client.write(0, b"x" * BLOCK)
            fault.end()
            await until(lambda: array.members()[1].in_sync)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


# --- in a cluster -----------------------------------------------------------------------------------------


def test_a_recovery_is_gone_on_with_by_another_node_when_its_node_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resync, "CHECKPOINT_S", 0.0)
    paths = clustered(tmp_path)
    different_halves(paths, 0)
    recovering(paths[1], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True, limits=lambda: (100, 8000)) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            records = 0

            def die(fields: dict[str, Any]) -> None:
                nonlocal records
                records += 1
                if records == 4:
                    cluster.crash(1)

            one.at("recovery.record", die, times=9)
            await until(lambda: 1 not in cluster.nodes)
            reached = superblock_of(paths[1]).recovery_offset
            assert reached
            await one.client.array.state.submitter.drained()
            assert not data_ios(two.disks, Op.WRITE, paths[1])
            two.array.resync.limits = lambda: (10**6, 10**6)
            await cluster.bury(one)
            await two.client.write(0, b"w" * BLOCK)
            await until(lambda: two.array.members()[1].in_sync)
            await settled(cluster)
            start = superblock_of(paths[0]).data_offset * 512
            copied = [io for io in data_ios(two.disks, Op.WRITE, paths[1]) if io.length > BLOCK]
            assert min(io.offset for io in copied) >= start + reached // 512 * 512 * 512

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_leaving_node_hands_its_recovery_on(tmp_path: Path) -> None:
    paths = clustered(tmp_path)
    different_halves(paths, 0)
    recovering(paths[1], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True, limits=lambda: (100, 8000)) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            await until(lambda: one.array.members()[1].recovery_offset >= 2 * MIB // 512)
            two.array.resync.limits = lambda: (10**6, 10**6)
            await one.array.stop()
            del cluster.nodes[1]
            reached = superblock_of(paths[1]).recovery_offset
            assert reached >= 2 * MIB // 512 or two.array.members()[1].in_sync
            await until(lambda: two.array.members()[1].in_sync)
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_all_nodes_write_while_one_fills_a_member(tmp_path: Path) -> None:
    paths = clustered(tmp_path)
    different_halves(paths, 0)
    recovering(paths[1], 0)

    async def story() -> None:
        async with cluster_of(3, paths, limits=lambda: (4000, 20000)) as cluster:
            nodes = list(cluster.nodes.values())
            chooser = random.Random(3)
            blocks = nodes[0].array.size_bytes // BLOCK
            while any(node.array.status().degraded for node in nodes):
                node = chooser.choice(nodes)
                block = chooser.randrange(blocks // 3) * 3 + node.number - 1
                await node.client.write(block * BLOCK, chooser.randbytes(BLOCK))
            await settled(cluster)
            assert all(member.in_sync for node in nodes for member in node.array.members())

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    assert [dirty_chunks(path, slot) for path in paths for slot in range(4)] == [[]] * 8


def test_the_end_of_a_recovery_that_a_peer_could_not_follow_is_said_again(tmp_path: Path) -> None:
    paths = clustered(tmp_path)
    different_halves(paths, 14 * MIB)
    recovering(paths[1], 14 * MIB)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True, limits=lambda: (1, 1)) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            await one.client.write(0, b"w" * BLOCK)
            unreadable = two.disks.fault(ops=(Op.READ,), lo=4096, hi=8192, error=errno.EIO, times=6)
            for node in (one, two):
                node.array.resync.limits = node.array.resync._pace._limits = lambda: (10**6, 10**6)
            await until(lambda: all(node.array.members()[1].in_sync for node in (one, two)))
            assert unreadable.hits or two.array.members()[1].in_sync
            await until(lambda: not one.array.state.held and not two.array.state.held)
            await until(lambda: not one.array.state.the_bitmap().needed(0))
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    assert [dirty_chunks(path, slot) for path in paths for slot in range(4)] == [[]] * 8


# --- spares and bad blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bitmap", [BitmapKind.INTERNAL, BitmapKind.CLUSTERED])
def test_a_spare_stays_idle_also_when_a_member_fails(tmp_path: Path, bitmap: BitmapKind) -> None:
    paths = make_images(tmp_path, 3, raid_disks=2, bitmap=bitmap)
    before = paths[2].read_bytes()
    if bitmap is BitmapKind.CLUSTERED:

        async def story() -> None:
            async with cluster_of(2, paths, faulty=True) as cluster:
                one = cluster.nodes[1]
                await one.client.write(0, os.urandom(MIB))
                one.array.faults.fail(1 << 1, "the test says so")
                await one.client.write(0, os.urandom(MIB))
                for node in cluster.nodes.values():
                    touched = {io.offset for io in node.disks.log if "disk2" in io.path and io.length}
                    assert touched <= {0, 4096, old_place(paths[2])}, "only its superblock"
                    assert node.array.status().members[2].spare

    else:

        async def story() -> None:
            async with running(paths, faulty=True) as (array, client):
                await client.write(0, os.urandom(MIB))
                array.faults.fail(1 << 1, "the test says so")
                await client.write(0, os.urandom(MIB))
                touched = {io.offset for io in disks_of(array).log if "disk2" in io.path and io.length}
                log = (superblock_of(paths[2]).super_offset + superblock_of(paths[2]).bblog_offset) * 512
                assert touched <= {0, 4096, log, old_place(paths[2])}, "only its superblock"
                assert array.status().members[2].spare

    run(story())
    assert paths[2].read_bytes()[8192:] == before[8192:]
    assert superblock_of(paths[2]).dev_roles[2] == ROLE_SPARE


def log_bad_blocks(path: Path, ranges: list[tuple[int, int]]) -> None:
    """Device sectors that cannot be read there, as Linux would have recorded them."""
    superblock = superblock_of(path)
    changed = replace(superblock, feature_map=superblock.feature_map | FeatureMap.BAD_BLOCKS)
    with open(path, "r+b") as file:
        file.seek((superblock.super_offset + superblock.bblog_offset) * 512)
        file.write(bad_blocks.format(ranges, size_sectors=superblock.bblog_size))
        file.seek(superblock.super_offset * 512)
        file.write(changed.to_bytes())


def test_bad_blocks_are_not_read(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    different_halves(paths, 15 * MIB)
    offset = superblock_of(paths[0]).data_offset
    log_bad_blocks(paths[0], [(offset + 64, 8)])
    log_bad_blocks(paths[1], [(offset + 256, 8), (offset + 64 + 8, 8)])

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            content = data_of(paths[0])
            for first, count in ((64, 8), (60, 6), (256, 8), (263, 4), (0, 32)):
                for _ in range(4):
                    assert (
                        await client.read(first * 512, count * 512)
                        == content[first * 512 : (first + count) * 512]
                    )
            for path, bad in ((paths[0], (64, 72)), (paths[1], (256, 264)), (paths[1], (72, 80))):
                lo, hi = ((offset + sector) * 512 for sector in bad)
                assert not disks.reads(str(path), lo, hi), "a block that is known to be bad was read"
            with pytest.raises(OSError, match="Input/output"):
                await client.read(64 * 512, 16 * 512)  # one half of it is bad here, the other there
            await client.write(64 * 512, b"w" * BLOCK)
            assert not any(member.faulty for member in array.members())

    run(story())


def test_a_resync_reads_around_bad_blocks(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def begin() -> None:
        async with running(paths):
            pass

    run(begin())
    offset = superblock_of(paths[0]).data_offset
    poke(paths[0], 0, b"0" * CHUNK)
    poke(paths[1], 0, b"1" * CHUNK)
    log_bad_blocks(paths[0], [(offset + 8, 8)])

    async def story() -> None:
        async with running(paths, faulty=True) as (array, _):
            array.state.the_bitmap().mark([0])
            array.resync.wake()
            await asyncio.wait_for(array.idle(), 20)
            lo = (offset + 8) * 512
            assert not disks_of(array).reads(str(paths[0]), lo, lo + 4096)

    run(story())
    assert data_of(paths[0])[:CHUNK] == data_of(paths[1])[:CHUNK] == b"1" * CHUNK


def test_a_resync_leaves_what_no_member_can_deliver_and_makes_the_rest_equal(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)
    poke(paths[1], 0, b"1" * (4 * CHUNK))
    at = superblock_of(paths[0]).data_offset * 512
    bad = CHUNK + 8 * 512

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            fault = disks_of(array).fault(ops=(Op.READ,), lo=at + bad, hi=at + bad + 512, error=errno.EIO)
            array.state.the_bitmap().mark([0, 1, 3])
            array.resync.wake()
            await asyncio.wait_for(array.idle(), 20)
            with pytest.raises(OSError, match="Input/output"):
                await client.read(bad, 512)
            fault.end()
            for _ in range(3):
                await array.sweep.once()
            assert dirty_chunks(paths[0]) == dirty_chunks(paths[1]) == [1]
            assert not any(member.faulty for member in array.members())

    run(story())
    first, second = data_of(paths[0]), data_of(paths[1])
    differing = [n for n in range(0, 4 * CHUNK, BLOCK) if first[n : n + BLOCK] != second[n : n + BLOCK]]
    assert [n for n in differing if not 2 * CHUNK <= n < 3 * CHUNK] == [bad]
