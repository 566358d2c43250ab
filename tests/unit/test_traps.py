"""The classic traps of a replicated lock manager (dlm.md 6.8), by their numbers: each is one that we could be in.

Every story passes as the code stands, and fails with its trap put back (one method replaced). `docs/lock-manager.md`
lists all forty; those that are not here are told where the thing itself is tested.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lockds_kit import SPACE, Lockd, Program, holders, lockds, start
from medium_kit import Ring

import clustermd
from clustermd.dlm import outbox, replica, resource, snapshot
from clustermd.dlm.effects import Bast, Cast, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.install import plan_install
from clustermd.dlm.lock import Lock
from clustermd.dlm.machine import Machine
from clustermd.dlm.messages import decode, in_parts
from clustermd.dlm.modes import EUNLOCK, Flag, Mode
from clustermd.dlm.orphans import Orphan
from clustermd.dlm.outbox import Outbox
from clustermd.dlm.replica import Phase, Replica
from clustermd.dlm.resource import Resource
from clustermd.dlm.shown import AT_ONCE, Shown
from clustermd.dlm.space import Joiner, Seat, Space
from clustermd.errors import Refused
from clustermd.group.agreed import change
from clustermd.group.agreed import group as agreed
from clustermd.group.agreed.fencing import Fencing
from clustermd.group.agreed.group import AgreedGroup
from clustermd.group.agreed.hello import Life, tagged
from clustermd.group.process_group import Left
from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster

Patch = pytest.MonkeyPatch
BACK: list[tuple[Callable[[], None], Callable[[Patch], None]]] = []
A, B, C = (1, 11, 1), (2, 22, 1), (3, 33, 1)


def trap(put_back: Callable[[Patch], None]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A story about a trap, and how to put the trap back."""

    def add(story: Callable[[], None]) -> Callable[[], None]:
        BACK.append((story, put_back))
        return story

    return add


# --- who may be believed ----------------------------------------------------------------------------------------------


def _shown_at_once(patch: Patch) -> None:
    really = Shown.put
    patch.setattr(Shown, "put", lambda self, number, after, frame: really(self, number, AT_ONCE, frame))


@trap(_shown_at_once)
def test_a_grant_that_only_its_own_node_heard_is_shown_to_nobody_trap_1() -> None:
    ring, (one, two, _) = lockds(3)
    a, b = Program(one), Program(two)
    mine = a.ask(Mode.EX)
    (message,) = [data for node, data in ring.under_way if node is one.node]
    one.node.group.on_message(
        (1, one.node.pid), message
    )  # its own message comes to it first, and to nobody else
    one.node.group.swept()
    assert holders(one) == [("node1", "EX", False)], "granted in its own state"
    ring.split((1,), (2, 3))
    ring.run()
    theirs = b.ask(Mode.EX)
    ring.run()
    assert not a.has(mine) and b.has(theirs)


def _quorum_means_nothing(patch: Patch) -> None:
    really = Replica.on_view
    patch.setattr(AgreedGroup, "_pause", lambda self, reason: None)
    patch.setattr(Replica, "on_view", lambda self, view: really(self, view) if view.quorate else None)


@trap(_quorum_means_nothing)
def test_what_is_delivered_without_quorum_is_not_applied_trap_2() -> None:
    ring, (_, _, three) = lockds(3)
    c = Program(three)
    c.ask(Mode.EX)
    late = [data for node, data in ring.under_way if node is three.node]
    ring.split((1, 2), (3,))
    before = three.applied
    for data in late:
        three.node.group.on_message((3, three.node.pid), data)
    assert three.applied == before
    ring.run()
    assert three.applied == before and not holders(three)
    assert three.fates[-1] == "suspended"


def _any_quorum_will_do(patch: Patch) -> None:
    really = AgreedGroup.on_quorum
    patch.setattr(AgreedGroup, "on_quorum", lambda self, quorate, ring: really(self, quorate, self._ring))


