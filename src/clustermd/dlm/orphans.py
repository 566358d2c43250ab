"""Orphans: locks that outlive the process that took them (dlm.md 1.7 PERSISTENT, ORPHAN; 2.4; 3.4).

When a session ends, or leaves its lockspace, a lock that was requested with PERSISTENT stays. What was pending on it
is cancelled, its value block is not touched, and it blocks others as before, but nobody hears its callbacks. It now
belongs to the session's node: it is held by that node's session number 0, which no client has. From there it goes

    to a session of the same life of that node, which requests the name with ORPHAN in the very mode that is granted;
    away with `purge`, as if its process had died now: the value block under PW or EX is marked invalid;
    away with its node, when that leaves or is proved dead. A lost node keeps its orphans until then, like all locks.

A lockspace lives as long as it has orphans, so who comes later finds them in the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clustermd.dlm.effects import SessionKey
from clustermd.dlm.lock import Lock
from clustermd.dlm.modes import EAGAIN, ENOENT
from clustermd.dlm.resource import Resource

NODE_SESSION = 0
"""The session number that stands for the node itself; clients count from 1."""


def owner_of(key: SessionKey) -> SessionKey:
    """The holder of the orphans of that session's node."""
    return key[0], key[1], NODE_SESSION


@dataclass(slots=True, eq=False)
class Orphan:
    """One orphan and the process, for people and for `purge`, that left it behind."""

    resource: Resource
    lock: Lock
    pid: int


class Orphans:
    """The orphans of one lockspace, by lock id."""

    __slots__ = ("by_id",)

    def __init__(self) -> None:
        self.by_id: dict[int, Orphan] = {}

    def __bool__(self) -> bool:
        return bool(self.by_id)

    def leave_behind(self, resource: Resource, lock: Lock, pid: int) -> None:
        """A granted lock loses its owner."""
        lock.session = owner_of(lock.session)
        lock.op = 0
        lock.wants_bast = False
        self.by_id[lock.id] = Orphan(resource, lock, pid)

    def find(self, owner: SessionKey, name: bytes, mode: int) -> Orphan | int:
        """The oldest orphan of that owner with that name and granted mode; else EAGAIN (another mode) or ENOENT."""
        named = [
            orphan
            for _, orphan in sorted(self.by_id.items())
            if orphan.lock.session == owner and orphan.resource.name == name
        ]
        right = [orphan for orphan in named if orphan.lock.gr == mode]
        return right[0] if right else EAGAIN if named else ENOENT

    def forget(self, lock_id: int) -> None:
        """It is an orphan no more, if it was."""
        self.by_id.pop(lock_id, None)

    def of_process(self, owners: Iterable[SessionKey], pid: int) -> list[Orphan]:
        """Those that `pid` (0: any process) left to these owners, by resource name, then oldest first."""
        of = frozenset(owners)
        found = [
            orphan
            for orphan in self.by_id.values()
            if orphan.lock.session in of and (pid == 0 or orphan.pid == pid)
        ]
        return sorted(found, key=lambda orphan: (orphan.resource.name, orphan.lock.id))
