"""The state of the lock manager as plain JSON values: for `clustermd locks`, and to say who waits for whom.

    {"epoch", "applied", "nodes": [{"node", "incarnation", "name", "lost"}],
     "lockspaces": {name: {"generation", "value_block_bytes", "slots": [...], "joining": [...], "resources": {...}}}}

A resource has "granted", "converting" and "waiting" in queue order; a lock tells who holds it, what it has and wants.
One that its process left behind ("orphan") belongs to the node, and "pid" is that process (`orphans`).
Names of resources that are not text are shown with backslash escapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clustermd.dlm.engine import Engine
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import Mode
from clustermd.dlm.resource import Lock, Resource
from clustermd.dlm.space import Space


def describe(machine: Machine) -> dict[str, Any]:
    return {
        "epoch": machine.epoch,
        "applied": machine.applied,
        "nodes": [
            {"node": node, "incarnation": incarnation, "name": state.name, "lost": state.lost}
            for (node, incarnation), state in sorted(machine.nodes.items())
        ],
        "lockspaces": {
            name: _space(machine.engine, space) for name, space in sorted(machine.engine.spaces.items())
        },
    }


def modes(machine: Machine) -> Iterator[tuple[int, int, int]]:
    """(lock id, granted mode, wanted mode or IV) of every lock: what tells since when it has been so."""
    for space in machine.engine.spaces.values():
        for resource in space.resources.values():
            for lock in resource.granted:
                yield lock.id, lock.gr, Mode.IV
            for lock in (*resource.converting, *resource.waiting):
                yield lock.id, lock.gr, lock.rq


def _who(engine: Engine, key: tuple[int, int, int]) -> dict[str, Any]:
    session = engine.sessions.get(key)
    who: dict[str, Any] = {"node": key[0], "incarnation": key[1], "session": key[2]}
    if session is not None:
        who |= {"name": session.name, "label": session.label, "pid": session.pid, "zombie": session.lost}
    return who


def _space(engine: Engine, space: Space) -> dict[str, Any]:
    return {
        "generation": space.generation,
        "deadlocks": space.waits is not None,
        "value_block_bytes": space.lvb_bytes,
        "slots": [
            {**_who(engine, seat.session), "slot": seat.slot, "name": seat.name, "state": seat.state.value}
            for _, seat in sorted(space.seats.items())
        ],
        "joining": [
            {
                **_who(engine, joiner.session),
                "max_slots": joiner.max_slots,
                "waits_for": [
                    {"slot": slot, "node": node, "name": name, "state": state}
                    for slot, node, name, state in joiner.waits_for
                ],
            }
            for joiner in space.joiners
        ],
        "resources": {
            name.decode(errors="backslashreplace"): _resource(engine, space, resource)
            for name, resource in sorted(space.resources.items())
        },
    }


def _resource(engine: Engine, space: Space, resource: Resource) -> dict[str, Any]:
    return {
        "granted": [_lock(engine, space, lock) for lock in resource.granted],
        "converting": [_queued(engine, space, lock) for lock in resource.converting],
        "waiting": [_queued(engine, space, lock) for lock in resource.waiting],
        "name_hex": resource.name.hex(),
        "value_block": None if resource.lvb is None else resource.lvb.hex(),
        "value_block_sequence": resource.lvb_seq,
        "value_block_invalid": resource.invalid,
    }


def _lock(engine: Engine, space: Space, lock: Lock) -> dict[str, Any]:
    shown = {"id": lock.id, "mode": Mode(lock.gr).name, **_who(engine, lock.session)}
    orphan = space.orphans.by_id.get(lock.id)
    return shown if orphan is None else shown | {"orphan": True, "pid": orphan.pid}


def _queued(engine: Engine, space: Space, lock: Lock) -> dict[str, Any]:
    return _lock(engine, space, lock) | {"wants": Mode(lock.rq).name}
