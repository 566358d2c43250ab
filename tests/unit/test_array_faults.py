"""Members that fail on an array of one node: who is answered what, when, and what stays true on the disks."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    data_at,
    data_of,
    dirty_chunks,
    disks_of,
    make_images,
    poke,
    run,
    running,
    slot_area,
    superblock_of,
    until,
)
from faulty_submitter import Fault, FaultySubmitter, Io

from clustermd.array.array import Array
from clustermd.array.request import Kind
from clustermd.device.member_device import Op
from clustermd.ondisk.create import BitmapKind
from clustermd.ondisk.superblock import MAX_SECTOR, ROLE_FAULTY

pytestmark = pytest.mark.usefixtures("quick_retries")


def hasten(array: Array) -> FaultySubmitter:
    """Seconds of the array's own count pass in 100 ms, so that a stuck member costs a test little waiting."""
    array.state.tick_s = 0.1
    return disks_of(array)


def superblock_write(io: Io) -> bool:
    return io.op is Op.WRITE and io.fua and io.offset == 4096


def roles(path: Path) -> tuple[int, ...]:
    return superblock_of(path).dev_roles[:2]


async def ticks(array: Array, count: int = 4) -> None:
    end = array.state.tick + count
    await until(lambda: array.state.tick >= end)


# --- write errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [{"error": errno.EIO}, {"short": 512}])
def test_a_write_error_fails_the_member_and_the_answer_waits_for_its_record(
    tmp_path: Path, what: dict[str, int]
) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), **what)
            record = disks.fault(member="disk0", only=superblock_write, skip=1, stuck=True, times=1)
            answer = client.send(Kind.WRITE, 5 * CHUNK, b"x" * BLOCK)
            await until(lambda: record.hits)
            assert roles(paths[0]) == (0, 1)
            assert not answer.done(), "answered before the fault is on the surviving disk"
            disks.release()
            assert (await asyncio.wait_for(answer, 5)).error == 0
            assert roles(paths[0]) == (0, ROLE_FAULTY)
            assert [member.faulty for member in array.members()] == [False, True]
            await client.write(6 * CHUNK, b"y" * BLOCK)
            assert len(disks.writes("disk1", lo=data_at(paths[1]))) == 1, "a failed member is left alone"

    run(story())
    assert dirty_chunks(paths[0]) == [5, 6], "a degraded array keeps its bits"


