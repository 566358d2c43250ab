"""An asyncio event loop with virtual time, whose order of ready callbacks is drawn.

Time stands still while anything is ready and then jumps to the next timer, so a run takes no longer than its
callbacks. Which of several ready callbacks runs next is a decision (`dice`): code that relies on an order
nobody promised is found out. There is no socket, file or signal here; asking for one raises NotImplementedError.

Every callback belongs to a `Process`, through the context in which it was scheduled; tasks inherit it. A process can be
killed (nothing of it runs ever again) or paused (everything of it waits, timers too, as under SIGSTOP). What belongs to
none is the simulator's own.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Coroutine
from typing import Any

from clustermd.testing.simulator.dice import Stream

SPIN_LIMIT = 200_000
"""So many callbacks without a step of time are a loop that never ends."""

TICK_S = 1e-9
"""No sleep is shorter: one that rounding makes nothing of would never end, as time moves for nobody else."""


class Spinning(Exception):
    """Callbacks follow one another for ever while time stands still."""


class Crashed(asyncio.CancelledError):
    """Raised out of a trace point of a process that was killed there: whatever passed it goes no further."""


class Process:
    """What can be killed or paused as a whole."""

    __slots__ = ("alive", "context", "frozen", "name", "paused", "tasks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.frozen: list[Handle] = []
        self.tasks: dict[asyncio.Task[Any], None] = {}  # in the order of their birth: a set has none
        self.context = contextvars.Context()
        self.context.run(PROCESS.set, self)

    def forget(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("PROCESS", default=None)


class Handle:
    """A scheduled callback; a timer has a time."""

    __slots__ = ("_cancelled", "args", "callback", "context", "process", "time_s")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
        time_s: float,
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = context.get(PROCESS, None)
        self.time_s = time_s
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self.time_s


class Timer(Handle):
    """A scheduled callback with a time."""

    __slots__ = ()


class SimLoop(asyncio.AbstractEventLoop):
    """See the module. `failed(context)` is told of exceptions that reach no caller."""

    def __init__(self, choices: Stream, failed: Callable[[dict[str, Any]], None]) -> None:
        self._choices = choices
        self._failed = failed
        self._now_s = 0.0
        self._ready: list[Handle] = []
        self._timers: list[tuple[float, int, Handle]] = []
        self._serial = 0
        self._closed = False
        self.callbacks = 0

    # --- running --------------------------------------------------------------------------------------

    def run(self, done: Callable[[], bool], until_s: float) -> bool:
        """Run until `done()`, looked at before each step of time. False if `until_s` came first, or nothing is left."""
        asyncio._set_running_loop(self)
        try:
            while True:
                self._run_ready()
                if done():
                    return True
                timers = self._timers
                while timers and timers[0][2]._cancelled:
                    heapq.heappop(timers)
                if not timers or timers[0][0] > until_s:
                    return False
                self._now_s = timers[0][0]
                while timers and timers[0][0] <= self._now_s:
                    handle = heapq.heappop(timers)[2]
                    if not handle._cancelled:
                        self._ready.append(handle)
        finally:
            asyncio._set_running_loop(None)

    def _run_ready(self) -> None:
        ready = self._ready
        below = self._choices.below
        spins = 0
        while ready:
            count = len(ready)
            handle = ready.pop(below(count)) if count > 1 else ready.pop()
            if handle._cancelled:
                continue
            process = handle.process
            if process is not None and (process.paused or not process.alive):
                process.frozen.append(handle)  # a dead one's are for its burial
                continue
            spins += 1
            if spins > SPIN_LIMIT:
                raise Spinning(f"{handle.callback} and others run for ever while time stands still")
            try:
                handle.context.run(handle.callback, *handle.args)
            except Crashed:
                pass
            except Exception as error:
                self._failed({"message": f"an error in {handle.callback}", "exception": error})
        self.callbacks += spins

    def _call(self, handle: Handle) -> None:
        try:
            handle.context.run(handle.callback, *handle.args)
        except Crashed:
            pass
        except Exception as error:
            self._failed({"message": f"an error in {handle.callback}", "exception": error})

    # --- processes --------------------------------------------------------------------------------------

    def pause(self, process: Process) -> None:
        process.paused = True

    def resume(self, process: Process) -> None:
        """Everything that became due meanwhile is ready now."""
        process.paused = False
        frozen, process.frozen = process.frozen, []
        self._ready += frozen

    def bury(self, process: Process) -> None:
        """Let the tasks of a killed process unwind: what they do counts no more, but nothing may be left of them."""
        assert not process.alive
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        ready = self._ready  # the same list throughout: whoever runs the loop holds it
        others: list[Handle] = []
        ready += process.frozen
        process.frozen = []
        for _ in range(50):
            tasks = [task for task in process.tasks if not task.done()]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            while ready:
                handle = ready.pop(0)
                if handle.process is not process:
                    others.append(handle)
                elif not handle._cancelled and not isinstance(handle, Timer):
                    self._call(handle)
        ready += others
        asyncio._set_running_loop(before)
        for task in process.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]

    def later(self, delay_s: float, what: Callable[..., object], *args: Any) -> None:
        """Call `what` in `delay_s`, whatever has become of the process from which this is called."""
        self.call_at(self._now_s + delay_s, what, *args, context=contextvars.Context())

    # --- asyncio ------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, contextvars.copy_context() if context is None else context, 0.0)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        when = self._now_s + (max(delay, TICK_S) if delay > 0 else delay)
        handle = Timer(callback, args, contextvars.copy_context() if context is None else context, when)
        self._serial += 1
        heapq.heappush(self._timers, (when, self._serial, handle))
        return handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        handle = Timer(callback, args, contextvars.copy_context() if context is None else context, when)
        self._serial += 1
        heapq.heappush(self._timers, (when, self._serial, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        process = context.get(PROCESS, None) if context is not None else PROCESS.get()
        if process is not None:
            process.tasks[task] = None
            task.add_done_callback(process.forget)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._failed(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self._failed(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Forget everything that is still scheduled."""
        self._ready.clear()
        self._timers.clear()
        self._closed = True

    def _timer_handle_cancelled(self, handle: Handle) -> None:
        """asyncio's timers report a cancellation here; ours are looked at when they are due."""
