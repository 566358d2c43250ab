"""A submitter with faults: it wraps a real one and decides, request by request, what becomes of it.

A `Fault` says which requests it means (member, operation, byte range on the device, how often) and what they
get: an error, a short transfer, or nothing at all until the test lets them go (`stuck`). What no fault means
goes to the real submitter untouched, so gate, batches, sweeps and real files stay what they are. A request that
gets an error moves nothing; instead a read into a buffer of our own is made, so that its completion comes in a real
sweep. A stuck request has passed the gate and counts as in flight. `release` lets it land late, as a slow disk would,
whatever has become of the gate meanwhile: it goes through a submitter of its own.

`log` holds every request that was queued, in order, and `done` every completion.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustermd.device.member_device import Buffer, BufferPool, Gate, GateState, MemberDevice, Op, Target
from clustermd.device.submitter import make_submitter
from clustermd.device.sweep import run_one

SCRATCH_BYTES = 4096


@dataclass(eq=False)
class Io:
    """One request as it was queued. `result` is None until it has completed."""

    path: str
    op: Op
    offset: int
    length: int
    fua: bool
    result: int | None = None
    land: Callable[[], None] = field(default=lambda: None, repr=False)
    fail: Callable[[int], None] = field(default=lambda error: None, repr=False)

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(eq=False)
class Fault:
    """Which requests, and what they get. `member` is a part of the path; `times` how many requests are hit.

    `until_written`: as a latent read error, gone when somebody writes there.

    Exactly one of `error` (an errno), `short` (bytes that are moved all the same) and `stuck`.
    """

    member: str = ""
    ops: tuple[Op, ...] = (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD)
    lo: int = 0
    hi: int = 1 << 62
    error: int = 0
    short: int = -1
    stuck: bool = False
    times: int = 1 << 30
    skip: int = 0
    until_written: bool = False
    only: Callable[[Io], bool] = lambda io: True
    hits: list[Io] = field(default_factory=list)

    def means(self, io: Io) -> bool:
        if self.times <= 0 or io.op not in self.ops or self.member not in io.path:
            return False
        if io.op is not Op.FLUSH and not (io.offset < self.hi and io.end > self.lo):
            return False
        if not self.only(io):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        self.hits.append(io)
        return True

    def end(self) -> None:
        """The device is well again."""
        self.times = 0


class _Recorder:
    """Target of a request that the real submitter has: notes the result, maybe another than the real one."""

    __slots__ = ("_io", "_result", "_scratch", "_submitter", "_tag", "_target")

    def __init__(
        self,
        submitter: FaultySubmitter,
        io: Io,
        target: Target,
        tag: int,
        result: int | None = None,
        scratch: Buffer | None = None,
    ) -> None:
        self._submitter = submitter
        self._io = io
        self._target = target
        self._tag = tag
        self._result = result
        self._scratch = scratch

    def io_done(self, tag: int, result: int) -> None:
        if self._scratch is not None:
            self._scratch.release()
        if self._result is not None and result != -errno.ESHUTDOWN:
            result = self._result
        self._io.result = result
        self._submitter.done.append(self._io)
        self._submitter.wrapped.pop(id(self._target), None)
        self._target.io_done(self._tag, result)


class FaultySubmitter:
    """`Submitter` around `inner`, with `faults`. The first fault that means a request decides."""

    def __init__(self, inner: Any, faults: list[Fault] | None = None) -> None:
        self.inner = inner
        self.gate: Gate = inner.gate
        self.pool: BufferPool = inner.pool
        self.faults = faults if faults is not None else []
        self.log: list[Io] = []
        self.done: list[Io] = []
        self.stuck: list[Io] = []
        self.wrapped: dict[int, Target] = {}
        self._moved: list[asyncio.Future[None]] = []
        self._late = make_submitter(pool_bytes=1 << 20)
        self._late.after_sweep(self.inner.submit)

    def fault(self, **what: Any) -> Fault:
        """Add a fault; see `Fault`."""
        fault = Fault(**what)
        self.faults.append(fault)
        return fault

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
        io = Io(device.path, op, offset_bytes, length_bytes, fua)
        self.log.append(io)
        for known in self.faults:
            there = known.member in io.path and io.offset < known.hi and io.end > known.lo
            if known.until_written and op is Op.WRITE and there:
                known.times = 0
        fault = None
        if self.gate.state is GateState.OPEN:
            fault = next((fault for fault in self.faults if fault.means(io)), None)

        def real(length: int = length_bytes, through: Any = self.inner) -> None:
            recorder = _Recorder(self, io, target, tag)
            self.wrapped[id(target)] = recorder
            through.queue(device, op, offset_bytes, length, buffer, buffer_offset, recorder, tag, fua)

        def fails(error: int, through: Any = self.inner) -> None:
            scratch = self.pool.take(SCRATCH_BYTES)
            recorder = _Recorder(self, io, target, tag, -error, scratch)
            self.wrapped[id(target)] = recorder
            through.queue(device, Op.READ, 0, SCRATCH_BYTES, scratch, 0, recorder, tag)

        def land() -> None:
            real(through=self._late)
            self._late.submit()

        def fail(error: int) -> None:
            fails(error, self._late)
            self._late.submit()

        if fault is None:
            real()
        elif fault.stuck:
            io.land, io.fail = land, fail
            self.stuck.append(io)
        elif fault.error:
            fails(fault.error)
        elif fault.short > 0:
            real(length=fault.short)
        else:
            fails(errno.EIO)

    def release(self, *, error: int = 0, last: bool = False) -> int:
        """Let all stuck requests land now (the latest first if `last`), or end them with `error`; how many."""
        stuck, self.stuck = self.stuck, []
        for io in reversed(stuck) if last else stuck:
            if error:
                io.fail(error)
            else:
                io.land()
        for moved in self._moved:
            if not moved.done():
                moved.set_result(None)
        self._moved.clear()
        return len(stuck)

    def well(self) -> None:
        """All devices work again; what is stuck stays so."""
        for fault in self.faults:
            fault.end()

    def submit(self) -> None:
        self.inner.submit()

    def after_sweep(self, listener: Callable[[], None]) -> None:
        self.inner.after_sweep(listener)
        self._late.after_sweep(listener)

    def _withdraw(self, target: Target) -> bool:
        withdrawn: bool = self.inner._withdraw(self.wrapped.get(id(target), target))
        return withdrawn

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
        return await run_one(
            self, self._withdraw, device, op, offset_bytes, length_bytes, buffer, buffer_offset, fua
        )

    @property
    def in_flight(self) -> int:
        return int(self.inner.in_flight) + self._late.in_flight + len(self.stuck)

    async def drained(self) -> None:
        while self.in_flight:
            if self.stuck:
                moved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._moved.append(moved)
                await moved
            else:
                await self.inner.drained()
                await self._late.drained()

    async def close(self) -> None:
        """A disk that is stuck for ever would keep a real process in the kernel; here its requests end."""
        self.well()
        self.release(error=errno.EIO)
        await self._late.drained()
        await self.inner.close()
        await self._late.close()

    # --- for tests ----------------------------------------------------------------------------------

    def writes(self, member: str = "", lo: int = 0, hi: int = 1 << 62) -> list[Io]:
        """Writes queued to [lo, hi) of a member, in order."""
        return self.ios(Op.WRITE, member, lo, hi)

    def reads(self, member: str = "", lo: int = 0, hi: int = 1 << 62) -> list[Io]:
        return self.ios(Op.READ, member, lo, hi)

    def ios(self, op: Op, member: str = "", lo: int = 0, hi: int = 1 << 62) -> list[Io]:
        """Requests of one kind; a flush is anywhere."""
        return [
            io
            for io in self.log
            if io.op is op and member in io.path and (op is Op.FLUSH or (io.offset < hi and io.end > lo))
        ]
