"""The client's side over real replicas: lockspaces, locks, cancelled waits (F16), suspension and loss."""

from __future__ import annotations

import asyncio

import pytest
from dlm_in_process import SPACE, Heard, StoppedClock, World

from clustermd.dlm.lockspace import Lock, Lockspace, LockspaceEvents, Slot
from clustermd.dlm.modes import Flag, Mode, StatusFlag
from clustermd.dlm.session import Session
from clustermd.errors import BadBytes, ClusterLost, LockRefused


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


def test_a_wait_ends_when_its_time_is_up() -> None:
    async def story() -> None:
        world, clock = World(), StoppedClock()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("token", Mode.EX))
        lock = await world.run(b.lock("token"))
        converting = await world.start(lock.convert(Mode.PR, timeout_s=5))
        new = await world.start(b.lock("token", Mode.EX, timeout_s=7))
        for task, now_s in ((converting, 5), (new, 7)):
            assert not task.done()
            clock.now_s = now_s
            await world.turn()
            with pytest.raises(LockRefused) as refused:
                await task
            assert refused.value.code == "timed-out"
        assert lock.mode is Mode.NL
        await world.run(held.unlock())
        assert lock.mode.name == "NL", "nobody waits for it any more"
        await world.run(a.lock("token", Mode.EX))

    asyncio.run(story())


def test_a_grant_that_is_faster_than_the_time_limit_counts() -> None:
    async def story() -> None:
        world, clock = World(), StoppedClock()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock("token", Mode.EX))
        lock = await world.run(b.lock("token"))
        converting = await world.start(lock.convert(Mode.PR, timeout_s=5))
        freeing = asyncio.ensure_future(held.unlock())
        await asyncio.sleep(0)
        assert world.group.accept(world.daemons[0].member), "the release is ordered before the time is up"
        clock.now_s = 6
        for _ in range(3):
            await asyncio.sleep(0)
        assert world.daemons[1].frames[-1][0] == "cancel"
        await world.turn()
        await freeing
        await converting
        assert lock.mode is Mode.PR
        await world.run(lock.convert(Mode.NL))

    asyncio.run(story())


def test_the_time_of_a_request_is_up_before_it_is_ordered() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        await world.run(a.lock("token", Mode.EX))
        for name, code in (("token", "timed-out"), ("other", "")):
            new = asyncio.ensure_future(b.lock(name, Mode.PR, timeout_s=0))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not new.done(), "what the lock manager will say is waited for"
            await world.turn()
            if code:
                with pytest.raises(LockRefused) as refused:
                    await new
                assert refused.value.code == code
            else:
                assert (await new).mode is Mode.PR

    asyncio.run(story())


def test_a_pending_conversion_is_cancelled_by_another_task() -> None:
    async def story() -> None:
        for deadlock, code in ((False, "cancelled"), (True, "deadlock")):
            world = World()
            a, _ = await world.join(0)
            b, _ = await world.join(1)
            await world.run(a.lock("token", Mode.EX))
            lock = await world.run(b.lock("token"))
            waiting = await world.start(lock.convert(Mode.EX))
            await world.run(lock.cancel(deadlock=deadlock))
            with pytest.raises(LockRefused) as refused:
                await waiting
            assert refused.value.code == code and lock.mode is Mode.NL
            await world.run(lock.cancel())

    asyncio.run(story())


def test_flags_of_requests_conversions_and_unlocks_reach_the_lock_manager() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        held = await world.run(a.lock(b"\xff\0name", Mode.PR, flags=Flag.VALBLK))
        assert held.name == "\\xff\0name" and held.lvb is not None
        either = await world.run(b.lock(b"\xff\0name", Mode.EX, flags=Flag.ALTPR))
        assert either.mode is Mode.PR and either.status_flags is StatusFlag.ALTMODE
        with pytest.raises(LockRefused) as refused:
            await world.run(either.convert(Mode.PR, flags=Flag.QUECVT))
        assert refused.value.code == "invalid"
        waiting = await world.start(held.convert(Mode.EX))
        demoted = await world.start(either.convert(Mode.EX, flags=Flag.CONVDEADLK))
        await waiting
        assert held.mode is Mode.EX, "the other one holds NL meanwhile"
        await world.run(held.unlock())
        await demoted
        assert either.mode is Mode.EX and either.status_flags is StatusFlag.DEMOTED

    asyncio.run(story())


