"""The lock engine as plain values and back, in one canonical form.

A snapshot holds everything that influences behaviour (dlm.md 6.3, trap 15): the order of every queue, what was
blasted and cast last, inherited flags, value blocks with sequence and mark, slots, joiners, orphans, the id
counter. Equal states give equal bytes, so a digest of the form compares replicas.
"""

from __future__ import annotations

from typing import Any

from clustermd.dlm.effects import SessionKey
from clustermd.dlm.engine import Engine, Place, SessionState
from clustermd.dlm.lock import Lock
from clustermd.dlm.orphans import Orphan
from clustermd.dlm.resource import Resource
from clustermd.dlm.space import Joiner, Seat, SeatState, Space


def _key(wire: list[int]) -> SessionKey:
    node, incarnation, number = wire
    return node, incarnation, number


def _dump_lock(lock: Lock) -> list[Any]:
    return [
        lock.id, list(lock.session), lock.op, lock.rq, lock.fl, lock.wants_bast, lock.lvb, lock.gr, lock.sb,
        lock.lvb_seq, lock.highbast, lock.cast_mode, lock.persistent,
    ]  # fmt: skip


def _load_lock(wire: list[Any]) -> Lock:
    number, session, *rest = wire
    return Lock(number, _key(session), *rest)


def _dump_resource(resource: Resource) -> list[Any]:
    queues = (resource.granted, resource.converting, resource.waiting)
    return [
        resource.name, resource.lvb, resource.lvb_seq, resource.invalid,
        *([_dump_lock(lock) for lock in queue] for queue in queues),
    ]  # fmt: skip


def _dump_space(space: Space) -> list[Any]:
    seats = [
        [seat.slot, list(seat.session), seat.name, seat.state.value, [list(key) for key in seat.told],
         seat.told_generation]
        for _, seat in sorted(space.seats.items())
    ]  # fmt: skip
    joiners = [
        [list(joiner.session), joiner.op, joiner.max_slots, [list(holder) for holder in joiner.waits_for]]
        for joiner in space.joiners
    ]
    resources = [_dump_resource(resource) for _, resource in sorted(space.resources.items())]
    orphans = [[lock_id, orphan.pid] for lock_id, orphan in sorted(space.orphans.by_id.items())]
    return [
        space.name, space.lvb_bytes, space.waits is not None, space.generation, seats, joiners, list(space.marks),
        resources, orphans,
    ]  # fmt: skip


def dump_engine(engine: Engine) -> list[Any]:
    sessions = [
        [list(key), session.name, session.label, session.pid, session.lost]
        for key, session in sorted(engine.sessions.items())
    ]
    return [engine.next_lock, sessions, [_dump_space(space) for _, space in sorted(engine.spaces.items())]]


def load_engine(wire: list[Any]) -> Engine:
    """Raises ValueError, TypeError or KeyError for what `dump_engine` did not make."""
    engine = Engine()
    engine.next_lock, sessions, spaces = wire
    for key, name, label, pid, lost in sessions:
        engine.sessions[_key(key)] = SessionState(_key(key), name, label, pid, lost)
    for name, lvb_bytes, deadlocks, generation, seats, joiners, marks, resources, orphans in spaces:
        space = engine.spaces[name] = Space(name, lvb_bytes, engine.waits if deadlocks else None)
        space.generation = generation
        for slot, session, node_name, state, told, told_generation in seats:
            space.seats[slot] = Seat(
                slot, _key(session), node_name, SeatState(state), [_key(key) for key in told], told_generation
            )
        for session, op, max_slots, waits_for in joiners:
            waits = tuple((slot, node, who, state) for slot, node, who, state in waits_for)
            space.joiners.append(Joiner(_key(session), op, max_slots, waits))
        space.marks = dict.fromkeys(marks)
        for resource_name, lvb, lvb_seq, invalid, *queues in resources:
            resource = space.resources[resource_name] = Resource(resource_name, engine.callbacks, space.waits)
            resource.lvb, resource.lvb_seq, resource.invalid = lvb, lvb_seq, invalid
            for queue, locks in zip(
                (resource.granted, resource.converting, resource.waiting), queues, strict=True
            ):
                for lock in map(_load_lock, locks):
                    queue.append(lock)
                    engine.locks[lock.id] = Place(space, resource, lock)
                    if space.waits is not None and queue is not resource.granted:
                        space.waits.begin(resource, lock)
        for lock_id, pid in orphans:
            place = engine.locks[lock_id]
            space.orphans.by_id[lock_id] = Orphan(place.resource, place.lock, pid)
    return engine
