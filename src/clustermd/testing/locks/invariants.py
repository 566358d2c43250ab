"""What must hold of a lock engine after every input (dlm.md 6.9), by an independent reading of its rules.

A `Checker` that watches an engine sees every call of it: the arguments, the return code, and the effects. From
these it keeps a ledger of its own and compares the engine's state with it and with the rules:

    queues      compatible grants, one queue a lock, the order of grants, no missed grant, no deadlock (here)
    callbacks   exactly one completion, blocking callbacks where due and only there (`callbacks`)
    values      who wrote what, what a reader gets, when it is not valid (`values`)
    orphans     who leaves what behind, and who gets it (here); circles of waits (`circles`)
    membership  slots, and recovery callbacks (`membership`)

It raises `LockRuleBroken`, out of the call that broke the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustermd.dlm.effects import Answer, Bast, Cast, Effect, RecoverDone, RecoverPrep, RecoverSlot
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import EAGAIN, ENOENT, Flag, Mode, StatusFlag
from clustermd.dlm.resource import Lock, Resource
from clustermd.testing.locks import circles
from clustermd.testing.locks.callbacks import Callbacks
from clustermd.testing.locks.ledger import Input, Ledger, Queues, Record, ResourceKey, read_call
from clustermd.testing.locks.membership import Membership
from clustermd.testing.locks.modes import is_down, may_coexist
from clustermd.testing.locks.rules import LockRuleBroken
from clustermd.testing.locks.values import Values

INPUTS = (
    "open_session", "lose_sessions", "end_sessions", "join", "leave", "recovered",
    "request", "convert", "unlock", "cancel", "purge",
)  # fmt: skip


@dataclass(slots=True)
class Ends:
    """What really became of nodes' lives, (node, incarnation): proved dead, or gone with a goodbye."""

    proved: set[tuple[int, int]] = field(default_factory=set)
    left: set[tuple[int, int]] = field(default_factory=set)