def test_an_unlock_marks_the_value_or_writes_it() -> None:
    async def story() -> None:
        world = World(1)
        a, _ = await world.join(0)
        reader = await world.run(a.lock("message", value_block=True))
        for flags, valid, block in ((Flag.NONE, True, b"one"), (Flag.IVVALBLK, False, b"one")):
            writer = await world.run(a.lock("message", Mode.EX, value_block=True))
            assert writer.lvb is not None and reader.lvb is not None
            writer.lvb[:3] = b"one" if valid else b"two"
            await world.run(writer.unlock(flags=flags))
            await world.run(reader.convert(Mode.CR))
            assert (reader.lvb_valid, bytes(reader.lvb[:3])) == (valid, block)
            await world.run(reader.convert(Mode.NL))
        untouched = await world.run(a.lock("message", Mode.EX, value_block=True))
        assert untouched.lvb is not None
        untouched.lvb[:3] = b"new"
        await world.run(untouched.convert(Mode.NL, value_block=False))
        await world.run(reader.convert(Mode.CR))
        assert bytes(reader.lvb[:3]) == b"one"

    asyncio.run(story())


def test_a_circle_of_waits_is_a_refusal_where_the_lockspace_looks_for_it() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0, deadlocks=True)
        b, _ = await world.join(1, deadlocks=True)
        x, y = await world.run(a.lock("x", Mode.EX)), await world.run(b.lock("y", Mode.EX))
        waiting = await world.start(a.lock("y", Mode.EX))
        with pytest.raises(LockRefused) as refused:
            await world.run(b.lock("x", Mode.EX))
        assert refused.value.code == "deadlock" and "who waits for it" in refused.value.message
        await world.run(y.unlock())
        assert (await waiting).mode is Mode.EX and x.mode is Mode.EX
        with pytest.raises(LockRefused) as refused:
            await world.join(1)
        assert refused.value.code == "deadlock-detection"

    asyncio.run(story())


def test_an_exclusive_join_finds_nobody_of_its_node_there() -> None:
    async def story() -> None:
        world = World()
        await world.join(0)
        other = world.daemons[1].session()
        assert (await world.run(other.join(SPACE, Heard(), max_slots=4, exclusive=True))).our_slot == 2
        again = world.daemons[0].session()
        with pytest.raises(LockRefused) as refused:
            await world.run(again.join(SPACE, Heard(), max_slots=4, exclusive=True))
        assert refused.value.code == "exists"

    asyncio.run(story())


def test_a_lock_that_was_left_behind_is_adopted_with_its_value() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        left = await world.run(a.lock("x", Mode.EX, value_block=True, flags=Flag.PERSISTENT))
        assert left.lvb is not None
        left.lvb[:3] = b"old"
        await world.run(left.convert(Mode.PW))
        await world.run(a.leave())
        assert left.dead and left.mode is Mode.IV
        waiting = await world.start(b.lock("x", Mode.PR, value_block=True))
        again, _ = await world.join(0)
        for mode, code in ((Mode.EX, "other-mode"), (Mode.PW, "")):
            told: list[Mode] = []
            adopting = world.run(again.adopt("x", mode, value_block=True, blocking=told.append))
            if code:
                with pytest.raises(LockRefused) as refused:
                    await adopting
                assert refused.value.code == code
        adopted = await adopting
        assert adopted.mode is Mode.PW and adopted.lvb is not None and bytes(adopted.lvb[:3]) == b"old"
        assert told == [Mode.PR], "somebody waits for it"
        adopted.lvb[:3] = b"new"
        await world.run(adopted.convert(Mode.NL))
        reader = await waiting
        assert reader.lvb is not None and bytes(reader.lvb[:3]) == b"new"
        with pytest.raises(LockRefused) as refused:
            await world.run(b.adopt("x", Mode.PW))
        assert refused.value.code == "no-orphan"

    asyncio.run(story())


def test_a_purge_frees_what_was_left_behind() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        b, _ = await world.join(1)
        await world.run(a.lock("x", Mode.EX, flags=Flag.PERSISTENT))
        await world.run(a.leave())
        waiting = await world.start(b.lock("x", Mode.PR))
        await world.run(b.purge())
        await world.run(b.purge(1, 4711))
        assert not waiting.done(), "another node's, and another process's"
        await world.run(b.purge(1, 1))
        assert (await waiting).mode is Mode.PR

    asyncio.run(story())


def test_a_cancelled_adoption_keeps_the_lock_until_the_session_ends() -> None:
    async def story() -> None:
        world = World()
        a, _ = await world.join(0)
        await world.run(a.lock("x", Mode.EX, flags=Flag.PERSISTENT))
        await world.run(a.leave())
        again, _ = await world.join(0)
        adopting = asyncio.ensure_future(again.adopt("x", Mode.EX))
        await asyncio.sleep(0)
        adopting.cancel()
        await world.turn()
        assert adopting.cancelled()
        with pytest.raises(LockRefused):
            await world.run(again.adopt("x", Mode.EX))
        await world.run(again.leave())
        third, _ = await world.join(0)
        assert (await world.run(third.adopt("x", Mode.EX))).mode is Mode.EX

    asyncio.run(story())


def test_frames_that_are_none_are_refused() -> None:
    session = Session(lambda frame: None)
    for frame in ([], ["cast", 1], ["nonsense"], ["done", SPACE]):
        with pytest.raises(BadBytes):
            session.on_frame(frame)
