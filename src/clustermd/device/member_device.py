"""The device waist: what an array asks of its disks.

An array queues reads, writes, flushes and discards for any of its member devices; nothing moves
until `submit()`, which passes the I/O gate once for the whole batch. Completions come back as one
sweep: every finished request calls its target, then the sweep's listeners run once. Queueing never
submits, so all that one event caused goes to the kernel in one call.

A `Buffer` belongs to the device from `queue` until its completion.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

from clustermd.device.lease import Lease


class Op(enum.IntEnum):
    """What a request does. DISCARD leaves zeroes or fails with -EOPNOTSUPP."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3


class Buffer(Protocol):
    """Aligned memory from a pool. `view` covers all of it; `address` is where it starts."""

    view: memoryview
    address: int

    def release(self) -> None:
        """Give it back to its pool. Only its owner may, and only once."""


class BufferPool(Protocol):
    def take(self, length_bytes: int) -> Buffer:
        """A buffer of at least `length_bytes`, aligned to 4096. Its content is undefined."""


class MemberDevice(Protocol):
    """An open disk or image file. Made by `open_member`, or by a simulator."""

    path: str
    size_sectors: int
    logical_block_bytes: int
    read_only: bool
    discard_zeroes: bool

    def close(self) -> None:
        """Close it; requests must have completed. Gives up the witness lock."""


class Target(Protocol):
    """Where a completion goes. `tag` is what was queued; `result` is bytes moved or -errno."""

    def io_done(self, tag: int, result: int) -> None: ...


class GateState(enum.Enum):
    """OPEN lets requests through. HELD keeps them queued. SHUT answers them with -ESHUTDOWN."""

    OPEN = "open"
    HELD = "held"
    SHUT = "shut"


LAPSED = "this node's lease is over: it has not heard a majority of the cluster for too long"


class Gate:
    """The I/O gate: in front of every submission, of data, bitmaps and superblocks alike.

    A node that lost contact is HELD and may be opened again; a node whose rights may have passed to
    others is SHUT until it has joined again: a new life begins with `renew` (rule 12). `reason` says why, for people.
    With a `lease`, its end holds the gate as well, and both have to let go of it: `lapsed` says that the lease was
    found over at the last `verdict`.
    """

    __slots__ = ("_hold", "_listeners", "lapsed", "lease", "reason", "state")

    def __init__(self, lease: Lease | None = None) -> None:
        self.state = GateState.OPEN
        self.reason = ""
        self.lease = lease
        self.lapsed = False
        self._hold: str | None = None
        self._listeners: list[Callable[[GateState], None]] = []

    def listen(self, listener: Callable[[GateState], None]) -> None:
        """Call `listener(state)` after each change."""
        self._listeners.append(listener)

    def verdict(self) -> GateState:
        """May a batch go now? Asked before every submission. The end of a lease and its renewal give no event,
        so they are found here, and listeners are told then.
        """
        lease = self.lease
        if lease is not None and lease.valid() is self.lapsed and self.state is not GateState.SHUT:
            self.lapsed = not self.lapsed
            self._settle()
        return self.state

    def open(self) -> None:
        self._hold = None
        self._settle()

    def hold(self, reason: str) -> None:
        self._hold = reason
        self._settle()

    def shut(self, reason: str) -> None:
        self.lapsed = False
        self._to(GateState.SHUT, reason)

    def renew(self) -> None:
        """A new life, after joining again. The old life's requests must all have completed before."""
        if self.state is GateState.SHUT:
            self.state = GateState.HELD
        self.open()

    def _settle(self) -> None:
        if self._hold is not None:
            self._to(GateState.HELD, self._hold)
        elif self.lapsed:
            self._to(GateState.HELD, LAPSED)
        else:
            self._to(GateState.OPEN, "")

    def _to(self, state: GateState, reason: str) -> None:
        if self.state is GateState.SHUT:
            return
        self.reason = reason
        if self.state is state:
            return
        self.state = state
        for listener in list(self._listeners):
            listener(state)


class Submitter(Protocol):
    """Queues requests for any member and submits them in batches through its gate."""

    gate: Gate
    pool: BufferPool

    def queue(
        self,
        device: MemberDevice,
        op: Op,
        offset_bytes: int,
        length_bytes: int,
        buffer: Buffer | None,
        buffer_offset: int,
        target: Target,
        tag: int,
        fua: bool = False,
    ) -> None:
        """Remember one request. READ and WRITE need a buffer; FLUSH ignores offset and length.

        A WRITE with `fua` is durable when it completes. Offsets and lengths are multiples of the
        device's logical block. Nothing is submitted, and `target` is never called, before `submit`.
        """

    def submit(self) -> None:
        """Hand everything queued to the kernel, if the gate is open.

        HELD: it stays queued, and goes when the gate opens. SHUT: each request completes with
        -ESHUTDOWN in the next sweep. Never calls a target from within.
        """

    def after_sweep(self, listener: Callable[[], None]) -> None:
        """Run `listener()` once after each sweep of completions; the sweep submits after that."""

    async def run(
        self,
        device: MemberDevice,
        op: Op,
        offset_bytes: int,
        length_bytes: int,
        buffer: Buffer | None = None,
        buffer_offset: int = 0,
        fua: bool = False,
    ) -> int:
        """Queue one request, submit, and wait: for what is not on the hot path. Bytes or -errno."""

    @property
    def in_flight(self) -> int:
        """Requests submitted and not completed."""

    async def drained(self) -> None:
        """Wait until nothing is in flight."""

    async def close(self) -> None:
        """Wait for what is in flight, then free ring and pool."""