def test_the_last_good_member_is_not_failed_and_its_error_is_the_clients(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            fault = disks.fault(ops=(Op.WRITE,), lo=data_at(paths[0]), error=errno.ENOSPC)
            with pytest.raises(OSError, match="Input/output"):
                await client.write(0, b"x" * BLOCK)
            assert sorted(member.faulty for member in array.members()) == [False, True]
            with pytest.raises(OSError, match="Input/output"):
                await client.write(0, b"y" * BLOCK)
            fault.end()
            await client.write(0, b"z" * BLOCK)
            assert await client.read(0, BLOCK) == b"z" * BLOCK

    run(story())


# --- read errors -------------------------------------------------------------------------------------


def bad_sector(array: Array, at: int) -> None:
    """The sector at byte `at` of the first member cannot be read until it is written."""
    disks_of(array).fault(
        member="disk0", ops=(Op.READ,), lo=at, hi=at + 512, error=errno.EIO, until_written=True
    )


def test_a_read_error_is_answered_from_another_member_and_repaired(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"g" * BLOCK)
            poke(paths[0], 512, b"b" * 512)
            bad_sector(array, data_at(paths[0]) + 512)
            assert await client.read(0, BLOCK) == b"g" * BLOCK
            await until(lambda: array.status().counters["read_errors_corrected"] == 1)
            writes = [
                io
                for io in disks.log
                if io.op is Op.WRITE and io.offset >= data_at(paths[0]) and io.length == 512
            ]
            assert [io.offset for io in writes] == [data_at(paths[0]) + 512], (
                "what could be read was rewritten"
            )
            assert not any(member.faulty for member in array.members())

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_copy_that_cannot_be_repaired_fails_its_member(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"g" * BLOCK)
            disks.fault(member="disk0", lo=data_at(paths[0]), error=errno.EIO)
            array.state.settled = False
            assert await client.read(0, BLOCK) == b"g" * BLOCK
            await until(lambda: roles(paths[1]) == (ROLE_FAULTY, 1))

    run(story())


@pytest.mark.parametrize("length", [BLOCK, 128 << 10])
def test_a_member_may_have_twenty_read_errors_and_no_more(tmp_path: Path, length: int) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            array.state.settled = False
            for turn in range(20):
                bad_sector(array, data_at(paths[0]) + turn * length)
                await client.read(turn * length, length)
                done = turn + 1
                await until(lambda: array.status().counters["read_errors_corrected"] == done)  # noqa: B023
            assert not array.members()[0].faulty
            bad_sector(array, data_at(paths[0]))
            await client.read(0, length)
            await until(lambda: roles(paths[1]) == (ROLE_FAULTY, 1))

    run(story())


def test_a_repair_that_meets_a_shut_gate_fails_nobody(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            at = data_at(paths[0])
            array.state.settled = False
            bad_sector(array, at)
            rewriting = disks.fault(member="disk0", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            await client.read(0, BLOCK)
            await until(lambda: rewriting.hits)
            array.state.gate.shut("the test says so")
            disks.release()
            task = array.repair._task
            assert task is not None
            await asyncio.wait_for(task, 10)
            assert not any(member.faulty for member in array.members())

    run(story())


def test_a_range_no_member_can_read_is_an_error_and_fails_nobody(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            at = data_at(paths[0])
            disks_of(array).fault(ops=(Op.READ,), lo=at, hi=at + BLOCK, error=errno.EIO, times=2)
            with pytest.raises(OSError, match="Input/output"):
                await client.read(0, BLOCK)
            assert await client.read(0, BLOCK) == bytes(BLOCK)
            assert not any(member.faulty for member in array.members())

    run(story())


# --- flushes, bitmap pages, superblocks -----------------------------------------------------------------


def test_a_member_that_cannot_flush_is_failed_before_the_flush_is_answered(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"x" * BLOCK)
            disks.fault(member="disk1", ops=(Op.FLUSH,), error=errno.EIO)
            record = disks.fault(member="disk0", only=superblock_write, stuck=True, times=1)
            answer = client.send(Kind.FLUSH)
            await until(lambda: record.hits)
            assert not answer.done()
            disks.release()
            assert (await asyncio.wait_for(answer, 5)).error == 0
            assert roles(paths[0]) == (0, ROLE_FAULTY)

    run(story())


def test_a_bitmap_write_error_fails_the_member_and_no_data_goes_before_the_bit(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)
    start, length, _ = slot_area(paths[1], 0)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=start, hi=start + length, error=errno.EIO)
            await client.write(5 * CHUNK, b"x" * BLOCK)
            assert roles(paths[0]) == (0, ROLE_FAULTY)
            assert not disks.writes("disk1", lo=data_at(paths[1]))
            assert dirty_chunks(paths[0]) == [5]

    run(story())


def test_bits_that_no_member_takes_are_the_clients_error_and_no_endless_labour(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)
    start, length, _ = slot_area(paths[1], 0)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"x" * BLOCK)
            fault = disks.fault(ops=(Op.WRITE,), lo=start, hi=start + length, error=errno.EIO)
            with pytest.raises(OSError, match="Input/output"):
                await client.write(5 * CHUNK, b"x" * BLOCK)
            assert len(disks.writes(lo=data_at(paths[0]) + 5 * CHUNK, hi=data_at(paths[0]) + 6 * CHUNK)) == 0
            assert sum(member.faulty for member in array.members()) == 1
            tried = len(fault.hits)
            for _ in range(50):
                await client.read(0, BLOCK)
            assert len(fault.hits) - tried < 10, "a page nobody waits for is written again and again"
            fault.end()
            await client.write(5 * CHUNK, b"y" * BLOCK)
            good = next(member for member in array.members() if not member.faulty)
            assert dirty_chunks(Path(good.path)) == [0, 5]

    run(story())


def test_a_member_that_takes_no_superblock_is_failed(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks_of(array).fault(member="disk1", only=superblock_write, error=errno.EIO)
            await client.write(0, b"x" * BLOCK)
            await until(lambda: roles(paths[0]) == (0, ROLE_FAULTY))
            assert array.members()[1].faulty

    run(story())


def test_when_the_last_good_member_takes_no_superblock_writes_fail_and_the_stop_ends(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"x" * BLOCK)
            disks.fault(member="disk0", only=superblock_write, error=errno.EIO)
            disks.fault(member="disk1", ops=(Op.WRITE,), error=errno.EIO)
            with pytest.raises(OSError, match="Input/output"):
                await client.write(0, b"y" * BLOCK)
            await asyncio.wait_for(array.stop(), 5)

    run(story())


def test_a_member_whose_superblock_cannot_be_read_does_not_keep_another_fault_from_the_disks(
    tmp_path: Path,
) -> None:
    paths = make_images(tmp_path, 3)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"x" * BLOCK)
            disks.fault(member="disk2", ops=(Op.READ,), lo=4096, hi=8192, error=errno.EIO)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[0]), error=errno.EIO)
            await client.write(0, b"y" * BLOCK)
            assert superblock_of(paths[0]).dev_roles[:3] == (0, ROLE_FAULTY, ROLE_FAULTY)

    run(story())


