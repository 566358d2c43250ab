"""Traps of the state that replicas share: snapshots, install points, what is done twice or missed (dlm.md 6.8)."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from lockds_kit import SPACE
from traps_kit import Traps

from clustermd.dlm import snapshot
from clustermd.dlm.engine import Engine
from clustermd.dlm.lock import Lock
from clustermd.dlm.machine import Machine
from clustermd.dlm.messages import decode, in_parts
from clustermd.dlm.modes import Flag, Mode
from clustermd.dlm.orphans import Orphan
from clustermd.dlm.replica import Phase, Replica
from clustermd.dlm.resource import Resource
from clustermd.dlm.space import Joiner, Seat, Space
from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster

Patch = pytest.MonkeyPatch
trap = Traps()
A, B, C = (1, 11, 1), (2, 22, 1), (3, 33, 1)


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


def _no_highbast(patch: Patch) -> None:
    really = snapshot._dump_lock

    def dump(lock: Lock) -> list[Any]:
        wire = really(lock)
        wire[10] = 0
        return wire

    patch.setattr(snapshot, "_dump_lock", dump)


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


def _joined(cluster: Cluster, number: int) -> Client:
    cluster.settle()
    client = cluster.node(number).client()
    client.send("join", SPACE, 64, 8)
    cluster.settle()
    return client


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


test_a_story_fails_with_its_trap_put_back = trap.test()
