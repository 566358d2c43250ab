"""Flaws of one array on one node: F7, F11, and rules 8 to 19 about bits, copies, faults, flushes and the gate."""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import Any

from clustermd.array.array import Array
from clustermd.array.bitmap import Bitmap
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.faults import Faults
from clustermd.array.ranges import Ranges
from clustermd.array.read import Reader
from clustermd.array.repair import Repair
from clustermd.array.request import Request
from clustermd.array.resync import Resync
from clustermd.array.sweep import Sweep
from clustermd.array.waiters import when_ended
from clustermd.array.write import WriteOp, Writer
from clustermd.device.member_device import Gate, GateState, Op
from clustermd.device.sweep import Sweep as DeviceSweep
from clustermd.testing.simulator.flaws import Flaw, Patch, flaw

_start, _begin_write, _end_write = Writer.start, Bitmap.start_write, Bitmap.end_write
_shut, _flush, _done, _drain = Gate.shut, Array._flush, Writer.done, Array._drain
_clear = Bitmap.clear


def _look_first(self: Writer, request: Request) -> None:
    """Looks at the windows, waits for others, and does not look again."""
    state = self.state
    lo = request.offset_bytes >> 9
    hi = lo + (request.length_bytes >> 9)
    holder = None if state.held or not state.active else state.ranges.overlapping(lo, hi)
    if holder is None or state.windows.blocked(lo, hi):
        _start(self, request)
        return
    when_ended(holder, partial(_without_a_look, self, request))


def _without_a_look(self: Writer, request: Request) -> None:
    windows = self.state.windows
    remembered, windows.any = windows.any, False
    _start(self, request)
    windows.any = remembered


async def _repair_as_if_alone(self: Repair) -> None:
    while self._queue:
        member, lo, hi = self._queue.pop(0)
        await self._rewrite(member, lo, hi)


async def _fire_and_forget(self: Resync, steps: list[tuple[int, int]], copy: Any) -> None:
    tasks = [asyncio.ensure_future(copy(lo, hi)) for lo, hi in steps]
    self.state.tasks.update(tasks)
    await asyncio.sleep(0)