@trap(_any_quorum_will_do)
def test_quorum_counts_for_the_ring_that_it_was_told_of_however_late_it_comes_trap_4() -> None:
    ring, (one, *_) = lockds(3)
    group, old = one.node.group, (ring.sequence, 1)
    views = len(one.node.of("view"))
    one.node.side = frozenset((1,))
    group.on_change(((1, one.node.pid),), (2, 3), ())
    group.on_ring((ring.sequence + 4, 1), (1,))
    group.on_quorum(True, old)  # the service has not heard of the new ring yet
    ring.run()
    assert len(one.node.of("view")) == views, "no view before the quorum of this very ring is known"
    group.on_quorum(False, (ring.sequence + 4, 1))
    ring.run()
    assert not one.node.view.quorate


def _two_histories_are_merged(patch: Patch) -> None:
    def plan(*args: Any) -> Any:
        really = plan_install(*args)
        if isinstance(really, str) or really.authority is None:
            return really
        applied = really.applied | {key: args[1][key].applied for key in really.foreign}
        return dataclasses.replace(
            really,
            foreign={},
            behind=(*really.behind, *really.foreign),
            members=tuple(sorted((*really.members, *really.foreign))),
            applied=applied,
        )

    patch.setattr(replica, "plan_install", plan)


@trap(_two_histories_are_merged)
def test_a_node_that_is_up_again_is_not_merged_into_a_history_that_went_on_without_it_trap_5() -> None:
    ring, (one, two, three) = lockds(3)
    b, c = Program(two), Program(three)
    held = c.ask(Mode.PR)
    ring.run()
    assert c.has(held)
    ring.split((1, 2), (3,))
    ring.run()
    b.ask(Mode.PR, b"another")
    ring.run()
    ring.form((1, 2, 3))  # NODEUP: the medium brings both sides together, and says nothing of what each did
    ring.run()
    assert "went on without this node" in three.restart
    assert not one.restart and not two.restart
    assert holders(one) == [("node3", "PR", True)], "until its end is proved"


def _fencing_counts_before_it_succeeds(patch: Patch) -> None:
    really = Fencing.view

    def view(self: Fencing, lost: list[Life], *rest: Any, **more: Any) -> None:
        really(self, lost, *rest, **more)
        self._proofs.update((life.key, "it will surely be fenced") for life in lost)

    patch.setattr(Fencing, "view", view)


@trap(_fencing_counts_before_it_succeeds)
def test_of_two_nodes_that_are_both_quorate_none_goes_on_before_the_other_is_fenced_trap_8() -> None:
    ring, (one, two) = lockds(2, quorate=lambda side: True)
    a, b = Program(one), Program(two)
    ring.split((1,), (2,))
    ring.run()
    ours, theirs = a.ask(Mode.EX), b.ask(Mode.EX)
    ring.run()
    assert one.node.view.quorate and two.node.view.quorate
    assert not a.has(ours) and not b.has(theirs)
    assert "node 2" in one.replica.status()["waits"]
    ring.nodes.remove(two.node)
    one.node.group.fence_done(2, "its power is off")
    ring.run()
    assert a.has(ours)


def _the_next_lockd_is_a_proof(patch: Patch) -> None:
    patch.setattr(change, "_proof_by_presence", lambda life, now: "it is back" if now is not None else "")


@trap(_the_next_lockd_is_a_proof)
def test_a_lockd_that_is_back_does_not_prove_that_its_old_programs_ended_trap_9() -> None:
    ring, (one, _, three) = lockds(3)
    a, c = Program(one), Program(three)
    held = c.ask(Mode.EX)
    ring.run()
    ring.end(three.node)
    again = start(ring, 3, 2)
    waits = a.ask(Mode.EX)
    new = Program(again)
    also = new.ask(Mode.EX)
    ring.run()
    assert c.has(held) and not a.has(waits) and not new.has(also)
    assert holders(one) == [("node3", "EX", True)]
    ring.end(again.node)
    start(ring, 3, 3, ended=[(1, "its programs have ended"), (2, "its programs have ended")])
    assert a.has(waits)


def _a_proof_is_for_the_node(patch: Patch) -> None:
    really = Machine._fenced

    def fenced(self: Machine, node: int, incarnation: int) -> None:
        for key in [key for key in self.nodes if key[0] == node]:
            self.nodes[key].lost = True
            really(self, *key)

    patch.setattr(Machine, "_fenced", fenced)


