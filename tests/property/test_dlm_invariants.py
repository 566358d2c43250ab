"""Random operations of several sessions, with deaths: the invariants of dlm.md 6.9 hold after every input."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.dlm.effects import Bast, Cast, Effect, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import EAGAIN, ECANCEL, EDEADLK, EUNLOCK, Flag
from clustermd.dlm.snapshot import dump_engine, load_engine
from clustermd.testing.locks.invariants import Checker

SPACE = "array"
NAMES = (b"token", b"bitmap0000")
LVB = 8

REQUEST_FLAGS = (
    Flag.NONE,
    Flag.VALBLK,
    Flag.NOQUEUE,
    Flag.NOQUEUE | Flag.NOQUEUEBAST | Flag.VALBLK,
    Flag.HEADQUE | Flag.VALBLK,
    Flag.NOORDER,
    Flag.ALTPR,
    Flag.ALTCW | Flag.VALBLK,
)
CONVERT_FLAGS = (
    Flag.NONE,
    Flag.VALBLK,
    Flag.VALBLK | Flag.NOQUEUE,
    Flag.QUECVT,
    Flag.CONVDEADLK | Flag.VALBLK,
    Flag.NODLCKWT,
    Flag.IVVALBLK,
    Flag.HEADQUE | Flag.VALBLK,
    Flag.NOORDER,
)
number = st.integers(0, 7)
value = st.binary(min_size=LVB, max_size=LVB)
request = st.tuples(st.just("request"), number, st.sampled_from((0, 0, 0, 1)), st.integers(0, 5), number)
convert = st.tuples(st.just("convert"), number, st.integers(0, 5), st.integers(0, 8), value)
convert_with_value = st.tuples(st.just("convert"), number, st.integers(0, 5), st.just(1), value)
unlock = st.tuples(
    st.just("unlock"), number, st.sampled_from((0, 0, 0, int(Flag.VALBLK), int(Flag.IVVALBLK)))
)
cancel = st.tuples(st.just("cancel"), number)
join = st.tuples(st.just("join"), number)
end = st.tuples(st.sampled_from(("join", "leave", "lost", "end", "recovered")), number)
OPERATIONS = st.lists(
    # a branch stands here as often as it should be drawn
    st.one_of(request, request, request, convert, convert, convert, convert_with_value, convert_with_value,
              convert_with_value, unlock, cancel, join, join, end),
    min_size=40,
    max_size=80,
)  # fmt: skip


class Storm:
    def __init__(self) -> None:
        self.engine = Engine()
        self.checker: Checker | None = Checker(self.engine)
        self.sessions: list[SessionKey] = []
        self.locks: list[int] = []
        for node in range(3):
            self.new_session(node)
            self.engine.join(self.sessions[node], 0, SPACE, LVB, 4)
        self.check()

    def new_session(self, node: int) -> None:
        key = (node % 3 + 1, 7, len(self.sessions) + 1)
        self.sessions.append(key)
        self.engine.open_session(key, f"node{key[0]}", "storm", 1)

    def check(self) -> list[Effect]:
        effects = self.engine.take_effects()
        if self.checker is not None:
            self.checker.after(effects)
        return effects

    def do(self, op: tuple[object, ...]) -> list[Effect]:
        engine = self.engine
        match op:
            case ("request", int(who), int(name), int(mode), int(flags)):
                key = self.sessions[who % len(self.sessions)]
                if not engine.alive(key):
                    return []
                flag = Flag.EXPEDITE if mode == 0 else REQUEST_FLAGS[flags]
                rc, lock = engine.request(key, 1, SPACE, NAMES[name], mode, int(flag), who % 4 != 3)
                if rc == 0:
                    self.locks.append(lock)
            case ("convert", int(which), int(mode), int(flags), bytes(lvb)):
                place = self.pick(which)
                if place is None:
                    return []
                lock = engine.locks[place].lock
                engine.convert(lock.session, 2, place, mode, int(CONVERT_FLAGS[flags]), lvb)
            case ("unlock", int(which), int(flags)):
                place = self.pick(which)
                if place is None:
                    return []
                lock = engine.locks[place].lock
                engine.unlock(lock.session, 3, place, flags, None)
                assert place not in engine.locks
            case ("cancel", int(which)):
                place = self.pick(which)
                if place is not None:
                    assert engine.cancel(engine.locks[place].lock.session, place)[0] == 0
            case (word, int(who)):
                self.fate(str(word), self.sessions[who % len(self.sessions)])
        effects = self.check()
        for effect in effects:
            if isinstance(effect, Cast):
                assert effect.session in engine.sessions, "I17: a completion for a session that ended"
                assert effect.status in (0, EAGAIN, ECANCEL, EUNLOCK, EDEADLK)
        return effects

    def fate(self, word: str, key: SessionKey) -> None:
        engine = self.engine
        alive = engine.alive(key)
        space = engine.spaces.get(SPACE)
        if word == "join" and alive and (space is None or not (space.member(key) or space.joiner(key))):
            engine.join(key, 4, SPACE, LVB, 4)
        elif word == "leave" and alive:
            engine.leave(key, SPACE)
        elif word == "lost" and alive:
            engine.lose_sessions([key])
            self.new_session(key[0])
        elif word == "end" and key in engine.sessions:
            engine.end_sessions([key], clean=False)
            self.new_session(key[0])
        elif word == "recovered" and alive and space is not None:
            for slot in sorted(space.seats):
                engine.recovered(key, SPACE, slot, space.generation)

    def pick(self, which: int) -> int | None:
        mine = [lock for lock in self.locks if lock in self.engine.locks]
        alive = [lock for lock in mine if self.engine.alive(self.engine.locks[lock].lock.session)]
        return alive[which % len(alive)] if alive else None


@given(OPERATIONS)
@settings(max_examples=120, deadline=None)
def test_invariants_hold_after_every_operation(operations: list[tuple[object, ...]]) -> None:
    storm = Storm()
    for op in operations:
        storm.do(op)
    for key in storm.sessions:
        storm.engine.end_sessions([key], clean=False)
        storm.check()
    assert not storm.engine.spaces, "I27: something was left when everybody had ended"
    assert not storm.engine.locks


def crowd(seed: int, count: int) -> Iterator[tuple[object, ...]]:
    """Operations that crowd one resource, so that queues grow long and conversions meet."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.choices(("request", "convert", "unlock", "cancel", "join", "fate"), (30, 50, 9, 4, 4, 1))[
            0
        ]
        which, mode = draw.randrange(64), draw.randrange(6)
        if kind == "request":
            yield kind, which, int(draw.random() < 0.1), mode, draw.randrange(8)
        elif kind == "convert":
            yield kind, which, mode, draw.randrange(9), draw.randbytes(LVB)
        elif kind == "unlock":
            yield kind, which, draw.choice((0, 0, int(Flag.VALBLK), int(Flag.IVVALBLK)))
        elif kind == "fate":
            yield draw.choice(("leave", "lost", "end", "recovered")), which
        else:
            yield kind, which


def test_invariants_hold_in_a_crowd() -> None:
    seen: Counter[object] = Counter()
    for seed in range(12):
        storm = Storm()
        for op in crowd(seed, 400):
            for effect in storm.do(op):
                seen[effect.status if isinstance(effect, Cast) else type(effect)] += 1
    assert seen[EDEADLK] > 20 and seen[EAGAIN] > 50 and seen[ECANCEL] > 20, f"the crowd was not one: {seen}"
    assert seen[Bast] > 300, f"the crowd was not one: {seen}"


def test_a_loaded_snapshot_behaves_like_its_origin() -> None:
    for seed in range(100, 112):
        storm = Storm()
        operations = list(crowd(seed, 240))
        for op in operations[:40]:
            storm.do(op)
        for op in operations[40:]:
            twin = Storm()
            twin.engine = load_engine(dump_engine(storm.engine))
            twin.checker = None  # its answers are compared with those of the origin, which is watched
            twin.sessions, twin.locks = list(storm.sessions), list(storm.locks)
            assert twin.do(op) == storm.do(op)
            assert dump_engine(twin.engine) == dump_engine(storm.engine)
