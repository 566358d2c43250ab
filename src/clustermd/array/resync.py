"""Copying: resync makes in-sync members equal where bits say they may differ, recovery fills a new member.

One node at a time has the resync right. It announces a window, in which no other node writes until the next
announcement, copies within it, waits for its own copies, flushes the members written, and only then moves on
(rules 8, 15, I8, I9). On this node a step holds its range in the table of ranges, so local writes and steps
never overlap. The source is the first usable member in role order, the one all nodes read while copies may differ.

A resync walks the chunks in `bitmap.unreconciled`; nothing is announced for what is skipped. A recovery walks a
member from its recovery offset to the end and records how far it came, so that another node can go on.

Speed: `limits()` gives (min, max) KiB/s. A recovery or a resync of the whole array yields to clients down to min; a
takeover's few chunks are copied at up to max, since until then all nodes read one member only. The window
is what a quarter second copies, at most 32 MiB, so that a writer elsewhere waits for no longer than that.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress

from clustermd.array.coordinator import Coordinator
from clustermd.array.member import Member
from clustermd.array.member_io import Shared, flush, halves, transfer
from clustermd.array.metadata import Metadata
from clustermd.array.state import ArrayState
from clustermd.array.status import SyncStatus
from clustermd.array.waiters import end_of
from clustermd.device.member_device import Op
from clustermd.errors import ClusterLost, Refused
from clustermd.ondisk.superblock import MAX_SECTOR

WINDOW_SECTORS = 65536
STEP_SECTORS = 512
DEPTH = 8
WINDOW_S = 0.25
MARK_S = 3.0
LOOK_AGAIN_S = 0.2
CHECKPOINT_S = 10.0
RETRY_S = 1.0
WHOLE_SHARE = 0.9
"""A resync of more than this part of all chunks is one of the whole array."""


class CopyFailed(Exception):
    """A step could not be done; the pass ends and begins anew with the members that are left."""


class Unreadable(CopyFailed):
    """No member can deliver a range."""


Copy = Callable[[int, int], Awaitable[None]]


class Step:
    """A range held by the resync on this node."""

    __slots__ = ("hi", "lo", "waiters")

    def __init__(self, lo: int, hi: int) -> None:
        self.lo = lo
        self.hi = hi
        self.waiters: list[Callable[[], None]] | None = None


async def announce(state: ArrayState, coordinator: Coordinator, lo: int, hi: int) -> None:
    """Have all other nodes keep out of [lo, hi). Raises what `Coordinator.announce` raises."""
    state.trace.point("resync.announce", lo=lo, hi=hi)
    await coordinator.announce(lo, hi)
    state.trace.point("resync.window", lo=lo, hi=hi)


async def hold_range(state: ArrayState, lo: int, hi: int) -> Step:
    """Hold [lo, hi) once nobody else does; give it back with `state.ranges.remove`.

    Whoever comes later waits for the step from now on, so that clients that never pause cannot keep it waiting.
    """
    step = Step(lo, hi)
    before = [end_of(holder) for holder in state.ranges.within(lo, hi)]
    state.ranges.add(step)
    try:
        for gone in before:
            await gone
    except BaseException:
        state.ranges.remove(step)
        raise
    return step


class Pace:
    """Keeps a copy within its limits: measured over the last seconds, yielding to clients when asked to.

    Whether to yield, and to which limit, is decided once a window, when it is announced: its size relies on that, and
    nobody elsewhere can write in it until it is copied. A limit that is raised counts at once.
    """

    def __init__(self, state: ArrayState, limits: Callable[[], tuple[int, int]]) -> None:
        self._state = state
        self._limits = limits
        self._yields = False
        self._limit_kib_s = 0
        self._mark_s = 0.0
        self._done = 0
        self._foreground = state.foreground
        self.speed_kib_s = 0

    def window_sectors(self, yielding: bool) -> int:
        """How much to announce at once. `yielding`: slowly, if there were client requests since the last window."""
        state = self._state
        self._yields = yielding and state.foreground != self._foreground
        self._foreground = state.foreground
        limit = self._limit_now()
        now_s = state.clock.monotonic_s()
        if limit != self._limit_kib_s or now_s - self._mark_s > MARK_S:
            self._limit_kib_s = limit
            self._mark_s = now_s
            self._done = 0
        return max(STEP_SECTORS, min(WINDOW_SECTORS, int(limit * 2 * WINDOW_S)))

    def _limit_now(self) -> int:
        least, most = self._limits()
        return max(1, least if self._yields else most)

    async def account(self, sectors: int) -> None:
        """`sectors` were copied: wait if that was too fast."""
        self._done += sectors
        while True:
            elapsed_s = self._state.clock.monotonic_s() - self._mark_s
            self.speed_kib_s = int(self._done / 2 / max(elapsed_s, 1e-6))
            limit = max(self._limit_kib_s, self._limit_now())
            ahead_s = self._done / 2 / limit - elapsed_s
            if ahead_s <= 0:
                return
            await asyncio.sleep(min(ahead_s, LOOK_AGAIN_S))


class Resync:
    """The copying task of one life. `limits` are read before each step.

    `recorded()` waits until all faults are on the disks and known to all nodes: a copy that was given up may still
    land on its member, so the window that keeps others out must not end before they have dropped that member.
    """

    def __init__(
        self,
        state: ArrayState,
        coordinator: Coordinator,
        metadata: Metadata,
        fail: Callable[[int, str], object],
        recorded: Callable[[], Awaitable[None]],
        limits: Callable[[], tuple[int, int]],
        changed: Callable[[], None],
    ) -> None:
        self.state = state
        self._recorded = recorded
        self.coordinator = coordinator
        self.metadata = metadata
        self.limits = limits
        self._fail = fail
        self._changed = changed
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._status: SyncStatus | None = None
        self._pace = Pace(state, limits)
        self._quiet = asyncio.Event()
        self._touched: set[int] = set()
        self._holes: set[int] = set()  # chunks with ranges that no member can deliver

    # --- the task ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._wake.set()
        self._quiet.clear()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="resync")

    async def stop(self) -> None:
        """End the task; steps in flight are finished or left with their bits set."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._status = None

    def wake(self) -> None:
        self._quiet.clear()
        self._wake.set()

    async def _run(self) -> None:
        state = self.state
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._pass()
            except ClusterLost:
                return
            except (Refused, OSError, CopyFailed) as error:
                if isinstance(error, OSError) and error.errno == errno.ESHUTDOWN:
                    return
                state.log.warning("the resync begins again in %.0f s: %s", RETRY_S, error)
                self._status = self._waiting("pending")
                self._changed()
                await asyncio.sleep(RETRY_S)
                self._wake.set()
                continue
            except Exception:
                # Nobody waits for this task: were it to end here, copies would stay different.
                state.log.exception("the resync failed unexpectedly and begins again")
                await asyncio.sleep(RETRY_S)
                self._wake.set()
                continue
            self._status = None
            if not self._wake.is_set():
                self._quiet.set()
            self._changed()

    def work(self) -> str | None:
        """What there is to do: "recovery", "resync", or None."""
        state = self.state
        if state.read_only:
            return None
        if any(not member.in_sync for member in state.writable) and state.in_sync:
            return "recovery"
        if state.the_bitmap().unreconciled:
            return "resync"
        return None

    async def _pass(self) -> None:
        state = self.state
        work = self.work()
        if work is None and (state.settled or not self.coordinator.all_settled()):
            return
        if work is not None:
            self._status = self._waiting("pending")
            self._changed()
        async with self.coordinator.resync_right(settles=True):
            self._pace = Pace(state, self.limits)
            state.trace.point("resync.right")
            said = ""
            while (work := self.work()) is not None:
                try:
                    if work == "resync" or state.the_bitmap().unreconciled:
                        await self._resync()
                    else:
                        await self._recover()
                except ClusterLost:
                    raise
                except (Refused, CopyFailed) as error:
                    await self._recorded()
                    if not state.the_bitmap().unreconciled:
                        raise
                    # Whoever gets the right after us takes the array for settled: it must be.
                    if str(error) != said:
                        said = str(error)
                        state.log.warning("the resync is tried again every %.0f s: %s", RETRY_S, error)
                    self._status = self._waiting("pending")
                    self._changed()
                    await asyncio.sleep(RETRY_S)
            if self.coordinator.settles():
                state.settled = True
                state.trace.point("resync.settled")
            elif self.coordinator.all_settled():
                self._wake.set()  # others may have queued behind us: after them everything is

    # --- resync -----------------------------------------------------------------------------------

    async def _resync(self) -> None:
        state = self.state
        bitmap = state.the_bitmap()
        if len(state.writable) < 2:
            alone = sorted(bitmap.unreconciled)
            for chunk in alone:
                bitmap.reconciled(chunk, state.degraded > 0)
            state.trace.point("bitmap.reconciled", chunks=alone, needed=state.degraded > 0)
            return
        yielding = len(bitmap.unreconciled) > WHOLE_SHARE * len(bitmap.counters)
        state.trace.point("resync.begin", chunks=len(bitmap.unreconciled))
        position = 0
        serials: dict[int, int] = {}
        while bitmap.unreconciled:
            ahead = [chunk for chunk in bitmap.unreconciled if self._end_of(chunk) > position]
            if not ahead:
                position = 0  # merged behind us meanwhile
                serials.clear()
                continue
            chunk = min(ahead)
            lo = max(position, chunk * bitmap.chunk_sectors)
            hi = min(lo + self._pace.window_sectors(yielding), state.array_sectors)
            await announce(state, self.coordinator, lo, hi)
            done = await self._copy_window(lo, hi, serials)
            await self._flush_touched()
            for finished in done:
                if serials.pop(finished, -1) == bitmap.mark_serial:
                    needed = state.degraded > 0 or finished in self._holes
                    bitmap.reconciled(finished, needed)
                    state.trace.point("bitmap.reconciled", chunks=[finished], needed=needed)
                    self._holes.discard(finished)
                    state.counters.resynced_chunks += 1
            state.trace.point("resync.copied", lo=lo, hi=hi)
            position = hi
            self._changed()

    def _end_of(self, chunk: int) -> int:
        """The sector behind a chunk; the last one may be cut short by the end of the array."""
        state = self.state
        return min((chunk + 1) * state.the_bitmap().chunk_sectors, state.array_sectors)

    async def _copy_window(self, lo: int, hi: int, serials: dict[int, int]) -> list[int]:
        """Copy the unreconciled chunks' parts within [lo, hi); the chunks whose end was reached."""
        state = self.state
        bitmap = state.the_bitmap()
        steps: list[tuple[int, int]] = []
        finished: list[int] = []
        at = lo
        while at < hi:
            chunk = at // bitmap.chunk_sectors
            end = self._end_of(chunk)
            if chunk in bitmap.unreconciled:
                if at == chunk * bitmap.chunk_sectors:
                    serials[chunk] = bitmap.mark_serial
                for start in range(at, min(end, hi), STEP_SECTORS):
                    steps.append((start, min(start + STEP_SECTORS, end, hi)))
                if end <= hi:
                    finished.append(chunk)
            at = end
        for group in range(0, len(steps), DEPTH):
            part = steps[group : group + DEPTH]
            self._progress("resync", part[0][0], state.array_sectors)
            await self._steps(part, self._copy_around)
            await self._pace.account(sum(end - start for start, end in part))
        return finished

    async def _steps(self, steps: list[tuple[int, int]], copy: Copy) -> None:
        """Copy several ranges at once; all have ended when this returns or raises."""
        tasks = [asyncio.ensure_future(copy(lo, hi)) for lo, hi in steps]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _copy_around(self, lo: int, hi: int) -> None:
        """Copy what can be read. Where no member can be, none answers a reader, so none contradicts another.

        A range that the first copy does not deliver as a whole is copied in ever smaller parts, so that only the very
        blocks it cannot read come from another: of all others readers have seen what stands there (I17). A chunk with
        a block that nobody delivers keeps its bit: it may be readable some day. A recovery is another matter, its
        target would answer.
        """
        block = self.state.block_sectors
        try:
            await self._copy(lo, hi, first_only=hi - lo > block)
        except Unreadable as error:
            if hi - lo > block:
                for half in halves(lo, hi, block):
                    await self._copy_around(*half)
                return
            self.state.log.error("left as it is: %s", error)
            self._holes.add(lo // self.state.the_bitmap().chunk_sectors)

    async def _copy(self, lo: int, hi: int, first_only: bool = False) -> None:
        """Read [lo, hi) from the first copy, or with `first_only` from no other, and write it to all that work."""
        state = self.state
        step = await hold_range(state, lo, hi)
        length = (hi - lo) * 512
        shared: Shared | None = None
        try:
            source, shared = await self._read_source(lo, hi, length, first_only)
            state.trace.point("resync.read", lo=lo, hi=hi)
            targets = [member for member in state.writable if member is not source]
            numbers = [member.number for member in targets]
            state.trace.point("resync.write", lo=lo, hi=hi, members=numbers, durable=False)
            results = await asyncio.gather(
                *(transfer(state, member, Op.WRITE, lo, length, shared) for member in targets)
            )
            for member, result in zip(targets, results, strict=True):
                self._touched.add(member.index)
                if result == -errno.ESHUTDOWN:
                    raise OSError(errno.ESHUTDOWN, "the gate is shut")
                if result != length:
                    self._fail(1 << member.index, f"a resync write failed ({result})")
                    raise CopyFailed(f"{member.path} refused a write at sector {lo}")
            state.trace.point("resync.wrote", lo=lo, hi=hi)
        finally:
            if shared is not None:
                shared.drop()
                state.trace.point("resync.step", lo=lo, hi=hi)
            state.ranges.remove(step)

    async def _read_source(self, lo: int, hi: int, length: int, first_only: bool) -> tuple[Member, Shared]:
        """The member that delivered, and what. A read that was given up keeps its buffer: it may still land."""
        state = self.state
        tried = 0
        stuck = False
        while True:
            source = state.first_copy(lo, hi, tried)
            if source is None:
                raise (CopyFailed if stuck else Unreadable)(f"no member can deliver sectors {lo} to {hi}")
            shared = Shared(state.submitter.pool.take(length))
            try:
                result = await transfer(state, source, Op.READ, lo, length, shared)
            except BaseException:
                shared.drop()
                raise
            if result == length:
                return source, shared
            shared.drop()
            if result == -errno.ESHUTDOWN:
                raise OSError(errno.ESHUTDOWN, "the gate is shut")
            state.log.warning("%s: read error in a resync at sector %d (%d)", source.path, lo, result)
            tried |= 1 << source.index
            stuck = stuck or result == -errno.ETIMEDOUT
            if first_only and not stuck:
                raise Unreadable(f"{source.path} cannot deliver all of sectors {lo} to {hi}")

    async def _flush_touched(self) -> None:
        """What was copied is durable before anything relies on it (rule 15)."""
        state = self.state
        touched, self._touched = self._touched, set()
        members = [member for member in state.writable if member.index in touched]
        results = await asyncio.gather(*(flush(state, member) for member in members))
        for member, result in zip(members, results, strict=True):
            if result == -errno.ESHUTDOWN:
                raise OSError(errno.ESHUTDOWN, "the gate is shut")
            if result < 0:
                self._fail(1 << member.index, f"a flush failed ({result})")
                raise CopyFailed(f"{member.path} cannot be flushed")
        state.trace.point("resync.flushed")

    # --- recovery ---------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Fill the recovering members from the least of their recovery offsets to the end."""
        state = self.state
        targets = [member for member in state.writable if not member.in_sync]
        position = min(member.recovery_offset for member in targets)
        position = min(position, state.array_sectors) // STEP_SECTORS * STEP_SECTORS
        checkpoint_s = state.clock.monotonic_s()
        state.log.info("recovery of %s from sector %d", ", ".join(m.path for m in targets), position)
        while position < state.array_sectors:
            if state.the_bitmap().unreconciled:
                break  # in-sync members first
            hi = min(position + self._pace.window_sectors(True), state.array_sectors)
            await announce(state, self.coordinator, position, hi)
            steps = [(lo, min(lo + STEP_SECTORS, hi)) for lo in range(position, hi, STEP_SECTORS)]
            for group in range(0, len(steps), DEPTH):
                part = steps[group : group + DEPTH]
                self._progress("recovery", part[0][0], state.array_sectors)
                await self._steps(part, self._copy)
                await self._pace.account(sum(end - start for start, end in part))
            await self._flush_touched()
            state.trace.point("resync.copied", lo=position, hi=hi)
            for member in targets:
                if member.faulty:
                    raise CopyFailed(f"{member.path} failed while it was being filled")
                member.recovery_offset = hi
            position = hi
            self._changed()
            if state.clock.monotonic_s() - checkpoint_s > CHECKPOINT_S:
                await self._record(targets, position)
                checkpoint_s = state.clock.monotonic_s()
        await self._record(targets, position)

    async def _record(self, targets: list[Member], position: int) -> None:
        """Write how far the recovery came; at the end the members are in sync, everywhere."""
        state = self.state
        finished = position >= state.array_sectors

        def change() -> None:
            for member in targets:
                if member.faulty or member.in_sync:
                    continue  # another node may have gone on with it, and come further
                member.recovery_offset = MAX_SECTOR if finished else max(member.recovery_offset, position)
                member.in_sync = finished

        state.trace.point("recovery.record", position=position)
        while True:
            try:
                await self.metadata.update(change)
                break
            except ClusterLost:
                raise
            except Refused as error:
                if not finished:
                    raise
                # Our state says in sync: nothing else would bring the others to know it.
                state.log.warning("the end of the recovery is not known to all yet: %s", error)
                await asyncio.sleep(RETRY_S)
        if finished and not state.degraded:
            state.the_bitmap().whole()
            state.trace.point("bitmap.whole")
        state.refresh()

    async def checkpoint(self) -> None:
        """On a clean stop: record how far a recovery came."""
        state = self.state
        targets = [member for member in state.writable if not member.in_sync]
        moved = [m for m in targets if m.recovery_offset > m.superblock.recovery_offset]
        if moved:
            await self._record(targets, min(member.recovery_offset for member in targets))

    # --- for people -------------------------------------------------------------------------------

    def _progress(self, action: str, done: int, total: int) -> None:
        self._status = SyncStatus(action, "running", done, total, self._pace.speed_kib_s)

    def _waiting(self, how: str) -> SyncStatus:
        action = "recovery" if self.work() == "recovery" else "resync"
        return SyncStatus(action, how, 0, self.state.array_sectors, 0)

    def status(self) -> SyncStatus | None:
        if self._status is not None:
            return self._status
        if self.state.windows.any:
            recovering = any(not member.in_sync for member in self.state.writable)
            return SyncStatus(
                "recovery" if recovering else "resync", "remote", 0, self.state.array_sectors, 0
            )
        return None

    async def idle(self) -> None:
        """Wait until nothing is being copied here and nothing waits to be."""
        while True:
            await self._quiet.wait()
            if not self._wake.is_set() and self._status is None:
                return
            await asyncio.sleep(0)
