"""Random operations of several sessions, with deaths: the invariants of dlm.md 6.9 hold after every input."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.dlm.effects import Bast, Cast, Effect, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import EAGAIN, ECANCEL, EDEADLK, ETIMEDOUT, EUNLOCK, Flag, Mode, SpaceFlag
from clustermd.dlm.orphans import NODE_SESSION
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
    Flag.PERSISTENT,
    Flag.PERSISTENT | Flag.VALBLK,
    Flag.ORPHAN | Flag.VALBLK,
    Flag.ORPHAN | Flag.PERSISTENT,
    Flag.NODLCKWT,
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
    Flag.NODLCKBLK,
)
STATUSES = (ECANCEL, EDEADLK, ETIMEDOUT)
number = st.integers(0, 7)
flags_of_request = st.integers(0, len(REQUEST_FLAGS) - 1)
value = st.binary(min_size=LVB, max_size=LVB)
request = st.tuples(
    st.just("request"), number, st.sampled_from((0, 0, 0, 1)), st.integers(0, 5), flags_of_request
)
convert = st.tuples(
    st.just("convert"), number, st.integers(0, 5), st.integers(0, len(CONVERT_FLAGS) - 1), value
)
convert_with_value = st.tuples(st.just("convert"), number, st.integers(0, 5), st.just(1), value)
unlock = st.tuples(
    st.just("unlock"), number, st.sampled_from((0, 0, 0, int(Flag.VALBLK), int(Flag.IVVALBLK)))
)
cancel = st.tuples(st.just("cancel"), number)
purge = st.tuples(st.just("purge"), number)
join = st.tuples(st.just("join"), number)
end = st.tuples(st.sampled_from(("join", "leave", "lost", "end", "recovered")), number)
OPERATIONS = st.lists(
    # a branch stands here as often as it should be drawn
    st.one_of(request, request, request, convert, convert, convert, convert_with_value, convert_with_value,
              convert_with_value, unlock, cancel, join, join, end, purge),
    min_size=40,
    max_size=80,
)  # fmt: skip


class Storm:
    def __init__(self, flags: SpaceFlag = SpaceFlag.NONE, *, basts: bool = True) -> None:
        self.engine = Engine()
        self.flags = int(flags)
        self.basts = basts
        self.checker: Checker | None = Checker(self.engine)
        self.sessions: list[SessionKey] = []
        self.locks: list[int] = []
        for node in range(3):
            self.new_session(node)
            self.engine.join(self.sessions[node], 0, SPACE, LVB, 4, self.flags)
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
                there = [key for key in self.sessions if engine.alive(key)]
                key = there[who % len(there)]
                flag, resource = REQUEST_FLAGS[flags], NAMES[name]
                if mode == 0 and not flag & Flag.ORPHAN:
                    flag = Flag.EXPEDITE
                if flag & Flag.ORPHAN:
                    key, resource, mode = self.left_behind(key, resource, mode)
                bast = self.basts and who % 4 != 3
                rc, lock = engine.request(key, 1, SPACE, resource, mode, int(flag), bast)
                if rc == 0 and lock not in self.locks:
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
                    status = STATUSES[which % 3]
                    assert engine.cancel(engine.locks[place].lock.session, place, status)[0] == 0
            case ("purge", int(which)):
                key = self.sessions[which % len(self.sessions)]
                if engine.alive(key):
                    engine.purge(key, SPACE, which % 4, 0)
            case (word, int(who)):
                there = [key for key in self.sessions if key in engine.sessions]
                self.fate(str(word), there[who % len(there)])
        effects = self.check()
        for effect in effects:
            if isinstance(effect, Cast):
                assert effect.session in engine.sessions, "I17: a completion for a session that ended"
                assert effect.status in (0, EAGAIN, EUNLOCK, *STATUSES)
        return effects

    def fate(self, word: str, key: SessionKey) -> None:
        engine = self.engine
        alive = engine.alive(key)
        space = engine.spaces.get(SPACE)
        if word == "join" and alive and (space is None or not (space.member(key) or space.joiner(key))):
            engine.join(key, 4, SPACE, LVB, 4, self.flags)
        elif word == "leave" and alive:
            engine.leave(key, SPACE)
        elif word == "lost" and alive:
            engine.lose_sessions([key])
            self.new_session(key[0])
        elif word == "end" and key in engine.sessions:
            engine.end_sessions([key], clean=False)
            self.new_session(key[0])
            engine.join(self.sessions[-1], 4, SPACE, LVB, 4, self.flags)
        elif word == "recovered" and alive and space is not None:
            for slot in sorted(space.seats):
                engine.recovered(key, SPACE, slot, space.generation)

    def left_behind(self, key: SessionKey, resource: bytes, mode: int) -> tuple[SessionKey, bytes, int]:
        """A session, name and mode that fit an orphan, if there is one and the mode drawn is not EX."""
        space = self.engine.spaces.get(SPACE)
        if space is None or mode == Mode.EX:
            return key, resource, mode
        for orphan in space.orphans.by_id.values():
            for seat in space.members():
                if orphan.lock.session[:2] == seat.session[:2]:
                    return seat.session, orphan.resource.name, orphan.lock.gr
        return key, resource, mode

    def pick(self, which: int) -> int | None:
        mine = [lock for lock in self.locks if lock in self.engine.locks]
        places = self.engine.locks
        alive = [lock for lock in mine if self.engine.alive(places[lock].lock.session)]
        alive = [lock for lock in alive if places[lock].lock.session[2] != NODE_SESSION]
        return alive[which % len(alive)] if alive else None


@given(OPERATIONS, st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_invariants_hold_after_every_operation(
    operations: list[tuple[object, ...]], deadlocks: bool, basts: bool
) -> None:
    storm = Storm(SpaceFlag.DEADLOCKS if deadlocks else SpaceFlag.NONE, basts=basts)
    for op in operations:
        storm.do(op)
    for key in storm.sessions:
        storm.engine.end_sessions([key], clean=False)
        storm.check()
    for key in sorted(storm.engine.sessions):
        assert key[2] == NODE_SESSION, "what is left is orphans, until their nodes die"
        storm.engine.end_sessions([key], clean=False, node_died=True)
        storm.check()
    assert not storm.engine.spaces, "I27: something was left when everybody had ended"
    assert not storm.engine.locks


def crowd(seed: int, count: int) -> Iterator[tuple[object, ...]]:
    """Operations that crowd one resource, so that queues grow long and conversions meet."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.choices(
            ("request", "convert", "unlock", "cancel", "join", "fate", "purge"), (30, 50, 9, 4, 6, 2, 0.5)
        )[0]
        which, mode = draw.randrange(64), draw.randrange(6)
        if kind == "request":
            yield kind, which, int(draw.random() < 0.1), mode, draw.randrange(len(REQUEST_FLAGS))
        elif kind == "convert":
            yield kind, which, mode, draw.randrange(len(CONVERT_FLAGS)), draw.randbytes(LVB)
        elif kind == "unlock":
            yield kind, which, draw.choice((0, 0, int(Flag.VALBLK), int(Flag.IVVALBLK)))
        elif kind == "fate":
            yield draw.choice(("leave", "lost", "end", "recovered")), which
        else:
            yield kind, which


