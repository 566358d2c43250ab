"""Flaws of windows and copies: F6-F8, F11, F21, F34, F35, F38, I10, rules 3-5, 8, 9, 15, 16, 18.

Each story passes, and fails with the flaw put back (see `flaws`). Windows are announced by hand where that shows
more than a resync would.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    clustered,
    data_at,
    data_of,
    dirty_chunks,
    disks_of,
    make_images,
    poke,
    run,
    running,
    slot_area,
    until,
)
from cluster_in_process import Node, cluster_of, settled
from faulty_submitter import Fault
from flaws import both_ways, flaw, patches_of, patience

from clustermd.array.array import Array
from clustermd.array.faults import Faults
from clustermd.array.member_io import Shared, transfer
from clustermd.array.request import Kind, Request
from clustermd.array.resync import Resync
from clustermd.array.write import Writer
from clustermd.cluster import life as life_module
from clustermd.cluster.life import Life
from clustermd.cluster.messages import SlotBlock
from clustermd.device.member_device import Op
from clustermd.errors import LockRefused, Refused

WINDOW = 2048


pytestmark = pytest.mark.usefixtures("quick_retries")


@asynccontextmanager
async def window(node: Node, lo: int, hi: int) -> AsyncIterator[None]:
    """`node` holds the resync right and keeps others out of [lo, hi)."""
    coordinator = node.array.coordinator
    async with coordinator.resync_right():
        await coordinator.announce(lo, hi)
        yield


async def answered(answer: asyncio.Future[Request], limit_s: float = 10) -> None:
    request = await asyncio.wait_for(asyncio.shield(answer), limit_s)
    assert request.error == 0
    if request.buffer is not None:
        request.buffer.release()


# --- F6, rule 4: a window belongs to a slot ---------------------------------------------------------------


@both_ways
def test_f6_the_takeover_of_one_slot_leaves_the_window_of_another(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            async with window(one, 0, WINDOW):
                await cluster.kill(3)
                await until(lambda: "takeover.done" in two.names() and "takeover.done" in one.names())
                inside = two.client.send(Kind.WRITE, 0, b"i" * BLOCK)
                await two.client.write(WINDOW * 512, b"o" * BLOCK)
                assert not inside.done(), "a write went into a live window"
            await answered(inside)

    with flaw(flawed, "into a live window", *patches_of("F6")):
        run(story())


@both_ways
def test_rule_4_the_window_of_a_dead_resyncer_ends_when_its_bits_are_merged_and_not_before(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            await one.client.write(3 * CHUNK, b"1" * BLOCK)
            reading = two.disks.fault(ops=(Op.READ,), lo=start, hi=start + length, stuck=True)
            right = window(one, 0, WINDOW)
            await right.__aenter__()  # it never comes to its end
            inside = two.client.send(Kind.WRITE, 3 * CHUNK, b"2" * BLOCK)
            await cluster.kill(1)
            await until(lambda: reading.hits)
            await asyncio.wait((inside,), timeout=0.5)
            assert not inside.done(), "let go before the bits were merged"
            reading.end()
            two.disks.release()
            await answered(inside)

    with flaw(flawed, "before the bits were merged", *patches_of("rule 4")):
        run(story())


# --- F7, rule 3: register first, look at the windows second ------------------------------------------------


@both_ways
def test_f7_a_write_that_waited_for_something_looks_at_the_windows_again(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    start = Writer.start
    seen: set[int] = set()

    def look_once(self: Writer, request: Request) -> None:
        windows = self.state.windows
        looked = id(request) in seen
        seen.add(id(request))
        remembered, windows.any = windows.any, windows.any and not looked
        start(self, request)
        windows.any = remembered

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            two.disks.fault(ops=(Op.WRITE,), lo=at, stuck=True, times=2)
            first = two.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await until(lambda: len(two.disks.stuck) == 2)
            second = two.client.send(Kind.WRITE, 0, b"2" * BLOCK)
            async with one.array.coordinator.resync_right():
                announcing = asyncio.ensure_future(one.array.coordinator.announce(0, WINDOW))
                await until(lambda: two.array.state.windows.any)
                two.disks.release()
                await asyncio.wait_for(announcing, 10)
                await answered(first)
                await asyncio.sleep(0.3)  # nothing tells that nothing comes
                assert len(two.disks.writes(lo=at, hi=at + BLOCK)) == 2, "a write slipped into the window"
            await answered(second)

    with flaw(flawed, "slipped into the window", (Writer, "start", look_once)):
        run(story())


# --- F8, F21, rule 5: a call that failed stops what it guarded ----------------------------------------------


@both_ways
def test_f8_nothing_is_copied_in_a_window_that_was_not_acknowledged(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            quiesce, refusals = two.array.quiesce, 3

            async def busy(lo: int, hi: int) -> bool:
                nonlocal refusals
                copied = [io for io in one.disks.writes(lo=at) if io.length > BLOCK]
                assert not copied or refusals <= 0, "copied in a window nobody keeps"
                refusals -= 1
                return refusals < 0 and await quiesce(lo, hi)

            two.array.quiesce = busy  # type: ignore[method-assign]
            one.array.state.the_bitmap().mark([3, 9])
            one.array.resync.wake()
            await asyncio.wait_for(one.array.idle(), 10)
            assert refusals < 0, "copied in a window nobody keeps"

    with flaw(flawed, "in a window nobody keeps", *patches_of("F8")):
        run(story())


@both_ways
def test_f21_a_joiner_that_cannot_read_a_window_does_not_serve(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def refuse(lockspace: Any, slot: int) -> SlotBlock:
        raise LockRefused("failed", "the test says so")

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            async with window(cluster.nodes[1], 0, WINDOW):
                two = cluster.add(2)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(life_module, "read_block", refuse)
                    with suppress(Refused):
                        await asyncio.wait_for(two.assemble(paths), 10)
                if not two.array.state.held:
                    assert two.array.state.windows.any, "serves without knowing the window"
                else:
                    await two.array.stop()
                    del cluster.nodes[2]

    with flaw(flawed, "without knowing the window", *patches_of("F21")):
        run(story())


@both_ways
def test_i10_who_joins_in_the_middle_of_a_resync_keeps_out_of_its_window(
    tmp_path: Path, flawed: bool
) -> None:
    """The block is written before the message: a joiner has only that."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            async with window(one, 0, WINDOW):
                two = cluster.add(2)
                await asyncio.wait_for(two.assemble(paths), 10)
                inside = two.client.send(Kind.WRITE, 0, b"i" * BLOCK)
                await two.client.write(WINDOW * 512, b"o" * BLOCK)
                assert not inside.done(), "a joiner wrote into the window"
            await answered(inside)

    with flaw(flawed, "wrote into the window", *patches_of("I10")):
        run(story())