@trap(_a_proof_is_for_the_node)
def test_a_proof_of_a_former_life_leaves_the_new_one_alone_trap_10() -> None:
    ring, (one, _, three) = lockds(3)
    ring.end(three.node)
    again = start(ring, 3, 2)
    c = Program(again)
    held = c.ask(Mode.EX)
    ring.run()
    one.node.group.vouch("node3", "its old programs were killed by hand")
    ring.run()
    assert c.has(held) and holders(one) == [("node3", "EX", False)]


def _the_fencer_does_not_look_again(patch: Patch) -> None:
    patch.setattr(Fencing, "_stop", lambda self, node: None)


@trap(_the_fencer_does_not_look_again)
def test_a_node_that_came_back_is_not_fenced_any_more_trap_11() -> None:
    ring, (one, two, three) = lockds(3)
    ring.lose(three.node)
    ring.run()
    assert [victim.incarnation for victim in one.node.fencing] == [1]
    again = start(ring, 3, 2, boot="the next boot")
    assert one.node.cancelled == [3], "the agent that is under way is stopped"
    one.node.group.fence_done(3, "too late")
    ring.tick(60)
    assert not again.node.expelled and again.installed
    assert len(one.node.fencing) == 1 and not two.node.fencing


def _lost_is_dead(patch: Patch) -> None:
    really = Machine._install

    def install(self: Machine, *args: Any) -> None:
        really(self, *args)
        for node, incarnation in [key for key, state in self.nodes.items() if state.lost]:
            self._fenced(node, incarnation)

    patch.setattr(Machine, "_install", install)


@trap(_lost_is_dead)
def test_what_a_lost_node_held_is_freed_when_it_is_fenced_and_not_before_trap_12() -> None:
    ring, (one, _, three) = lockds(3)
    a, c = Program(one), Program(three)
    c.ask(Mode.EX)
    ring.run()
    waits = a.ask(Mode.EX)
    ring.lose(three.node)
    ring.run()
    assert one.installed and not a.has(waits)
    other = a.ask(Mode.EX, b"another")
    ring.run()
    assert a.has(other), "what it does not hold is given as ever"
    one.node.group.fence_done(3, "off")
    ring.run()
    assert a.has(waits)


def _a_converter_loses_all(patch: Patch) -> None:
    really = Engine.lose_sessions

    def lose(self: Engine, keys: Any) -> None:
        keys = list(keys)
        for place in list(self.locks.values()):
            if place.lock.session in keys and place.lock in place.resource.converting:
                self._forget(place.resource, place.lock)
        really(self, keys)

    patch.setattr(Engine, "lose_sessions", lose)


@trap(_a_converter_loses_all)
def test_a_lost_converter_keeps_what_it_was_granted_trap_13() -> None:
    ring, (one, two, three) = lockds(3)
    a, b, c = Program(one), Program(two), Program(three)
    first, second = a.ask(Mode.PR), c.ask(Mode.PR)
    ring.run()
    c.send("convert", c.lock(second), int(Mode.EX), 0, None)
    ring.run()
    ring.lose(three.node)
    ring.run()
    a.free(first)
    writes = b.ask(Mode.EX)
    ring.run()
    assert not b.has(writes) and holders(two) == [("node3", "PR", True)]


# --- the state that travels -------------------------------------------------------------------------------------------


def _no_highbast(patch: Patch) -> None:
    really = snapshot._dump_lock

    def dump(lock: Lock) -> list[Any]:
        wire = really(lock)
        wire[10] = 0
        return wire

    patch.setattr(snapshot, "_dump_lock", dump)


def _an_engine_with_everything() -> Engine:
    engine = Engine()
    for key in (A, B, C):
        engine.open_session(key, f"node{key[0]}", "array", 100 + key[0])
        engine.join(key, 1, SPACE, 16, 2)
    valblk = int(Flag.VALBLK)
    _, held = engine.request(A, 2, SPACE, b"token", Mode.PR, valblk, True)
    engine.request(B, 2, SPACE, b"token", Mode.EX, valblk, True)
    engine.convert(A, 3, held, Mode.PR, valblk, bytes(16))
    engine.request(B, 3, SPACE, b"left behind", Mode.EX, int(Flag.PERSISTENT) | valblk, True)
    engine.request(B, 4, SPACE, b"marked", Mode.EX, 0, True)
    engine.end_sessions([B], clean=False)
    engine.take_effects()
    return engine


