"""What a user of the lock manager sees: a lockspace, its locks and its recovery events.

The array process, `clustermd lock` and tests use these Protocols; `dlm.session` implements them over
a connection to the node's lockd. Every callback of one lockspace comes in the order in which the lock manager
generated it, from the event loop, never from within a call of this interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from clustermd.dlm.modes import Flag, Mode, StatusFlag


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

    `mode` is what is granted; `lvb` the caller's value block buffer (as many bytes as the lockspace has, written by
    the lock manager when a grant reads it, read by it when a conversion writes it), or None without VALBLK;
    `lvb_valid` is False when the last completion said VALNOTVALID; `status_flags` is all it said beside its status.
    """

    name: str
    mode: Mode
    lvb: bytearray | None
    lvb_valid: bool
    status_flags: StatusFlag

    async def convert(
        self,
        mode: Mode,
        *,
        noqueue: bool = False,
        flags: Flag = Flag.NONE,
        value_block: bool = True,
        timeout_s: float | None = None,
    ) -> None:
        """Convert and wait. Raises LockRefused ("would-block", "deadlock", "timed-out", "cancelled"), ClusterLost.

        `flags` are those of dlm.md 1.7 for conversions. Without `value_block` a lock that has one leaves it alone this
        time. After `timeout_s` the conversion is cancelled; whether that or a grant was faster is waited for, also
        while the cluster stands still, so that a refusal is always the truth and a grant is never lost.

        One operation at a time: a second one while one is pending raises LockRefused ("busy").
        If the waiting task is cancelled, the conversion is cancelled too, its outcome awaited, and a grant that won the
        race converted back, before CancelledError goes on (F16): the lock then has its old mode.
        """

    async def cancel(self, *, deadlock: bool = False) -> None:
        """Cancel the conversion that another task waits for; that one raises LockRefused ("cancelled", or "deadlock").

        Nothing happens when a grant was faster.
        """

    async def unlock(self, *, flags: Flag = Flag.NONE) -> None:
        """FORCEUNLOCK: works with an operation pending. The object is dead afterwards.

        `flags` may be VALBLK (write the value block of a lock that has one) or IVVALBLK (mark it invalid instead).
        """


class Lockspace(Protocol):
    """A joined lockspace: `our_slot` (DLM slot, from 1), `slots`, `generation` of the last recovery."""

    name: str
    our_slot: int
    slots: tuple[Slot, ...]
    generation: int

    async def lock(
        self,
        name: str | bytes,
        mode: Mode = Mode.NL,
        *,
        value_block: bool = False,
        noqueue: bool = False,
        blocking: Callable[[Mode], None] | None = None,
        flags: Flag = Flag.NONE,
        timeout_s: float | None = None,
    ) -> Lock:
        """A new lock. NL is requested with EXPEDITE and granted at once; others wait, or raise
        LockRefused ("would-block") with `noqueue`. `blocking(mode)` is the blocking callback.

        `flags` are those of dlm.md 1.7 for requests; with PERSISTENT the lock outlives this session (`dlm.orphans`).
        `timeout_s` is as in `Lock.convert`. Raises LockRefused ("deadlock") where the lockspace looks for deadlocks.
        """

    async def adopt(
        self,
        name: str | bytes,
        mode: Mode,
        *,
        value_block: bool = False,
        blocking: Callable[[Mode], None] | None = None,
        persistent: bool = True,
    ) -> Lock:
        """Take over a lock that a process of this node requested with PERSISTENT and left behind in `mode`.

        With `value_block` its value is read. Raises LockRefused ("no-orphan", "other-mode"). If the task is cancelled
        the lock stays with this session, until that ends.
        """

    async def purge(self, node: int = 0, pid: int = 0) -> None:
        """Free what process `pid` (0: every one) of that node (0: ours) left behind; value blocks get the mark."""

    async def recovered(self, slot: int) -> None:
        """The takeover of failed `slot` is finished here; it may be given to a joiner again."""

    async def leave(self) -> None:
        """Release the lockspace cleanly (all locks but PERSISTENT ones are freed; members get no recover_slot)."""
