"""Flaws of the channel and of metadata: F15-F20, rules 5, 6, 12, 17, and nodes that die in the middle of a message.

Each story passes, and fails with the flaw put back (see `flaws`).
"""

from __future__ import annotations

import asyncio
import errno
from contextlib import suppress
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
    run,
    slot_area,
    superblock_of,
    until,
)
from cluster_in_process import Node, cluster_of, faulty_members, settled
from flaws import both_ways, flaw, patches_of, patience

from clustermd.array import array as array_module
from clustermd.array.array import Array
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.metadata import Metadata
from clustermd.array.request import Kind
from clustermd.cluster import channel as channel_module
from clustermd.cluster.channel import Channel
from clustermd.cluster.life import Life
from clustermd.cluster.messages import Message, MessageType
from clustermd.device.member_device import Gate, Op
from clustermd.dlm.modes import Mode
from clustermd.errors import LockRefused, Refused
from clustermd.ondisk.superblock import ROLE_FAULTY

SUPERBLOCK: dict[str, Any] = {"lo": 4096, "hi": 8192}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, quick_retries: None) -> None:
    monkeypatch.setattr(array_module, "REJOIN_S", 0.02)
    monkeypatch.setattr(channel_module, "ACK_S", 5.0)


def life_of(node: Node) -> Life:
    life = node.array.coordinator._life  # type: ignore[attr-defined]
    assert isinstance(life, Life)
    return life


def channel_of(node: Node) -> Channel:
    return life_of(node).channel


def note(node: Node) -> Message:
    """A message that asks for nothing."""
    return Message(MessageType.RESYNCING_START, life_of(node).slot)


async def send(node: Node, limit_s: float = 10) -> None:
    await asyncio.wait_for(channel_of(node).send(note(node)), limit_s)


# --- F15: a receiver always answers --------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), Refused("x", "no"), RuntimeError("a slip")])
def test_f15_a_receiver_that_cannot_follow_says_so_at_once(
    tmp_path: Path, error: Exception, flawed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]

            async def fail(message: Message) -> int:
                raise error

            if flawed:
                monkeypatch.setattr(channel_module, "ACK_S", 0.2)
            handle = channel_of(two)._handle
            channel_of(two)._handle = fail
            with pytest.raises(LockRefused) as refused:
                await send(one)
            assert refused.value.code == "peer-failed", "no answer"
            channel_of(two)._handle = handle
            await send(one)
            await send(two)

    with flaw(flawed, "no answer", *patches_of("F15")):
        run(story())


# --- F16, F17: nothing is left behind by what failed ------------------------------------------------------------


