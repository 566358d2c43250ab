"""The lock manager for programs that do not use asyncio: the same as `lockd.api`, from any thread.

    with PlainLockspace("backup") as space:
        with space.lock("db1", Mode.EX, timeout_s=5) as lock:
            ...

A thread of the lockspace's own runs the connection; every call hands its work there and waits. Calls may come from
many threads at once. A lock belongs to the lockspace, not to a thread: whoever has the object may use it.

`blocking(lock, mode)` and `on_lost(reason)` are called in a second thread, one after the other, so they may use the
lock, and they should not take long. A forked child cannot use its parent's lockspace; it opens its own.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from clustermd.dlm.lockspace import Slot
from clustermd.dlm.modes import Flag, Mode
from clustermd.dlm.wire import SLOTS_MAX
from clustermd.errors import ClusterLost, Refused
from clustermd.lockd.api import VALUE_BLOCK_BYTES, HeldLock, KeptLock, OpenLockspace, connect_lockspace
from clustermd.rundir import RunDir

T = TypeVar("T")
Blocking = Callable[["PlainLock", Mode], None]


class PlainLock:
    """A lock that this program has. Made by `PlainLockspace.lock`; the end of its `with` block frees it."""

    def __init__(self, space: PlainLockspace, held: HeldLock) -> None:
        self.space = space
        self.name = held.name
        self._held = held

    @property
    def mode(self) -> Mode:
        """What is granted: IV when it has been freed or lost."""
        return self._held.mode

    @property
    def value(self) -> bytes:
        """As `HeldLock.value`."""
        return self._held.value

    @value.setter
    def value(self, value: bytes) -> None:
        self._held.value = value

    @property
    def value_valid(self) -> bool:
        """As `HeldLock.value_valid`."""
        return self._held.value_valid

    def convert(
        self, mode: Mode, *, noqueue: bool = False, timeout_s: float | None = None, flags: Flag = Flag.NONE
    ) -> None:
        """As `HeldLock.convert`."""
        self.space._call(self._held.convert(mode, noqueue=noqueue, timeout_s=timeout_s, flags=flags))

    def unlock(self) -> None:
        """As `HeldLock.unlock`."""
        self.space._call(self._held.unlock())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.space._call(self._held.__aexit__(kind, error, trace))


class PlainKept:
    """A lock that stays here between its uses. Made by `PlainLockspace.keep`."""

    def __init__(self, space: PlainLockspace, kept: KeptLock) -> None:
        self.space = space
        self.name = kept.name
        self._kept = kept

    @property
    def mode(self) -> Mode:
        """As `KeptLock.mode`."""
        return self._kept.mode

    @contextmanager
    def use(self, mode: Mode = Mode.EX, *, timeout_s: float | None = None) -> Iterator[PlainLock]:
        """As `KeptLock.use`. Uses of several threads exclude each other like those of several nodes."""
        using = self._kept.use(mode, timeout_s=timeout_s)
        held = self.space._call(using.__aenter__())
        try:
            yield PlainLock(self.space, held)
        except BaseException as error:
            self.space._call(using.__aexit__(type(error), error, error.__traceback__))
            raise
        self.space._call(using.__aexit__(None, None, None))

    def give_back(self) -> None:
        """As `KeptLock.give_back`."""
        self.space._call(self._kept.give_back())


class PlainLockspace:
    """A lockspace for the length of a `with` block. Arguments and errors are those of `connect_lockspace`."""

    def __init__(
        self,
        name: str,
        *,
        label: str = "",
        rundir: RunDir | None = None,
        start: bool = True,
        timeout_s: float | None = None,
        value_block_bytes: int = VALUE_BLOCK_BYTES,
        max_slots: int = SLOTS_MAX,
        deadlocks: bool = False,
        witness: bool = True,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self._on_lost = on_lost
        self._arguments: dict[str, Any] = {
            "label": label,
            "rundir": rundir,
            "start": start,
            "timeout_s": timeout_s,
            "value_block_bytes": value_block_bytes,
            "max_slots": max_slots,
            "deadlocks": deadlocks,
            "witness": witness,
            "on_lost": None if on_lost is None else self._told_lost,
        }
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._space: OpenLockspace | None = None
        self._stop: asyncio.Event | None = None
        self._begun: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._threads:
            raise RuntimeError(f"lockspace {self.name} is open already: make another PlainLockspace")
        self._pid = os.getpid()
        self._threads = [
            threading.Thread(target=self._work, name=f"lockspace {self.name}", daemon=True),
            threading.Thread(target=self._call_back, name=f"callbacks of {self.name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        try:
            error = self._begun.get()
        except BaseException:
            self._end()
            raise
        if error is not None:
            self._end()
            raise error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def lost(self) -> str:
        """Why the session and all locks are gone; empty while they are not."""
        return self._open().lost

    @property
    def members(self) -> tuple[Slot, ...]:
        """Who is in the lockspace, us included."""
        return self._open().members

    def lock(
        self,
        name: str,
        mode: Mode = Mode.EX,
        *,
        value_block: bool = False,
        noqueue: bool = False,
        timeout_s: float | None = None,
        blocking: Blocking | None = None,
        flags: Flag = Flag.NONE,
    ) -> PlainLock:
        """As `OpenLockspace.lock`. Ctrl-C while it waits takes the request back."""
        made: list[PlainLock] = []

        def blocked(held: HeldLock, mode: Mode) -> None:
            assert blocking is not None, "asked for"
            if not made:
                made.append(PlainLock(self, held))
            self._calls.put(lambda: blocking(made[0], mode))

        async def work() -> PlainLock:
            held = await self._open().lock(
                name,
                mode,
                value_block=value_block,
                noqueue=noqueue,
                timeout_s=timeout_s,
                blocking=None if blocking is None else blocked,
                flags=flags,
            )
            if not made:
                made.append(PlainLock(self, held))
            return made[0]

        return self._call(work())

    def keep(self, name: str, *, value_block: bool = False) -> PlainKept:
        """As `OpenLockspace.keep`."""

        async def work() -> KeptLock:
            return self._open().keep(name, value_block=value_block)

        return PlainKept(self, self._call(work()))

    def holders(self, name: str, mode: Mode) -> list[dict[str, Any]]:
        """As `OpenLockspace.holders`."""
        return self._call(self._open().holders(name, mode))

    # --- from the caller's thread

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._pid != os.getpid() or self._loop is None or self._loop.is_closed():
            work.close()
            raise ClusterLost(
                "not-open",
                f"lockspace {self.name} is not open in this process: use it inside its `with` block, and open "
                "another one in a forked child",
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _open(self) -> OpenLockspace:
        if self._space is None:
            raise ClusterLost(
                "not-open", f"lockspace {self.name} is not open: use it inside its `with` block"
            )
        return self._space

    def _end(self) -> None:
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        self._threads[0].join()
        self._calls.put(None)
        if threading.current_thread() is not self._threads[1]:
            self._threads[1].join()
        self._threads = []
        self._space = None

    # --- in our threads

    def _work(self) -> None:
        try:
            asyncio.run(self._live())
        except (Refused, OSError) as error:
            self._begun.put(error)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with connect_lockspace(self.name, **self._arguments) as space:
            self._space = space
            self._begun.put(None)
            await self._stop.wait()

    def _told_lost(self, reason: str) -> None:
        on_lost = self._on_lost
        assert on_lost is not None, "asked for"
        self._calls.put(lambda: on_lost(reason))

    def _call_back(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
