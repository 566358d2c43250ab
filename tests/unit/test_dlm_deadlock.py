"""Circles of waits over several resources: what is found, what is not, and who is the victim (dlm.md 1.6, 6.7)."""

from __future__ import annotations

import pytest

from clustermd.dlm.effects import Bast, Cast, Refusal, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import EAGAIN, EDEADLK, Flag, Mode, SpaceFlag
from clustermd.dlm.snapshot import dump_engine, load_engine
from clustermd.testing.locks.invariants import Checker

A, B, C = (1, 1, 1), (2, 2, 1), (3, 3, 1)
DEADLOCKS = int(SpaceFlag.DEADLOCKS)


class Story:
    """Three sessions in lockspaces "one" and "two" that look for deadlocks, and in "array", which does not."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.checker = Checker(self.engine)
        for key in (A, B, C):
            self.engine.open_session(key, f"node{key[0]}", "test", 1)
            for name, flags in (("one", DEADLOCKS), ("two", DEADLOCKS), ("array", 0)):
                self.engine.join(key, 1, name, 8, 4, flags)
        self.told()

    def told(self) -> list[Cast]:
        effects = self.engine.take_effects()
        self.checker.after(effects)
        self.basts = [effect.session for effect in effects if isinstance(effect, Bast)]
        return [effect for effect in effects if isinstance(effect, Cast)]

    def ask(
        self, key: SessionKey, name: str, mode: Mode = Mode.EX, flags: Flag = Flag.NONE, bast: bool = False
    ) -> tuple[int, int | None]:
        """(lock, status of its completion, None while it waits); `name` is [lockspace:]resource."""
        space, _, resource = name.rpartition(":")
        rc, lock = self.engine.request(key, 1, space or "one", resource.encode(), mode, int(flags), bast)
        assert rc == 0
        return lock, next((cast.status for cast in self.told() if cast.lock == lock), None)

    def convert(self, lock: int, mode: Mode, flags: Flag = Flag.NONE) -> int | None:
        key = self.engine.locks[lock].lock.session
        assert self.engine.convert(key, 2, lock, mode, int(flags), None)[0] == 0
        return next((cast.status for cast in self.told() if cast.lock == lock), None)


def test_the_newest_request_that_closes_a_circle_is_refused_and_nothing_else_changes() -> None:
    story = Story()
    a, _ = story.ask(A, "x")
    story.ask(B, "y")
    story.ask(C, "z")
    assert story.ask(A, "y")[1] is None
    assert story.ask(B, "z")[1] is None
    before = dump_engine(story.engine)
    victim, status = story.ask(C, "x")
    assert status == EDEADLK and victim not in story.engine.locks
    assert dump_engine(story.engine)[1:] == before[1:], "but the next id"
    story.engine.unlock(A, 3, a, 0, None)
    assert story.ask(C, "x")[1] == 0, "nobody waits for what it waits for any more"


def test_a_circle_over_two_lockspaces_is_found() -> None:
    story = Story()
    story.ask(A, "one:x")
    story.ask(B, "two:x")
    assert story.ask(A, "two:x")[1] is None
    assert story.ask(B, "one:x")[1] == EDEADLK


def test_a_conversion_that_closes_a_circle_keeps_its_old_mode_and_its_place() -> None:
    story = Story()
    x, _ = story.ask(A, "x", Mode.PR)
    story.ask(B, "x", Mode.PR)
    story.ask(A, "y")
    assert story.ask(B, "y")[1] is None
    queues = [lock.id for lock in story.engine.locks[x].resource.granted]
    assert story.convert(x, Mode.EX) == EDEADLK
    assert (story.engine.locks[x].lock.gr, [lock.id for lock in story.engine.locks[x].resource.granted]) == (
        Mode.PR,
        queues,
    )


def test_who_stands_before_one_in_the_queue_is_waited_for_too() -> None:
    story = Story()
    story.ask(C, "x", Mode.PR)
    story.ask(B, "y")
    assert story.ask(A, "x", Mode.EX)[1] is None
    assert story.ask(A, "y", Mode.CR)[1] is None
    assert story.ask(B, "x", Mode.PR)[1] == EDEADLK, "PR goes with C's PR, but not past A, who waits for B"
    assert story.ask(B, "x", Mode.PR, Flag.NOORDER)[1] == 0


def test_the_holders_behind_a_patient_one_in_the_queue_are_waited_for() -> None:
    story = Story()
    story.ask(C, "x", Mode.PR)
    story.ask(B, "y")
    assert story.ask(A, "x", Mode.EX, bast=True)[1] is None, "A lets go when it is asked to"
    assert story.ask(C, "y", Mode.CR)[1] is None
    assert story.ask(B, "x", Mode.PR)[1] == EDEADLK, "A's request waits for C, who waits for B"


@pytest.mark.parametrize(
    ("holder", "bast", "waiter"),
    [
        (Flag.NONE, True, Flag.NONE),
        (Flag.NODLCKBLK, False, Flag.NONE),
        (Flag.NONE, False, Flag.NODLCKWT),
    ],
    ids=["a blocking callback", "NODLCKBLK", "NODLCKWT"],
)
def test_what_is_no_wait_closes_no_circle(holder: Flag, bast: bool, waiter: Flag) -> None:
    for other_way in (False, True):
        story = Story()
        story.ask(A, "x", flags=holder, bast=bast)
        story.ask(B, "y")
        steps = [(A, "y", Flag.NONE), (B, "x", waiter)]
        for key, name, flags in reversed(steps) if other_way else steps:
            assert story.ask(key, name, flags=flags)[1] is None


def test_a_lockspace_that_did_not_ask_for_it_and_a_failed_noqueue_see_no_deadlock() -> None:
    story = Story()
    story.ask(A, "array:x")
    story.ask(B, "array:y")
    assert story.ask(A, "array:y")[1] is None
    assert story.ask(B, "array:x")[1] is None
    story.ask(A, "x")
    story.ask(B, "y")
    assert story.ask(A, "y")[1] is None
    assert story.ask(B, "x", flags=Flag.NOQUEUE)[1] == EAGAIN


def test_ones_own_locks_are_no_wait() -> None:
    story = Story()
    story.ask(A, "x")
    assert story.ask(A, "x")[1] is None


def test_an_alternative_mode_is_a_way_out() -> None:
    for flags, status in ((Flag.ALTPR, None), (Flag.NONE, EDEADLK)):
        story = Story()
        story.ask(A, "x", Mode.CR)
        story.ask(C, "x", Mode.PR)
        story.ask(B, "y")
        assert story.ask(A, "y")[1] is None
        assert story.ask(C, "x", Mode.CW, bast=True)[1] is None, (
            "so that nothing behind it is granted at once"
        )
        assert story.ask(B, "x", Mode.EX, flags)[1] == status, "PR goes with A's CR, EX does not"


def test_a_request_put_before_others_may_close_a_circle_of_theirs() -> None:
    story = Story()
    story.ask(C, "x", bast=True)
    story.ask(B, "y")
    assert story.ask(A, "y")[1] is None
    assert story.ask(B, "x")[1] is None
    assert story.ask(A, "x", flags=Flag.HEADQUE)[1] == EDEADLK, "B would wait for A, who waits for B"
    assert story.ask(A, "x")[1] is None, "behind B"


def test_who_is_lost_waits_for_nobody() -> None:
    story = Story()
    story.ask(A, "x")
    story.ask(B, "y")
    assert story.ask(A, "y")[1] is None
    story.engine.lose_sessions([A])
    story.told()
    assert story.ask(B, "x")[1] is None, "it is granted when A's end is proved"
    story.engine.end_sessions([A], clean=False)
    assert [cast.status for cast in story.told()] == [0]


def test_waits_are_known_after_a_snapshot_and_gone_when_they_end() -> None:
    story = Story()
    story.ask(A, "x")
    story.ask(B, "y")
    waiting, _ = story.ask(A, "y")
    loaded = load_engine(dump_engine(story.engine))
    _, victim = loaded.request(B, 1, "one", b"x", Mode.EX, 0, False)
    assert victim not in loaded.locks
    story.engine.cancel(A, waiting)
    story.told()
    assert story.ask(B, "x")[1] is None


def test_all_members_say_the_same() -> None:
    engine = Engine()
    for key, flags in ((A, DEADLOCKS), (B, 0)):
        engine.open_session(key, "node", "test", 1)
        engine.join(key, 1, "one", 8, 4, flags)
    assert [effect.code for effect in engine.take_effects() if isinstance(effect, Refusal)] == [
        "deadlock-detection"
    ]