@both_ways
def test_f16_a_request_that_timed_out_is_not_granted_to_nobody_later(
    tmp_path: Path, flawed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clustered(tmp_path)
    monkeypatch.setattr(channel_module, "ACK_S", 0.1)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            go_on = asyncio.Event()

            async def slow(message: Message) -> int:
                await go_on.wait()
                return 0

            channel_of(two)._handle = slow
            with pytest.raises(LockRefused) as refused:
                await send(one)
            assert refused.value.code == "not-acknowledged"
            go_on.set()
            for node in (one, two, one):
                for _ in range(20):
                    try:
                        await send(node, patience(flawed))
                        break
                    except LockRefused:
                        await asyncio.sleep(0.01)
                else:
                    raise AssertionError("the channel is stuck")

    with flaw(flawed, "stuck|TimeoutError", *patches_of("F16")):
        run(story())


@both_ways
def test_f17_a_token_that_is_refused_leaves_the_way_free_for_the_next_sender(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            token: Any = channel_of(one)._token
            convert, times = token.convert, 1

            async def refused(mode: Mode, *, noqueue: bool = False) -> None:
                nonlocal times
                times -= 1
                if times == 0:
                    raise LockRefused("deadlock", "the test says so")
                await convert(mode, noqueue=noqueue)

            token.convert = refused
            with pytest.raises(LockRefused):
                await send(one)
            await send(one, patience(flawed))

    with flaw(flawed, "TimeoutError", *patches_of("F17")):
        run(story())


def test_a_sender_that_is_cancelled_leaves_all_locks_as_they_were(tmp_path: Path) -> None:
    """At every step of a message; the next sender, and the node as a receiver, find them free."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            for steps in range(0, 60, 2):
                sending = asyncio.ensure_future(channel_of(one).send(note(one)))
                for _ in range(steps):
                    await asyncio.sleep(0)
                sending.cancel()
                with suppress(asyncio.CancelledError):
                    await sending
                await send(two)
                await send(one)

    run(story())


# --- F18: no superblock without the token --------------------------------------------------------------------


@both_ways
def test_f18_no_superblock_is_written_without_the_token(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            token: Any = channel_of(one)._token
            convert = token.convert

            async def refused(mode: Mode, *, noqueue: bool = False) -> None:
                raise LockRefused("deadlock", "the test says so")

            token.convert = refused
            before = len(one.disks.writes(**SUPERBLOCK))
            one.array.faults.fail(1 << 1, "the test says so")
            answer = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await asyncio.sleep(0.4)  # nothing tells that nothing comes
            assert len(one.disks.writes(**SUPERBLOCK)) == before, "written without the token"
            assert not answer.done()
            token.convert = convert
            assert (await asyncio.wait_for(answer, 10)).error == 0

    with flaw(flawed, "without the token", *patches_of("F18")):
        run(story())


# --- F19, rules 6 and 17: everybody follows, or the sender knows ------------------------------------------------


@both_ways
def test_f19_the_roles_that_a_dead_sender_wrote_and_told_nobody_are_adopted(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            dead = one.die_at("metadata.written")
            one.array.faults.fail(1 << 1, "the test says so")
            await asyncio.wait_for(dead.wait(), 10)
            assert superblock_of(paths[0]).dev_roles[1] == ROLE_FAULTY
            survivors = [cluster.nodes[2], cluster.nodes[3]]
            assert [faulty_members(node) for node in survivors] == [[False, False]] * 2
            await cluster.bury(one)
            for node in survivors:
                await until(lambda: faulty_members(node) == [False, True], patience(flawed))  # noqa: B023
            await survivors[0].client.write(0, b"2" * BLOCK)
            assert data_of(paths[1])[:1] == b"\0", "written to a member that is out"

    with flaw(flawed, "never came to that", *patches_of("F19")):
        run(story())


@both_ways
@pytest.mark.parametrize("point", ["metadata.token", "metadata.write", "send.written", "send.acknowledged"])
def test_f19_a_sender_may_die_at_any_step_and_the_survivors_agree(
    tmp_path: Path, point: str, flawed: bool
) -> None:
    """The nodes' roles and the disks say the same after the adoption; what the sender had not written is undone."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            dead = one.die_at(point)
            one.array.faults.fail(1 << 1, "the test says so")
            await asyncio.wait_for(dead.wait(), 10)
            events = superblock_of(paths[0]).events
            await cluster.bury(one)
            await until(lambda: superblock_of(paths[0]).events > events, patience(flawed))
            for number in (2, 3):
                await cluster.nodes[number].client.write(number * CHUNK, b"x" * BLOCK)
            await settled(cluster)
            on_disk = superblock_of(paths[0]).dev_roles[1] == ROLE_FAULTY
            for number in (2, 3):
                await until(lambda: faulty_members(cluster.nodes[number])[1] == on_disk)  # noqa: B023
            if not on_disk:
                assert data_of(paths[0]) == data_of(paths[1])

    with flaw(flawed, "never came to that", *patches_of("F19")):
        run(story())


@both_ways
def test_rule_6_a_node_that_cannot_load_an_announced_superblock_fails_the_sender_and_keeps_its_requests(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            unreadable = two.disks.fault(member="disk0", ops=(Op.READ,), **SUPERBLOCK, error=errno.EIO)
            one.array.faults.fail(1 << 1, "the test says so")
            answer = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await until(lambda: len(unreadable.hits) > 3)
            assert not answer.done(), "answered although a node could not follow"
            assert "cannot be confirmed" in two.array.state.held
            kept = two.client.send(Kind.READ, 0, BLOCK)
            await asyncio.sleep(0.05)
            assert not kept.done()
            unreadable.end()
            assert (await asyncio.wait_for(answer, 10)).error == 0
            request = await asyncio.wait_for(kept, 10)
            assert request.error == 0 and request.buffer is not None
            request.buffer.release()
            assert faulty_members(two) == [False, True]
            assert not two.array.state.held

    with flaw(flawed, "could not follow", *patches_of("rule 6")):
        run(story())


@both_ways
def test_rule_6_doubt_and_lost_contact_are_two_things(tmp_path: Path, flawed: bool) -> None:
    """A node that reads the superblocks again opens no gate that is held because contact is lost, and the other way."""
    paths = clustered(tmp_path)

    def one_and_the_same(self: Array) -> None:
        self.resume()

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            two.array.doubt("the test says so")
            two.array.hold("no contact")
            kept = two.client.send(Kind.READ, 0, BLOCK)
            two.array.trust()
            await asyncio.sleep(0.02)
            assert not kept.done() and two.array.state.gate.state.value == "held", "served without contact"
            two.array.doubt("again")
            two.array.resume()
            await asyncio.sleep(0.02)
            assert not kept.done(), "served in doubt"
            two.array.trust()
            request = await asyncio.wait_for(kept, 10)
            assert request.buffer is not None
            request.buffer.release()

    with flaw(flawed, "served without contact", (Array, "trust", one_and_the_same)):
        run(story())


@both_ways
def test_two_nodes_fail_different_members_at_once_and_all_agree(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path, 3)
    reload = Metadata.reload

    async def not_when_it_runs(self: Metadata, *, ours: bool = False, announced: Any = None) -> None:
        if self.state.held:
            await reload(self, ours=ours, announced=announced)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            one, two, three = (cluster.nodes[number] for number in (1, 2, 3))
            one.array.faults.fail(1 << 1, "the test says so")
            two.array.faults.fail(1 << 2, "the test says so")
            answers = [node.client.send(Kind.WRITE, node.number * CHUNK, b"x" * BLOCK) for node in (one, two)]
            for answer in await asyncio.wait_for(asyncio.gather(*answers), 10):
                assert answer.error == 0
            assert superblock_of(paths[0]).dev_roles[:3] == (0, ROLE_FAULTY, ROLE_FAULTY)
            for node in (one, two, three):
                assert faulty_members(node) == [False, True, True], "nodes disagree"

    with flaw(flawed, "nodes disagree|At index", (Metadata, "reload", not_when_it_runs)):
        run(story())


def test_two_nodes_that_fail_both_members_at_once_keep_one(tmp_path: Path) -> None:
    """Whoever publishes second finds its last good member failed by the other, and must not lose it too."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            one.array.faults.fail(1 << 1, "the test says so")
            two.array.faults.fail(1 << 0, "the test says so")
            answers = [node.client.send(Kind.WRITE, 0, b"x" * BLOCK) for node in (one, two)]
            results = await asyncio.wait_for(asyncio.gather(*answers), 10)
            assert [answer.error for answer in results] == [0, 0]
            roles = [superblock_of(path).dev_roles[:2] for path in paths]
            assert ((0, ROLE_FAULTY) in roles) != ((ROLE_FAULTY, 1) in roles), (
                "each goes on with a half of its own"
            )
            sides = [[member.number for member in node.array.state.in_sync] for node in (one, two)]
            assert sides in ([[0], [0]], [[1], [1]]), "each goes on with a half of its own"

    run(story())


# --- F20: an answer belongs to a message, a message is processed once ---------------------------------------------


@both_ways
def test_f20_the_answer_to_an_older_message_is_not_taken_for_this_ones(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            await send(one)
            receiver = channel_of(two)
            lock: Any = receiver._message
            convert, deaf = lock.convert, True

            async def hears_nothing(mode: Mode, *, noqueue: bool = False) -> None:
                await convert(mode, noqueue=noqueue)
                if mode is Mode.CR and deaf:
                    lock.lvb_valid = False

            lock.convert = hears_nothing
            with suppress(LockRefused):
                await send(one)
                raise AssertionError("let go unread, and taken for read")
            deaf = False
            await send(one)

    with flaw(flawed, "taken for read", *patches_of("F20")):
        run(story())


@both_ways
def test_f20_a_message_is_processed_once(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            handled: list[int] = []

            async def count(message: Message) -> int:
                handled.append(message.sequence)
                return 0

            channel_of(two)._handle = count
            await send(one)
            channel_of(two)._blocking(Mode.EX)  # a callback with no new message behind it
            await until(lambda: two.names().count("recv.done") >= 2)
            await send(one)
            assert len(handled) == len(set(handled)) == 2, "processed twice"

    with flaw(flawed, "processed twice", *patches_of("F20b")):
        run(story())


def test_a_sender_that_dies_after_the_message_was_written_is_survived(tmp_path: Path) -> None:
    """After M4 some have processed it and some have not; the next sender's messages reach all."""
    paths = clustered(tmp_path)

    async def story() -> None:
        for point in ("send.begin", "send.written", "send.acknowledged"):
            async with cluster_of(3, paths) as cluster:
                await settled(cluster)
                one, two, three = (cluster.nodes[number] for number in (1, 2, 3))
                dead = one.die_at(point)
                sending = asyncio.ensure_future(channel_of(one).send(note(one)))
                await asyncio.wait_for(dead.wait(), 10)
                await cluster.bury(one)
                await asyncio.gather(sending, return_exceptions=True)
                for node in (two, three, two):
                    for _ in range(50):
                        try:
                            await send(node)
                            break
                        except LockRefused:
                            await asyncio.sleep(0.01)
                    else:
                        raise AssertionError("the channel is stuck")

    run(story())


# --- rule 12: the gate ----------------------------------------------------------------------------------------------


@both_ways
def test_rule_12_what_a_lost_life_had_to_write_is_not_written_in_the_next_one(
    tmp_path: Path, flawed: bool
) -> None:
    """Bits that were not on the disks when the session was lost belong to a slot that may be another's by now."""
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)

    def always(self: BitmapWriter) -> None:
        bitmap = self.state.bitmap
        if self._batch is None and bitmap is not None and bitmap.wants_flush:
            self._start(bitmap.begin_flush())

    async def keep_the_bitmap(self: Array) -> None:
        bitmap = self.state.bitmap
        await drain(self)
        self.state.bitmap = bitmap

    drain = Array._drain

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            stuck = one.disks.fault(ops=(Op.WRITE,), lo=start, hi=start + length, stuck=True, times=2)
            first = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await until(lambda: len(stuck.hits) == 2)
            second = one.client.send(Kind.WRITE, 9 * CHUNK, b"1" * BLOCK)
            one.at("join.member", lambda _: marks.append(len(one.disks.log)))
            one.at("slot.loaded", lambda _: marks.append(len(one.disks.log)))
            marks: list[int] = []
            number = one.lose_session()
            one.disks.release()
            await one.disks.drained()
            one.end_session(number)
            for answer in await asyncio.wait_for(asyncio.gather(first, second), 15):
                assert answer.error == 0
            assert len(marks) == 2
            between = [
                io
                for io in one.disks.log[marks[0] : marks[1]]
                if io.op is Op.WRITE and io.offset < length + start
            ]
            assert not [io for io in between if io.end > start], "an old life's bits were written"
            await settled(cluster)

    patches = [(BitmapWriter, "kick", always), (Array, "_drain", keep_the_bitmap)]
    with flaw(flawed, "old life's bits", *patches):
        run(story())


@both_ways
def test_rule_12_nothing_passes_a_shut_gate(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)
    shut = Gate.shut

    def stays_open(self: Gate, reason: str) -> None:
        if reason != "the test says so":
            shut(self, reason)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            bits = one.disks.fault(ops=(Op.WRITE,), lo=start, hi=start + length, stuck=True, times=2)
            answer = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await until(lambda: len(bits.hits) == 2)
            marks: list[int] = []
            one.at("join.member", lambda _: marks.append(len(one.disks.log)))
            number = one.lose_session()
            one.disks.release()
            await one.disks.drained()
            one.end_session(number)
            request = await asyncio.wait_for(answer, 15)
            assert request.error == 0
            await until(lambda: marks)
            at = data_at(paths[0])
            passed = [io for io in one.disks.log[: marks[0]] if io.op is Op.WRITE and io.offset >= at]
            assert not [io for io in passed if io.result == io.length], "data passed after the loss"
            await settled(cluster)

    with flaw(flawed, "passed after the loss", (Gate, "shut", stays_open)):
        run(story())


def test_a_node_that_loses_its_session_again_and_again_under_load_ends_with_equal_members(
    tmp_path: Path,
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            written: dict[int, bytes] = {}
            stop = False

            async def load(node: Node, blocks: range) -> None:
                turn = 0
                while not stop:
                    turn += 1
                    for block in blocks:
                        content = f"{node.number}-{turn}-{block} ".encode().ljust(BLOCK, b".")
                        answer = await asyncio.wait_for(
                            node.client.send(Kind.WRITE, block * BLOCK, content), 20
                        )
                        assert answer.error == 0 and answer.buffer is not None
                        answer.buffer.release()
                        written[block] = content

            loads = [
                asyncio.ensure_future(load(node, range(first, first + 2000, 400)))
                for node, first in ((one, 0), (one, 1), (two, 2), (two, 3))
            ]
            for turn in range(12):
                node = (one, two)[turn % 2]
                rejoins = node.array.status().counters["rejoins"]
                for _ in range(turn * 3):
                    await asyncio.sleep(0)
                number = node.lose_session()
                await node.disks.drained()
                node.end_session(number)
                await until(lambda: node.array.status().counters["rejoins"] > rejoins)  # noqa: B023
            stop = True
            await asyncio.gather(*loads)
            await settled(cluster)
            for block, content in written.items():
                for node in (one, two):
                    assert await node.client.read(block * BLOCK, BLOCK) == content

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    assert [dirty_chunks(path, slot) for path in paths for slot in range(4)] == [[]] * 8


def test_a_fault_that_was_not_recorded_when_the_session_was_lost_is_recorded_in_the_next_life(
    tmp_path: Path,
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, error=errno.EIO)
            slow = one.disks.fault(member="disk0", ops=(Op.WRITE,), lo=at + CHUNK, stuck=True, times=1)
            async with channel_of(two).token():
                first = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
                await until(lambda: one.array.members()[1].faulty)
                second = one.client.send(Kind.WRITE, CHUNK, b"2" * BLOCK)
                await until(lambda: slow.hits)
                number = one.lose_session()
                await asyncio.sleep(0.05)  # the tasks of this life have ended, the disk has not
            one.disks.release()
            await one.disks.drained()
            one.end_session(number)
            for answer in await asyncio.wait_for(asyncio.gather(first, second), 15):
                assert answer.error == 0
            assert faulty_members(two) == [False, True]
            assert min(one.array.state.the_bitmap().counters) >= 0, (
                "a write ended on a bitmap it did not begin on"
            )
            await one.client.write(CHUNK, b"3" * BLOCK)
            assert 1 in dirty_chunks(paths[0], one.array.state.slot)

    run(story())