@trap(_no_highbast)
def test_a_snapshot_tells_of_everything_that_behaviour_depends_on_trap_15() -> None:
    """Whatever field of the state is changed, its snapshot is another one; so none can be forgotten in it."""
    whole = snapshot.dump_engine(_an_engine_with_everything())
    assert snapshot.dump_engine(snapshot.load_engine(copy.deepcopy(whole))) == whole
    links = {"callbacks", "waits", "lock", "resource"}
    parts: dict[type, Callable[[Engine], Any]] = {
        Lock: lambda engine: next(iter(engine.locks.values())).lock,
        Resource: lambda engine: next(iter(engine.spaces[SPACE].resources.values())),
        Seat: lambda engine: next(iter(engine.spaces[SPACE].seats.values())),
        Joiner: lambda engine: Joiner(A, 1, 2),
        Orphan: lambda engine: next(iter(engine.spaces[SPACE].orphans.by_id.values())),
        Space: lambda engine: engine.spaces[SPACE],
    }
    for kind, find in parts.items():
        fields = getattr(kind, "__slots__", None) or [field.name for field in dataclasses.fields(kind)]
        for name in sorted({*fields} - links):
            engine = _an_engine_with_everything()
            part = find(engine)
            if kind is Joiner:
                engine.spaces[SPACE].joiners.append(part)
            before = snapshot.dump_engine(engine)
            value = getattr(part, name)
            changed = _other(value)
            if changed is None:
                continue
            setattr(part, name, changed)
            assert snapshot.dump_engine(engine) != before, f"{kind.__name__}.{name} is not in a snapshot"


