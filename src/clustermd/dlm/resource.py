"""One lock resource: three ordered queues and a value block, and the rules that move locks between them.

A resource is a name on which locks are held. A lock is in exactly one of three queues: *granted*
(it has its mode), *converting* (it keeps its old mode and wants another) or *waiting* (it has nothing
yet). `conflict` asks whether some other lock's granted mode is incompatible with the mode wanted; a
converting lock counts with what it holds, never with what it wants.

Order is what makes the rules fair (dlm.md 1.4): a new conversion that conflicts with nothing jumps the
queue; once queued, conversions are granted strictly from the head; any queued conversion holds up
every waiting request; requests are granted strictly from the head of the waiting queue. NOORDER and
EXPEDITE are the only ways around.

Two converters that each block the other can never both be granted; the newcomer is told (EDEADLK),
demoted to NL (CONVDEADLK) or queued and blasted (NODLCKWT): dlm.md 1.6. Circles over several resources are found
where the lockspace asks for it (`deadlock`): then `waits` knows every lock in a queue.

The value block moves when a lock's mode changes, in the direction that `LVB_DIRECTION` gives (dlm.md 2.2).
A mark says that its last writer died; only the next write clears it.

Everything here is synchronous and deterministic: all replicas call it with the same operations in the
same order. Effects are appended to the list that the engine handed in.
"""

from __future__ import annotations

from clustermd.dlm.deadlock import Waits
from clustermd.dlm.effects import Bast, Cast
from clustermd.dlm.lock import (
    ALTCW,
    ALTMODE,
    ALTPR,
    CONVDEADLK,
    CW,
    DEMOTED,
    EX,
    EXPEDITE,
    HEADQUE,
    IV,
    IVVALBLK,
    LVB_DIRECTION,
    NL,
    NODLCKWT,
    NOORDER,
    NOQUEUE,
    NOQUEUEBAST,
    PR,
    PW,
    QUECVT,
    VALBLK,
    VALNOTVALID,
    Callbacks,
    is_down_conversion,
)
from clustermd.dlm.lock import Lock as Lock
from clustermd.dlm.modes import COMPATIBLE, EAGAIN, EBUSY, ECANCEL, EDEADLK, EUNLOCK