def test_a_fault_that_comes_while_superblocks_are_written_is_recorded_by_another_write(
    tmp_path: Path,
) -> None:
    paths = make_images(tmp_path, 3, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"x" * BLOCK)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[0]), error=errno.EIO)
            record = disks.fault(member="disk0", only=superblock_write, stuck=True, times=1)
            first = client.send(Kind.WRITE, 0, b"y" * BLOCK)
            await until(lambda: record.hits)
            disks.fault(member="disk2", ops=(Op.WRITE,), lo=data_at(paths[0]), error=errno.EIO)
            second = client.send(Kind.WRITE, CHUNK - BLOCK, b"z" * BLOCK)
            await until(lambda: array.members()[2].faulty)
            disks.release()
            for answer in (first, second):
                assert (await asyncio.wait_for(answer, 5)).error == 0
            assert superblock_of(paths[0]).dev_roles[:3] == (0, ROLE_FAULTY, ROLE_FAULTY)

    run(story())


def test_a_member_that_turns_out_not_to_discard_is_written_with_zeroes_while_another_fails(
    tmp_path: Path,
) -> None:
    paths = make_images(tmp_path, 3)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"x" * CHUNK)
            disks.fault(member="disk1", ops=(Op.DISCARD,), error=errno.EOPNOTSUPP)
            disks.fault(member="disk2", ops=(Op.DISCARD,), error=errno.EIO)
            await client.do(Kind.WRITE_ZEROES, 0, CHUNK)
            assert array.members()[2].faulty

    run(story())
    assert data_of(paths[0])[:CHUNK] == data_of(paths[1])[:CHUNK] == bytes(CHUNK)


@pytest.mark.parametrize("bitmap", [BitmapKind.NONE, BitmapKind.INTERNAL])
def test_no_write_goes_out_before_the_array_is_marked_active(tmp_path: Path, bitmap: BitmapKind) -> None:
    paths = make_images(tmp_path, bitmap=bitmap)

    async def begin() -> None:
        async with running(paths):
            pass

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            mark = disks.fault(member="disk0", only=superblock_write, stuck=True, times=1)
            first = client.send(Kind.WRITE, 0, b"x" * BLOCK)
            await until(lambda: mark.hits)
            second = client.send(Kind.WRITE, 4 * CHUNK, b"y" * BLOCK)
            for _ in range(20):
                await client.read(0, BLOCK)
            assert not disks.writes(lo=data_at(paths[0])), "data is on its way while the disks say clean"
            disks.release()
            for answer in (first, second):
                assert (await asyncio.wait_for(answer, 5)).error == 0
            assert superblock_of(paths[0]).resync_offset != MAX_SECTOR

    run(begin())
    run(story())


