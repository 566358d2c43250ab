"""The client's side over real replicas: lockspaces, locks, cancelled waits (F16), suspension and loss."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from clustermd.dlm.lockspace import Lock, Lockspace, LockspaceEvents, Slot
from clustermd.dlm.modes import Mode
from clustermd.dlm.replica import Replica
from clustermd.dlm.session import Session, SessionLockspace
from clustermd.errors import BadBytes, ClusterLost, LockRefused
from clustermd.testing.locks.order import MemoryGroup
from clustermd.trace import Trace

T = TypeVar("T")
SPACE = "0a0b0c0d-0000-1111-2222-333344445555"


class Heard:
    """A lockspace's user: remembers every event in order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def recover_prep(self) -> None:
        self.log.append(("prep",))

    def recover_slot(self, slot: Slot) -> None:
        self.log.append(("slot", slot.slot, slot.name))

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        self.log.append(("done", [slot.slot for slot in slots], our_slot))

    def suspended(self, reason: str) -> None:
        self.log.append(("suspended",))

    def resumed(self) -> None:
        self.log.append(("resumed",))

    def lost(self, reason: str) -> None:
        self.log.append(("lost", reason))


class Daemon:
    """A replica with sessions instead of sockets."""

    def __init__(self, group: MemoryGroup, node: int) -> None:
        port = group.port(node, node)
        self.member = port.me
        self.replica = Replica(self, Trace())
        self.replica.attach(port)
        port.events = self.replica
        self.sessions: dict[int, Session] = {}
        self.frames: list[list[Any]] = []

    def session(self) -> Session:
        number = self.replica.open_session("test", 1)

        def send(frame: list[Any]) -> None:
            self.frames.append(frame)
            self.replica.session_frame(number, frame)

        session = self.sessions[number] = Session(send)
        return session

    def to_session(self, session: int, frame: list[Any]) -> None:
        self.sessions[session].on_frame(frame)

    def suspended(self, reason: str) -> None:
        for session in self.sessions.values():
            session.on_suspended(reason)

    def resumed(self) -> None:
        for session in self.sessions.values():
            session.on_resumed()

    def must_restart(self, reason: str) -> None:
        for session in self.sessions.values():
            session.on_lost(reason)