def test_invariants_hold_in_a_crowd() -> None:
    seen: Counter[object] = Counter()
    for seed in range(16):
        storm = Storm(SpaceFlag.DEADLOCKS if seed % 2 else SpaceFlag.NONE, basts=seed % 4 != 3)
        for op in crowd(seed, 400):
            for effect in storm.do(op):
                adopted = isinstance(effect, Cast) and effect.adopted
                seen[
                    "adopted" if adopted else effect.status if isinstance(effect, Cast) else type(effect)
                ] += 1
    assert seen[EDEADLK] > 20 and seen[EAGAIN] > 50 and seen[ECANCEL] > 20, f"the crowd was not one: {seen}"
    assert seen[Bast] > 200 and seen[ETIMEDOUT] > 20, f"the crowd was not one: {seen}"
    assert seen["adopted"] > 2, f"the crowd was not one: {seen}"


def test_a_loaded_snapshot_behaves_like_its_origin() -> None:
    for seed in range(100, 112):
        storm = Storm(SpaceFlag.DEADLOCKS if seed % 2 else SpaceFlag.NONE)
        operations = list(crowd(seed, 240))
        for op in operations[:40]:
            storm.do(op)
        for op in operations[40:]:
            twin = Storm()
            twin.flags, twin.basts = storm.flags, storm.basts
            twin.engine = load_engine(dump_engine(storm.engine))
            twin.checker = None  # its answers are compared with those of the origin, which is watched
            twin.sessions, twin.locks = list(storm.sessions), list(storm.locks)
            assert twin.do(op) == storm.do(op)
            assert dump_engine(twin.engine) == dump_engine(storm.engine)
