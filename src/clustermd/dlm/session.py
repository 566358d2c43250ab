"""The client's side: a lock session over a connection to the node's lock daemon.

`Session` is given a function that sends frames and is fed the frames that come back; it turns them into the
coroutines of `dlm.lockspace`. What an operation completes with is applied to the lock at once when its frame
is handled (mode, value block), in the order in which the lock manager generated it; whoever waits
for it is woken after. So a blocking callback that follows a grant finds the lock granted.

A task that is cancelled while it waits does not leave its request behind (md-cluster spec 8.1, F16: a
request that nobody waits for is granted later to nobody, and hangs the cluster): the request is cancelled,
the outcome awaited, and what was granted after all given back.

While the group is suspended the daemon keeps operations; they only take longer.

What the session asks, is shown and gives back are trace points (`lock.*`), as the client sees it: a right counts from
the moment its grant is shown, and not any more from just before the frame that gives it back is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clustermd.dlm.lock import is_down_conversion
from clustermd.dlm.lockspace import LockspaceEvents, Slot
from clustermd.dlm.modes import (
    EAGAIN,
    EBUSY,
    ECANCEL,
    EDEADLK,
    EINVAL,
    ENOENT,
    EUNLOCK,
    Flag,
    Mode,
    StatusFlag,
)
from clustermd.dlm.wire import Frame
from clustermd.errors import BadBytes, ClusterLost, LockRefused, Refused
from clustermd.trace import Trace

_CODES = {
    EAGAIN: ("would-block", "another lock excludes this mode now"),
    EDEADLK: ("deadlock", "it and another conversion would wait for each other"),
    ECANCEL: ("cancelled", "the request was cancelled"),
    EUNLOCK: ("unlocked", "the lock has been freed"),
    EBUSY: ("busy", "an operation of this lock is still pending"),
    EINVAL: ("invalid", "the lock manager does not accept this combination of mode and flags"),
    ENOENT: ("no-such-lock", "the lock or its lockspace is gone"),
}

Outcome = int | Refused | None
"""A status (0 or negative), a refusal with words, or None: the session was lost."""


def _hex(block: bytes | bytearray | None) -> str | None:
    """A value block for a trace: hex without the zeros at its end."""
    return None if block is None else bytes(block).rstrip(b"\0").hex()


def _refused(status: int, what: str) -> LockRefused:
    code, why = _CODES.get(status, ("failed", f"the lock manager answered {status}"))
    return LockRefused(code, f"{what} was refused: {why}", status=status)


async def _settled(future: asyncio.Future[Outcome]) -> Outcome:
    """The outcome, awaited even if the task is cancelled (again) meanwhile."""
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            continue
    return future.result()


class SessionLock:
    """One lock (`dlm.lockspace.Lock`). `id` is 0 until the lock manager has given one."""

    def __init__(
        self,
        space: SessionLockspace,
        name: str,
        lvb: bytearray | None,
        blocking: Callable[[Mode], None] | None,
    ) -> None:
        self.name = name
        self.mode = Mode.IV
        self.lvb = lvb
        self.lvb_valid = True
        self.id = 0
        self.dead = False
        self.space = space
        self.blocking = blocking
        self._session = space.session
        self._busy = False
        self.number = space.session.next_number()

    async def convert(self, mode: Mode, *, noqueue: bool = False) -> None:
        """See `dlm.lockspace.Lock`. A down conversion that is cancelled stays done: it gave a right away."""
        what = f"converting {self.name} of lockspace {self.space.name} from {self.mode.name} to {mode.name}"
        self._session.check_alive(what)
        if self.dead:
            raise _refused(EUNLOCK, what)
        if self._busy:
            raise _refused(EBUSY, what)
        self._busy = True
        before = self.mode
        try:
            future = self._start(mode, Flag.NOQUEUE if noqueue else Flag.NONE)
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError:
                await self._give_up(future, before)
                raise
            self._session.raise_unless_granted(future.result(), what)
        finally:
            self._busy = False

    async def unlock(self) -> None:
        """See `dlm.lockspace.Lock`. A holder of PW or EX with a value block writes it (dlm.md 2.3)."""
        what = f"freeing {self.name} of lockspace {self.space.name}"
        self._session.check_alive(what)
        if self.dead:
            raise _refused(EUNLOCK, what)
        self.dead = True
        future = self._start_unlock()
        await asyncio.wait((future,))
        outcome = future.result()
        if outcome != EUNLOCK:
            self._session.raise_unless_granted(outcome, what)

    async def discard(self, future: asyncio.Future[Outcome]) -> None:
        """The task that waited for this new lock was cancelled: free it, whether granted or not."""
        self.dead = True
        if self.id:
            await _settled(self._start_unlock())
        await _settled(future)

    def _start(self, mode: Mode, flags: Flag, *, value_block: bool = True) -> asyncio.Future[Outcome]:
        lvb = None
        if self.lvb is not None and value_block:
            flags |= Flag.VALBLK
            lvb = bytes(self.lvb)
        if self._session.trace.on:
            self._trace_convert(mode, lvb if self.mode >= Mode.PW else None)
        return self._session.submit(["convert", 0, self.id, int(mode), int(flags), lvb], lock=self)

    def _start_unlock(self) -> asyncio.Future[Outcome]:
        lvb = None if self.lvb is None else bytes(self.lvb)
        written = lvb if self.mode >= Mode.PW else None
        self.point("lock.given", mode=Mode.IV.name, had=self.mode.name, block=_hex(written))
        return self._session.submit(["unlock", 0, self.id, int(Flag.FORCEUNLOCK), lvb], lock=self)

    def _trace_convert(self, mode: Mode, written: bytes | None) -> None:
        if is_down_conversion(self.mode, mode):
            self.point("lock.given", mode=mode.name, had=self.mode.name, block=_hex(written))
            return
        if {self.mode, mode} == {Mode.PR, Mode.CW}:
            # either may be gone before the other is shown; what both allow is sure
            self.point("lock.given", mode=Mode.CR.name, had=self.mode.name, block=None)
        self.point("lock.asked", mode=mode.name, had=self.mode.name, block=_hex(written))

    def point(self, name: str, **fields: object) -> None:
        """A trace point about this lock. `lock` is its number in the session, from 1."""
        trace = self._session.trace
        if trace.on:
            trace.point(name, space=self.space.name, resource=self.name, lock=self.number, **fields)

    async def _give_up(self, future: asyncio.Future[Outcome], before: Mode) -> None:
        """F16: no conversion stays queued or granted for a task that does not wait for it any more."""
        if not future.done():
            self._session.send_cancel(self.id)
        outcome = await _settled(future)
        if outcome == 0 and not self.dead and self.mode != before:
            if is_down_conversion(before, self.mode):
                return
            # what the grant read is not written back: that would clear the mark of a dead writer
            await _settled(self._start(before, Flag.NONE, value_block=before >= Mode.PW))


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
        name: str,
        mode: Mode = Mode.NL,
        *,
        value_block: bool = False,
        noqueue: bool = False,
        blocking: Callable[[Mode], None] | None = None,
    ) -> SessionLock:
        """See `dlm.lockspace.Lockspace`."""
        what = f"locking {name} of lockspace {self.name} in {mode.name}"
        self.session.check_alive(what)
        resource = name.encode()
        if not 1 <= len(resource) <= 64:
            raise LockRefused(
                "invalid", f"{what} was refused: a name has 1 to 64 bytes, this one {len(resource)}"
            )
        flags = Flag.EXPEDITE if mode is Mode.NL else Flag.NOQUEUE if noqueue else Flag.NONE
        if value_block:
            flags |= Flag.VALBLK
        lock = SessionLock(self, name, bytearray(self.lvb_bytes) if value_block else None, blocking)
        frame = ["request", 0, self.name, resource, int(mode), int(flags), blocking is not None]
        lock.point("lock.asked", mode=mode.name, had=Mode.IV.name, block=None)
        future = self.session.submit(frame, lock=lock)
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            await lock.discard(future)
            raise
        self.session.raise_unless_granted(future.result(), what)
        return lock

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
        future.add_done_callback(lambda _: self.session.spaces.pop(self.name, None))
        await asyncio.wait((future,))
        self.session.raise_unless_granted(future.result(), what)


class Session:
    """One connection to the lock daemon. Feed it `on_frame` and the group's fate; `send` carries frames out.

    `waiting` says, for each lockspace whose join waits, for which slots: (slot, node, name, state).
    """

    def __init__(self, send: Callable[[Frame], None], trace: Trace | None = None) -> None:
        self._send = send
        self.trace = trace or Trace()
        self._next_op = 1
        self._next_lock = 0
        self._pending: dict[int, tuple[asyncio.Future[Outcome], SessionLock | None]] = {}
        self._locks: dict[int, SessionLock] = {}
        self._joins: dict[str, tuple[int, SessionLockspace]] = {}
        self._lost = ""
        self.spaces: dict[str, SessionLockspace] = {}
        self.waiting: dict[str, tuple[tuple[int, int, str, str], ...]] = {}
        self.trace.point("session.begin")

    def next_number(self) -> int:
        """The number of a new lock of this session, from 1."""
        self._next_lock += 1
        return self._next_lock

    async def join(
        self, name: str, events: LockspaceEvents, *, lvb_bytes: int = 64, max_slots: int
    ) -> SessionLockspace:
        """Enter a lockspace of at most `max_slots` members; returns after the first recover_done.

        Waits while only slots of dead members whose end or takeover is not finished are left. Raises LockRefused
        ("too-many-nodes", "value-block-size", "already-joined"), ClusterLost.
        """
        what = f"joining lockspace {name}"
        self.check_alive(what)
        if name in self.spaces or name in self._joins:
            raise LockRefused("already-joined", f"{what} was refused: this session is in it already")
        space = SessionLockspace(self, name, events, lvb_bytes)
        future = self.submit(["join", 0, name, lvb_bytes, max_slots])
        op = self._next_op - 1
        self._joins[name] = (op, space)
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            if not self._lost and not isinstance(future.done() and future.result(), Refused):
                await _settled(self.submit(["leave", 0, name]))
            self._pending.pop(op, None)
            self._joins.pop(name, None)
            self.spaces.pop(name, None)
            raise
        finally:
            self.waiting.pop(name, None)
        self._joins.pop(name, None)
        self.raise_unless_granted(future.result(), what)
        return space

    # ---- from the connection

    def on_frame(self, frame: Frame) -> None:
        """A frame of the daemon. Raises BadBytes for one that `dlm.wire` does not describe."""
        match frame:
            case ["cast", op, lock, status, sb_flags, lvb, mode]:
                self._on_cast(op, lock, status, sb_flags, lvb, Mode(mode))
            case ["bast", number, mode]:
                lock = self._locks.get(number)
                if lock is not None and not lock.dead and lock.blocking is not None:
                    lock.point("lock.blocking", mode=Mode(mode).name)
                    lock.blocking(Mode(mode))
            case ["answer", op, rc, number]:
                self._on_answer(op, rc, number)
            case ["refused", op, code, message, data]:
                self._resolve(op, LockRefused(code, message, **data))
            case ["prep", name]:
                if name in self.spaces:
                    self.spaces[name].events.recover_prep()
            case ["slot", name, slot, node, node_name]:
                if name in self.spaces:
                    self.spaces[name].events.recover_slot(Slot(slot, node, node_name))
            case ["done", name, slots, our_slot, generation]:
                self._on_done(name, tuple(Slot(*slot) for slot in slots), our_slot, generation)
            case ["waits", _, name, holders]:
                self.waiting[name] = tuple((slot, node, who, state) for slot, node, who, state in holders)
            case _:
                raise BadBytes(
                    "bad-frame", f"the lock daemon sent {str(frame)[:80]}, which is no frame of it"
                )

    def on_suspended(self, reason: str) -> None:
        for space in list(self.spaces.values()):
            space.events.suspended(reason)

    def on_resumed(self) -> None:
        for space in list(self.spaces.values()):
            space.events.resumed()

    def on_lost(self, reason: str) -> None:
        """The connection or the state behind it is gone: every pending call raises ClusterLost."""
        if self._lost:
            return
        self._lost = reason or "the lock daemon is gone"
        self.trace.point("lock.lost", reason=self._lost)
        spaces, self.spaces = self.spaces, {}
        for lock in self._locks.values():
            lock.dead = True
        self._locks.clear()
        self._joins.clear()
        for space in spaces.values():
            space.events.lost(self._lost)
        pending, self._pending = self._pending, {}
        for future, _ in pending.values():
            if not future.done():
                future.set_result(None)

    # ---- for locks and lockspaces

    def check_alive(self, what: str) -> None:
        if self._lost:
            raise ClusterLost("session-lost", f"{what} is not possible: {self._lost}")

    def raise_unless_granted(self, outcome: Outcome, what: str) -> None:
        """Raises ClusterLost or LockRefused for an outcome that is not 0."""
        if outcome is None:
            raise ClusterLost("session-lost", f"{what} came to nothing: {self._lost}")
        if isinstance(outcome, Refused):
            raise outcome
        if outcome != 0:
            raise _refused(outcome, what)

    def submit(self, frame: Frame, *, lock: SessionLock | None = None) -> asyncio.Future[Outcome]:
        """Send an operation; its number is filled in. The future never gets an exception."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if self._lost:
            future.set_result(None)
            return future
        frame[1] = self._next_op
        self._next_op += 1
        self._pending[frame[1]] = (future, lock)
        self._send(frame)
        return future

    def send_cancel(self, lock: int) -> None:
        """Cancel what is pending on a lock; the pending operation's own completion tells the outcome."""
        if self._lost:
            return
        self._send(["cancel", self._next_op, lock])
        self._next_op += 1

    # ---- inside

    def _resolve(self, op: int, outcome: Outcome) -> None:
        future, _ = self._pending.pop(op, (None, None))
        if future is not None and not future.done():
            future.set_result(outcome)

    def _on_answer(self, op: int, rc: int, number: int) -> None:
        _, lock = self._pending.get(op, (None, None))
        if rc != 0 or lock is None:
            self._resolve(op, rc)
            return
        # a request was accepted; its completion follows
        lock.id = number
        self._locks[number] = lock
        if lock.dead:
            # whoever asked for it was cancelled before the lock had a number
            self._send(["unlock", self._next_op, number, int(Flag.FORCEUNLOCK), None])
            self._next_op += 1

    def _on_cast(
        self, op: int, number: int, status: int, sb_flags: int, lvb: bytes | None, mode: Mode
    ) -> None:
        lock = self._locks.get(number)
        if lock is not None:
            lock.mode = mode
            if status == 0:
                lock.lvb_valid = not sb_flags & StatusFlag.VALNOTVALID
                if lvb is not None and lock.lvb is not None:
                    lock.lvb[:] = lvb
            if self.trace.on and not lock.dead and not lock.space.left:
                self._trace_cast(lock, status, lvb)
            if mode is Mode.IV:
                del self._locks[number]
                lock.dead = True
                # freeing a lock also ends whatever else was pending on it
                for other in [op for op, (_, owner) in self._pending.items() if owner is lock]:
                    self._resolve(other, status)
        self._resolve(op, status)

    def _trace_cast(self, lock: SessionLock, status: int, lvb: bytes | None) -> None:
        if status == 0:
            valid = lock.lvb_valid if lock.lvb is not None else None
            lock.point("lock.granted", mode=lock.mode.name, block=_hex(lvb), valid=valid)
        else:
            lock.point("lock.refused", mode=lock.mode.name, status=status)

    def _on_done(self, name: str, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        op, space = self._joins.pop(name, (0, None))
        if space is not None:
            self.spaces[name] = space
        else:
            space = self.spaces.get(name)
            if space is None:
                return
        space.slots, space.our_slot, space.generation = slots, our_slot, generation
        space.events.recover_done(slots, our_slot, generation)
        if op:
            self._resolve(op, 0)