class Resource:
    """The queues and the value block of one name. `lvb` is None until first written."""

    __slots__ = (
        "callbacks",
        "converting",
        "granted",
        "invalid",
        "lvb",
        "lvb_seq",
        "name",
        "waiting",
        "waits",
    )

    def __init__(self, name: bytes, callbacks: Callbacks, waits: Waits | None = None) -> None:
        self.name = name
        self.callbacks = callbacks
        self.waits = waits
        self.granted: list[Lock] = []
        self.converting: list[Lock] = []
        self.waiting: list[Lock] = []
        self.lvb: bytes | None = None
        self.lvb_seq = 0
        self.invalid = False

    @property
    def empty(self) -> bool:
        return not (self.granted or self.converting or self.waiting)

    # ---- the four operations (dlm.md 1.5); arguments were checked by the engine

    def request(self, lock: Lock) -> bool:
        """A new lock. Returns False if it is gone: EAGAIN or EDEADLK is cast instead of queueing it."""
        if self._try_grant(lock, now=True) is _GRANTED:
            self._grant(lock)
            return True
        if lock.fl & NOQUEUE:
            self._cast(lock, EAGAIN)
            self._bast_blockers_of_noqueue(lock)
            return False
        self._enqueue(self.waiting, lock)
        if self.waits is not None and self.waits.close_a_circle(lock):
            self.drop(lock)
            self._cast(lock, EDEADLK)
            return False
        self._bast_blockers(lock, self.granted)
        return True

    def convert(self, lock: Lock, op: int, mode: int, flags: int) -> int:
        """Change the mode of a granted lock. Returns 0, or EBUSY if an operation of it is pending."""
        if lock not in self.granted:
            return EBUSY
        lock.op = op
        lock.fl = flags
        lock.sb = 0
        lock.rq = mode
        outcome = self._try_grant(lock, now=True)
        if outcome is _DEMOTED:
            self._grant_converting(IV, False)
            outcome = _GRANTED if self._can_grant(lock, now=True) else _BLOCKED
        if outcome is _GRANTED:
            self._grant(lock)
            self.pend()
        elif outcome is _DEADLOCK and not flags & NODLCKWT:
            lock.rq = IV
            self._cast(lock, EDEADLK)
        elif flags & NOQUEUE:
            self._cast(lock, EAGAIN)
            self._bast_blockers_of_noqueue(lock)
        else:
            place = self.granted.index(lock)
            del self.granted[place]
            self._enqueue(self.converting, lock)
            if self.waits is not None and self.waits.close_a_circle(lock):
                self.drop(lock)
                self.granted.insert(place, lock)
                lock.rq = IV
                self._cast(lock, EDEADLK)
            else:
                self._bast_blockers(lock, self.granted)
        return 0

    def unlock(self, lock: Lock, op: int, flags: int) -> None:
        """Remove the lock from whatever queue it is in; a PW or EX holder may write the value block (dlm.md 2.3)."""
        lock.op = op
        lock.sb = 0
        if lock.gr >= PW:
            effective = lock.fl | flags
            if effective & IVVALBLK:
                self.invalid = True
            elif effective & VALBLK and lock.lvb is not None:
                self._write_lvb(lock)
        self.drop(lock)
        lock.gr = IV
        self._cast(lock, EUNLOCK)
        self.pend()

    def cancel(self, lock: Lock, status: int = ECANCEL) -> bool:
        """End a pending operation with `status`; nothing happens to a granted lock. Returns whether the lock lives."""
        if lock in self.converting:
            self.revert(lock)
        elif lock in self.waiting:
            self.drop(lock)
        else:
            return True
        lock.sb = 0
        self._cast(lock, status)
        self.pend()
        return lock.gr != IV

    # ---- what the engine uses when a session ends

    def drop(self, lock: Lock) -> None:
        """Take it out of its queue."""
        if self.waits is not None:
            self.waits.end(lock)
        for queue in (self.granted, self.converting, self.waiting):
            if lock in queue:
                queue.remove(lock)
                return

    def end(self, lock: Lock, status: int) -> None:
        """Tell the owner of a lock that is gone already."""
        lock.sb = 0
        self._cast(lock, status)

    def revert(self, lock: Lock) -> None:
        """A queued conversion goes back to granted in its old mode."""
        self.drop(lock)
        lock.rq = IV
        self._add_granted(lock)

    def adopt(self, lock: Lock) -> None:
        """A granted lock has a new owner, who is told its mode, its value if he asks for it, and who waits for it."""
        lock.rq, lock.sb, lock.highbast, lock.cast_mode = IV, 0, 0, lock.gr
        lvb = None
        if lock.fl & VALBLK:
            if self.lvb is not None:
                lock.lvb, lock.lvb_seq = self.lvb, self.lvb_seq
            lvb = lock.lvb
            lock.sb = VALNOTVALID if self.invalid else 0
        self.callbacks.out.append(Cast(lock.session, lock.id, lock.op, 0, lock.sb, lvb, lock.gr, True, True))
        self.pend()

    def pend(self) -> None:
        """Grant what has become grantable, then blast the holders that block the rest (dlm.md 1.5)."""
        high, cw_blocked = self._grant_converting(IV, False)
        high, cw_blocked = self._grant_waiting(high, cw_blocked)
        if high == IV:
            return
        for lock in list(self.granted):
            if not lock.wants_bast:
                continue
            if lock.gr == PR and cw_blocked:
                if lock.highbast >= EX:
                    continue
            elif lock.highbast >= high or (lock.gr, high) in COMPATIBLE:
                continue
            self._bast(lock, CW if cw_blocked and high == PR and lock.gr == PR else high)
            lock.highbast = high

    # ---- the grant rules (dlm.md 1.4, 1.6)

    def _can_grant(self, lock: Lock, *, now: bool) -> bool:
        if lock.fl & EXPEDITE:
            return True
        if _conflict(self.granted, lock) or _conflict(self.converting, lock):
            return False
        if lock.gr != IV:
            if now:
                return not lock.fl & QUECVT or not self.converting
            return bool(lock.fl & NOORDER) or self.converting[0] is lock
        if lock.fl & NOORDER:
            return True
        if now:
            return not self.converting and not self.waiting
        return not self.converting and self.waiting[0] is lock

    def _try_grant(self, lock: Lock, *, now: bool) -> int:
        if self._can_grant(lock, now=now):
            return _GRANTED
        if lock.gr != IV and not lock.fl & NOQUEUE and self._deadlocked(lock):
            if not lock.fl & CONVDEADLK:
                return _DEADLOCK
            lock.gr = NL
            lock.sb |= DEMOTED
            return _DEMOTED
        wanted = lock.rq
        if lock.fl & ALTPR and wanted != PR:
            lock.rq = PR
        elif lock.fl & ALTCW and wanted != CW:
            lock.rq = CW
        else:
            return _BLOCKED
        if self._can_grant(lock, now=now):
            lock.sb |= ALTMODE
            return _GRANTED
        lock.rq = wanted
        return _BLOCKED

    def _deadlocked(self, lock: Lock) -> bool:
        ahead = True
        for other in self.converting:
            if other is lock:
                ahead = False
                continue
            blocked_by_us = (lock.gr, other.rq) not in COMPATIBLE
            if blocked_by_us and (ahead or (other.gr, lock.rq) not in COMPATIBLE):
                return True
        return False

    def _grant_converting(self, high: int, cw_blocked: bool) -> tuple[int, bool]:
        demotion_restart = True
        while True:
            granted = demoted_now = False
            highest = IV
            for lock in list(self.converting):
                was_demoted = lock.sb & DEMOTED
                outcome = self._try_grant(lock, now=False)
                if outcome is _GRANTED:
                    self._grant(lock)
                    granted = True
                elif not was_demoted and lock.sb & DEMOTED:
                    demoted_now = True
                elif outcome is _DEADLOCK:
                    if lock.fl & NODLCKWT and lock.wants_bast and lock.highbast < lock.rq:
                        self._bast(lock, lock.rq)
                        lock.highbast = lock.rq
                else:
                    highest = max(highest, lock.rq)
                    cw_blocked = cw_blocked or lock.rq == CW
            if granted:
                continue
            if demoted_now and demotion_restart:
                demotion_restart = False
                continue
            return max(high, highest), cw_blocked

    def _grant_waiting(self, high: int, cw_blocked: bool) -> tuple[int, bool]:
        for lock in list(self.waiting):
            if self._try_grant(lock, now=False) is _GRANTED:
                self._grant(lock)
            else:
                high = max(high, lock.rq)
                cw_blocked = cw_blocked or lock.rq == CW
        return high, cw_blocked

    def _grant(self, lock: Lock) -> None:
        before = lock.gr
        self._transfer_lvb(lock)
        if lock.gr != lock.rq or lock not in self.granted:
            lock.gr = lock.rq
            self.drop(lock)
            self._add_granted(lock)
        lock.rq = IV
        lock.highbast = 0
        self._cast(lock, 0, rising=not is_down_conversion(before, lock.gr))

    def _add_granted(self, lock: Lock) -> None:
        # The place matters: basts go out in this order. Only a lock whose last conversion failed under
        # NOQUEUE still has a requested mode here and can stand before a new one.
        for place, other in enumerate(self.granted):
            if other.rq < lock.gr:
                self.granted.insert(place, lock)
                return
        self.granted.append(lock)

    def _enqueue(self, queue: list[Lock], lock: Lock) -> None:
        if lock.fl & HEADQUE:
            queue.insert(0, lock)
        else:
            queue.append(lock)
        if self.waits is not None:
            self.waits.begin(self, lock)

    # ---- the value block (dlm.md 2)

    def _transfer_lvb(self, lock: Lock) -> None:
        direction = LVB_DIRECTION[lock.gr][lock.rq]
        if direction == "r":
            if not lock.fl & VALBLK or lock.lvb is None or self.lvb is None:
                return
            lock.lvb = self.lvb
            lock.lvb_seq = self.lvb_seq
        elif direction == "w":
            if lock.fl & IVVALBLK:
                self.invalid = True
                return
            if not lock.fl & VALBLK or lock.lvb is None:
                return
            self._write_lvb(lock)
        if self.invalid:
            lock.sb |= VALNOTVALID

    def _write_lvb(self, lock: Lock) -> None:
        self.lvb = lock.lvb
        self.lvb_seq += 1
        lock.lvb_seq = self.lvb_seq
        self.invalid = False

    # ---- callbacks (dlm.md 1.8)

    def _cast(self, lock: Lock, status: int, *, rising: bool = False) -> None:
        lvb = None
        if status == 0 and lock.lvb is not None and LVB_DIRECTION[lock.cast_mode][lock.gr] != "w":
            lvb = lock.lvb
        cast = Cast(lock.session, lock.id, lock.op, status, lock.sb, lvb, lock.gr, rising)
        self.callbacks.out.append(cast)
        self.callbacks.basts.pop(lock.id, None)
        lock.cast_mode = lock.gr

    def _bast(self, lock: Lock, mode: int) -> None:
        if lock.cast_mode != IV and (mode, lock.cast_mode) in COMPATIBLE:
            return
        last = self.callbacks.basts.get(lock.id, IV)
        if last == mode or (last > mode and last > PR):
            return
        self.callbacks.basts[lock.id] = mode
        self.callbacks.out.append(Bast(lock.session, lock.id, mode))

    def _bast_blockers(self, lock: Lock, queue: list[Lock]) -> None:
        for holder in queue:
            if holder is lock or not holder.wants_bast:
                continue
            if (holder.gr, lock.rq) in _MIDDLE:
                if holder.highbast >= EX:
                    continue
            elif holder.highbast >= lock.rq or (holder.gr, lock.rq) in COMPATIBLE:
                continue
            self._bast(holder, lock.rq)
            holder.highbast = lock.rq

    def _bast_blockers_of_noqueue(self, lock: Lock) -> None:
        if lock.fl & NOQUEUEBAST:
            self._bast_blockers(lock, self.granted)
            self._bast_blockers(lock, self.converting)


_GRANTED, _BLOCKED, _DEADLOCK, _DEMOTED = range(4)
_MIDDLE = frozenset(((PR, CW), (CW, PR)))


def _conflict(queue: list[Lock], lock: Lock) -> bool:
    rq = lock.rq
    for other in queue:  # noqa: SIM110  the hottest loop of the engine: any() would make a generator
        if (other.gr, rq) not in COMPATIBLE and other is not lock:
            return True
    return False