class World:
    def __init__(self, size: int = 2) -> None:
        self.group = MemoryGroup()
        self.daemons = [Daemon(self.group, node) for node in range(1, size + 1)]
        self.group.view()
        self.group.settle()

    async def turn(self, times: int = 10) -> None:
        """Let tasks run and the group deliver."""
        for _ in range(times):
            await asyncio.sleep(0)
            self.group.settle()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`, which must come to its end."""
        task = asyncio.ensure_future(work)
        await self.turn()
        assert task.done(), "it waits for something"
        return task.result()

    async def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """`work`, which must be waiting for something."""
        task = asyncio.ensure_future(work)
        await self.turn()
        assert not task.done()
        return task

    async def join(self, daemon: int, max_slots: int = 4) -> tuple[SessionLockspace, Heard]:
        heard = Heard()
        session = self.daemons[daemon].session()
        return await self.run(session.join(SPACE, heard, max_slots=max_slots)), heard


def test_session_implements_the_lockspace_protocols() -> None:
    async def story() -> None:
        world = World(1)
        space, heard = await world.join(0)
        as_space: Lockspace = space
        as_events: LockspaceEvents = heard
        lock: Lock = await world.run(as_space.lock("token"))
        assert lock.mode is Mode.NL and as_events is heard

    asyncio.run(story())


def test_join_returns_after_recover_done_and_knows_the_slots() -> None:
    async def story() -> None:
        world = World()
        first, heard = await world.join(0)
        assert heard.log == [("done", [1], 1)]
        second, _ = await world.join(1)
        assert (first.our_slot, second.our_slot) == (1, 2)
        assert heard.log == [("done", [1], 1), ("prep",), ("done", [1, 2], 1)]
        assert first.slots == (Slot(1, 1, "node1"), Slot(2, 2, "node2"))
        assert first.generation == second.generation == 2
        await world.run(second.leave())
        assert heard.log[-2:] == [("prep",), ("done", [1], 1)]

    asyncio.run(story())


def test_value_blocks_travel_with_conversions() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        writer = await world.run(a.lock("message", value_block=True))
        reader = await world.run(b.lock("message", value_block=True))
        assert writer.lvb is not None and reader.lvb is not None
        await world.run(writer.convert(Mode.EX))
        writer.lvb[:5] = b"hello"
        waiting = await world.start(reader.convert(Mode.CR))
        await world.run(writer.convert(Mode.NL))
        await waiting
        assert bytes(reader.lvb[:6]) == b"hello\0"
        assert reader.mode is Mode.CR and reader.lvb_valid

    asyncio.run(story())


def test_a_dead_writer_is_seen_by_the_next_reader() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, heard = await world.join(1)
        writer = await world.run(a.lock("message", Mode.EX, value_block=True))
        await world.run(writer.convert(Mode.PW))
        reader = await world.run(b.lock("message", value_block=True))
        waiting = await world.start(reader.convert(Mode.PR))
        world.daemons[0].replica.session_lost(1)
        world.group.settle()
        assert not waiting.done()
        world.daemons[0].replica.session_end(1, "proved by the test", False)
        await world.turn()
        await waiting
        assert not reader.lvb_valid
        assert heard.log[-3:] == [("prep",), ("slot", 1, "node1"), ("done", [2], 2)]

    asyncio.run(story())


def test_would_block_and_busy_and_unlocked_are_refusals() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("bitmap0000", Mode.PW))
        with pytest.raises(LockRefused, match="excludes this mode") as refused:
            await world.run(b.lock("bitmap0000", Mode.PW, noqueue=True))
        assert refused.value.code == "would-block"
        other = await world.run(b.lock("bitmap0000"))
        with pytest.raises(LockRefused) as refused:
            await world.run(other.convert(Mode.PW, noqueue=True))
        assert refused.value.code == "would-block" and other.mode is Mode.NL
        waiting = await world.start(other.convert(Mode.PW))
        with pytest.raises(LockRefused) as refused:
            await other.convert(Mode.EX)
        assert refused.value.code == "busy"
        await world.run(other.unlock())
        with pytest.raises(LockRefused) as refused:
            await waiting
        assert refused.value.code == "unlocked"
        with pytest.raises(LockRefused) as refused:
            await other.convert(Mode.NL)
        assert refused.value.code == "unlocked"
        assert held.mode is Mode.PW

    asyncio.run(story())


def test_a_conversion_deadlock_is_a_refusal_and_the_lock_keeps_its_mode() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        one = await world.run(a.lock("x", Mode.PR))
        two = await world.run(b.lock("x", Mode.PR))
        waiting = await world.start(one.convert(Mode.EX))
        with pytest.raises(LockRefused) as refused:
            await world.run(two.convert(Mode.EX))
        assert refused.value.code == "deadlock" and two.mode is Mode.PR
        await world.run(two.unlock())
        await waiting
        assert one.mode is Mode.EX

    asyncio.run(story())


def test_a_blocking_callback_sees_the_lock_already_granted() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        first = await world.run(a.lock("ack", Mode.EX))
        seen: list[tuple[Mode, Mode]] = []
        second = await world.run(b.lock("ack", blocking=lambda mode: seen.append((mode, second.mode))))
        waiting = await world.start(second.convert(Mode.CR))
        third = await world.run(a.lock("ack"))
        behind = await world.start(third.convert(Mode.EX))
        await world.run(first.convert(Mode.NL))
        await waiting
        assert seen == [(Mode.EX, Mode.CR)]
        await world.run(second.convert(Mode.NL))
        await behind

    asyncio.run(story())


def test_a_cancelled_wait_leaves_no_request_behind() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("token", Mode.EX))
        lock = await world.run(b.lock("token"))
        waiting = await world.start(lock.convert(Mode.EX))
        waiting.cancel()
        await world.turn()
        assert waiting.cancelled()
        assert lock.mode is Mode.NL
        await world.run(held.convert(Mode.NL))
        assert lock.mode is Mode.NL, "nobody waits for it any more"
        await world.run(held.convert(Mode.EX))
        await world.run(held.convert(Mode.NL))
        await world.run(lock.convert(Mode.PR))

    asyncio.run(story())


def test_a_grant_that_wins_the_race_against_a_cancelled_wait_is_given_back() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("token", Mode.EX))
        lock = await world.run(b.lock("token"))
        waiting = await world.start(lock.convert(Mode.PW))
        group, members = world.group, [daemon.member for daemon in world.daemons]
        release = asyncio.ensure_future(held.convert(Mode.NL))
        await asyncio.sleep(0)
        assert group.accept(members[0]), "the release is ordered before the cancel"
        waiting.cancel()
        await asyncio.sleep(0)
        await world.turn()
        await release
        assert waiting.cancelled()
        assert lock.mode is Mode.NL
        await world.run(held.convert(Mode.EX))

    asyncio.run(story())


def test_a_task_cancelled_in_the_turn_of_its_grant_gives_it_back() -> None:
    async def story() -> None:
        world = World(1)
        a, _ = await world.join(0)
        lock = await world.run(a.lock("token"))
        task = asyncio.ensure_future(lock.convert(Mode.EX))
        await asyncio.sleep(0)
        world.group.settle()
        assert lock.mode is Mode.EX, "granted, but its task has not run"
        task.cancel()
        await world.turn()
        assert task.cancelled()
        assert lock.mode is Mode.NL

    asyncio.run(story())


def test_cancelling_twice_still_waits_for_the_outcome() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        await world.run(a.lock("token", Mode.EX))
        lock = await world.run(b.lock("token"))
        waiting = await world.start(lock.convert(Mode.EX))
        waiting.cancel()
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
        with pytest.raises(LockRefused):
            await lock.convert(Mode.PR)
        await world.turn()
        assert waiting.cancelled()
        await world.run(lock.convert(Mode.NL))

    asyncio.run(story())


def test_a_cancelled_down_conversion_stays_done() -> None:
    async def story() -> None:
        world = World(1)
        a, _ = await world.join(0)
        lock = await world.run(a.lock("token", Mode.EX))
        task = asyncio.ensure_future(lock.convert(Mode.NL))
        await asyncio.sleep(0)
        task.cancel()
        await world.turn()
        assert task.cancelled()
        assert lock.mode is Mode.NL

    asyncio.run(story())


def test_a_cancelled_new_lock_is_freed() -> None:
    async def story() -> None:
        for granted in (False, True):
            world = World()
            a, _ = await world.join(0)
            b, _ = await world.join(1)
            held = await world.run(a.lock("token", Mode.NL if granted else Mode.EX))
            task = asyncio.ensure_future(b.lock("token", Mode.EX))
            await asyncio.sleep(0)
            task.cancel()
            await world.turn()
            assert task.cancelled()
            await world.run(held.convert(Mode.EX))
            await world.run(held.convert(Mode.NL))
            assert (
                world.daemons[0].replica.status()["lockspaces"][SPACE]["resources"]["token"]["waiting"] == []
            )
            assert (
                len(world.daemons[0].replica.status()["lockspaces"][SPACE]["resources"]["token"]["granted"])
                == 1
            )

    asyncio.run(story())


def test_a_joiner_waits_for_zombies_and_says_for_whom() -> None:
    async def story() -> None:
        world = World()
        await world.join(0, max_slots=1)
        session = world.daemons[1].session()
        with pytest.raises(LockRefused) as refused:
            await world.run(session.join(SPACE, Heard(), max_slots=1))
        assert refused.value.code == "too-many-nodes" and "node1" in refused.value.message
        world.daemons[0].replica.session_lost(1)
        heard = Heard()
        joining = await world.start(session.join(SPACE, heard, max_slots=1))
        assert session.waiting == {SPACE: ((1, 1, "node1", "zombie"),)}
        world.daemons[0].replica.session_end(1, "proved by the test", False)
        await world.turn()
        assert (await joining).our_slot == 1
        assert session.waiting == {}

    asyncio.run(story())


def test_a_cancelled_join_leaves() -> None:
    async def story() -> None:
        world = World()
        await world.join(0, max_slots=1)
        world.daemons[0].replica.session_lost(1)
        session = world.daemons[1].session()
        joining = await world.start(session.join(SPACE, Heard(), max_slots=1))
        joining.cancel()
        await world.turn()
        assert joining.cancelled()
        world.daemons[0].replica.session_end(1, "proved by the test", False)
        await world.turn()
        assert world.daemons[0].replica.status()["lockspaces"] == {}
        await world.run(session.join(SPACE, Heard(), max_slots=1))

    asyncio.run(story())


def test_recovered_frees_the_slot_of_a_failed_member() -> None:
    async def story() -> None:
        world = World(3)
        await world.join(0)
        b, heard = await world.join(1)
        world.daemons[0].replica.session_end(1, "proved by the test", False)
        await world.turn()
        assert ("slot", 1, "node1") in heard.log
        await world.run(b.recovered(1))
        c, _ = await world.join(2)
        assert c.our_slot == 1

    asyncio.run(story())


def test_requests_made_while_suspended_wait() -> None:
    async def story() -> None:
        world = World()
        a, heard = await world.join(0)
        world.group.break_sequencer()
        assert heard.log[-1] == ("suspended",)
        waiting = await world.start(a.lock("token", Mode.EX))
        world.group.view()
        await world.turn()
        assert (await waiting).mode is Mode.EX
        assert heard.log[-1] == ("resumed",)

    asyncio.run(story())


def test_loss_ends_every_pending_call_and_every_lock() -> None:
    async def story() -> None:
        world = World()
        a, heard = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("token", Mode.EX))
        mine = await world.run(b.lock("token"))
        waiting = await world.start(mine.convert(Mode.EX))
        joining = await world.start(b.lock("token", Mode.PR))
        b.session.on_lost("the test says so")
        b.session.on_lost("again")
        for task in (waiting, joining):
            with pytest.raises(ClusterLost, match="the test says so"):
                await task
        for call in (mine.convert(Mode.NL), mine.unlock(), b.lock("x"), b.leave(), b.recovered(1)):
            with pytest.raises(ClusterLost):
                await call
        assert held.mode is Mode.EX
        assert heard.log[-1] == ("done", [1, 2], 1)

    asyncio.run(story())


def test_a_task_cancelled_when_the_session_is_lost_ends() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        await world.run(a.lock("token", Mode.EX))
        lock = await world.run(b.lock("token"))
        waiting = await world.start(lock.convert(Mode.EX))
        new = await world.start(b.lock("token", Mode.EX))
        waiting.cancel()
        new.cancel()
        b.session.on_lost("the test says so")
        await world.turn()
        assert waiting.cancelled() and new.cancelled()

    asyncio.run(story())


def test_leaving_frees_all_locks_and_ends_what_waits() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("token", Mode.EX))
        other = await world.run(b.lock("token"))
        waiting = await world.start(other.convert(Mode.EX))
        await world.run(b.leave())
        with pytest.raises(LockRefused) as refused:
            await waiting
        assert refused.value.code == "unlocked"
        await world.run(a.leave())
        with pytest.raises(LockRefused):
            await held.convert(Mode.NL)
        assert world.daemons[0].replica.status()["lockspaces"] == {}

    asyncio.run(story())


def test_frames_that_are_none_are_refused() -> None:
    session = Session(lambda frame: None)
    for frame in ([], ["cast", 1], ["nonsense"], ["done", SPACE]):
        with pytest.raises(BadBytes):
            session.on_frame(frame)
