"""What a user of the lock manager sees: a lockspace, its locks and its recovery events.

The array process, `clustermd lock` and tests use these Protocols; `dlm.session` implements them over
a connection to the node's lockd. Every callback of one lockspace comes in the order in which the lock manager
generated it, from the event loop, never from within a call of this interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from clustermd.dlm.modes import Mode


@dataclass(frozen=True, slots=True)
class Slot:
    """A member of a lockspace: its DLM slot (1 is the first) and its node."""

    slot: int
    node: int
    name: str


class LockspaceEvents(Protocol):
    """Recovery events, in this order at each change: prep, one slot call per failed member, done."""

    def recover_prep(self) -> None:
        """Locking stops; some member may be dead."""

    def recover_slot(self, slot: Slot) -> None:
        """`slot` failed (not: left cleanly) and has been fenced. Its locks are being purged."""

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        """Locking goes on with these members."""

    def suspended(self, reason: str) -> None:
        """The group is not quorate or its sequencer is gone: hold I/O. Locks are kept."""

    def resumed(self) -> None:
        """The group is back and our session lived through it: I/O may go on."""

    def lost(self, reason: str) -> None:
        """The session is gone with all its locks: shut the gate. Pending calls raise ClusterLost."""


class Lock(Protocol):
    """One lock object on one resource.

    `mode` is what is granted; `lvb` the caller's value block buffer (64 bytes, written by the lock
    manager when a grant reads it, read by it when a conversion writes it), or None without VALBLK;
    `lvb_valid` is False when the last completion said VALNOTVALID.
    """

    name: str
    mode: Mode
    lvb: bytearray | None
    lvb_valid: bool

    async def convert(self, mode: Mode, *, noqueue: bool = False) -> None:
        """Convert and wait. Raises LockRefused ("would-block", "deadlock"), ClusterLost.

        One operation at a time: a second one while one is pending raises LockRefused ("busy").
        If the waiting task is cancelled, the conversion is cancelled too, its outcome awaited, and a grant that won the
        race converted back, before CancelledError goes on (F16): the lock then has its old mode.
        """

    async def unlock(self) -> None:
        """FORCEUNLOCK: works with an operation pending. The object is dead afterwards."""


class Lockspace(Protocol):
    """A joined lockspace: `our_slot` (DLM slot, from 1), `slots`, `generation` of the last recovery."""

    name: str
    our_slot: int
    slots: tuple[Slot, ...]
    generation: int

    async def lock(
        self,
        name: str,
        mode: Mode = Mode.NL,
        *,
        value_block: bool = False,
        noqueue: bool = False,
        blocking: Callable[[Mode], None] | None = None,
    ) -> Lock:
        """A new lock. NL is requested with EXPEDITE and granted at once; others wait, or raise
        LockRefused ("would-block") with `noqueue`. `blocking(mode)` is the blocking callback."""

    async def recovered(self, slot: int) -> None:
        """The takeover of failed `slot` is finished here; it may be given to a joiner again."""

    async def leave(self) -> None:
        """Release the lockspace cleanly (all locks are freed; members get no recover_slot)."""
