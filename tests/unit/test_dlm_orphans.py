"""Orphans: what stays when its process ends, who may take it, and when it goes (dlm.md 1.7, 2.4, 3.4)."""

from __future__ import annotations

from clustermd.dlm.effects import Bast, Cast, Effect, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import EAGAIN, ECANCEL, ENOENT, EUNLOCK, Flag, Mode, StatusFlag
from clustermd.dlm.report import describe
from clustermd.dlm.snapshot import dump_engine, load_engine
from clustermd.dlm.wire import pack
from clustermd.testing.locks.invariants import Checker

SPACE = "space"
A, A2, B = (1, 11, 1), (1, 11, 2), (2, 22, 1)
OWNER = (1, 11, 0)
VALBLK = Flag.VALBLK


class Story:
    """A and A2 on node 1, B on node 2, all in one lockspace. Every call returns what it told."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.checker = Checker(self.engine)
        for key in (A, A2, B):
            self.engine.open_session(key, f"node{key[0]}", "test", 100 + key[2])
            self.engine.join(key, 1, SPACE, 8, 4)
        self.told()

    def told(self) -> list[Effect]:
        effects = self.engine.take_effects()
        self.checker.after(effects)
        return [effect for effect in effects if isinstance(effect, (Cast, Bast))]

    def ask(self, key: SessionKey, mode: Mode, flags: Flag = Flag.NONE, name: bytes = b"x") -> int:
        rc, lock = self.engine.request(key, 1, SPACE, name, mode, int(flags), True)
        assert rc == 0
        self.effects = self.told()
        return lock

    def adopt(self, key: SessionKey, mode: Mode, flags: Flag = Flag.NONE) -> tuple[int, int]:
        answer = self.engine.request(key, 7, SPACE, b"x", mode, int(flags | Flag.ORPHAN), True)
        self.effects = self.told()
        return answer

    def end(self, *keys: SessionKey, clean: bool = False, node_died: bool = False) -> list[Effect]:
        self.engine.end_sessions(keys, clean=clean, node_died=node_died)
        return self.told()

    def convert(
        self, lock: int, mode: Mode, flags: Flag = Flag.NONE, lvb: bytes | None = None
    ) -> list[Effect]:
        key = self.engine.locks[lock].lock.session
        assert self.engine.convert(key, 2, lock, mode, int(flags), lvb)[0] == 0
        return self.told()

    def purge(self, key: SessionKey, node: int = 0, pid: int = 0) -> list[Effect]:
        assert self.engine.purge(key, SPACE, node, pid) == 0
        return self.told()


def statuses(effects: list[Effect]) -> list[tuple[int, int, int]]:
    return [(cast.lock, cast.status, cast.mode) for cast in effects if isinstance(cast, Cast)]


def test_a_persistent_lock_outlives_its_process_and_blocks_others() -> None:
    for clean in (False, True):
        story = Story()
        stays = story.ask(A, Mode.EX, Flag.PERSISTENT)
        goes = story.ask(A, Mode.EX, name=b"y")
        waiting = story.ask(B, Mode.PR)
        assert story.end(A, clean=clean) == []
        assert goes not in story.engine.locks
        assert story.engine.locks[stays].lock.session == OWNER
        story.ask(B, Mode.PW)
        assert story.effects == [], "an orphan hears no blocking callbacks"
        assert waiting in story.engine.locks


def test_what_was_pending_on_it_is_cancelled() -> None:
    story = Story()
    held = story.ask(B, Mode.PR)
    lock = story.ask(A, Mode.PR, Flag.PERSISTENT)
    request = story.ask(A, Mode.EX, Flag.PERSISTENT)
    story.convert(lock, Mode.EX)
    behind = story.ask(A2, Mode.PR)
    ended = story.end(A)
    assert statuses(ended) == [(behind, 0, Mode.PR)], "the conversion and the request were in its way"
    assert request not in story.engine.locks and story.engine.locks[lock].lock.gr == Mode.PR
    assert story.engine.locks[held].lock.gr == Mode.PR


def test_only_its_own_node_adopts_it_and_only_in_its_mode() -> None:
    story = Story()
    lock = story.ask(A, Mode.PW, Flag.PERSISTENT)
    assert story.adopt(A2, Mode.PW) == (ENOENT, 0), "it is no orphan yet"
    story.end(A)
    assert story.adopt(B, Mode.PW) == (ENOENT, 0)
    assert story.adopt(A2, Mode.EX) == (EAGAIN, 0)
    waiting = story.ask(B, Mode.PR)
    assert story.adopt(A2, Mode.PW) == (0, lock)
    assert story.effects == [
        Cast(A2, lock, 7, 0, 0, None, Mode.PW, rising=True, adopted=True),
        Bast(A2, lock, Mode.PR),
    ]
    assert OWNER not in story.engine.sessions
    story.engine.unlock(A2, 8, lock, 0, None)
    assert statuses(story.told()) == [(lock, EUNLOCK, -1), (waiting, 0, Mode.PR)]


def test_an_adopted_lock_ends_with_its_new_session_unless_that_says_otherwise() -> None:
    for flags in (Flag.NONE, Flag.PERSISTENT):
        story = Story()
        lock = story.ask(A, Mode.EX, Flag.PERSISTENT)
        story.end(A)
        story.adopt(A2, Mode.EX, flags)
        story.end(A2)
        assert (lock in story.engine.locks) is (flags is Flag.PERSISTENT)


def test_its_value_is_left_alone_and_read_by_who_adopts_it() -> None:
    story = Story()
    lock = story.ask(A, Mode.EX, Flag.PERSISTENT | VALBLK)
    story.convert(lock, Mode.PW, VALBLK, b"written.")
    story.end(A)
    assert story.adopt(A2, Mode.PW, VALBLK) == (0, lock)
    (cast,) = story.effects
    assert isinstance(cast, Cast) and (cast.lvb, cast.sb_flags) == (b"written.", 0)


def test_a_purge_frees_the_orphans_of_a_node_or_of_one_process_and_marks_their_values() -> None:
    story = Story()
    first = story.ask(A, Mode.PR, Flag.PERSISTENT)
    second = story.ask(A2, Mode.PR, Flag.PERSISTENT)
    writer = story.ask(A2, Mode.PW, Flag.PERSISTENT | VALBLK, name=b"y")
    story.convert(writer, Mode.EX, VALBLK)
    story.convert(writer, Mode.PW, VALBLK, b"written.")
    alive = story.ask(B, Mode.CR, Flag.PERSISTENT)
    story.end(A, A2)
    reader = story.ask(B, Mode.PR, VALBLK, b"y")
    assert story.purge(B, 2) == [] and story.purge(B) == [], "node 2 left nothing behind"
    assert story.purge(B, 1, 101) == []
    assert (first in story.engine.locks, second in story.engine.locks) == (False, True)
    assert story.purge(B, 1) == [
        Cast(B, reader, 1, 0, StatusFlag.VALNOTVALID, b"written.", Mode.PR, rising=True)
    ]
    assert sorted(story.engine.locks) == [alive, reader]
    assert story.engine.purge(A, SPACE, 0, 0) == ENOENT, "it is no member"


def test_leaving_a_lockspace_leaves_them_behind_as_well() -> None:
    story = Story()
    stays = story.ask(A, Mode.PR, Flag.PERSISTENT)
    goes = story.ask(A, Mode.PR)
    story.ask(B, Mode.PR)
    story.convert(stays, Mode.EX)
    assert story.engine.leave(A, SPACE) == 0
    assert statuses(story.told()) == [(goes, EUNLOCK, -1), (stays, ECANCEL, Mode.PR)]
    assert story.engine.locks[stays].lock.session == OWNER


def test_a_lockspace_lives_as_long_as_it_has_orphans() -> None:
    story = Story()
    lock = story.ask(A, Mode.EX, Flag.PERSISTENT)
    story.end(A, A2, B)
    assert list(story.engine.locks) == [lock] and not story.engine.spaces[SPACE].seats
    story.engine.open_session((1, 11, 3), "node1", "test", 103)
    story.engine.join((1, 11, 3), 1, SPACE, 8, 4)
    story.told()
    assert story.adopt((1, 11, 3), Mode.EX) == (0, lock)
    story.end((1, 11, 3))
    assert not story.engine.spaces and not story.engine.sessions


def test_a_snapshot_has_them() -> None:
    story = Story()
    lock = story.ask(A, Mode.EX, Flag.PERSISTENT)
    story.end(A)
    loaded = load_engine(dump_engine(story.engine))
    assert dump_engine(loaded) == dump_engine(story.engine)
    assert loaded.request(A2, 1, SPACE, b"x", Mode.EX, int(Flag.ORPHAN), False) == (0, lock)


def test_a_node_takes_its_orphans_along_when_it_is_proved_dead_or_leaves() -> None:
    for left in (False, True):
        machine = Machine()
        machine.apply(pack(["install", 1, [[1, 11, "node1"], [2, 22, "node2"]], [], []]))
        flags = int(Flag.PERSISTENT)
        for node, life in ((1, 11), (2, 22)):
            machine.apply(pack(["ops", node, life, 1, [[1, "open", "test", 1], [1, "join", 1, SPACE, 8, 4]]]))
        ops = [[1, "request", 2, SPACE, b"x", 5, flags, True], [1, "end", "proved", False]]
        machine.apply(pack(["ops", 1, 11, 3, ops]))
        machine.apply(pack(["ops", 2, 22, 3, [[1, "request", 2, SPACE, b"x", 3, 0, True]]]))
        gone = machine.apply(pack(["install", 2, [[2, 22, "node2"]], [[1, 11]] if left else [], []]))
        if not left:
            assert gone == []
            machine.apply(pack(["ops", 2, 22, 4, [[1, "purge", 3, SPACE, 1, 0]]]))
            assert 1 in machine.engine.locks, "a lost node keeps what it has until it is proved dead"
            gone = machine.apply(pack(["fenced", 1, 11, "proved"]))
        assert statuses(gone) == [(2, 0, Mode.PR)]
        assert list(machine.engine.locks) == [2]
        assert set(machine.engine.sessions) == {B}


def test_no_client_speaks_for_the_node_itself() -> None:
    machine = Machine()
    machine.apply(pack(["install", 1, [[1, 11, "node1"]], [], []]))
    ops = [[1, "open", "test", 1], [1, "join", 1, SPACE, 8, 4]]
    ops += [[1, "request", 2, SPACE, b"x", 5, int(Flag.PERSISTENT), True], [1, "end", "proved", False]]
    machine.apply(pack(["ops", 1, 11, 1, ops]))
    assert OWNER in machine.engine.sessions
    for op in (["unlock", 1, 1, 0, None], ["end", "", True], ["lost"], ["open", "me", 1]):
        machine.apply(pack(["ops", 1, 11, machine.nodes[1, 11].last_op + 1, [[0, *op]]]))
    assert list(machine.engine.locks) == [1] and machine.engine.alive(OWNER)


def test_a_status_shows_who_left_it_behind() -> None:
    machine = Machine()
    machine.apply(pack(["install", 1, [[1, 11, "node1"]], [], []]))
    ops = [[1, "open", "clustermd lock", 4711], [1, "join", 1, SPACE, 8, 4]]
    ops += [[1, "request", 2, SPACE, b"x", 5, int(Flag.PERSISTENT), True], [1, "end", "proved", False]]
    machine.apply(pack(["ops", 1, 11, 1, ops]))
    space = describe(machine)["lockspaces"][SPACE]
    (shown,) = space["resources"]["x"]["granted"]
    assert (shown["name"], shown["pid"], shown["orphan"], shown["label"]) == ("node1", 4711, True, "orphans")
    assert space["deadlocks"] is False
