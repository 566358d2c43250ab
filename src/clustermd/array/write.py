"""The write path: register, look at the windows, set the bits, send to every writable member.

A write is plain function calls. It registers its range first and looks at the windows second, in one
synchronous step, so no window can slip in between (rule 3). What must wait leaves the fast path: an overlapping
range or window parks the request, a chunk whose bit is not on disk waits for the bitmap writer, a failed
member makes it a matter of `faults`. A write is answered when every member has it, or when
the fault of those that miss it is recorded and acknowledged by all nodes (rule 17).

When its life ends before every member has it, a write starts again in the next life, unless that life ended by
exclusion: then others may have written there since, so it is refused, and only when nothing of it is in flight any
more. What came of it on each member is as with any write that failed: old or new, sector by sector, and its bits,
which others take over, have it made equal.

A request that a member does not answer within `device_timeout_s` fails that member (rule 16): the client gets its
answer, the buffer stays with the device until the request is gone. The last good member is not failed, so there the
range stays taken too: what lands late must not overtake a newer write.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from clustermd.array.bitmap import Bitmap
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.request import Kind, Request
from clustermd.array.state import EXCLUDED, ArrayState
from clustermd.array.waiters import when_ended
from clustermd.device.member_device import Buffer, Op


class WriteOp:
    """One write in flight. Masks have one bit a member: pending, failed, succeeded, and abandoned by a time-out."""

    __slots__ = (
        "abandoned",
        "bitmap",
        "buffer",
        "chunks",
        "expected",
        "failed",
        "hi",
        "lingering",
        "lo",
        "orphaned",
        "pending",
        "redo",
        "request",
        "settling",
        "succeeded",
        "tick",
        "unsupported",
        "waiters",
        "writer",
    )

    def __init__(
        self, writer: Writer, request: Request, bitmap: Bitmap, lo: int, hi: int, chunks: range
    ) -> None:
        self.writer = writer
        self.request = request
        self.bitmap = bitmap
        self.lo = lo
        self.hi = hi
        self.chunks = chunks
        self.buffer = request.buffer
        self.expected = request.length_bytes if request.kind is Kind.WRITE else 0
        self.tick = writer.state.tick
        self.pending = 0
        self.failed = 0
        self.succeeded = 0
        self.abandoned = 0
        self.redo = False
        self.unsupported = False
        self.settling = False
        self.orphaned = False
        self.lingering = False
        self.waiters: list[Callable[[], None]] | None = None

    def io_done(self, tag: int, result: int) -> None:
        bit = 1 << tag
        if self.abandoned & bit:
            self.writer.late(self, tag)
            return
        if result == self.expected:
            self.succeeded |= bit
        elif result == -errno.EOPNOTSUPP and self.request.kind is not Kind.WRITE:
            self.unsupported = True
            self.succeeded |= bit
        else:
            self.failed |= bit
            if result == -errno.ESHUTDOWN:
                self.redo = True
        self.pending &= ~bit
        trace = self.writer.state.trace
        if trace.on:
            number = self.writer.state.members[tag].number
            left = self.pending.bit_count()
            trace.point("write.member", lo=self.lo, hi=self.hi, member=number, result=result, left=left)
        if not self.pending:
            self.writer.done(self)

    def bits_stable(self, error: int) -> None:
        self.writer.bits_stable(self, error)


class Writer:
    """Takes WRITE requests, and TRIM requests as discards (EOPNOTSUPP where a member cannot).

    `settle(op)` is called for a write that some member may lack.
    """

    def __init__(
        self, state: ArrayState, bitmap_writer: BitmapWriter, settle: Callable[[WriteOp], None]
    ) -> None:
        self.state = state
        self.bitmap_writer = bitmap_writer
        self._settle = settle
        self.in_flight: set[WriteOp] = set()
        self._behind_window: list[Request] = []
        state.windows.listen(self._windows_changed)

    def start(self, request: Request) -> None:
        """Take one request, now or after what it must wait for. Queues; the caller kicks and submits."""
        state = self.state
        state.foreground += 1
        if state.held or not state.active:
            state.keep(request)
            if not state.held:
                state.activate()
            return
        lo = request.offset_bytes >> 9
        hi = lo + (request.length_bytes >> 9)
        holder = state.ranges.overlapping(lo, hi)
        if holder is not None:
            when_ended(holder, partial(self.start, request))
            return
        bitmap = state.the_bitmap()
        chunk_sectors = bitmap.chunk_sectors
        chunks = range(lo // chunk_sectors, (hi - 1) // chunk_sectors + 1)
        op = WriteOp(self, request, bitmap, lo, hi, chunks)
        state.ranges.add(op)
        if state.windows.any and state.windows.blocked(lo, hi):
            state.ranges.remove(op)
            self._behind_window.append(request)
            return
        self.in_flight.add(op)
        stable = bitmap.start_write(chunks)
        if state.trace.on:
            state.trace.point("write.begin", lo=lo, hi=hi, chunks=list(chunks), stable=stable)
        if stable:
            self.issue(op)
        else:
            self.bitmap_writer.wait(op)

    def issue(self, op: WriteOp) -> None:
        """Send the data to every writable member."""
        state = self.state
        op.tick = state.tick  # what its bits took is not these members' doing
        queue = state.submitter.queue
        request = op.request
        offset = request.offset_bytes
        length = request.length_bytes
        fua = request.fua
        operation = Op.WRITE if request.kind is Kind.WRITE else Op.DISCARD
        pending = 0
        for member in state.writable:
            index = member.index
            pending |= 1 << index
            at = member.data_offset_bytes + offset
            queue(member.device, operation, at, length, op.buffer, 0, op, index, fua)
        op.pending = pending
        if state.trace.on:
            numbers = [member.number for member in state.writable]
            state.trace.point("write.issue", lo=op.lo, hi=op.hi, chunks=list(op.chunks), members=numbers)
        if not pending:
            self._settle(op)

    def bits_stable(self, op: WriteOp, error: int) -> None:
        if not (error or op.redo):
            self.issue(op)
            return
        if error == errno.ESHUTDOWN:
            op.redo = True
        self._settle(op)

    def done(self, op: WriteOp) -> None:
        """Every member has answered."""
        state = self.state
        if op.failed or op.redo or state.unpublished:
            self._settle(op)
            return
        state.counters.data_writes += 1
        self.finish(op, errno.EOPNOTSUPP if op.unsupported else 0)

    def finish(self, op: WriteOp, error: int) -> None:
        """End the write: its bits may go in time, its range is free, the client has its answer."""
        state = self.state
        if state.trace.on:
            missed = [member.number for member in state.member_of(op.failed)]
            keeps = state.degraded > 0 or error not in (0, errno.EOPNOTSUPP)
            state.trace.point("write.done", lo=op.lo, hi=op.hi, error=error, missed=missed, needed=keeps)
        self.in_flight.discard(op)
        request = op.request
        if op.abandoned:
            op.orphaned = True
            request.buffer = None
            op.lingering = any(not member.faulty for member in state.member_of(op.abandoned))
        if not op.lingering:
            self._let_go(op, state.degraded > 0 or error not in (0, errno.EOPNOTSUPP))
        request.error = error
        request.owner.completed(request)

    def _let_go(self, op: WriteOp, keep_bits: bool) -> None:
        op.bitmap.end_write(op.chunks, keep_bits)
        self.state.ranges.remove(op)

    def exclude(self) -> None:
        """The life of all that is in flight is over, and they may not start again: see `redo`."""
        for op in self.in_flight:
            op.redo = True

    def redo(self, op: WriteOp) -> None:
        """The gate shut before the write had reached every member: it starts again in the next life, or is refused."""
        if self.state.excluded:
            op.redo = True
            if not op.abandoned:
                self.finish(op, EXCLUDED)
            return  # else `late` refuses it
        self.state.trace.point("write.redo", lo=op.lo, hi=op.hi)
        self.in_flight.discard(op)
        self._let_go(op, True)
        self.state.parked.append(op.request)

    def late(self, op: WriteOp, index: int) -> None:
        """A request that had been given up has ended after all."""
        op.abandoned &= ~(1 << index)
        self.state.members[index].stuck -= 1
        if op.abandoned:
            return
        if not op.orphaned:
            if op.redo and self.state.excluded:
                self.finish(op, EXCLUDED)
            return
        if op.buffer is not None:
            buffer: Buffer = op.buffer
            op.buffer = None
            buffer.release()
        if op.lingering:
            self._let_go(op, True)

    def overdue(self, limit_ticks: int) -> int:
        """Give up what is older than `limit_ticks` seconds; the mask of members that have it."""
        stuck = 0
        for op in [op for op in self.in_flight if op.pending and self.state.tick - op.tick > limit_ticks]:
            stuck |= op.pending
            for member in self.state.member_of(op.pending):
                member.stuck += 1
            op.abandoned |= op.pending
            op.failed |= op.pending
            op.pending = 0
            self._settle(op)
        return stuck

    def _windows_changed(self) -> None:
        if self._behind_window:
            waiting, self._behind_window = self._behind_window, []
            for request in waiting:
                self.start(request)
            self.bitmap_writer.kick()
            self.state.submitter.submit()