class Checker:
    """The rules, over one engine after the other if they share a history. `watch` before the first input.

    `ended`, if it is known, says which nodes' locks may be taken away.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self.ledger = Ledger()
        self.values = Values(self.ledger)
        self.callbacks = Callbacks(self.ledger)
        self.membership = Membership(self.ledger)
        self.told: list[Effect] = []
        self.ended: Ends | None = None
        if engine is not None:
            self.watch(engine)

    def clone(self) -> Checker:
        """A checker that knows the same and goes its own way; it watches nothing."""
        twin = Checker()
        twin.ledger = self.ledger.clone()
        twin.values = self.values.clone(twin.ledger)
        twin.callbacks = Callbacks(twin.ledger)
        twin.membership = self.membership.clone(twin.ledger)
        twin.ended = self.ended
        return twin

    def watch(self, engine: Engine) -> None:
        """Judge every input of `engine` from now on. Its state must be what this checker knows."""
        for word in INPUTS:
            setattr(engine, word, self._watched(engine, word))

    def unwatch(self, engine: Engine) -> None:
        for word in INPUTS:
            delattr(engine, word)

    def after(self, effects: list[Effect]) -> None:
        """What the engine handed out must be what its inputs caused, in that order (I18)."""
        told, self.told = self.told, []
        if [effect for effect in effects if isinstance(effect, (Cast, Bast))] != told:
            raise LockRuleBroken("callback-order", f"handed out {effects}, caused {told}")

    def _watched(self, engine: Engine, word: str) -> Callable[..., Any]:
        really: Callable[..., Any] = getattr(Engine, word)

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = engine.callbacks.out
            place = len(out)
            result = really(engine, *args, **kwargs)
            call = read_call(word, args, kwargs)
            match result:
                case (int(rc), int(lock)):
                    call.rc, call.lock = rc, lock
                case int(rc):
                    call.rc = rc
            call.effects = out[place:]
            self._judge(engine, call)
            return result

        return watched

    # ---- one input

    def _judge(self, engine: Engine, call: Input) -> None:
        ledger = self.ledger
        self._may_purge(call)
        ledger.seeking = {name for name, space in engine.spaces.items() if space.waits is not None}
        looked_at = self._looked_at(call)
        self.values.given(call)
        self._given(engine, call)
        ended: list[Record] = []
        for effect in call.effects:
            if isinstance(effect, Cast):
                self.told.append(effect)
                ended += self._completed(call, effect)
            elif isinstance(effect, Bast):
                self.told.append(effect)
                self.callbacks.bast(effect)
            elif isinstance(effect, (RecoverPrep, RecoverSlot, RecoverDone)):
                self.membership.told(effect)
            elif isinstance(effect, Answer) and effect.session in ledger.lost:
                raise LockRuleBroken("callback-after-end", f"{effect} for a session that is lost")
        looked_at |= {
            ledger.records[effect.lock].key if effect.lock in ledger.records else ended[-1].key
            for effect in call.effects
            if isinstance(effect, Cast) and self._looks_again(call, effect)
        }
        for record in ledger.records.values():
            if record.key in looked_at:
                record.fresh = record.headed = False
        self._left_behind(call)
        self._vanished(engine, call)
        self._state(engine, call)
        self.membership.after(call, engine)

    def _may_purge(self, call: Input) -> None:
        """A node's locks go when its end is proved, or with its goodbye (I7)."""
        if self.ended is None or not (call.node_died or call.node_left):
            return
        may = self.ended.proved if call.node_died else self.ended.left
        for key in sorted(call.keys):
            if key[:2] not in may:
                raise LockRuleBroken("purged-unproved", f"{call.word} of {key}, whose node may live")

    def _looked_at(self, call: Input) -> set[ResourceKey]:
        """The resources whose queues are looked at because locks are taken away (dlm.md 1.5, 6.4)."""
        if call.word == "unlock" and call.rc == 0 and call.lock in self.ledger.records:
            return {self.ledger.records[call.lock].key}
        records = self.ledger.records.values()
        if call.word == "purge":
            return {record.key for record in records if call.frees_orphan(record, self.ledger.lost)}
        if call.word == "request" and call.flags & Flag.ORPHAN and call.lock in self.ledger.records:
            return {self.ledger.records[call.lock].key}
        if not call.purges and call.word != "lose_sessions":
            return set()
        return {
            record.key
            for record in records
            if record.session in call.keys and (not call.space or record.key[0] == call.space)
        }

    @staticmethod
    def _looks_again(call: Input, cast: Cast) -> bool:
        """Whether this completion says that the queues were looked at: a conversion or a cancel did something."""
        mine = cast.lock == call.lock
        return mine and (call.word == "cancel" or (call.word == "convert" and cast.status == 0))

    def _given(self, engine: Engine, call: Input) -> None:
        """Put the input into the ledger, before its effects."""
        ledger = self.ledger
        record = ledger.records.get(call.lock)
        if call.word == "open_session":
            ledger.pids |= dict.fromkeys(call.keys, call.pid)
        elif call.word == "request" and call.flags & Flag.ORPHAN and call.rc != -22:
            self._adopted(engine, call)
        elif call.word == "request" and call.rc == 0:
            if call.lock <= ledger.last_id:
                raise LockRuleBroken("lock-id-again", f"lock id {call.lock} came back")
            ledger.last_id = call.lock
            buffer = bytes(engine.spaces[call.space].lvb_bytes) if call.flags & Flag.VALBLK else None
            (session,) = call.keys
            key = (call.space, call.name)
            ledger.records[call.lock] = Record(
                call.lock, key, session, call.flags, call.mode, call.op, call.bast, buffer,
                headed=bool(call.flags & Flag.HEADQUE), persistent=bool(call.flags & Flag.PERSISTENT),
            )  # fmt: skip
        elif call.word == "convert" and record is not None and call.rc in (0, -16, -22):
            size = engine.spaces[record.key[0]].lvb_bytes
            if call.lvb is None or len(call.lvb) == size:
                if call.flags & Flag.VALBLK and record.buffer is None:
                    record.buffer = bytes(size)
                if call.lvb is not None and record.buffer is not None:
                    record.buffer = call.lvb
            if call.rc == 0:
                if record.pending:
                    raise LockRuleBroken("completion-twice", f"{record} took a second operation")
                record.fl, record.rq, record.op, record.pending = call.flags, call.mode, call.op, True
                record.persistent = record.persistent or bool(call.flags & Flag.PERSISTENT)
        elif call.word == "lose_sessions":
            ledger.lost |= call.keys
            for other in ledger.records.values():
                if other.session in call.keys:
                    other.pending = False
        elif call.word == "end_sessions":
            ledger.lost -= call.keys

    def _adopted(self, engine: Engine, call: Input) -> None:
        """A request for an orphan gets the oldest of its node's that has the name and the mode, or says why not."""
        (session,) = call.keys
        if call.space not in engine.spaces or engine.spaces[call.space].member(session) is None:
            return
        records = self.ledger.records
        named = [
            record
            for record in records.values()
            if record.left_by is not None
            and record.key == (call.space, call.name)
            and record.session[:2] == session[:2]
        ]
        right = [record.id for record in named if record.mode == call.mode]
        expected = (0, min(right)) if right else (EAGAIN if named else ENOENT, 0)
        if (call.rc, call.lock) != expected:
            raise LockRuleBroken(
                "orphan", f"{session} asked for one and got {call.rc, call.lock}, not {expected}"
            )
        if not right:
            return
        record = records[call.lock]
        record.session, record.op, record.pending, record.left_by = session, call.op, True, None
        record.fl, record.wants_bast, record.told = call.flags, call.bast, Mode.IV
        record.persistent = bool(call.flags & Flag.PERSISTENT)
        if call.flags & Flag.VALBLK and record.buffer is None:
            record.buffer = bytes(engine.spaces[call.space].lvb_bytes)

    def _left_behind(self, call: Input) -> None:
        """Locks that outlive their session belong to its node from now on."""
        for record in self.ledger.records.values():
            if call.orphans(record):
                record.left_by = self.ledger.pids[record.session]
                record.session = (*record.session[:2], 0)
                record.wants_bast, record.pending = False, False

    def _completed(self, call: Input, cast: Cast) -> list[Record]:
        """Put a completion into the ledger. Returns the lock's record if it ended."""
        record = self.callbacks.cast(call, cast)
        record.pending = False
        if cast.adopted:
            self.values.adopted(record, cast)
        elif cast.status == 0:
            self.values.granted(record, cast)
            record.told, record.fresh = Mode.IV, True
        record.mode = cast.mode
        if cast.mode == Mode.IV:
            return [self.ledger.records.pop(record.id)]
        return []

    def _vanished(self, engine: Engine, call: Input) -> None:
        """A lock goes by its own completion, or with its session; a lost session keeps what it holds (I7)."""
        records = self.ledger.records
        for lock in [lock for lock in records if lock not in engine.locks]:
            record = records[lock]
            waits = record.mode == Mode.IV
            with_session = record.session in call.keys and (
                call.purges or (call.word == "lose_sessions" and waits)
            )
            if call.frees_orphan(record, self.ledger.lost):
                with_session = True
            if not with_session or (call.space and record.key[0] != call.space):
                raise LockRuleBroken("lock-vanished", f"{record} is gone by {call.word} of {call.lock}")
            del records[lock]
        for record in records.values():
            if call.frees_orphan(record, self.ledger.lost):
                raise LockRuleBroken("orphan", f"{record} is there after {call}")
        for lock in engine.locks:
            if lock not in records:
                raise LockRuleBroken("callback-after-end", f"lock {lock} is there, but was said to be gone")

    # ---- the state

    def _state(self, engine: Engine, call: Input) -> None:
        now: dict[ResourceKey, Queues] = {}
        present: dict[ResourceKey, Resource] = {}
        places: set[int] = set()
        granted = {
            effect.lock
            for effect in call.effects
            if isinstance(effect, Cast) and effect.status == 0 and not effect.adopted
        }
        for name, space in engine.spaces.items():
            for resource_name, resource in space.resources.items():
                key = (name, resource_name)
                present[key] = resource
                if resource.empty:
                    raise LockRuleBroken("left-over", f"{key} has no locks")
                now[key] = Queues(
                    [(lock.id, lock.gr, lock.rq) for lock in resource.granted],
                    [(lock.id, lock.gr, lock.rq) for lock in resource.converting],
                    [(lock.id, lock.gr, lock.rq) for lock in resource.waiting],
                )
                self._one_queue(engine, resource, places)
                self._compatible(resource)
                self._order(call, self.ledger.queues.get(key, Queues()), now[key], granted)
                self._no_missed_grant(resource)
                self._no_deadlock(resource)
                self.callbacks.all_answered(key, resource)
                self.callbacks.holders_told(key, resource)
                self.values.compare(key, resource)
        if places != engine.locks.keys():
            raise LockRuleBroken("one-queue", f"{engine.locks.keys() - places} are in no queue")
        self._at_once(call, granted)
        record = self.ledger.records.get(call.lock)
        if record is not None and record.pending and call.word in ("request", "convert") and call.rc == 0:
            circles.none_closed(self.ledger, now, record)
        self.values.forget(present, set(engine.spaces))
        self.ledger.queues = now

    def _one_queue(self, engine: Engine, resource: Resource, places: set[int]) -> None:
        for queue in (resource.granted, resource.converting, resource.waiting):
            for lock in queue:
                if lock.id in places or lock.id not in engine.locks or engine.locks[lock.id].lock is not lock:
                    raise LockRuleBroken("one-queue", f"{lock} is in two queues or unknown")
                places.add(lock.id)
                if (lock.gr >= Mode.NL) != (queue is not resource.waiting):
                    raise LockRuleBroken("one-queue", f"{lock} is in a queue where it cannot be")
                record = self.ledger.records[lock.id]
                if queue is resource.granted:
                    if lock.gr != record.mode and not record.fl & Flag.CONVDEADLK:
                        raise LockRuleBroken(
                            "completion-lost", f"{lock}, but its owner was told {record.mode}"
                        )
                elif lock.rq < Mode.NL:
                    raise LockRuleBroken("one-queue", f"{lock} is queued and wants nothing")
                elif record.fl & (Flag.NOQUEUE | Flag.EXPEDITE):
                    raise LockRuleBroken("noqueue-waits", f"{lock} may not wait")
        for lock in resource.converting:
            if not lock.sb & StatusFlag.DEMOTED and is_down(lock.gr, lock.rq):
                raise LockRuleBroken("down-conversion-waits", f"{lock} waits to go down")

    def _compatible(self, resource: Resource) -> None:
        modes: dict[int, list[Lock]] = {}
        for lock in (*resource.granted, *resource.converting):
            modes.setdefault(lock.gr, []).append(lock)
        for mode, locks in modes.items():
            for other, others in modes.items():
                if (other != mode or len(locks) > 1) and not may_coexist(mode, other):
                    raise LockRuleBroken(
                        "excluding-modes-granted", f"{resource.name!r}: {locks} beside {others}"
                    )

    def _no_missed_grant(self, resource: Resource) -> None:
        queue = resource.converting or resource.waiting
        if queue:
            head = queue[0]
            headed = queue is resource.waiting and self.ledger.records[head.id].headed
            if not headed and not _blocked(resource, head):
                raise LockRuleBroken("missed-grant", f"{resource.name!r}: {head} could be granted")

    def _no_deadlock(self, resource: Resource) -> None:
        records = self.ledger.records
        for number, ahead in enumerate(resource.converting):
            for behind in resource.converting[number + 1 :]:
                if (records[ahead.id].fl | records[behind.id].fl) & Flag.NODLCKWT:
                    continue
                if not may_coexist(ahead.gr, behind.rq) and not may_coexist(behind.gr, ahead.rq):
                    raise LockRuleBroken("conversion-deadlock", f"{ahead} and {behind} wait for each other")

    def _order(self, call: Input, was: Queues, now: Queues, granted: set[int]) -> None:
        """Grants come from the head of each queue, and no request passes a queued conversion (I11, I12)."""
        records = self.ledger.records
        queued = {lock for lock, _, _ in (*now.converting, *now.waiting)}
        for rule, queue, after in (
            ("converting-order", was.converting, now.converting),
            ("waiting-order", was.waiting, now.waiting),
        ):
            passed = 0
            self._line(rule, call, [lock for lock, _, _ in queue], [lock for lock, _, _ in after])
            for lock, _, _ in queue:
                if lock in queued:
                    passed = passed or lock
                elif lock in granted and passed and not records[lock].fl & Flag.NOORDER:
                    raise LockRuleBroken(rule, f"{records[lock]} was granted before {records[passed]}")
        if now.converting:
            for lock, _, _ in was.waiting:
                if lock in granted and not records[lock].fl & Flag.NOORDER:
                    raise LockRuleBroken("waiting-order", f"{records[lock]} passed a queued conversion")
        mine = {lock for lock, _, _ in now.granted}
        if call.lock not in granted or call.lock not in mine:
            return
        if call.word == "request" and not call.flags & (Flag.NOORDER | Flag.EXPEDITE):
            if was.converting or was.waiting:
                raise LockRuleBroken("waiting-order", f"{records[call.lock]} passed those who waited")
        elif call.word == "convert" and call.flags & Flag.QUECVT and was.converting:
            raise LockRuleBroken("converting-order", f"{records[call.lock]} passed a conversion with QUECVT")

    def _line(self, rule: str, call: Input, before: list[int], after: list[int]) -> None:
        """Who is in a queue keeps his place; who comes is the last, or the first with HEADQUE."""
        if before == after:
            return
        known, still = set(before), set(after)
        stayed = [lock for lock in before if lock in still]
        came = [lock for lock in after if lock not in known]
        right = [*came, *stayed] if call.flags & Flag.HEADQUE else [*stayed, *came]
        if after != right or came not in ([], [call.lock]):
            raise LockRuleBroken(
                rule, f"the queue was {before} and is {after} after {call.word} of {call.lock}"
            )

    def _at_once(self, call: Input, granted: set[int]) -> None:
        """What can never have to wait is granted by its own input (I14, I15)."""
        if call.rc != 0 or call.lock in granted or (call.word == "request" and call.flags & Flag.ORPHAN):
            return
        if call.word == "request" and call.flags & Flag.EXPEDITE:
            raise LockRuleBroken("noqueue-waits", f"lock {call.lock} with EXPEDITE was not granted")
        record = self.ledger.records.get(call.lock)
        if call.word == "convert" and record is not None and is_down(record.mode, call.mode):
            raise LockRuleBroken("down-conversion-waits", f"{record} was not granted at once")


def _blocked(resource: Resource, lock: Lock) -> bool:
    return any(
        other is not lock and not may_coexist(other.gr, lock.rq)
        for other in (*resource.granted, *resource.converting)
    )
