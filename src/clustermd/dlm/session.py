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

from clustermd.dlm.lockspace import LockspaceEvents, Slot
from clustermd.dlm.modes import ECANCEL, Flag, Mode, SpaceFlag, StatusFlag
from clustermd.dlm.session_lock import Outcome, hex_of, refused, settled
from clustermd.dlm.session_lock import SessionLock as SessionLock
from clustermd.dlm.session_lockspace import SessionLockspace as SessionLockspace
from clustermd.dlm.wire import Frame
from clustermd.errors import BadBytes, ClusterLost, LockRefused, Refused
from clustermd.trace import Trace


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
        self,
        name: str,
        events: LockspaceEvents,
        *,
        lvb_bytes: int = 64,
        max_slots: int,
        deadlocks: bool = False,
        exclusive: bool = False,
    ) -> SessionLockspace:
        """Enter a lockspace of at most `max_slots` members; returns after the first recover_done.

        With `deadlocks` requests that would close a circle of waits are refused ("deadlock"; `dlm.deadlock`); all
        members must say the same. With `exclusive` (NEWEXCL) nobody of this node may be in it yet. Waits while only
        slots of dead members whose end or takeover is not finished are left. Raises LockRefused ("too-many-nodes",
        "value-block-size", "deadlock-detection", "exists", "already-joined"), ClusterLost.
        """
        what = f"joining lockspace {name}"
        self.check_alive(what)
        if name in self.spaces or name in self._joins:
            raise LockRefused("already-joined", f"{what} was refused: this session is in it already")
        space = SessionLockspace(self, name, events, lvb_bytes)
        flags = SpaceFlag.DEADLOCKS if deadlocks else SpaceFlag.NONE
        if exclusive:
            flags |= SpaceFlag.NEWEXCL
        future = self.submit(["join", 0, name, lvb_bytes, max_slots, int(flags)])
        op = self._next_op - 1
        self._joins[name] = (op, space)
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            if not self._lost and not isinstance(future.done() and future.result(), Refused):
                await settled(self.submit(["leave", 0, name]))
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
            case ["adopted", op, lock, sb_flags, lvb, mode]:
                self._on_adopted(op, lock, sb_flags, lvb, Mode(mode))
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
            raise refused(outcome, what)

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

    def send_cancel(self, lock: int, status: int = ECANCEL) -> None:
        """Cancel what is pending on a lock; the pending operation's own completion tells the outcome."""
        if self._lost:
            return
        self._send(["cancel", self._next_op, lock, status])
        self._next_op += 1

    def forget_lockspace(self, space: SessionLockspace) -> None:
        """It was left. What was left behind there is nobody's lock here any more."""
        self.spaces.pop(space.name, None)
        for number in [number for number, lock in self._locks.items() if lock.space is space]:
            lock = self._locks.pop(number)
            lock.dead, lock.mode = True, Mode.IV

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
        elif lock.too_late:
            self.send_cancel(number, lock.too_late)

    def _on_adopted(self, op: int, number: int, sb_flags: int, lvb: bytes | None, mode: Mode) -> None:
        _, lock = self._pending.get(op, (None, None))
        if lock is not None:
            lock.id = number
            self._locks[number] = lock
            lock.status_flags = StatusFlag(sb_flags)
            self._granted(lock, lvb, mode)
            if self.trace.on and not lock.space.left:
                self._trace_cast(lock, 0, lvb)
        self._resolve(op, 0)

    @staticmethod
    def _granted(lock: SessionLock, lvb: bytes | None, mode: Mode) -> None:
        lock.mode = mode
        lock.lvb_valid = not lock.status_flags & StatusFlag.VALNOTVALID
        if lvb is not None and lock.lvb is not None:
            lock.lvb[:] = lvb

    def _on_cast(
        self, op: int, number: int, status: int, sb_flags: int, lvb: bytes | None, mode: Mode
    ) -> None:
        lock = self._locks.get(number)
        if lock is not None:
            lock.mode = mode
            lock.status_flags = StatusFlag(sb_flags)
            if status == 0:
                self._granted(lock, lvb, mode)
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
            lock.point("lock.granted", mode=lock.mode.name, block=hex_of(lvb), valid=valid)
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
