"""Repairing a read error: the good copy of the bad blocks is written over them, under the rules of a resync.

Another node could write the block between our read of the good copy and our write of it, so a repair takes the
resync right and a window, like any copy (rule 9, F11). A member that does not take it, or that has used up
its budget of errors, is failed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

from clustermd.array.coordinator import Coordinator
from clustermd.array.member import Member
from clustermd.array.member_io import Shared, halves, transfer
from clustermd.array.resync import announce, hold_range
from clustermd.array.state import ArrayState
from clustermd.device.member_device import Op
from clustermd.errors import ClusterLost, Refused

MAX_READ_ERRORS = 20
DECAY_TICKS = 3600
"""Read errors count half after an hour without one (md-cluster spec 7.4)."""
ALIGN_SECTORS = 8
STEP_SECTORS = 2048


class Repair:
    """One background task that repairs one range after the other."""

    def __init__(
        self,
        state: ArrayState,
        coordinator: Coordinator,
        fail: Callable[[int, str], object],
        recorded: Callable[[], Awaitable[None]],
    ) -> None:
        self.state = state
        self.coordinator = coordinator
        self._fail = fail
        self._recorded = recorded
        self._queue: list[tuple[Member, int, int]] = []
        self._task: asyncio.Task[None] | None = None

    def request(self, member: Member, lo: int, hi: int) -> None:
        """Have [lo, hi) of `member` rewritten from another copy."""
        state = self.state
        if member.faulty or state.read_only:
            return
        if member.bad_blocks and not member.good_for(lo, hi):
            return
        member.read_errors >>= (state.tick - member.read_error_tick) // DECAY_TICKS
        member.read_error_tick = state.tick
        member.read_errors += 1
        if member.fail_fast or member.read_errors > MAX_READ_ERRORS:
            self._fail(1 << member.index, f"too many read errors ({member.read_errors})")
            return
        if not any(m is member and a <= lo and b >= hi for m, a, b in self._queue):
            self._queue.append((member, lo, hi))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="repair")

    async def _run(self) -> None:
        while self._queue:
            member, lo, hi = self._queue.pop(0)
            lo -= lo % ALIGN_SECTORS
            hi = min(-(-hi // ALIGN_SECTORS) * ALIGN_SECTORS, self.state.array_sectors)
            try:
                async with self.coordinator.resync_right():
                    self.state.trace.point("resync.right")
                    for at in range(lo, hi, STEP_SECTORS):
                        end = min(at + STEP_SECTORS, hi)
                        await announce(self.state, self.coordinator, at, end)
                        await self._rewrite(member, at, end)
                        if member.faulty:
                            await self._recorded()  # what was given up may still land there
                            break
            except ClusterLost:
                return
            except (Refused, OSError) as error:
                self.state.log.warning("%s: not repaired at sector %d: %s", member.path, lo, error)

    async def _rewrite(self, member: Member, lo: int, hi: int) -> None:
        state = self.state
        if member.faulty:
            return
        step = await hold_range(state, lo, hi)
        try:
            sectors = await self._mend(member, lo, hi)
        finally:
            state.ranges.remove(step)
        if sectors:
            member.corrected_errors += sectors // 8 or 1
            state.counters.read_errors_corrected += 1
            state.log.info("%s: read error corrected at sectors %d to %d", member.path, lo, hi)

    async def _mend(self, member: Member, lo: int, hi: int) -> int:
        """Rewrite those blocks of [lo, hi) that the member does not deliver, and no others; how many sectors.

        What it does deliver, readers may have seen; where copies may still differ, another has other content (I17).
        """
        state = self.state
        length = (hi - lo) * 512
        block = state.block_sectors
        shared = Shared(state.submitter.pool.take(length))
        try:
            result = await transfer(state, member, Op.READ, lo, length, shared)
            if result == length:
                return 0
            if result == -errno.ESHUTDOWN:
                raise OSError(errno.ESHUTDOWN, "the gate is shut")
            if result == -errno.ETIMEDOUT:
                self._fail(1 << member.index, f"no answer at sector {lo}")
                return 0
            if hi - lo <= block:
                return await self._copy(member, lo, hi, shared)
        finally:
            shared.drop()
        sectors = 0
        for half in halves(lo, hi, block):
            if not member.faulty:
                sectors += await self._mend(member, *half)
        return sectors

    async def _copy(self, member: Member, lo: int, hi: int, shared: Shared) -> int:
        """Write another copy of [lo, hi) over that of `member`; the sectors written and read back."""
        state = self.state
        length = (hi - lo) * 512
        source = state.first_copy(lo, hi, 1 << member.index)
        if source is None or await transfer(state, source, Op.READ, lo, length, shared) != length:
            return 0
        state.trace.point("resync.read", lo=lo, hi=hi)
        state.trace.point("resync.write", lo=lo, hi=hi, members=[member.number], durable=True)
        try:
            result = await transfer(state, member, Op.WRITE, lo, length, shared, fua=True)
            if result == length:
                state.trace.point("resync.wrote", lo=lo, hi=hi)
                result = await transfer(state, member, Op.READ, lo, length, shared)
        finally:
            state.trace.point("resync.step", lo=lo, hi=hi)
        if result == -errno.ESHUTDOWN:
            raise OSError(errno.ESHUTDOWN, "the gate is shut")
        if result != length:
            self._fail(1 << member.index, f"a read error at sector {lo} could not be repaired ({result})")
            return 0
        return hi - lo

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
