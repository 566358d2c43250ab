"""Locks that stay with a program between its uses of them, until somebody else wants them.

What one node uses again and again, and others seldom, costs the cluster nothing then: a use of a lock that is
still here is no message at all. It is how cluster filesystems use the lock manager, and is built from nothing but
its blocking callback (dlm.md 1.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from clustermd.dlm.lock import is_down_conversion
from clustermd.dlm.modes import Mode, compatible
from clustermd.errors import ClusterLost, LockRefused

if TYPE_CHECKING:
    from clustermd.lockd.held import HeldLock, OpenLockspace

_LISTEN_S = 0.001
"""A use of what is here waits for nothing, so who uses it without end would never hear that somebody wants it."""


class KeptLock:
    """One resource's lock, shared by all uses in this program. Made by `OpenLockspace.keep`.

    Uses that exclude each other wait for each other in their order, also within this program. Once somebody else
    waits, those that are under way are the last before he gets it.
    """

    def __init__(self, space: OpenLockspace, name: str, value_block: bool) -> None:
        self.space = space
        self.name = name
        self._value_block = value_block
        self._held: HeldLock | None = None
        self._wanted = False
        self._using: list[Mode] = []
        self._idle = asyncio.Event()
        self._turn = asyncio.Lock()
        self._listened_s = 0.0

    @property
    def mode(self) -> Mode:
        """In which it is here now, used or not; IV when it is not."""
        return Mode.IV if self._held is None else self._held.mode

    @asynccontextmanager
    async def use(self, mode: Mode = Mode.EX, *, timeout_s: float | None = None) -> AsyncIterator[HeldLock]:
        """Have it in `mode` at least for the length of the block; its value may be read and set there.

        Waits for other uses and for other programs. Raises LockRefused ("timed-out" with the holders after
        `timeout_s`, "deadlock"), ClusterLost: also at the end of the block, when the lock was lost in it.
        """
        held = await self._begin(mode, timeout_s)
        try:
            yield held
        finally:
            self._end(mode)
        self.space.check_alive(f"using {self.name} of lockspace {self.space.name}")

    async def give_back(self) -> None:
        """Do not keep it any longer; returns when nobody here uses it and it is free for everybody."""
        async with self._turn:
            await self._unused()
            await self._let_go()

    def space_lost(self) -> None:
        """The session is over. What nobody uses guards nothing and must not keep anybody waiting."""
        if not self._using and self._held is not None:
            held, self._held = self._held, None
            held.let_go()

    async def _begin(self, mode: Mode, timeout_s: float | None) -> HeldLock:
        what = f"locking {self.name} of lockspace {self.space.name} in {mode.name}"
        self.space.check_alive(what)
        loop = asyncio.get_running_loop()
        if loop.time() >= self._listened_s + _LISTEN_S:
            await asyncio.sleep(0)
            self._listened_s = loop.time()
        end_s = None if timeout_s is None else loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(end_s):
                await self._turn.acquire()
        except TimeoutError:
            raise self._too_late(what, timeout_s) from None
        try:
            if not self._fits(mode):
                try:
                    async with asyncio.timeout_at(end_s):
                        await self._unused()
                except TimeoutError:
                    raise self._too_late(what, timeout_s) from None
                if self._wanted or not self._covers(mode):
                    await self._let_go()
            held = self._held
            if held is None:
                left_s = None if end_s is None else max(0.0, end_s - loop.time())
                held = self._held = await self.space.lock(
                    self.name, mode, value_block=self._value_block, blocking=self._blocked, timeout_s=left_s
                )
            self._using.append(mode)
            self._idle.clear()
            return held
        finally:
            self._turn.release()

    def _end(self, mode: Mode) -> None:
        self._using.remove(mode)
        if self._using:
            return
        self._idle.set()
        if self.space.lost:
            self.space_lost()
        elif self._wanted:
            self.space.spawn(self._give_way())

    def _covers(self, mode: Mode) -> bool:
        held = self.mode
        return held is mode or (held is not Mode.IV and is_down_conversion(held, mode))

    def _fits(self, mode: Mode) -> bool:
        """Whether a use in `mode` may begin beside those under way, with the lock as it is."""
        return (
            not self._wanted and self._covers(mode) and all(compatible(mode, other) for other in self._using)
        )

    async def _unused(self) -> None:
        while self._using:
            await self._idle.wait()

    async def _let_go(self) -> None:
        held, self._held = self._held, None
        self._wanted = False
        if held is not None:
            await held.unlock()

    def _blocked(self, held: HeldLock, _: Mode) -> None:
        if held is self._held:
            self._wanted = True
            if not self._using:
                self.space.spawn(self._give_way())

    async def _give_way(self) -> None:
        async with self._turn:
            # a use that came first has given way itself
            if self._wanted and not self._using and not self.space.lost:
                with suppress(ClusterLost):  # it is told otherwise, and gives way as well
                    await self._let_go()

    def _too_late(self, what: str, timeout_s: float | None) -> LockRefused:
        return LockRefused(
            "timed-out",
            f"{what} was not granted in {timeout_s:g} s: other uses in this program come first",
            timeout_s=timeout_s,
        )