def _other(value: Any) -> Any:
    """A value of the same kind that is another one; None for what holds parts that are looked at themselves."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str() if not hasattr(value, "value"):
            return value + "x"
        case bytes():
            return value + b"x"
        case tuple() if value and all(type(item) is int for item in value):
            return (*value[:-1], value[-1] + 1)
        case None:
            return b"x"
    return None


def _dumped_when_sent(patch: Patch) -> None:
    really = Replica._flush

    def flush(self: Replica) -> None:
        if any(decode(message)[0] == "snapshot" for message in self._to_send):
            assert self._view is not None and self._group is not None
            parts = in_parts(
                "snapshot", self._view.ring, self._machine.dump_sealed(), self._group.max_payload
            )
            self._to_send = deque(parts)
        really(self)

    patch.setattr(Replica, "_flush", flush)


def _joined(cluster: Cluster, number: int) -> Client:
    cluster.settle()
    client = cluster.node(number).client()
    client.send("join", SPACE, 64, 8)
    cluster.settle()
    return client


@trap(_dumped_when_sent)
def test_a_snapshot_is_of_the_install_point_however_late_it_is_sent_trap_16() -> None:
    cluster = Cluster(2)
    a, b = _joined(cluster, 1), _joined(cluster, 2)
    newcomer = cluster.start(3)
    group = cluster.group
    group.view()
    for node in cluster.nodes.values():
        while not group.accept(node.member):
            assert group.deliver(node.member)  # the view: its START is on its way
    a.node.port.limit = 0  # what it has to send after the install point must wait
    for node in cluster.nodes.values():
        while group.deliver(node.member):
            pass
    assert a.node.replica.installed and not newcomer.replica.installed
    b.send("request", SPACE, b"token", int(Mode.EX), 0, True)
    cluster.settle()
    a.node.port.limit = 1 << 30
    b.send("request", SPACE, b"token", int(Mode.PR), 0, True)
    cluster.settle()
    assert newcomer.replica.installed
    cluster.check_quiet()


def _what_came_before_is_held_too(patch: Patch) -> None:
    really = Replica._try_install

    def try_install(self: Replica) -> None:
        held = list(self._held)
        really(self)
        if self._phase is Phase.FETCHING:
            self._held = held

    patch.setattr(Replica, "_try_install", try_install)


@trap(_what_came_before_is_held_too)
def test_a_newcomer_applies_nothing_that_is_in_the_snapshot_already_trap_17() -> None:
    cluster = Cluster(2)
    a = _joined(cluster, 1)
    newcomer = cluster.start(3)
    op = a.send("request", SPACE, b"token", int(Mode.EX), 0, True)  # sent before the view, delivered after it
    cluster.group.view()
    cluster.settle()
    assert newcomer.replica.installed and op in a.done
    cluster.check_quiet()


# --- changes of membership --------------------------------------------------------------------------------------------


def _any_start_will_do(patch: Patch) -> None:
    really = Replica._on_start

    def on_start(self: Replica, key: Any, config: bytes, ring: Any, start: Any) -> None:
        really(self, key, config, self._view.ring if self._view is not None else ring, start)

    patch.setattr(Replica, "_on_start", on_start)


@trap(_any_start_will_do)
def test_a_start_of_an_older_view_is_none_of_the_new_one_trap_18() -> None:
    cluster = Cluster(2)
    _joined(cluster, 1)
    group = cluster.group
    group.view()
    for node in cluster.nodes.values():
        group.deliver(node.member)  # their STARTs for this view are on their way
    group.view()
    for node in cluster.nodes.values():
        group.deliver(node.member)
    for node in cluster.nodes.values():
        group.accept(node.member)
    for node in cluster.nodes.values():
        while group.deliver(node.member):
            pass
    assert not any(node.replica.installed for node in cluster.nodes.values())
    cluster.settle()
    cluster.check_quiet()


def _each_word_of_the_medium_is_a_view(patch: Patch) -> None:
    really = AgreedGroup.on_change

    def on_change(self: AgreedGroup, *change: Any) -> None:
        really(self, *change)
        if self._events is not None:
            self._events.on_view(self.view)

    patch.setattr(AgreedGroup, "on_change", on_change)


@trap(_each_word_of_the_medium_is_a_view)
def test_one_change_that_comes_as_two_is_one_view_trap_19() -> None:
    ring, (one, two, three) = lockds(3)
    views = len(one.node.of("view"))
    ring.end(three.node)  # who left ...
    again = Lockd(ring, 3, 2)
    ring.form(
        (1, 2, 3), joined=[again.node]
    )  # ... and in the same breath who joined: two words are said on the way
    again.join()
    ring.run()
    assert again.installed
    for daemon in (one, two):
        assert len(daemon.node.of("view")) == views + 1
        assert daemon.node.view.left == ((three.node.group.me, Left.LOST),)
        assert daemon.node.view.joined == (again.node.group.me,)


def _nobody_looks_again(patch: Patch) -> None:
    patch.setattr(Resource, "pend", lambda self: None)


@trap(_nobody_looks_again)
def test_an_unlock_that_was_held_back_wakes_who_waits_at_the_install_point_trap_20() -> None:
    cluster = Cluster(2)
    a, b = _joined(cluster, 1), _joined(cluster, 2)
    held = a.send("request", SPACE, b"token", int(Mode.EX), 0, True)
    waits = b.send("request", SPACE, b"token", int(Mode.EX), 0, True)
    cluster.settle()
    assert held in a.done and waits not in b.done
    a.send("unlock", next(iter(a.held)), int(Flag.FORCEUNLOCK), None)
    group = cluster.group
    group.view()
    group.accept(a.node.member)
    for node in cluster.nodes.values():
        while group.deliver(node.member):
            pass
    assert waits not in b.done, "frozen"
    cluster.settle()
    assert waits in b.done
    cluster.check_quiet()


def _a_pid_is_a_process(patch: Patch) -> None:
    patch.setattr(Life, "key", property(lambda self: (self.member.node, 1)))


@trap(_a_pid_is_a_process)
def test_another_process_with_the_same_pid_is_another_life_trap_21() -> None:
    ring, (one, _, three) = lockds(3)
    Program(three).ask(Mode.EX)
    ring.run()
    ring.end(three.node)
    number = start_with_pid(ring, three.node.pid)
    assert [member.incarnation for member, _ in one.node.view.left] == [1]
    assert [member.incarnation for member in one.node.view.members if member.node == 3] == [number]
    assert holders(one) == [("node3", "EX", True)]


def start_with_pid(ring: Ring, pid: int) -> int:
    """Node 3's next lockd, which happens to be process `pid` again. Returns its incarnation."""
    again = Lockd(ring, 3, 2)
    again.node.pid = again.node.group._pid = pid
    ring.form([node.number for node in ring.nodes], joined=[again.node])
    again.join()
    ring.run()
    return again.node.group.me.incarnation


