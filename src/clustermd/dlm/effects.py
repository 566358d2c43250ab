"""What the lock engine tells its sessions, as values.

The engine is a pure state machine: an input changes the state and appends effects, in the order in
which they were generated (dlm.md 1.8: per lock, callbacks are shown in generation order). The replica
shows each effect to the one session it is for, and drops those for sessions of other nodes.

The three that every operation has are named tuples: they cost a third of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

SessionKey = tuple[int, int, int]
"""A session: node number, incarnation of the node, and the session's number in that life."""


class Answer(NamedTuple):
    """The submission code of operation `op`: 0 or a negative errno; `lock` is the id a request was given."""

    session: SessionKey
    op: int
    rc: int
    lock: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Operation `op` was refused for a reason that has words (joining a lockspace, mostly)."""

    session: SessionKey
    op: int
    code: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


class Cast(NamedTuple):
    """The completion of `op` on `lock`: status, status-block flags, value block if it came to the caller.

    `mode` is what is granted afterwards (IV: the lock is gone). `rising` says that the session may do
    more than before: such a cast is shown only when the input that caused it is stable (dlm.md 6.2).
    `adopted` says that an orphan was adopted: the call itself returns the lock, there is no completion callback.
    """

    session: SessionKey
    lock: int
    op: int
    status: int
    sb_flags: int
    lvb: bytes | None
    mode: int
    rising: bool
    adopted: bool = False


class Bast(NamedTuple):
    """Somebody wants `mode` on the resource of `lock`."""

    session: SessionKey
    lock: int
    mode: int


@dataclass(frozen=True, slots=True)
class RecoverPrep:
    session: SessionKey
    space: str


@dataclass(frozen=True, slots=True)
class RecoverSlot:
    """The member in `slot` failed, is proved dead, and its locks are purged."""

    session: SessionKey
    space: str
    slot: int
    node: int
    name: str


@dataclass(frozen=True, slots=True)
class RecoverDone:
    """The members by slot, (slot, node, node name); the first one a session gets completes its join."""

    session: SessionKey
    space: str
    slots: tuple[tuple[int, int, str], ...]
    our_slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class JoinWaits:
    """A join waits for these slots to come free: (slot, node, node name, "zombie" or "recovering")."""

    session: SessionKey
    op: int
    space: str
    holders: tuple[tuple[int, int, str, str], ...]


Effect = Answer | Refusal | Cast | Bast | RecoverPrep | RecoverSlot | RecoverDone | JoinWaits
