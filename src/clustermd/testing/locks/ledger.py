"""What an outsider knows of an engine: the inputs it was given and the callbacks it made, lock by lock.

Nothing here is read from the engine's own locks, so that what the engine believes can be compared with it.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

from clustermd.dlm.effects import Effect, SessionKey
from clustermd.dlm.modes import Mode

ResourceKey = tuple[str, bytes]
"""Lockspace and resource name."""


@dataclass(slots=True)
class Record:
    """One lock: `fl` and `rq` of its last accepted operation, its owner's buffer, what its owner was told.

    `mode` is what the last completion said. `told` is the strongest blocking callback since the last grant.
    `fresh` says that it was granted by an input which did not look at the queues again, so nobody had to tell it yet;
    `headed` that it was put before others in the queue and was not looked at yet (dlm.md 1.4 rule 7, 1.5).
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
    clean: bool = False
    node_left: bool = False
    node_died: bool = False
    rc: int = 0
    effects: list[Effect] = field(default_factory=list)

    @property
    def purges(self) -> bool:
        """Whether it takes sessions' locks away for good."""
        return self.word in ("leave", "end_sessions")


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
    """Everything known, and the state after the last input."""

    records: dict[int, Record] = field(default_factory=dict)
    last_id: int = 0
    lost: set[SessionKey] = field(default_factory=set)
    queues: dict[ResourceKey, Queues] = field(default_factory=dict)
    seats: dict[str, Seats] = field(default_factory=dict)

    def clone(self) -> Ledger:
        """A copy that goes its own way. Queues and seats are replaced, never changed, so they are shared."""
        return Ledger(
            {lock: copy(record) for lock, record in self.records.items()},
            self.last_id,
            set(self.lost),
            dict(self.queues),
            dict(self.seats),
        )


def read_call(word: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Input:
    """A call of one of the engine's methods as an `Input`."""
    match word, args:
        case "request", (key, op, space, name, mode, flags, bast):
            return Input(word, frozenset((key,)), space, op, name, 0, mode, flags, bast)
        case "convert", (key, op, lock, mode, flags, lvb):
            return Input(word, frozenset((key,)), "", op, b"", lock, mode, flags, lvb=lvb)
        case "unlock", (key, op, lock, flags, lvb):
            return Input(word, frozenset((key,)), "", op, b"", lock, Mode.IV, flags, lvb=lvb)
        case "cancel", (key, lock):
            return Input(word, frozenset((key,)), lock=lock)
        case "leave", (key, space):
            return Input(word, frozenset((key,)), space)
        case "end_sessions", (keys,):
            clean, node_died = kwargs["clean"], kwargs.get("node_died", False)
            node_left = kwargs.get("node_left", False)
            return Input(word, frozenset(keys), clean=clean, node_died=node_died, node_left=node_left)
        case "lose_sessions", (keys,):
            return Input(word, frozenset(keys))
    return Input(word)