# --- members that do not answer ---------------------------------------------------------------------------


def stuck_fault(disks: FaultySubmitter, paths: list[Path], what: str) -> Fault:
    start, length, _ = slot_area(paths[1], 0)
    if what == "data":
        return disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), stuck=True, times=1)
    if what == "bits":
        return disks.fault(member="disk1", ops=(Op.WRITE,), lo=start, hi=start + length, stuck=True, times=1)
    if what == "superblock":
        return disks.fault(member="disk1", only=superblock_write, stuck=True, times=1)
    return disks.fault(member="disk1", ops=(Op.FLUSH,), stuck=True, times=1)


@pytest.mark.parametrize("what", ["data", "bits", "superblock", "flush"])
def test_a_member_that_does_not_answer_is_failed_and_what_lands_late_does_no_harm(
    tmp_path: Path, what: str
) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4) as (array, client):
            disks = hasten(array)
            fault = stuck_fault(disks, paths, what)
            await client.write(5 * CHUNK, b"1" * BLOCK)
            await client.do(Kind.FLUSH)
            assert fault.hits, "nothing was stuck"
            assert array.members()[1].faulty
            assert roles(paths[0]) == (0, ROLE_FAULTY)
            await client.write(5 * CHUNK, b"2" * BLOCK)
            others = [client.send(Kind.WRITE, (6 + turn) * CHUNK, b"3" * BLOCK) for turn in range(4)]
            assert disks.release() == 1
            for answer in others:
                assert (await asyncio.wait_for(answer, 5)).error == 0
            await disks.drained()
            assert await client.read(5 * CHUNK, BLOCK) == b"2" * BLOCK
            assert await client.read(6 * CHUNK, BLOCK) == b"3" * BLOCK
            await until(lambda: not array.members()[1].stuck)

    run(story())


def test_a_stuck_read_is_answered_by_another_member_and_lands_in_nobodys_buffer(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4) as (array, client):
            disks = hasten(array)
            await client.write(0, b"g" * BLOCK)
            poke(paths[0], 0, b"b" * BLOCK)
            array.state.settled = False
            disks.fault(member="disk0", ops=(Op.READ,), lo=data_at(paths[0]), stuck=True, times=1)
            answer = await asyncio.wait_for(client.send(Kind.READ, 0, BLOCK), 5)
            assert answer.error == 0
            await until(lambda: roles(paths[1]) == (ROLE_FAULTY, 1))
            assert disks.release() == 1
            await disks.drained()
            assert answer.buffer is not None
            assert bytes(answer.buffer.view[:BLOCK]) == b"g" * BLOCK
            answer.buffer.release()
            await until(lambda: not array.members()[0].stuck)

    run(story())


def test_late_zeroes_leave_the_shared_zeroes_alone(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)
    long = 1 << 20

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4) as (array, client):
            disks = hasten(array)
            await client.write(0, b"x" * (4 * long))
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), stuck=True, times=1)
            await client.do(Kind.WRITE_ZEROES, 0, long, no_hole=True)
            disks.release()
            await disks.drained()
            await asyncio.gather(*(client.write(turn * long, b"y" * long) for turn in range(1, 3)))
            await client.do(Kind.WRITE_ZEROES, 3 * long, long, no_hole=True)
            assert await client.read(3 * long, long) == bytes(long)

    run(story())


