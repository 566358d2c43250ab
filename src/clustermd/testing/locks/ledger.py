"""What an outsider knows of an engine: the inputs it was given and the callbacks it made, lock by lock.

Nothing here is read from the engine's own locks, so that what the engine believes can be compared with it.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

from clustermd.dlm.effects import Effect, SessionKey
from clustermd.dlm.modes import ECANCEL, Flag, Mode

ResourceKey = tuple[str, bytes]
"""Lockspace and resource name."""


@dataclass(slots=True)
class Record:
    """One lock: `fl` and `rq` of its last accepted operation, its owner's buffer, what its owner was told.

    `mode` is what the last completion said. `told` is the strongest blocking callback since the last grant.
    `fresh` says that it was granted by an input which did not look at the queues again, so nobody had to tell it yet;
    `headed` that it was put before others in the queue and was not looked at yet (dlm.md 1.4 rule 7, 1.5).
    `persistent` ones survive their session; `left_by` is then the process that left it, else None (dlm.md 1.7).
    """

    id: int
    key: ResourceKey
    session: SessionKey
    fl: int
    rq: int
    op: int
    wants_bast: bool
    buffer: bytes | None
    mode: int = Mode.IV
    pending: bool = True
    told: int = Mode.IV
    fresh: bool = False
    headed: bool = False
    persistent: bool = False
    left_by: int | None = None


@dataclass(slots=True)
class Input:
    """One call of the engine with its arguments, its return code, and the effects it had."""

    word: str
    keys: frozenset[SessionKey] = frozenset()
    space: str = ""
    op: int = 0
    name: bytes = b""
    lock: int = 0
    mode: int = Mode.IV
    flags: int = 0
    bast: bool = False
    lvb: bytes | None = None
    status: int = ECANCEL
    node: int = 0
    pid: int = 0
    clean: bool = False
    node_left: bool = False
    node_died: bool = False
    rc: int = 0
    effects: list[Effect] = field(default_factory=list)

    @property
    def purges(self) -> bool:
        """Whether it takes sessions' locks away for good."""
        return self.word in ("leave", "end_sessions")

    def orphans(self, record: Record) -> bool:
        """Whether it takes the owner away and leaves that lock behind (dlm.md 1.7 PERSISTENT)."""
        if not self.purges or record.session not in self.keys or not record.persistent:
            return False
        here = not self.space or record.key[0] == self.space
        return here and record.mode != Mode.IV and not self.node_died and not self.node_left

    def frees_orphan(self, record: Record, lost: set[SessionKey]) -> bool:
        """Whether it is a purge of that lock."""
        if self.word != "purge" or self.rc != 0 or record.left_by is None or record.session in lost:
            return False
        (caller,) = self.keys
        node, here = self.node or caller[0], record.key[0] == self.space
        return here and record.session[0] == node and self.pid in (0, record.left_by)


@dataclass(slots=True)
class Queues:
    """A resource as it was: (lock, granted mode, requested mode) in the order of each queue."""

    granted: list[tuple[int, int, int]] = field(default_factory=list)
    converting: list[tuple[int, int, int]] = field(default_factory=list)
    waiting: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Seats:
    """A lockspace as it was: slot -> (session, state)."""

    seats: dict[int, tuple[SessionKey, str]] = field(default_factory=dict)


@dataclass(slots=True)
class Ledger:
    """Everything known, and the state after the last input. `seeking` are the lockspaces that look for deadlocks."""

    records: dict[int, Record] = field(default_factory=dict)
    last_id: int = 0
    lost: set[SessionKey] = field(default_factory=set)
    queues: dict[ResourceKey, Queues] = field(default_factory=dict)
    seats: dict[str, Seats] = field(default_factory=dict)
    pids: dict[SessionKey, int] = field(default_factory=dict)
    seeking: set[str] = field(default_factory=set)

    def clone(self) -> Ledger:
        """A copy that goes its own way. Queues and seats are replaced, never changed, so they are shared."""
        return Ledger(
            {lock: copy(record) for lock, record in self.records.items()},
            self.last_id,
            set(self.lost),
            dict(self.queues),
            dict(self.seats),
            dict(self.pids),
            set(self.seeking),
        )


def read_call(word: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Input:
    """A call of one of the engine's methods as an `Input`."""
    match word, args:
        case "request", (key, op, space, name, mode, flags, bast):
            return Input(word, frozenset((key,)), space, op, name, 0, mode, flags, bast)
        case "convert", (key, op, lock, mode, flags, lvb):
            return Input(word, frozenset((key,)), "", op, b"", lock, mode, flags, lvb=lvb)
        case "unlock", (key, op, lock, flags, lvb) if flags & Flag.CANCEL:
            return Input("cancel", frozenset((key,)), "", op, lock=lock, flags=flags, lvb=lvb)
        case "unlock", (key, op, lock, flags, lvb):
            return Input(word, frozenset((key,)), "", op, b"", lock, Mode.IV, flags, lvb=lvb)
        case "cancel", (key, lock, *status):
            return Input(word, frozenset((key,)), lock=lock, status=status[0] if status else ECANCEL)
        case "purge", (key, space, node, pid):
            return Input(word, frozenset((key,)), space, node=node, pid=pid)
        case "open_session", (key, _, _, pid):
            return Input(word, frozenset((key,)), pid=pid)
        case "leave", (key, space):
            return Input(word, frozenset((key,)), space)
        case "end_sessions", (keys,):
            clean, node_died = kwargs["clean"], kwargs.get("node_died", False)
            node_left = kwargs.get("node_left", False)
            return Input(word, frozenset(keys), clean=clean, node_died=node_died, node_left=node_left)
        case "lose_sessions", (keys,):
            return Input(word, frozenset(keys))
    return Input(word)
