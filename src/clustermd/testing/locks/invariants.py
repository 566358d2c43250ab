"""What must hold of a lock engine after every input (dlm.md 6.9), checked by an independent reading of the rules.

`Checker` watches one engine: call `before` ahead of an input and `after` behind it, with the effects. It keeps
a shadow of every value block (I21, I22) and remembers every lock id ever seen (I10).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from clustermd.dlm.effects import Answer, Cast, Effect
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import EDEADLK, Flag, Mode, StatusFlag
from clustermd.dlm.resource import Lock, Resource

TOGETHER = {
    Mode.NL: "NL CR CW PR PW EX",
    Mode.CR: "NL CR CW PR PW",
    Mode.CW: "NL CR CW",
    Mode.PR: "NL CR PR",
    Mode.PW: "NL CR",
    Mode.EX: "NL",
}


def may_coexist(a: int, b: int) -> bool:
    return a < 0 or b < 0 or Mode(b).name in TOGETHER[Mode(a)].split()


def _blocked(resource: Resource, lock: Lock, mode: int) -> bool:
    return any(
        not may_coexist(other.gr, mode)
        for other in (*resource.granted, *resource.converting)
        if other is not lock
    )


def is_down(granted: int, requested: int) -> bool:
    return requested < granted and (granted, requested) != (Mode.PR, Mode.CW)


@dataclass
class Queues:
    converting: list[int]
    waiting: list[int]
    granted_modes: dict[int, int]


@dataclass
class Value:
    value: bytes | None = None
    seq: int = 0


@dataclass
class Checker:
    engine: Engine
    seen: set[int] = field(default_factory=set)
    values: dict[tuple[str, bytes], Value] = field(default_factory=dict)
    queues: dict[tuple[str, bytes], Queues] = field(default_factory=dict)

    def resources(self) -> Iterable[tuple[tuple[str, bytes], Resource]]:
        for name, space in sorted(self.engine.spaces.items()):
            for resource_name, resource in sorted(space.resources.items()):
                yield (name, resource_name), resource

    def after(self, effects: list[Effect]) -> None:
        """Check the state that an input led to, and what it told."""
        now = {}
        places: dict[int, int] = {}
        for key, resource in self.resources():
            self._queue_states(resource, places)
            self._no_missed_grant(resource)
            self._no_conversion_deadlock(resource)
            now[key] = Queues(
                [lock.id for lock in resource.converting],
                [lock.id for lock in resource.waiting],
                {lock.id: lock.gr for lock in resource.granted},
            )
            self._value(key, resource)
        assert places.keys() == self.engine.locks.keys(), "I10: a lock without a queue"
        self._order_of_grants(now, effects)
        self._effects(effects)
        self._slots()
        self.queues = now
        for key in [key for key in self.values if key not in now]:
            del self.values[key]

    def _queue_states(self, resource: Resource, places: dict[int, int]) -> None:
        holders = [*resource.granted, *resource.converting]
        for number, lock in enumerate(holders):
            for other in holders[number + 1 :]:
                assert may_coexist(lock.gr, other.gr), f"I1: {lock} beside {other}"
        for queue in (resource.granted, resource.converting, resource.waiting):
            for lock in queue:
                assert lock.id not in places, f"I10: {lock} is in two queues"
                places[lock.id] = 1
                assert self.engine.locks[lock.id].lock is lock
                assert (lock.gr >= Mode.NL) == (queue is not resource.waiting), f"I10: {lock}"
                if queue is not resource.granted:
                    assert lock.rq >= Mode.NL
                    assert not lock.fl & Flag.NOQUEUE, f"I15: {lock} waits"
                    assert not lock.fl & Flag.EXPEDITE, f"I15: {lock} waits"
        for lock in resource.converting:
            if not lock.sb & StatusFlag.DEMOTED:
                assert not is_down(lock.gr, lock.rq), f"I14: {lock} waits to go down"

    def _no_missed_grant(self, resource: Resource) -> None:
        if resource.converting:
            head = resource.converting[0]
            assert _blocked(resource, head, head.rq), f"I13: {head} could be granted"
        elif resource.waiting:
            head = resource.waiting[0]
            # a request that was put at the head of a queue is not looked at until the next change (rule 7)
            headed = head.fl & Flag.HEADQUE
            assert headed or _blocked(resource, head, head.rq), f"I13: {head} could be granted"

    def _no_conversion_deadlock(self, resource: Resource) -> None:
        for number, ahead in enumerate(resource.converting):
            for behind in resource.converting[number + 1 :]:
                if not (ahead.fl | behind.fl) & Flag.NODLCKWT:
                    mutual = not may_coexist(ahead.gr, behind.rq) and not may_coexist(behind.gr, ahead.rq)
                    assert not mutual, f"I16: {ahead} and {behind} wait for each other"

    def _order_of_grants(self, now: dict[tuple[str, bytes], Queues], effects: list[Effect]) -> None:
        granted = {effect.lock for effect in effects if isinstance(effect, Cast) and effect.status == 0}
        for key, was in self.queues.items():
            if key not in now:
                continue
            for name, queue in (("I12", was.converting), ("I11", was.waiting)):
                passed: list[int] = []
                for lock in queue:
                    place = self.engine.locks.get(lock)
                    if place is None:
                        continue
                    if lock not in granted:
                        passed.append(lock)
                    elif passed and not place.lock.fl & Flag.NOORDER:
                        still = [other for other in passed if other in now[key].converting + now[key].waiting]
                        assert not still, f"{name}: {lock} was granted before {still}"
            if any(lock in granted for lock in was.waiting):
                first = [lock for lock in was.waiting if lock in granted and lock in self.engine.locks]
                plain = [lock for lock in first if not self.engine.locks[lock].lock.fl & Flag.NOORDER]
                assert not (plain and now[key].converting), f"I11: {plain} passed a queued conversion"

    def _value(self, key: tuple[str, bytes], resource: Resource) -> None:
        known = self.values.setdefault(key, Value())
        if resource.lvb != known.value:
            assert resource.lvb_seq > known.seq, "I22: a value changed without a write"
        assert resource.lvb_seq >= known.seq
        known.value, known.seq = resource.lvb, resource.lvb_seq

    def _effects(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Answer(_, _, 0, lock) if lock and lock not in self.seen:
                    assert lock > max(self.seen, default=0), "I10: a lock id came back"
                    self.seen.add(lock)
                case Cast():
                    place = self.engine.locks.get(effect.lock)
                    assert effect.status != EDEADLK or effect.mode >= Mode.NL
                    if place is None:
                        continue
                    fl = place.lock.fl
                    if effect.sb_flags & StatusFlag.ALTMODE:
                        assert fl & (Flag.ALTPR | Flag.ALTCW), "I20"
                    if effect.sb_flags & StatusFlag.DEMOTED:
                        assert fl & Flag.CONVDEADLK, "I20"

    def _slots(self) -> None:
        for space in self.engine.spaces.values():
            sessions = [seat.session for seat in space.seats.values() if seat.state.value != "recovering"]
            assert len(set(sessions)) == len(sessions), "I9: a session with two slots"
            assert all(slot == seat.slot >= 1 for slot, seat in space.seats.items())
            for seat in space.seats.values():
                session = self.engine.sessions.get(seat.session)
                if seat.state.value == "member":
                    assert session is not None and not session.lost
                elif seat.state.value == "zombie":
                    assert session is not None and session.lost
                else:
                    assert session is None
            assert not space.empty
