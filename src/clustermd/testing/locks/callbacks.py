"""Completions and blocking callbacks: none lost, none twice, none for nobody (dlm.md 1.3, 1.8).

Blocking callbacks are judged from both sides. One that says nothing new must not come: the holder never asked for
callbacks, has given up what is in the way, or was told as much since its last grant. And one that is due must have
come: when the queues were looked at, every holder in the way of somebody in a queue was told a mode as strong as what
is wanted. Nobody tells lost sessions, converting locks, or of a conversion that is deadlocked or was demoted and
is therefore not counted among the blocked (dlm.md 1.5 step 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from clustermd.dlm.effects import Bast, Cast
from clustermd.dlm.modes import EAGAIN, ECANCEL, EDEADLK, EUNLOCK, Flag, Mode, StatusFlag
from clustermd.dlm.resource import Resource
from clustermd.testing.locks import circles
from clustermd.testing.locks.ledger import Input, Ledger, Queues, Record, ResourceKey
from clustermd.testing.locks.modes import is_down, may_coexist
from clustermd.testing.locks.rules import LockRuleBroken

TOLD_AGAIN = (Mode.PR, Mode.CW)
"""Holders of these are told of the other again and again, which also forgets stronger ones (dlm.md 1.8)."""


@dataclass(slots=True)
class Callbacks:
    """The rules of callbacks, over what the ledger knows."""

    ledger: Ledger

    def cast(self, call: Input, cast: Cast) -> Record:
        """One completion. Returns the lock's record, as it was before."""
        record = self.ledger.records.get(cast.lock)
        if record is None or record.session != cast.session:
            raise LockRuleBroken("callback-after-end", f"{cast} for a lock that does not exist")
        if cast.session in self.ledger.lost:
            rule = "zombie-granted" if cast.status == 0 else "callback-after-end"
            raise LockRuleBroken(rule, f"{cast} for a session that is lost")
        if cast.status != EUNLOCK and not record.pending:
            raise LockRuleBroken("completion-twice", f"{cast}, but nothing of the lock is pending")
        unlocked = call.word == "unlock" and cast.lock == call.lock
        if cast.op != (call.op if unlocked else record.op if record.pending else 0):
            raise LockRuleBroken("completion-twice", f"{cast} completes another operation than {record.op}")
        self._status(call, cast, record)
        return record

    def _status(self, call: Input, cast: Cast, record: Record) -> None:
        mine, flags = cast.lock == call.lock, record.fl
        stays = self._holds(record)
        if cast.adopted:
            legal = mine and call.word == "request" and cast.status == 0 and cast.rising
        elif cast.status == 0:
            legal, stays = self._granted(cast, record), cast.mode
        elif cast.status == EAGAIN:
            legal = mine and call.word in ("request", "convert") and bool(flags & Flag.NOQUEUE)
        elif call.word == "cancel":
            legal = mine and cast.status == call.status
        elif cast.status == EDEADLK:
            legal = mine and call.word in ("request", "convert")
            if not self._is_stuck(call, cast, record):
                rule = "deadlock" if record.key[0] in self.ledger.seeking else "conversion-deadlock"
                raise LockRuleBroken(rule, f"{cast}, but there is no deadlock")
            if cast.sb_flags & StatusFlag.DEMOTED:
                stays = Mode.NL
        elif cast.status == ECANCEL:
            legal = call.word == "leave" and call.orphans(record)
        else:
            unlocked = mine and call.word == "unlock"
            legal = cast.status == EUNLOCK and (
                unlocked or (call.word == "leave" and cast.session in call.keys)
            )
            stays = Mode.IV
        if not legal or cast.mode != stays:
            raise LockRuleBroken("status", f"{cast} is not what {record} can be told by {call.word}")

    def _granted(self, cast: Cast, record: Record) -> bool:
        demoted = bool(cast.sb_flags & StatusFlag.DEMOTED)
        before = Mode.NL if demoted else record.mode
        if not cast.rising and not is_down(before, cast.mode):
            raise LockRuleBroken("rise-not-held-back", f"{cast} gives more rights than {before}")
        alternatives = [Mode.PR] if record.fl & Flag.ALTPR else [Mode.CW] if record.fl & Flag.ALTCW else []
        wanted = alternatives if cast.sb_flags & StatusFlag.ALTMODE else [record.rq]
        return cast.mode in wanted and (not demoted or bool(record.fl & Flag.CONVDEADLK))

    def _is_stuck(self, call: Input, cast: Cast, record: Record) -> bool:
        """Whether a request or conversion that is submitted now may be told of a deadlock."""
        if record.fl & (Flag.NODLCKWT | Flag.NOQUEUE):
            return False
        if call.word == "convert" and self.deadlocked(cast.lock, record):
            return True
        if record.key[0] not in self.ledger.seeking:
            return False
        # a demotion has let others pass before the circle was looked for: what was there is not known any more
        return bool(cast.sb_flags & StatusFlag.DEMOTED) or circles.would_close(self.ledger, record)

    def deadlocked(self, lock: int, record: Record) -> bool:
        """Whether a conversion that is submitted now meets one in the queue that it blocks (dlm.md 1.6)."""
        was = self.ledger.queues[record.key]
        held = next((granted for other, granted, _ in was.granted if other == lock), Mode.IV)
        return any(other != lock and not may_coexist(held, wanted) for other, _, wanted in was.converting)

    def _holds(self, record: Record) -> int:
        was = self.ledger.queues.get(record.key, Queues())
        return next((held for lock, held, _ in (*was.granted, *was.converting) if lock == record.id), Mode.IV)

    def bast(self, bast: Bast) -> None:
        """One blocking callback."""
        record = self.ledger.records.get(bast.lock)
        if record is None or record.session != bast.session or bast.session in self.ledger.lost:
            raise LockRuleBroken("callback-after-end", f"{bast} for nobody")
        if not record.wants_bast:
            raise LockRuleBroken("callback-needless", f"{bast}, but its owner asked for no callbacks")
        if may_coexist(record.mode, bast.mode):
            raise LockRuleBroken("callback-needless", f"{bast}, but what is held is only {record.mode}")
        again = record.told >= bast.mode
        if again and record.mode not in TOLD_AGAIN:
            raise LockRuleBroken("callback-needless", f"{bast}, but its owner was told {record.told} already")
        record.told = max(record.told, bast.mode)

    def all_answered(self, key: ResourceKey, resource: Resource) -> None:
        """Whether everything that is pending stands in a queue, and the other way round."""
        records = self.ledger.records
        for lock in resource.granted:
            if records[lock.id].pending:
                raise LockRuleBroken("completion-lost", f"{records[lock.id]} is granted and was never told")
        for lock in (*resource.converting, *resource.waiting):
            if lock.session in self.ledger.lost:
                raise LockRuleBroken("zombie-granted", f"{records[lock.id]} is lost, and would be granted")
            if not records[lock.id].pending:
                raise LockRuleBroken("completion-twice", f"{records[lock.id]} is queued, but was answered")

    def holders_told(self, key: ResourceKey, resource: Resource) -> None:
        """Whether every holder in the way of somebody has been told."""
        queued = [*resource.converting, *resource.waiting]
        if not queued:
            return
        was = self.ledger.queues.get(key, Queues())
        known = {lock for lock, _, _ in (*was.converting, *was.waiting)}
        records = self.ledger.records
        for holder in resource.granted:
            record = records[holder.id]
            if not record.wants_bast or record.session in self.ledger.lost:
                continue
            for lock in queued:
                if may_coexist(holder.gr, lock.rq) or record.told >= lock.rq:
                    continue
                if lock.id in known and (record.fresh or self._not_counted(resource, lock.id)):
                    continue
                raise LockRuleBroken(
                    "holder-not-told", f"{record} is in the way of {records[lock.id]} and was not told"
                )

    def _not_counted(self, resource: Resource, lock_id: int) -> bool:
        for place, lock in enumerate(resource.converting):
            if lock.id == lock_id:
                if self.ledger.records[lock_id].fl & Flag.CONVDEADLK and lock.gr == Mode.NL:
                    return True
                return any(
                    not may_coexist(lock.gr, other.rq)
                    and (number < place or not may_coexist(other.gr, lock.rq))
                    for number, other in enumerate(resource.converting)
                    if other is not lock
                )
        return False
