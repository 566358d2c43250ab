"""Traps of who is told what, and of whose turn it is (dlm.md 6.8), each put back once (`traps_kit`)."""

from __future__ import annotations

from typing import Any

import pytest
from lockds_kit import SPACE, Program, holders, lockds
from traps_kit import Traps

from clustermd.dlm import resource
from clustermd.dlm.effects import Bast, Cast, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.lock import Lock
from clustermd.dlm.modes import EUNLOCK, Flag, Mode
from clustermd.dlm.resource import Resource

Patch = pytest.MonkeyPatch
trap = Traps()
A, B, C = (1, 11, 1), (2, 22, 1), (3, 33, 1)


def _two_in_a_lockspace() -> tuple[Engine, int]:
    """A has EX. Returns the engine and that lock."""
    engine = Engine()
    for key in (A, B):
        engine.open_session(key, f"node{key[0]}", "array", 100)
        engine.join(key, 1, SPACE, 16, 4)
    _, lock = engine.request(A, 2, SPACE, b"token", Mode.EX, int(Flag.VALBLK), True)
    engine.take_effects()
    return engine, lock


def _sessions(effects: list[Any], kind: type) -> list[SessionKey]:
    return [effect.session for effect in effects if isinstance(effect, kind)]


def _the_dead_are_told(patch: Patch) -> None:
    really = Engine.end_sessions

    def end(self: Engine, keys: Any, **how: Any) -> None:
        keys = list(keys)
        ended = [place.lock for place in self.locks.values() if place.lock.session in keys]
        really(self, keys, **how)
        for lock in ended:
            self.callbacks.out.append(Cast(lock.session, lock.id, lock.op, EUNLOCK, 0, None, Mode.IV, False))

    patch.setattr(Engine, "end_sessions", end)


@trap(_the_dead_are_told)
def test_a_session_that_ended_gets_no_completion_any_more_trap_24() -> None:
    engine, _ = _two_in_a_lockspace()
    engine.request(A, 3, SPACE, b"another", Mode.PR, 0, True)
    engine.request(B, 3, SPACE, b"token", Mode.PR, 0, True)
    engine.take_effects()
    engine.end_sessions([A], clean=False)
    effects = engine.take_effects()
    assert _sessions(effects, Cast) == [B] and all(effect.session != A for effect in effects)


def _zombies_are_asked(patch: Patch) -> None:
    really = Engine.lose_sessions

    def lose(self: Engine, keys: Any) -> None:
        keys = list(keys)
        really(self, keys)
        for place in self.locks.values():
            if place.lock.session in keys:
                place.lock.wants_bast = True

    patch.setattr(Engine, "lose_sessions", lose)


@trap(_zombies_are_asked)
def test_nobody_asks_a_zombie_to_let_go_and_a_holder_is_asked_once_for_each_grant_trap_25() -> None:
    engine, _ = _two_in_a_lockspace()
    engine.request(B, 3, SPACE, b"token", Mode.PR, 0, True)
    assert _sessions(engine.take_effects(), Bast) == [A]
    engine.request(B, 4, SPACE, b"token", Mode.PR, 0, True)
    assert not _sessions(engine.take_effects(), Bast), "it is not repeated, so nobody may rely on that"
    _, other = engine.request(A, 3, SPACE, b"another", Mode.PW, 0, True)
    engine.lose_sessions([A])
    engine.take_effects()
    engine.request(B, 5, SPACE, b"another", Mode.EX, 0, True)
    assert A not in _sessions(engine.take_effects(), Bast) and engine.locks[other].lock.highbast == 0


def _null_locks_keep_nothing(patch: Patch) -> None:
    really = Resource.unlock

    def unlock(self: Resource, lock: Lock, *args: Any) -> None:
        really(self, lock, *args)
        if all(other.gr == Mode.NL for other in self.granted):
            self.lvb = None

    patch.setattr(Resource, "unlock", unlock)


@trap(_null_locks_keep_nothing)
def test_a_null_lock_keeps_the_value_and_the_last_one_takes_it_along_trap_27() -> None:
    engine, lock = _two_in_a_lockspace()
    valblk = int(Flag.VALBLK)
    _, keeper = engine.request(B, 3, SPACE, b"token", Mode.NL, int(Flag.EXPEDITE) | valblk, False)
    engine.unlock(A, 3, lock, int(Flag.FORCEUNLOCK), b"v" * 16)
    engine.convert(B, 4, keeper, Mode.CR, valblk, None)
    (cast,) = [
        effect for effect in engine.take_effects() if isinstance(effect, Cast) and effect.session == B
    ][-1:]
    assert cast.lvb == b"v" * 16
    engine.unlock(B, 5, keeper, 0, None)
    _, again = engine.request(B, 6, SPACE, b"token", Mode.CR, valblk, False)
    assert engine.locks[again].lock.lvb == bytes(16), "who needs it keeps a lock; `docs/locks.md` says so"


def _readers_pass(patch: Patch) -> None:
    really = Resource._can_grant

    def can_grant(self: Resource, lock: Lock, *, now: bool) -> bool:
        if now and lock.gr == Mode.IV:
            return not resource._conflict([*self.granted, *self.converting], lock)
        return really(self, lock, now=now)

    patch.setattr(Resource, "_can_grant", can_grant)


@trap(_readers_pass)
def test_readers_that_keep_coming_do_not_pass_a_writer_that_waits_trap_36() -> None:
    ring, (one, two, three) = lockds(3)
    a, b, c = Program(one), Program(two), Program(three)
    first, second = a.ask(Mode.PR), b.ask(Mode.PR)
    ring.run()
    b.send("convert", b.lock(second), int(Mode.EX), 0, None)
    ring.run()
    readers = [c.ask(Mode.PR), a.ask(Mode.CR)]
    ring.run()
    assert not c.has(readers[0]) and not a.has(readers[1])
    a.free(first)
    ring.run()
    assert [(name, mode) for name, mode, _ in holders(one)] == [("node2", "EX")]


test_a_story_fails_with_its_trap_put_back = trap.test()
