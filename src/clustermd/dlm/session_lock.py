"""One lock as its client has it: what is granted, the value block, and the operations on it (`dlm.lockspace.Lock`).

Whatever ends the wait for an operation early, a time limit or a task that is cancelled, becomes a cancel, which is
an operation in the order like all others: either it ends the request or the grant was faster, and only the answer
says which. So both wait for it (dlm.md 6.8 trap 22; md-cluster spec 8.1, F16). A time limit that lost the race has
been kept by the lock manager; the grant counts. A cancelled task wants nothing any more: its grant is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from clustermd.dlm.lock import is_down_conversion
from clustermd.dlm.modes import (
    EAGAIN,
    EBUSY,
    ECANCEL,
    EDEADLK,
    EINVAL,
    ENOENT,
    ETIMEDOUT,
    EUNLOCK,
    Flag,
    Mode,
    StatusFlag,
)
from clustermd.errors import LockRefused, Refused

if TYPE_CHECKING:
    from clustermd.dlm.session import SessionLockspace

_CODES = {
    EAGAIN: ("would-block", "another lock excludes this mode now"),
    EDEADLK: ("deadlock", "it would wait for somebody who waits for it"),
    ETIMEDOUT: ("timed-out", "it was not granted in time"),
    ECANCEL: ("cancelled", "the request was cancelled"),
    EUNLOCK: ("unlocked", "the lock has been freed"),
    EBUSY: ("busy", "an operation of this lock is still pending"),
    EINVAL: ("invalid", "the lock manager does not accept this combination of mode and flags"),
    ENOENT: ("no-such-lock", "the lock or its lockspace is gone"),
}

Outcome = int | Refused | None
"""A status (0 or negative), a refusal with words, or None: the session was lost."""


def hex_of(block: bytes | bytearray | None) -> str | None:
    """A value block for a trace: hex without the zeros at its end."""
    return None if block is None else bytes(block).rstrip(b"\0").hex()


def refused(status: int, what: str) -> LockRefused:
    code, why = _CODES.get(status, ("failed", f"the lock manager answered {status}"))
    return LockRefused(code, f"{what} was refused: {why}", status=status)


async def settled(future: asyncio.Future[Outcome]) -> Outcome:
    """The outcome, awaited even if the task is cancelled (again) meanwhile."""
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            continue
    return future.result()


class SessionLock:
    """One lock (`dlm.lockspace.Lock`). `id` is 0 until the lock manager has given one.

    `too_late` is the status with which it is to be cancelled as soon as it has one, 0 if it is not.
    """

    def __init__(
        self,
        space: SessionLockspace,
        name: str,
        lvb: bytearray | None,
        blocking: Callable[[Mode], None] | None,
        flags: Flag = Flag.NONE,
    ) -> None:
        self.name = name
        self.mode = Mode.IV
        self.lvb = lvb
        self.lvb_valid = True
        self.status_flags = StatusFlag.NONE
        self.id = 0
        self.dead = False
        self.too_late = 0
        self.space = space
        self.blocking = blocking
        self._session = space.session
        self._busy = False
        self._flags = flags
        self.number = space.session.next_number()

    async def convert(
        self,
        mode: Mode,
        *,
        noqueue: bool = False,
        flags: Flag = Flag.NONE,
        value_block: bool = True,
        timeout_s: float | None = None,
    ) -> None:
        """See `dlm.lockspace.Lock`. A down conversion that is cancelled stays done: it gave a right away."""
        what = f"converting {self.name} of lockspace {self.space.name} from {self.mode.name} to {mode.name}"
        self._session.check_alive(what)
        if self.dead:
            raise refused(EUNLOCK, what)
        if self._busy:
            raise refused(EBUSY, what)
        self._busy = True
        before = self.mode
        if noqueue:
            flags |= Flag.NOQUEUE
        try:
            future = self._start(mode, flags, value_block=value_block)
            try:
                await self.within(future, timeout_s)
            except asyncio.CancelledError:
                await self._give_up(future, before)
                raise
            self._session.raise_unless_granted(future.result(), what)
        finally:
            self._busy = False

    async def cancel(self, *, deadlock: bool = False) -> None:
        """See `dlm.lockspace.Lock`."""
        what = f"cancelling what is pending on {self.name} of lockspace {self.space.name}"
        self._session.check_alive(what)
        if self.dead:
            raise refused(EUNLOCK, what)
        future = self._session.submit(["cancel", 0, self.id, EDEADLK if deadlock else ECANCEL])
        await asyncio.wait((future,))
        self._session.raise_unless_granted(future.result(), what)

    async def unlock(self, *, flags: Flag = Flag.NONE) -> None:
        """See `dlm.lockspace.Lock`. A holder of PW or EX with a value block writes it (dlm.md 2.3)."""
        what = f"freeing {self.name} of lockspace {self.space.name}"
        self._session.check_alive(what)
        if self.dead:
            raise refused(EUNLOCK, what)
        self.dead = True
        outcome = await asyncio.shield(self._start_unlock(flags))
        if outcome != EUNLOCK:
            self._session.raise_unless_granted(outcome, what)

    async def within(self, future: asyncio.Future[Outcome], timeout_s: float | None) -> None:
        """Wait for an operation of this lock; after `timeout_s` of loop time it is cancelled, and waited for."""
        if timeout_s is None:
            await asyncio.shield(future)
            return
        await asyncio.wait((future,), timeout=max(timeout_s, 0.0))
        if future.done():
            return
        if self.id:
            self._session.send_cancel(self.id, ETIMEDOUT)
        else:
            self.too_late = ETIMEDOUT
        await asyncio.wait((future,))

    async def discard(self, future: asyncio.Future[Outcome]) -> None:
        """The task that waited for this new lock was cancelled: free it, whether granted or not."""
        self.dead = True
        if self.id:
            await settled(self._start_unlock())
        await settled(future)

    def _start(self, mode: Mode, flags: Flag, *, value_block: bool = True) -> asyncio.Future[Outcome]:
        lvb = None
        if flags & Flag.VALBLK and self.lvb is None:
            self.lvb = bytearray(self.space.lvb_bytes)
        if self.lvb is not None and value_block:
            flags |= Flag.VALBLK
            lvb = bytes(self.lvb)
        self._flags = flags
        if self._session.trace.on:
            writes = self.mode >= Mode.PW and not flags & Flag.IVVALBLK
            self._trace_convert(mode, flags, lvb if writes else None)
        return self._session.submit(["convert", 0, self.id, int(mode), int(flags), lvb], lock=self)

    def _start_unlock(self, flags: Flag = Flag.NONE) -> asyncio.Future[Outcome]:
        lvb = None if self.lvb is None else bytes(self.lvb)
        all_flags = (
            flags | self._flags
        )  # a lock that was converted with VALBLK writes when it is freed (dlm.md 1.5)
        writes = self.mode >= Mode.PW and bool(all_flags & Flag.VALBLK) and not all_flags & Flag.IVVALBLK
        written = hex_of(lvb) if writes else None
        self.point("lock.given", mode=Mode.IV.name, had=self.mode.name, block=written)
        return self._session.submit(["unlock", 0, self.id, int(Flag.FORCEUNLOCK | flags), lvb], lock=self)

    def _trace_convert(self, mode: Mode, flags: Flag, written: bytes | None) -> None:
        if is_down_conversion(self.mode, mode):
            self.point("lock.given", mode=mode.name, had=self.mode.name, block=hex_of(written))
            return
        if flags & Flag.CONVDEADLK and self.mode > Mode.NL:
            # the old mode may be gone before anything is shown
            self.point("lock.given", mode=Mode.NL.name, had=self.mode.name, block=None)
        elif {self.mode, mode} == {Mode.PR, Mode.CW}:
            # either may be gone before the other is shown; what both allow is sure
            self.point("lock.given", mode=Mode.CR.name, had=self.mode.name, block=None)
        self.point("lock.asked", mode=mode.name, had=self.mode.name, block=hex_of(written))

    def point(self, name: str, **fields: object) -> None:
        """A trace point about this lock. `lock` is its number in the session, from 1."""
        trace = self._session.trace
        if trace.on:
            trace.point(name, space=self.space.name, resource=self.name, lock=self.number, **fields)

    async def _give_up(self, future: asyncio.Future[Outcome], before: Mode) -> None:
        """F16: no conversion stays queued or granted for a task that does not wait for it any more."""
        if not future.done():
            self._session.send_cancel(self.id)
        outcome = await settled(future)
        if outcome == 0 and not self.dead and self.mode != before:
            if is_down_conversion(before, self.mode):
                return
            # what the grant read is not written back: that would clear the mark of a dead writer
            await settled(self._start(before, Flag.NONE, value_block=before >= Mode.PW))
