"""The simulator's loop: time jumps, ready callbacks come in a drawn order, processes are paused, killed and buried."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from typing import Any

import pytest

from clustermd.testing.simulator import loop as loop_module
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import PROCESS, Crashed, Process, SimLoop, Spinning

NEVER: Callable[[], bool] = lambda: False  # noqa: E731  a name for what stands in every call


class Kit:
    """A loop, what it was told of as failed, and a list to write down in."""

    def __init__(self, seed: int = 0, decisions: dict[str, list[int]] | None = None) -> None:
        self.failed: list[dict[str, Any]] = []
        self.dice = Dice(seed, decisions)
        self.loop = SimLoop(self.dice.stream("loop"), self.failed.append)  # type: ignore[abstract]
        self.seen: list[Any] = []

    def note(self, what: object) -> None:
        self.seen.append((what, self.loop.time()))


def dull() -> Kit:
    return Kit(decisions={})


def test_time_jumps_to_the_next_timer_and_costs_nothing() -> None:
    kit = dull()
    began_s = time.monotonic()
    for delay_s in (3600.0, 60.0, 86400.0):
        kit.loop.call_later(delay_s, kit.note, delay_s)
    assert not kit.loop.run(NEVER, 1e9)
    assert kit.seen == [(60.0, 60.0), (3600.0, 3600.0), (86400.0, 86400.0)]
    assert time.monotonic() - began_s < 5


def test_a_run_ends_at_its_bound_and_goes_on_from_there() -> None:
    kit = dull()
    kit.loop.call_later(5.0, kit.note, "late")
    assert not kit.loop.run(NEVER, 4.0)
    assert kit.seen == [] and kit.loop.time() < 4.0
    assert kit.loop.run(lambda: bool(kit.seen), 6.0)
    assert kit.seen == [("late", 5.0)]


def test_a_cancelled_timer_is_no_step_of_time() -> None:
    kit = dull()
    kit.loop.call_later(1.0, kit.note, "never").cancel()
    kit.loop.call_later(2.0, kit.note, "comes")
    kit.loop.run(NEVER, 10.0)
    assert kit.seen == [("comes", 2.0)]


def order_of_ten(kit: Kit) -> list[int]:
    for number in range(10):
        kit.loop.call_soon(kit.note, number)
    kit.loop.run(NEVER, 0.0)
    return [what for what, _ in kit.seen]


def test_what_is_ready_comes_in_the_order_of_the_decisions() -> None:
    orders = {tuple(order_of_ten(Kit(seed))) for seed in range(20)}
    assert len(orders) > 10
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert order_of_ten(Kit(3)) == order_of_ten(Kit(3))
    assert order_of_ten(dull()) == list(range(10))


def test_coroutines_sleep_and_wait_on_virtual_time() -> None:
    kit = dull()

    async def sleeper() -> None:
        kit.note("begins")
        await asyncio.sleep(10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 5)
        kit.note("ends")

    kit.loop.create_task(sleeper())
    kit.loop.run(NEVER, 100.0)
    assert kit.seen == [("begins", 0.0), ("ends", 15.0)] and not kit.failed


def test_an_error_that_reaches_no_caller_is_told() -> None:
    kit = dull()

    def wrong() -> None:
        raise ValueError("wrong")

    kit.loop.call_soon(wrong)
    kit.loop.call_soon(kit.note, "goes on")
    kit.loop.run(NEVER, 0.0)
    assert [str(context["exception"]) for context in kit.failed] == ["wrong"]
    assert kit.seen == [("goes on", 0.0)]


def test_callbacks_without_end_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "SPIN_LIMIT", 100)
    kit = dull()

    def again() -> None:
        kit.loop.call_soon(again)

    kit.loop.call_soon(again)
    with pytest.raises(Spinning):
        kit.loop.run(NEVER, 1.0)


def test_sockets_and_threads_are_refused() -> None:
    kit = dull()
    with pytest.raises(NotImplementedError):
        kit.loop.call_soon_threadsafe(kit.note, 1)
    with pytest.raises(NotImplementedError):
        kit.loop.add_reader(0, kit.note)


# --- processes ----------------------------------------------------------------------------------------------------


def in_process(kit: Kit, process: Process, delay_s: float, what: str) -> None:
    kit.loop.call_later(delay_s, kit.note, what, context=process.context.copy())


def test_a_paused_process_sees_its_timers_late_and_others_do_not() -> None:
    kit = dull()
    one, two = Process("one"), Process("two")
    in_process(kit, one, 1.0, "one")
    in_process(kit, two, 1.0, "two")
    kit.loop.pause(one)
    kit.loop.later(8.0, kit.loop.resume, one)
    kit.loop.run(NEVER, 100.0)
    assert kit.seen == [("two", 1.0), ("one", 8.0)]


def test_nothing_of_a_killed_process_runs() -> None:
    kit = dull()
    process = Process("one")

    async def life() -> None:
        assert PROCESS.get() is process
        while True:
            await asyncio.sleep(1)
            kit.note("alive")

    kit.loop.create_task(life(), context=process.context)
    kit.loop.later(2.5, setattr, process, "alive", False)
    kit.loop.run(NEVER, 10.0)
    assert kit.seen == [("alive", 1.0), ("alive", 2.0)]
    kit.loop.bury(process)
    assert not [task for task in process.tasks if not task.done()]


def test_tasks_of_tasks_belong_to_the_process_and_are_buried() -> None:
    kit = dull()
    process = Process("one")

    async def child() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            kit.note("unwound")

    async def parent() -> None:
        await asyncio.gather(child(), child())

    kit.loop.create_task(parent(), context=process.context)
    kit.loop.run(NEVER, 1.0)
    assert len(process.tasks) == 3
    process.alive = False
    kit.loop.bury(process)
    assert [what for what, _ in kit.seen] == ["unwound", "unwound"]
    assert all(task.done() for task in process.tasks) and not kit.failed


def test_a_burial_leaves_what_others_have_ready() -> None:
    """It happens within the run of the loop: what is ready then is ready at that time still."""
    kit = dull()
    dead, living = Process("dead"), Process("living")
    in_process(kit, dead, 1.0, "never")
    kit.loop.create_task(asyncio.Event().wait(), context=dead.context)

    def kill() -> None:
        dead.alive = False
        kit.loop.call_soon(kit.note, "other", context=living.context.copy())
        kit.loop.bury(dead)

    kit.loop.later(0.5, kill)
    in_process(kit, living, 2.0, "later")
    kit.loop.run(NEVER, 10.0)
    assert kit.seen == [("other", 0.5), ("later", 2.0)]


def test_a_crash_at_a_point_ends_what_passed_it() -> None:
    kit = dull()
    process = Process("one")

    async def victim() -> None:
        process.alive = False
        raise Crashed("write.issue")

    def later() -> None:
        kit.note("after")

    kit.loop.create_task(victim(), context=process.context)
    kit.loop.call_later(1.0, later, context=process.context.copy())
    kit.loop.run(NEVER, 10.0)
    assert kit.seen == [] and not kit.failed


def test_what_is_scheduled_for_the_world_outlives_the_process_that_asked() -> None:
    kit = dull()
    process = Process("one")

    def ask() -> None:
        kit.loop.later(1.0, kit.note, "world")
        kit.loop.call_later(1.0, kit.note, "own")
        process.alive = False

    kit.loop.call_soon(ask, context=process.context.copy())
    kit.loop.run(NEVER, 10.0)
    assert kit.seen == [("world", 1.0)]
    assert contextvars.copy_context().get(PROCESS) is None