def _discard_at_once(self: Array, request: Request) -> None:
    """A discard goes down as it is: no range, no window, no bit."""
    owner = request.owner
    left = len(self.state.writable)

    class Answer:
        def io_done(self, tag: int, result: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                owner.completed(request)

    answer = Answer()
    for member in self.state.writable:
        at = member.data_offset_bytes + request.offset_bytes
        self.state.submitter.queue(
            member.device, Op.DISCARD, at, request.length_bytes, None, 0, answer, member.index
        )


def _bits_are_always_there(self: Bitmap, chunks: Any) -> bool:
    _begin_write(self, chunks)
    return True


def _forget_the_missing(self: Bitmap, chunks: Any, degraded: bool) -> None:
    _end_write(self, chunks, False)


def _clear_whatever_runs(self: Bitmap, chunks: Any) -> int:
    cleared = 0
    for chunk in range(len(self.counters)):
        if self.counters[chunk]:
            self._clear_bit(chunk)
            self.lazy.add(self.page_of(chunk))
            cleared += 1
    return cleared


def _all_in_use_is_ready(self: Bitmap) -> list[int]:
    ready = [chunk for chunk, value in enumerate(self.counters) if value]
    for chunk in ready:
        self.counters[chunk] = 1
        self._idle.add(chunk)
    return ready


async def _no_flush(self: Any) -> bool:
    return True


def _flush_the_first_only(self: Array, request: Request) -> None:
    state = self.state
    all_of_them, state.writable = state.writable, state.writable[:1]
    _flush(self, request)
    state.writable = all_of_them


def _flush_none(self: Array, request: Request) -> None:
    request.owner.completed(request)


def _nobody_before_us(self: Ranges, lo: int, hi: int) -> None:
    return None


def _answer_at_once(self: Any, op: WriteOp) -> None:
    if op.redo:
        self.writer.redo(op)
        return
    self.fail(op.failed, "a write failed")
    self._answer(op, self._verdict(op))


async def _at_once(self: Faults) -> int:
    return 0


def _ignore_failures(self: Writer, op: WriteOp) -> None:
    op.failed = 0
    _done(self, op)


def _every_failure_is_the_clients(self: Any, op: WriteOp) -> int:
    return errno.EIO


def _frees_its_range(self: Writer, op: WriteOp, error: int) -> None:
    self.in_flight.discard(op)
    op.orphaned = True
    op.request.buffer = None if op.abandoned else op.request.buffer
    self._let_go(op, True)
    op.request.error = error
    op.request.owner.completed(op.request)


def _answer_after_the_first(self: WriteOp, tag: int, result: int) -> None:
    """Answered when one member has it; the others may still read the client's buffer."""
    bit = 1 << tag
    first = not self.succeeded
    self.succeeded |= bit
    self.pending &= ~bit
    if first:
        self.succeeded |= self.pending
        self.writer.done(self)


def _never_shut(self: Gate, reason: str) -> None:
    if reason == "stopped":
        _shut(self, reason)


def _keep(self: Array, reason: str) -> None:
    """Nothing is refused: it waits for the next life, as where nodes are processes on one machine."""


def _no_verdict(self: DeviceSweep) -> GateState:
    return GateState.OPEN


def _pages_without_fua() -> tuple[Patch, ...]:
    """Bitmap pages go out as plain writes."""
    start = BitmapWriter._start

    def cached(self: Any, pages: dict[int, bytes]) -> None:
        submitter = self.state.submitter
        queue = submitter.queue

        def plain(*args: Any) -> None:
            queue(*args[:8])

        submitter.queue = plain
        try:
            start(self, pages)
        finally:
            del submitter.queue

    return ((BitmapWriter, "_start", cached),)


def _ready_before_the_bits() -> tuple[Patch, ...]:
    """Data goes out with its bits, not after them."""
    issue = Writer.issue

    def wait(self: Any, write: Any) -> None:
        issue(write.writer, write)
        self._flushers.append(asyncio.get_running_loop().create_future())

    return ((BitmapWriter, "wait", wait),)


FLAWS = (
    flaw("F7", "looks at the windows, waits, and does not look again", (Writer, "start", _look_first)),
    flaw(
        "F11", "repairs a read error without keeping other nodes out", (Repair, "_run", _repair_as_if_alone)
    ),
    flaw("I1", "sends data before its bits are stable", (Bitmap, "start_write", _bits_are_always_there)),
    Flaw("I1b", "sends data together with its bits", _ready_before_the_bits),
    flaw("I2", "clears bits of chunks that are being written", (Bitmap, "begin_sweep", _all_in_use_is_ready)),
    flaw("I2b", "forgets that a missing member lacks a chunk", (Bitmap, "end_write", _forget_the_missing)),
    flaw("I2c", "clears every bit", (Bitmap, "clear", _clear_whatever_runs)),
    flaw("rule 8", "moves its window while it copies", (Resync, "_steps", _fire_and_forget)),
    flaw("rule 9", "discards without range, window and bits", (Array, "_zero", _discard_at_once)),
    flaw("rule 10b", "reads any copy at any time", (Reader, "read_first", lambda self, lo, hi: False)),
    flaw("rule 12", "goes on writing after its membership is lost", (Gate, "shut", _never_shut)),
    flaw("rule 12b", "does not look at the gate", (DeviceSweep, "verdict", _no_verdict)),
    flaw("rule 12c", "writes what it was asked before others went on without it", (Array, "_exclude", _keep)),
    flaw("rule 15", "clears bits before the members were flushed", (Sweep, "flush_members", _no_flush)),
    flaw(
        "rule 15b", "counts chunks as copied before they are durable", (Resync, "_flush_touched", _no_flush)
    ),
    Flaw("rule 15c", "writes bitmap pages without FUA", _pages_without_fua),
    flaw(
        "rule 16b",
        "gives a range back over a write that may still land",
        (Writer, "finish", _frees_its_range),
    ),
    flaw(
        "rule 17",
        "answers before the fault is recorded",
        (Faults, "settle", _answer_at_once),
        (Faults, "recorded", _at_once),
    ),
    flaw("rule 17b", "takes a failed write for a good one", (Writer, "done", _ignore_failures)),
    flaw(
        "rule 17d", "tells the client of a failed member", (Faults, "_verdict", _every_failure_is_the_clients)
    ),
    flaw("rule 17c", "answers a write when one member has it", (WriteOp, "io_done", _answer_after_the_first)),
    flaw(
        "rule 18", "lets overlapping writes overtake one another", (Ranges, "overlapping", _nobody_before_us)
    ),
    flaw("rule 19", "flushes one member only", (Array, "_flush", _flush_the_first_only)),
    flaw("rule 19b", "answers a flush at once", (Array, "_flush", _flush_none)),
)