def _every_operation_counts(patch: Patch) -> None:
    def ops(self: Machine, node: int, incarnation: int, first: int, ops: list[Any]) -> None:
        state = self.nodes[node, incarnation]
        for op in ops:
            state.last_op += 1
            self._op(state, (node, incarnation, op[0]), op[1:])

    patch.setattr(Machine, "_ops", ops)


@trap(_every_operation_counts)
def test_what_is_asked_again_because_its_fate_was_unknown_is_done_once_trap_23() -> None:
    cluster = Cluster(2)
    a = _joined(cluster, 1)
    a.send("request", SPACE, b"token", int(Mode.PR), 0, True)
    again = list(a.node.port.sent)
    cluster.settle()
    a.node.port.sent += again
    cluster.settle()
    assert [node.machine.engine.next_lock for node in cluster.nodes.values()] == [2, 2]
    cluster.check_quiet()


# --- who is told, and of what -----------------------------------------------------------------------------------------


def _the_dead_are_told(patch: Patch) -> None:
    really = Engine.end_sessions

    def end(self: Engine, keys: Any, **how: Any) -> None:
        keys = list(keys)
        ended = [place.lock for place in self.locks.values() if place.lock.session in keys]
        really(self, keys, **how)
        for lock in ended:
            self.callbacks.out.append(Cast(lock.session, lock.id, lock.op, EUNLOCK, 0, None, Mode.IV, False))

    patch.setattr(Engine, "end_sessions", end)


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


# --- the daemon that never stands still -------------------------------------------------------------------------------


def test_nothing_that_hears_the_order_can_wait_for_anything_trap_30() -> None:
    """What is called for each delivery imports nothing that blocks: no files, sockets, processes, threads or sleep."""
    source = Path(clustermd.__file__).parent
    blocking = {"asyncio", "os", "pathlib", "queue", "select", "socket", "subprocess", "threading", "time"}
    clients = {"session.py", "session_lock.py", "session_lockspace.py"}
    looked = 0
    for path in [*(source / "dlm").glob("*.py"), *(source / "group" / "agreed").glob("*.py")]:
        if path.name in clients:
            continue
        looked += 1
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & blocking, f"{path.name}: {names}"
    assert looked > 15


def _deaf_while_it_wants_to_speak(patch: Patch) -> None:
    really = AgreedGroup.on_message

    def on_message(self: AgreedGroup, peer: Any, data: bytes) -> None:
        if not self._outgoing:
            really(self, peer, data)

    patch.setattr(AgreedGroup, "on_message", on_message)


@trap(_deaf_while_it_wants_to_speak)
def test_who_must_try_again_hears_on_meanwhile_trap_31() -> None:
    ring, (one, two, _) = lockds(3)
    a, b = Program(one), Program(two)
    one.node.full = True
    mine = [a.ask(Mode.PR) for _ in range(50)]
    theirs = b.ask(Mode.PR)
    ring.tick(1)
    assert b.has(theirs) and holders(one) == [("node2", "PR", False)]
    one.node.full = False
    ring.tick(1)
    assert all(map(a.has, mine)), "and loses nothing of what it wanted to say"


def _goes_without_a_word(patch: Patch) -> None:
    patch.setattr(AgreedGroup, "leave", lambda self, done: done())


@trap(_goes_without_a_word)
def test_a_lockd_that_stops_in_order_says_goodbye_first_and_nobody_is_fenced_trap_34() -> None:
    ring, (one, two, three) = lockds(3)
    a, c = Program(one), Program(three)
    c.send("leave", SPACE)
    ring.run()
    three.replica.session_end(c.number, "it said goodbye", clean=True)
    ring.run()
    gone: list[bool] = []
    three.node.group.leave(lambda: gone.append(True))
    ring.run()
    assert gone
    ring.end(three.node)  # PROCDOWN, as it looks when corosync itself is stopped
    ring.run()
    ring.form((1, 2), gone=(3,))
    ring.run()
    ring.tick(60)
    assert not one.node.fencing and not two.node.fencing
    assert not one.node.group.status()["lost"] and len(one.replica.status()["nodes"]) == 2
    got = a.ask(Mode.EX)
    ring.run()
    assert a.has(got)