# --- F34, F38: windows end, and stale ones are not met ---------------------------------------------------------


@both_ways
def test_f34_writers_go_on_when_a_dead_resyncer_was_taken_over(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            right = window(one, 0, WINDOW)
            await right.__aenter__()  # it never comes to its end
            inside = two.client.send(Kind.WRITE, 0, b"2" * BLOCK)
            await cluster.kill(1)
            await answered(inside, patience(flawed))

    with flaw(flawed, "TimeoutError", *patches_of("F34")):
        run(story())


@both_ways
def test_f38_a_slots_new_owner_clears_the_window_of_the_former_one(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            life: Any = two.array.coordinator._life  # type: ignore[attr-defined]
            keeper = await life._lockspace.lock("bitmap0000", value_block=True)  # the resource lives on
            right = window(one, 0, WINDOW)
            await right.__aenter__()  # it never comes to its end
            await cluster.kill(1)
            await until(lambda: "takeover.done" in two.names())
            await asyncio.wait_for(cluster.add(1).assemble(paths), 10)
            three = cluster.add(3)
            await asyncio.wait_for(three.assemble(paths), 10)
            assert not three.array.state.windows.any, "a window of an earlier life"
            await three.client.write(0, b"3" * BLOCK)
            await keeper.unlock()

    with flaw(flawed, "of an earlier life", *patches_of("F38")):
        run(story())


# --- F35: a leaving node leaves nothing to chance ----------------------------------------------------------


@both_ways
def test_f35_a_degraded_node_that_leaves_hands_its_bits_over(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            one.array.faults.fail(1 << 1, "the test says so")
            await one.client.write(3 * CHUNK, b"1" * BLOCK)
            await one.array.stop()
            del cluster.nodes[1]
            await until(lambda: dirty_chunks(paths[0], 0) == [], patience(flawed))
            await until(lambda: dirty_chunks(paths[0], 1) == [3])
            assert two.array.state.the_bitmap().needed(3)

    with flaw(flawed, "never came to that", *patches_of("F35")):
        run(story())


@both_ways
def test_a_node_that_says_goodbye_is_taken_over_although_others_come_and_go_meanwhile(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    done = Life.recover_done

    def its_owner_is_there(self: Life, slots: Any, our_slot: int, generation: int) -> None:
        self._gone |= {slot.slot - 1 for slot in slots}
        done(self, slots, our_slot, generation)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            one.array.faults.fail(1 << 1, "the test says so")
            await one.client.write(3 * CHUNK, b"1" * BLOCK)
            life: Any = one.array.coordinator._life  # type: ignore[attr-defined]
            announced = asyncio.Event()
            go_on = asyncio.Event()
            stop_tasks = life._stop_tasks

            async def slowly() -> None:
                announced.set()
                await go_on.wait()
                await stop_tasks()

            life._stop_tasks = slowly
            leaving = asyncio.ensure_future(one.array.stop())
            await asyncio.wait_for(announced.wait(), 10)
            three = cluster.add(3)
            joining = asyncio.ensure_future(three.assemble(paths))
            await until(lambda: "join.member" in three.names())
            go_on.set()
            await asyncio.wait_for(leaving, 10)
            del cluster.nodes[1]
            await asyncio.wait_for(joining, 10)
            await until(lambda: "takeover.done" in two.names(), patience(flawed))
            assert dirty_chunks(paths[0], 0) == []

    with flaw(flawed, "never came to that", (Life, "recover_done", its_owner_is_there)):
        run(story())


# --- F11, rule 9: repairs, discards and zeroes are writes ---------------------------------------------------


@both_ways
def test_f11_a_repair_does_not_write_old_data_over_another_nodes_write(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            await one.client.write(0, b"old" + bytes(BLOCK - 3))
            at = data_at(paths[0])
            one.array.state.settled = False
            one.disks.fault(
                member="disk0", ops=(Op.READ,), lo=at, hi=at + 512, error=errno.EIO, until_written=True
            )
            repair = one.disks.fault(
                member="disk0", ops=(Op.WRITE,), lo=at, hi=at + BLOCK, stuck=True, times=1
            )
            assert (await one.client.read(0, BLOCK))[:3] == b"old"
            await until(lambda: repair.hits)
            write = two.client.send(Kind.WRITE, 0, b"new" + bytes(BLOCK - 3))
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(write), 0.3)
            one.disks.release()
            await answered(write)
            await until(lambda: one.array.status().counters["read_errors_corrected"])
            assert data_of(paths[0])[:3] == data_of(paths[1])[:3] == b"new", "old data over a write"

    with flaw(flawed, "old data over a write", *patches_of("F11")):
        run(story())


@both_ways
def test_rule_9_a_discard_goes_down_only_where_every_member_then_reads_zeroes(
    tmp_path: Path, flawed: bool
) -> None:
    paths = make_images(tmp_path)
    zero = Array._zero

    def wherever_it_works(self: Array, request: Request) -> None:
        for member in self.state.writable:
            member.device.discard_zeroes = True
        zero(self, request)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            await client.write(0, b"x" * BLOCK)
            array.members()[1].device.discard_zeroes = False
            await client.do(Kind.TRIM, 0, BLOCK)
            assert not disks_of(array).ios(Op.DISCARD), "copies may differ now"
            await client.do(Kind.WRITE_ZEROES, 0, BLOCK)
            assert not disks_of(array).ios(Op.DISCARD), "copies may differ now"
            assert await client.read(0, BLOCK) == bytes(BLOCK)

    with flaw(flawed, "copies may differ", (Array, "_zero", wherever_it_works)):
        run(story())


# --- rule 8, 15, 16: windows move past finished, durable copies -----------------------------------------------


@both_ways
def test_rule_8_a_window_moves_only_past_copies_that_are_done(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            copy = one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            one.array.state.the_bitmap().mark([0, 200])
            one.array.resync.wake()
            await until(lambda: copy.hits)
            for _ in range(30):
                await two.client.read(0, BLOCK)
            covered = two.array.state.windows.blocked(0, 8)
            one.disks.release()
            assert covered, "the window moved over a copy in flight"
            await settled(cluster)

    with flaw(flawed, "moved over a copy", *patches_of("rule 8")):
        run(story())


@both_ways
@pytest.mark.parametrize("what", ["sweep", "resync"])
def test_rule_15_a_bit_goes_after_the_members_were_flushed(tmp_path: Path, what: str, flawed: bool) -> None:
    paths = make_images(tmp_path, delay=60)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            if what == "sweep":
                await client.write(3 * CHUNK, b"x" * BLOCK)
            else:
                array.state.the_bitmap().mark([3])
                array.resync.wake()
                await asyncio.wait_for(array.idle(), 10)
            written = max(disks.log.index(io) for io in disks.writes("disk1", lo=data_at(paths[1])))
            for _ in range(3):
                await array.sweep.once()
            assert dirty_chunks(paths[0]) == []
            cleared = disks.log.index(disks.writes("disk1", start, start + length)[-1])
            flushed = [disks.log.index(io) for io in disks.ios(Op.FLUSH, "disk1")]
            assert any(written < place < cleared for place in flushed), "cleared without a flush"
            if what == "resync":
                settled_by = [io for io in disks.log[written:] if io.op is Op.FLUSH][:2]
                assert len(settled_by) == 2, "cleared without a flush"

    patches = patches_of("rule 15") + (patches_of("rule 15b") if what == "resync" else ())
    with flaw(flawed, "without a flush|IndexError", *patches):
        run(story())


@both_ways
def test_rule_16_a_read_that_was_given_up_lands_in_a_buffer_of_its_own(tmp_path: Path, flawed: bool) -> None:
    """A resync reads elsewhere when a source is stuck. What then arrives late must not be what is copied."""
    paths = make_images(tmp_path, delay=60)
    poke(paths[0], 0, b"0" * CHUNK)
    poke(paths[1], 0, b"1" * CHUNK)
    at = data_at(paths[0])

    async def one_buffer(self: Resync, lo: int, hi: int, length: int, first_only: bool) -> Any:
        shared, tried = Shared(self.state.submitter.pool.take(length)), 0
        while True:
            source = self.state.first_copy(lo, hi, tried)
            assert source is not None
            if await transfer(self.state, source, Op.READ, lo, length, shared) == length:
                return source, shared
            tried |= 1 << source.index

    async def story() -> None:
        async with running(paths, faulty=True, device_timeout_s=4, tick_s=0.1) as (array, _):
            disks = disks_of(array)
            disks.fault(member="disk0", ops=(Op.READ,), lo=at, hi=at + CHUNK, stuck=True, times=1)
            write = disks.fault(member="disk0", ops=(Op.WRITE,), lo=at, hi=at + CHUNK, stuck=True, times=1)
            array.state.the_bitmap().mark([0])
            array.resync.wake()
            await until(lambda: write.hits)
            (late,) = [io for io in disks.stuck if io.op is Op.READ]
            disks.stuck.remove(late)
            late.land()
            disks.submit()
            await until(lambda: late.result is not None)
            disks.release()
            await asyncio.wait_for(array.idle(), 10)
            assert data_of(paths[0])[:CHUNK] == b"1" * CHUNK, "copied what landed late"

    with flaw(flawed, "copied what landed late", (Resync, "_read_source", one_buffer)):
        run(story())


@both_ways
def test_rule_16_a_window_is_not_acknowledged_over_a_write_that_can_still_land(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True, device_timeout_s=4, tick_s=0.1) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            one.array.faults.fail(1 << 1, "the test says so")
            await one.array.faults.recorded()
            two.disks.fault(member="disk0", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            write = two.client.send(Kind.WRITE, 0, b"2" * BLOCK)
            assert (await asyncio.wait_for(write, 10)).error == errno.EIO
            async with one.array.coordinator.resync_right():
                with suppress(LockRefused):
                    await one.array.coordinator.announce(0, WINDOW)
                    assert not two.disks.stuck, "acknowledged over a write that can still land"
                two.disks.release()
                await until(lambda: not two.array.state.ranges.count)
                await one.array.coordinator.announce(0, WINDOW)

    with flaw(flawed, "can still land", *patches_of("rule 16b")):
        run(story())


@both_ways
def test_rule_16_the_window_stays_until_all_know_that_the_copys_target_is_out(
    tmp_path: Path, flawed: bool
) -> None:
    """A copy that was given up may still land on its target, over what a peer writes there after the window."""
    paths = clustered(tmp_path)

    async def at_once(self: Faults) -> int:
        return 0

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True, device_timeout_s=4, tick_s=0.1) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            copy = one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            record = Fault(ops=(Op.WRITE,), lo=4096, hi=8192, error=errno.EIO, times=2)
            one.disks.faults.append(record)
            one.array.state.the_bitmap().mark([0])
            one.array.resync.wake()
            await until(lambda: copy.hits)
            write = two.client.send(Kind.WRITE, 0, b"2" * BLOCK)
            await answered(write)
            faulty = two.array.members()[1].faulty
            one.disks.release()
            assert faulty, "written to a member on which an old copy can still land"
            await settled(cluster)

    with flaw(flawed, "can still land", (Faults, "surely_recorded", at_once)):
        run(story())


# --- rules 17, 18, 19 ------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("what", ["write", "bits", "superblock", "flush"])
def test_rule_17_an_answer_waits_until_every_node_knows_of_the_fault(
    tmp_path: Path, what: str, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            kind, places = Kind.WRITE, {"write": (at, 1 << 62), "bits": (start, start + length)}
            if what == "superblock":
                one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=4096, hi=8192, error=errno.EIO)
                one.array.state.unpublished = True
                one.array.faults.publish_soon()
            elif what == "flush":
                kind = Kind.FLUSH
                one.disks.fault(member="disk1", ops=(Op.FLUSH,), error=errno.EIO)
            else:
                lo, hi = places[what]
                one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=lo, hi=hi, error=errno.EIO)
            reading = Fault(ops=(Op.READ,), lo=4096, hi=8192, stuck=True)
            two.disks.faults.append(reading)
            answer = one.client.send(kind, 0, b"1" * BLOCK if kind is Kind.WRITE else 0)
            await until(lambda: reading.hits)
            assert not answer.done(), "answered before the other node knows"
            reading.end()
            two.disks.release()
            assert (await asyncio.wait_for(answer, 10)).error == 0
            assert two.array.members()[1].faulty, "answered before the other node knows"

    with flaw(flawed, "before the other node knows", *patches_of("rule 17")):
        run(story())


@both_ways
def test_rule_18_overlapping_writes_of_one_node_do_not_overtake_one_another(
    tmp_path: Path, flawed: bool
) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"0" * BLOCK)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), stuck=True, times=1)
            before = len(disks.done)
            first = client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await until(lambda: len(disks.done) > before)
            second = client.send(Kind.WRITE, 512, b"2" * BLOCK)
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(second), 5 if flawed else 0.05)
            disks.release()
            await answered(first)
            await answered(second)
            assert data_of(paths[0]) == data_of(paths[1]), "one order on one member, another on the other"

    with flaw(flawed, "one order on one member", *patches_of("rule 18")):
        run(story())


@both_ways
def test_rule_19_a_flush_covers_every_member(tmp_path: Path, flawed: bool) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"1" * BLOCK)
            before = len(disks.log)
            stuck = disks.fault(member="disk1", ops=(Op.FLUSH,), stuck=True, times=1)
            answer = client.send(Kind.FLUSH)
            await asyncio.sleep(0.3)  # nothing tells that nothing comes
            assert not answer.done() and stuck.hits, "answered before every member was flushed"
            disks.release()
            await answered(answer)
            flushed = {io.path for io in disks.log[before:] if io.op is Op.FLUSH}
            assert flushed == {str(path) for path in paths}

    with flaw(flawed, "before every member was flushed", *patches_of("rule 19")):
        run(story())
