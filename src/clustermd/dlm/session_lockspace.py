"""A lockspace as the client that joined it has it: new locks, orphans, recovery, leaving (see `dlm.lockspace`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from clustermd.dlm.lockspace import LockspaceEvents, Slot
from clustermd.dlm.modes import EAGAIN, ENOENT, Flag, Mode
from clustermd.dlm.session_lock import Outcome, SessionLock, settled
from clustermd.errors import LockRefused

if TYPE_CHECKING:
    from clustermd.dlm.session import Session

_QUEUES = Flag.NOQUEUE | Flag.HEADQUE | Flag.NOORDER | Flag.ORPHAN
"""Who asks for NL with one of these means its place in the queues."""


class SessionLockspace:
    """A joined lockspace (`dlm.lockspace.Lockspace`)."""

    def __init__(self, session: Session, name: str, events: LockspaceEvents, lvb_bytes: int) -> None:
        self.session = session
        self.name = name
        self.events = events
        self.lvb_bytes = lvb_bytes
        self.our_slot = 0
        self.slots: tuple[Slot, ...] = ()
        self.generation = 0
        self.left = False

    async def lock(
        self,
        name: str | bytes,
        mode: Mode = Mode.NL,
        *,
        value_block: bool = False,
        noqueue: bool = False,
        blocking: Callable[[Mode], None] | None = None,
        flags: Flag = Flag.NONE,
        timeout_s: float | None = None,
    ) -> SessionLock:
        """See `dlm.lockspace.Lockspace`."""
        if mode is Mode.NL and not flags & _QUEUES:
            flags |= Flag.EXPEDITE
        elif noqueue:
            flags |= Flag.NOQUEUE
        lock, future, what = self._request("locking", name, mode, value_block, blocking, flags)
        try:
            await lock.within(future, timeout_s)
        except asyncio.CancelledError:
            await lock.discard(future)
            raise
        self.session.raise_unless_granted(future.result(), what)
        return lock

    async def adopt(
        self,
        name: str | bytes,
        mode: Mode,
        *,
        value_block: bool = False,
        blocking: Callable[[Mode], None] | None = None,
        persistent: bool = True,
    ) -> SessionLock:
        """See `dlm.lockspace.Lockspace`."""
        flags = Flag.ORPHAN | Flag.PERSISTENT if persistent else Flag.ORPHAN
        lock, future, what = self._request("adopting", name, mode, value_block, blocking, flags)
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            await settled(future)
            raise
        outcome = future.result()
        if outcome == EAGAIN:
            raise LockRefused(
                "other-mode", f"{what} was refused: it was left behind in another mode", status=EAGAIN
            )
        if outcome == ENOENT:
            why = "no process of this node left it behind"
            raise LockRefused("no-orphan", f"{what} was refused: {why}", status=ENOENT)
        self.session.raise_unless_granted(outcome, what)
        return lock

    async def purge(self, node: int = 0, pid: int = 0) -> None:
        """See `dlm.lockspace.Lockspace`."""
        what = f"freeing what was left behind in lockspace {self.name}"
        self.session.check_alive(what)
        future = self.session.submit(["purge", 0, self.name, node, pid])
        await asyncio.wait((future,))
        self.session.raise_unless_granted(future.result(), what)

    async def recovered(self, slot: int) -> None:
        """See `dlm.lockspace.Lockspace`."""
        what = f"ending the takeover of slot {slot} of lockspace {self.name}"
        self.session.check_alive(what)
        future = self.session.submit(["recovered", 0, self.name, slot, self.generation])
        await asyncio.wait((future,))
        self.session.raise_unless_granted(future.result(), what)

    async def leave(self) -> None:
        """See `dlm.lockspace.Lockspace`. Every lock of the lockspace is dead afterwards."""
        what = f"leaving lockspace {self.name}"
        self.session.check_alive(what)
        self.left = True
        self.session.trace.point("lock.left", space=self.name)
        future = self.session.submit(["leave", 0, self.name])
        # also if nobody waits any more; until then the name cannot be joined again
        future.add_done_callback(lambda _: self.session.forget_lockspace(self))
        await asyncio.wait((future,))
        self.session.raise_unless_granted(future.result(), what)

    def _request(
        self,
        doing: str,
        name: str | bytes,
        mode: Mode,
        value_block: bool,
        blocking: Callable[[Mode], None] | None,
        flags: Flag,
    ) -> tuple[SessionLock, asyncio.Future[Outcome], str]:
        resource = name.encode() if isinstance(name, str) else name
        shown = resource.decode(errors="backslashreplace")
        what = f"{doing} {shown} of lockspace {self.name} in {mode.name}"
        self.session.check_alive(what)
        if not 1 <= len(resource) <= 64:
            raise LockRefused(
                "invalid", f"{what} was refused: a name has 1 to 64 bytes, this one {len(resource)}"
            )
        if value_block:
            flags |= Flag.VALBLK
        block = bytearray(self.lvb_bytes) if flags & Flag.VALBLK else None
        lock = SessionLock(self, shown, block, blocking, flags)
        lock.point("lock.asked", mode=mode.name, had=Mode.IV.name, block=None)
        frame = ["request", 0, self.name, resource, int(mode), int(flags), blocking is not None]
        return lock, self.session.submit(frame, lock=lock), what