def _no_bound(patch: Patch) -> None:
    patch.setattr(Outbox, "check_room", lambda self, session, word: None)


@trap(_no_bound)
def test_what_waits_to_be_ordered_is_bounded_and_the_refusal_says_so_trap_39() -> None:
    ring, (one, *_) = lockds(3)
    a, other = Program(one), Program(one)
    held = a.ask(Mode.EX)
    ring.run()
    ring.split((1,), (2,), (3,))
    ring.run()
    asked = [a.ask(Mode.NL, flags=Flag.EXPEDITE) for _ in range(outbox.OF_A_SESSION)]
    a.ask(Mode.PR)
    assert len(a.heard("refused")) == 1
    refused = a.heard("refused")[0]
    assert refused[2] == "too-many-operations" and "clustermd cluster status" in refused[3]
    freed = a.free(held)
    fits = other.ask(Mode.NL, flags=Flag.EXPEDITE)
    assert len(a.heard("refused")) == 1 and not other.heard("refused"), "giving back is always taken"
    ring.form((1, 2, 3))
    ring.run()
    ring.tick(1)
    assert all(map(a.has, asked)) and other.has(fits)
    assert any(frame[1] == freed for frame in a.heard("cast"))
    more = a.ask(Mode.PR)
    ring.run()
    assert a.has(more), "there is room again"


def test_all_sessions_of_a_node_together_are_bounded_too_trap_39(monkeypatch: Patch) -> None:
    monkeypatch.setattr(outbox, "OF_A_NODE", 10)
    box = Outbox()
    for session in range(10):
        box.check_room(session, "request")
        box.add([session, "request"])
    with pytest.raises(Refused, match="10 lock operations of this node"):
        box.check_room(77, "join")
    box.check_room(77, "unlock")
    box.applied(1)
    box.check_room(77, "join")


def _texts_of_any_length(patch: Patch) -> None:
    patch.setattr(replica, "TEXT_MOST", 1 << 20)


@trap(_texts_of_any_length)
def test_no_message_is_larger_than_what_is_carried_in_one_piece_trap_40() -> None:
    ring, (one, two, three) = lockds(3)
    a = Program(one)
    group = one.node.group
    with pytest.raises(Refused, match="carries"):
        group.multicast(bytes(group.max_payload + 1))
    number = one.replica.open_session("x" * 200_000, 1)
    one.replica.session_lost(number)
    one.replica.session_end(number, "y" * 200_000, clean=False)
    got = [a.ask(Mode.PR, b"resource%d" % which) for which in range(3000)]
    sizes = []
    while ring.under_way:
        sizes += [len(data) for _, data in ring.under_way]
        ring.run()
    assert all(map(a.has, got)), "nothing that a person wrote stops the others"
    assert len(Machine.dump(one.replica._machine)) > 2 * agreed.MAX_PAYLOAD_BYTES
    ring.end(three.node)
    again = start(ring, 3, 2)
    assert again.installed and max(sizes) <= agreed.MAX_PAYLOAD_BYTES + 64
    assert holders(two, "resource7") == [("node1", "PR", False)]


def test_the_tag_of_a_message_counts_whole_trap_3() -> None:
    """Both sides of a cut may have the same ring sequence: the lowest node of the ring tells them apart."""
    ring, (one, _, three) = lockds(3)
    ring.split((1, 2), (3,))
    ring.run()
    number, sequence, lowest = one.node.view.ring
    before = one.applied
    one.node.group.on_message((2, 201), tagged((number, sequence, lowest + 2), 0, True, b"other side"))
    assert one.applied == before and not [
        heard for heard in one.node.of("message") if heard[2] == b"other side"
    ]
    assert not three.node.view.quorate


# --- and with the traps put back --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("story", "put_back"), BACK, ids=[story.__name__ for story, _ in BACK])
def test_a_story_fails_with_its_trap_put_back(
    story: Callable[[], None], put_back: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    put_back(monkeypatch)
    with pytest.raises(AssertionError):
        story()