def test_a_member_that_fails_while_its_late_write_lands_gives_the_buffer_back_once(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4) as (array, client):
            disks = hasten(array)
            await client.write(0, b"1" * BLOCK)
            stuck = disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), stuck=True, times=1)
            record = disks.fault(member="disk0", only=superblock_write, stuck=True, times=1)
            answer = client.send(Kind.WRITE, 0, b"2" * BLOCK)
            await until(lambda: record.hits)
            late = next(io for io in disks.stuck if io is stuck.hits[0])
            disks.stuck.remove(late)
            late.land()
            disks.submit()
            await until(lambda: late.result is not None)
            assert not answer.done()
            disks.release()
            request = await asyncio.wait_for(answer, 5)
            assert request.error == 0
            if request.buffer is not None:
                request.buffer.release()

    run(story())


def test_a_write_given_up_on_the_last_good_member_keeps_its_range_until_it_has_landed(
    tmp_path: Path,
) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4) as (array, client):
            disks = hasten(array)
            disks.fault(member="disk1", ops=(Op.WRITE,), error=errno.EIO)
            await client.write(0, b"1" * BLOCK)
            disks.fault(member="disk0", ops=(Op.WRITE,), lo=data_at(paths[0]), stuck=True, times=1)
            with pytest.raises(OSError, match="Input/output"):
                await client.write(0, b"2" * BLOCK)
            again = client.send(Kind.WRITE, 0, b"3" * BLOCK)
            other = client.send(Kind.WRITE, CHUNK, b"4" * BLOCK)
            assert (await asyncio.wait_for(other, 5)).error == 0
            await ticks(array)
            assert not again.done(), "overtaken by an older write that can still land"
            disks.release()
            assert (await asyncio.wait_for(again, 5)).error == 0
            assert await client.read(0, BLOCK) == b"3" * BLOCK

    run(story())


def test_slow_bits_do_not_count_against_the_members_that_get_the_data(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)
    start, length, _ = slot_area(paths[1], 0)

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4) as (array, client):
            disks = hasten(array)
            await client.write(9 * CHUNK, b"0" * BLOCK)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=start, hi=start + length, stuck=True, times=1)
            slow = disks.fault(member="disk0", ops=(Op.WRITE,), lo=data_at(paths[0]), stuck=True, times=1)
            answer = client.send(Kind.WRITE, 0, b"x" * BLOCK)
            await until(lambda: slow.hits)
            await ticks(array, 1)
            disks.release()
            assert (await asyncio.wait_for(answer, 5)).error == 0

    run(story())


def test_a_stuck_copy_fails_its_target_and_a_stuck_source_is_read_elsewhere(tmp_path: Path) -> None:
    paths = make_images(tmp_path, 3, assume_clean=False, chunk=64 << 10)
    poke(paths[0], 0, b"0" * CHUNK)
    poke(paths[1], 0, b"1" * CHUNK)
    at = data_at(paths[0])

    source = Fault(member="disk0", ops=(Op.READ,), lo=at, hi=at + CHUNK, stuck=True, times=1)
    far = at + 8 * CHUNK
    target = Fault(member="disk2", ops=(Op.WRITE,), lo=far, hi=far + CHUNK, stuck=True, times=1)

    async def story() -> None:
        async with running(paths, faulty=[source, target], device_timeout_s=4, tick_s=0.1) as (array, client):
            disks = disks_of(array)
            await until(lambda: source.hits)
            await until(lambda: disks.writes("disk2", lo=at, hi=at + CHUNK))
            await until(lambda: target.hits)
            await until(lambda: array.members()[2].faulty)
            await asyncio.wait_for(array.idle(), 10)
            await client.write(8 * CHUNK, b"new" + bytes(509))
            assert disks.release() == 2
            await disks.drained()

    run(story())
    first = data_of(paths[0])
    assert first == data_of(paths[1])
    assert first[:CHUNK] == b"1" * CHUNK, "what landed late in the buffer was copied"
    assert first[8 * CHUNK :][:3] == b"new"
