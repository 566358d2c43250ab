"""The submitter of one array process over simulated boxes: the production contract (`device/member_device.py`).

The gate is asked once per batch (`device.sweep`, the production code). Then each request travels, lands (its buffer is
read at that moment, so a buffer that was given away too early shows), and completes in a sweep.

When the process dies, what it has in flight is in the box's hands: each request lands whole, in part, not at all, or
late. What storage fencing cut off before it landed never will.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Sequence

from clustermd.array.array import Array
from clustermd.device.member_device import Buffer, BufferPool, Gate, GateState, MemberDevice, Op, Target
from clustermd.device.sweep import Awaited, Sweep, run_one
from clustermd.testing.simulator.boxes import Io, Path, Watcher
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop
from clustermd.testing.simulator.pool import SimPool

LATENCIES_S = (0.0001, 0.0002, 0.0002, 0.0003, 0.0005, 0.001, 0.004)
"""How long a request takes to land, and again as long at most until its completion is seen."""

LANDINGS = ("none", "whole", "torn", "late", "late torn")
"""What can become of a request whose process died. The first is the dull one."""


class SimSubmitter:
    """`Submitter` of one array process over any number of paths."""

    def __init__(self, loop: SimLoop, process: Process, dice: Dice, watcher: Watcher) -> None:
        self.gate = Gate()
        self.memory = SimPool()
        self.pool: BufferPool = self.memory
        self.process = process
        self.watcher = watcher
        self._loop = loop
        self._latency = dice.stream("latency")
        self._fate = dice.stream("fate")
        self._queued: list[Io] = []
        self._flight: dict[Io, None] = {}
        self._done: list[tuple[Target, int, int]] = []
        self._delivering = False
        self._in_flight = 0
        self._sweep = process.context.run(Sweep, loop, self.gate, self.submit)
        self._deserted: list[Target] = []  # whose completions a dead process did not see
        self.node = process.name
        self.array: Array | None = None
        self.life_over = False  # proved dead: nothing of it may land any more
        self.pause_s = 0.0  # between the gate and the medium, for the next batches
        self.landing: Callable[[Io], str] | None = None  # a fate for each request at a death; else drawn

    # --- Submitter ------------------------------------------------------------------------------------

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
        assert isinstance(device, Path)
        assert not device.closed, f"a request for {device.path}, which is closed"
        self._queued.append(
            Io(self, device, op, offset_bytes, length_bytes, buffer, buffer_offset, target, tag, fua)
        )

    def submit(self) -> None:
        if not self._queued:
            return
        if not self.process.alive:
            dead, self._queued = self._queued, []
            _end_tasks(io.target for io in dead)
            return
        state = self._sweep.verdict()
        if state is GateState.SHUT:
            self._refuse(errno.ESHUTDOWN)
        elif state is GateState.OPEN:
            batch, self._queued = self._queued, []
            self._in_flight += len(batch)
            for io in batch:
                self.watcher.submitted(io)
                self._send(io)

    def _refuse(self, error: int) -> None:
        queued, self._queued = self._queued, []
        self._sweep.refuse([(io.target, io.tag) for io in queued], error)

    def _withdraw(self, target: Target) -> bool:
        for place, io in enumerate(self._queued):
            if io.target is target:
                del self._queued[place]
                return True
        return False

    def after_sweep(self, listener: Callable[[], None]) -> None:
        self._sweep.listen(listener)

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
        return self._in_flight

    async def drained(self) -> None:
        while self._in_flight:
            await self._sweep.wait_drained()

    async def close(self) -> None:
        if self._sweep.closed:
            return
        self._sweep.close()
        self._refuse(errno.ECANCELED)
        while self._in_flight or self._sweep.has_refused:
            await self.drained()
            await asyncio.sleep(0)
            self._refuse(errno.ECANCELED)

    # --- the way there and back -------------------------------------------------------------------------

    # Its timers are the disk's doing, not the process's: they go on when that is dead or stopped.

    def _latency_s(self) -> float:
        return LATENCIES_S[self._latency.below(len(LATENCIES_S))]

    def _send(self, io: Io) -> None:
        path = io.path
        self._flight[io] = None
        if path.fenced or path.lost_path or not path.box.powered:
            self._loop.later(self._latency_s(), self._complete, io, -errno.EIO)
            return
        trouble = path.trouble_with(io) if path.troubles else None
        delay_s = self._latency_s() + self.pause_s
        if trouble is not None:
            delay_s += trouble.slow_s
            if trouble.stuck:
                path.stuck.append(io)
                return
            if trouble.error:
                if trouble.after and io.op is Op.WRITE:
                    self._loop.later(delay_s, self._land_and_fail, io, trouble.error)
                else:
                    self._loop.later(delay_s, self._complete, io, -trouble.error)
                return
        self._loop.later(delay_s, self._land, io)

    def _land(self, io: Io) -> None:
        if io.gone:
            return
        self._complete(io, self._effect(io, range(io.lo, io.hi)))

    def _land_and_fail(self, io: Io, error: int) -> None:
        if io.gone:
            return
        some = [number for number in range(io.lo, io.hi) if self._fate.below(2)]
        self._effect(io, some)
        self._complete(io, -error)

    def _effect(self, io: Io, sectors: Sequence[int]) -> int:
        """What the request does to the box; its result."""
        path = io.path
        box = path.box
        if path.fenced or path.lost_path or not box.powered:
            return -errno.EIO
        if io.op is Op.FLUSH:
            box.flush()
            return 0
        if io.op is Op.READ:
            if box.bad_sectors and any(number in box.bad_sectors for number in range(io.lo, io.hi)):
                return -errno.EIO
            if not io.ghost and io.buffer is not None:
                at = io.buffer_offset
                io.buffer.view[at : at + io.length_bytes] = box.data[
                    io.offset_bytes : io.offset_bytes + io.length_bytes
                ]
            return io.length_bytes
        if io.op is Op.DISCARD and not path.discard_zeroes:
            return -errno.EOPNOTSUPP
        if sectors:
            box.write(io, sectors)
        return io.length_bytes if io.op is Op.WRITE else 0

    def _complete(self, io: Io, result: int) -> None:
        if io.gone:
            return
        io.gone = True
        del self._flight[io]
        if not self.process.alive:
            self._in_flight -= 1
            return
        self._done.append((io.target, io.tag, result))
        if not self._delivering:
            self._delivering = True
            self._loop.call_soon(self._deliver, context=self.process.context.copy())

    def _deliver(self) -> None:
        self._delivering = False
        done, self._done = self._done, []
        self._in_flight -= len(done)
        self._sweep.deliver(done)
        if not self._in_flight and self._sweep.awaits_drain:
            self._sweep.drained()

    # --- faults -----------------------------------------------------------------------------------------

    def release(self, path: Path, error: int = 0) -> None:
        """The path is well again: what was stuck goes on, or fails."""
        stuck, path.stuck = path.stuck, []
        for io in stuck:
            if io.gone:
                continue
            if error:
                self._complete(io, -error)
            else:
                self._loop.later(self._latency_s(), self._land, io)

    def process_died(self, late_s: Sequence[float]) -> None:
        """The process is gone: what it had queued never goes out, each request in flight meets its fate.

        `late_s` are the delays a late one may have.
        """
        self._deserted = self._targets()
        self._queued = []
        self._in_flight -= len(self._done)
        self._done = []
        for io in list(self._flight):
            if io.op is Op.WRITE and io.buffer is not None:
                io.ghost = bytes(io.data())
            fate = self.landing(io) if self.landing else LANDINGS[self._fate.below(len(LANDINGS))]
            stuck = io in io.path.stuck
            if io.op is not Op.WRITE or (fate == "none" and not stuck):
                self._complete(io, -errno.EIO)
                continue
            sectors = range(io.lo, io.hi)
            some = [number for number in sectors if self._fate.below(2)] if "torn" in fate else list(sectors)
            if "late" in fate or stuck:
                # nothing else may complete it: it is the box's now
                ghost = self._ghost(io)
                self._loop.later(late_s[self._fate.below(len(late_s))], self._land_ghost, ghost, some)
            else:
                self._land_ghost(self._ghost(io), some)

    def _ghost(self, io: Io) -> Io:
        """A copy that the timers of the living know nothing of."""
        io.gone = True
        del self._flight[io]
        if io in io.path.stuck:
            io.path.stuck.remove(io)
        ghost = Io(self, io.path, io.op, io.offset_bytes, io.length_bytes, None, 0, io.target, io.tag, io.fua)
        ghost.ghost = io.ghost
        self._flight[ghost] = None
        return ghost

    def _land_ghost(self, io: Io, sectors: Sequence[int]) -> None:
        if io.gone:
            return
        self._effect(io, sectors)
        self._complete(io, 0)

    def let_go(self) -> None:
        """The process is dead: its tasks end."""
        _end_tasks([*self._deserted, *self._targets()])

    def _targets(self) -> list[Target]:
        """Whom a completion that has not been seen yet is for."""
        return [io.target for io in (*self._queued, *self._flight)] + [target for target, _, _ in self._done]

    def cut_off(self) -> None:
        """What is on its way never lands."""
        for io in list(self._flight):
            if io in io.path.stuck:
                io.path.stuck.remove(io)
            self._complete(io, -errno.EIO)


def _end_tasks(targets: Iterable[Target]) -> None:
    """Whoever of a dead process awaits a request is told something, so that its task can end."""
    for target in targets:
        if isinstance(target, Awaited):
            target.io_done(0, -errno.ESHUTDOWN)
