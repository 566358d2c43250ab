"""One array on one node: its life from assembly to stop, and the way in for requests.

A *life* is one membership: join, load bitmaps, serve, until the array stops or the node loses its place in the
cluster. After a loss the array drains what is in flight, joins again as a new member, and only then goes on with the
requests it kept; clients stay connected and see a pause (design section 5). Where the others may have gone on without
this node (`Coordinator.excludes`) nothing is kept over the end of a life: what was not answered is refused, so is what
is asked before the next life serves, and clients have to connect anew. An array without cluster has one life.

The parts are classes of their own over one `ArrayState`; this file wires them and owns their order at start and stop.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection
from functools import partial

from clustermd.array.activity import Activity
from clustermd.array.assemble import Assembly, check_complete
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.coordinator import Coordinator
from clustermd.array.faults import Faults
from clustermd.array.flush import FlushOp
from clustermd.array.member import Member
from clustermd.array.metadata import Metadata
from clustermd.array.read import Reader
from clustermd.array.repair import Repair
from clustermd.array.report import report
from clustermd.array.request import Kind, Request
from clustermd.array.resync import Resync
from clustermd.array.slots import Slots
from clustermd.array.state import ArrayState
from clustermd.array.status import ArrayStatus
from clustermd.array.sweep import Sweep
from clustermd.array.waiters import Waited, end_of, resolve
from clustermd.array.write import WriteOp, Writer
from clustermd.array.zero import ZERO_PIECE_BYTES, ZeroJob
from clustermd.clock import Clock
from clustermd.device.member_device import Buffer, BufferPool, GateState, Submitter
from clustermd.errors import ClusterLost, Refused
from clustermd.ondisk.superblock import MAX_SECTOR
from clustermd.trace import Trace

DEVICE_TIMEOUT_S = 30
QUIESCE_S = 15.0
REJOIN_S = 0.5
REJOIN_MOST_S = 8.0
CUT_S = 5.0
"""How long a stop without contact waits for its tasks before it gives up the membership."""
DEFAULT_LIMITS = (1000, 200000)


class Array:
    """A Volume over the members of `assembly`. All of them stay open until `stop`.

    `limits()` gives resync speeds (min, max) in KiB/s; `changed()` is called when the status may have changed.
    `allow_degraded`: start although a role that the superblocks count on has no device here.
    """

    def __init__(
        self,
        name: str,
        assembly: Assembly,
        coordinator: Coordinator,
        submitter: Submitter,
        clock: Clock,
        trace: Trace,
        *,
        read_only: bool = False,
        allow_degraded: bool = False,
        device_timeout_s: int = DEVICE_TIMEOUT_S,
        limits: Callable[[], tuple[int, int]] = lambda: DEFAULT_LIMITS,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        state = ArrayState(
            name,
            assembly.members,
            assembly.reference,
            submitter,
            clock,
            trace,
            read_only=read_only,
            device_timeout_s=device_timeout_s,
        )
        self.state = state
        self.coordinator = coordinator
        self.allow_degraded = allow_degraded
        self.changed = changed
        self.faults = Faults(state, self._publish_faults)
        self.bitmap_writer = BitmapWriter(state, self.faults.fail)
        self.metadata = Metadata(state, coordinator, self.bitmap_writer, self.faults.fail)
        self.metadata.unrecorded = self.faults.publish_soon
        self.metadata.known_to_all = self.faults.known_to_all
        self.metadata.outvoted = self._outvoted
        self.slots = Slots(state, self.bitmap_writer, assembly.template, self.faults.fail)
        self.writer = Writer(state, self.bitmap_writer, self.faults.settle)
        self.activity = Activity(state, self.metadata, lambda: bool(self.writer.in_flight), self._redispatch)
        self.faults.writer = self.writer
        self.faults.changed = self._members_changed
        self.repair = Repair(state, coordinator, self.faults.fail, self.faults.surely_recorded)
        self.reader = Reader(state, self.repair.request)
        self.sweep = Sweep(state, self.bitmap_writer, self.metadata, self.faults.fail)
        self.resync = Resync(
            state,
            coordinator,
            self.metadata,
            self.faults.fail,
            self.faults.surely_recorded,
            limits,
            lambda: self.changed(),
        )
        self.nodes = self.slots.nodes
        self.stopped = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = asyncio.Event()
        self._no_contact = ""
        self._in_doubt = ""
        self._shut_out: Callable[[str], None] = lambda reason: None
        self._let_in: Callable[[], None] = lambda: None
        self._living = False
        self._merging = asyncio.Lock()
        self._merges = True
        self._zeroes: Buffer | None = None
        state.clean = assembly.reference.resync_offset == MAX_SECTOR
        state.active = not state.clean
        submitter.after_sweep(self.bitmap_writer.kick)
        state.gate.listen(self._gate_changed)
        if trace.on:
            trace.point(
                "array.assembled",
                uuid=state.reference.set_uuid.hex(),
                clustered=coordinator.clustered,
                members={member.number: member.path for member in state.members},
            )

    # --- Volume -----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def size_bytes(self) -> int:
        return self.state.array_sectors * 512

    @property
    def read_only(self) -> bool:
        return self.state.read_only

    @property
    def block_bytes(self) -> int:
        return self.state.block_sectors * 512

    @property
    def pool(self) -> BufferPool:
        return self.state.submitter.pool

    def submit(self, batch: list[Request]) -> None:
        """Take a batch of client requests (see `request.Volume`); EINVAL for one that is not whole blocks."""
        odd = self.block_bytes - 1
        for request in batch:
            kind = request.kind
            if kind is Kind.FLUSH:
                self._flush(request)
            elif not request.length_bytes:
                request.owner.completed(request)
            elif (request.offset_bytes | request.length_bytes) & odd:
                # a member would refuse it, and be failed for that
                request.error = errno.EINVAL
                request.owner.completed(request)
            elif kind is Kind.READ:
                self.reader.start(request)
            elif self.state.read_only:
                request.error = errno.EPERM
                request.owner.completed(request)
            elif kind is Kind.WRITE:
                self.writer.start(request)
            else:
                self._zero(request)
        self.bitmap_writer.kick()
        self.state.submitter.submit()

    def _flush(self, request: Request) -> None:
        state = self.state
        if state.held:
            state.keep(request)
        elif state.read_only or not state.writable:
            request.error = 0 if state.read_only else errno.EIO
            request.owner.completed(request)
        else:
            FlushOp(state, self.faults, request)

    def _zero(self, request: Request) -> None:
        everywhere = all(member.device.discard_zeroes for member in self.state.writable)
        if request.kind is Kind.TRIM and not everywhere:
            request.owner.completed(request)
            return
        if self._zeroes is None:
            self._zeroes = self.pool.take(ZERO_PIECE_BYTES)
            self._zeroes.view[:ZERO_PIECE_BYTES] = bytes(ZERO_PIECE_BYTES)
        ZeroJob(request, everywhere and not request.no_hole, self._zeroes, self.writer.start).run()

    # --- start --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve. Raises Refused or ClusterLost when that cannot be; `stop` then cleans up."""
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._every_second(), name="tick"))
        await self._begin()
        if not self.state.read_only:
            self._tasks.append(loop.create_task(self._sweep(), name="sweep"))
        if self.coordinator.clustered:
            self._tasks.append(loop.create_task(self._stay_member(), name="member"))

    async def _begin(self) -> None:
        """Begin a life: join, check that we see what others use, mark the array active, serve."""
        state = self.state
        self._lost.clear()
        self._forget_former_life()
        state.settled = not self.coordinator.clustered and not state.read_only
        if state.read_only:
            await self.slots.load_for_reading()
        else:
            state.slot = await self.coordinator.join(self)
            check_complete(state, self.coordinator.peers(), self.allow_degraded)
            await self.activity.begin(self.coordinator.clustered)
        self._living = True
        state.trace.point("array.serving", slot=state.slot)
        self._keep_or_serve()
        if state.excluded and not self._lost.is_set():
            state.excluded = False
            self._let_in()
        if not state.read_only:
            self.resync.start()
        self.changed()

    def _redispatch(self) -> None:
        """Start again what was kept while I/O was held."""
        if self.state.held:
            return
        parked, self.state.parked = self.state.parked, []
        if parked:
            self.submit(parked)

    # --- background -----------------------------------------------------------------------------------

    async def _every_second(self) -> None:
        state = self.state
        while True:
            await asyncio.sleep(state.tick_s)
            if state.gate.state is not GateState.OPEN:
                continue
            state.tick += 1
            limit = state.device_timeout_s
            stuck = (
                self.writer.overdue(limit) | self.reader.overdue(limit) | self.bitmap_writer.overdue(limit)
            )
            for flush in [flush for flush in state.flushes if state.tick - flush.tick > limit]:
                stuck |= flush.give_up()
            if stuck:
                self.faults.fail(stuck, f"no answer for {limit} s")
                state.submitter.submit()

    async def _sweep(self) -> None:
        state = self.state
        header = state.bitmap_header
        delay_s = header.daemon_sleep if header is not None else 5
        seen = -1
        while True:
            await asyncio.sleep(delay_s)
            if state.held:
                continue
            try:
                if await self.sweep.once():
                    self.changed()
                idle = seen == state.foreground and not self.writer.in_flight
                seen = state.foreground
                if idle and not state.clean and not self.coordinator.clustered and not state.unpublished:
                    await self.activity.mark(True)
            except ClusterLost:
                continue
            except (Refused, OSError) as error:
                if not isinstance(error, OSError) or error.errno != errno.ESHUTDOWN:
                    state.log.warning("a sweep failed: %s", error)
            except Exception:
                # Nobody waits for this task: were it to end here, no bit would ever be cleared again.
                state.log.exception("a sweep failed unexpectedly, the next one tries again")

    async def _publish_faults(self) -> None:
        await self.metadata.update()
        self._members_changed()

    def _members_changed(self) -> None:
        self.state.refresh()
        if self._living:
            self.resync.wake()
        self.changed()

    def _gate_changed(self, gate: GateState) -> None:
        trace, why = self.state.trace, self.state.gate.reason
        match gate:
            case GateState.OPEN:
                trace.point("gate.open")
            case GateState.HELD:
                trace.point("gate.held", reason=why)
            case GateState.SHUT:
                trace.point("gate.shut", reason=why)

    # --- losing the cluster and coming back -----------------------------------------------------------

    async def _stay_member(self) -> None:
        while True:
            await self._lost.wait()
            await self._end_life()
            delay_s = REJOIN_S
            said = ""
            while True:
                try:
                    await self._begin()
                    self.state.counters.rejoins += 1
                    break
                except (Refused, OSError) as error:
                    self.state.held = f"not a member of the cluster: {error}"
                    if str(error) != said:
                        said = str(error)
                        self.state.log.warning("joining again failed, and will be tried again: %s", error)
                    self.changed()
                    self.state.gate.shut("joining again failed")
                    await self._drain()
                    # A member with a shut gate can follow no message, and may hold bits that others must copy.
                    await self.coordinator.abandon()
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, REJOIN_MOST_S)  # each attempt makes the others recover us

    async def _end_life(self) -> None:
        """Stop what acts, let what is in flight land; requests are kept, if they may be."""
        self._living = False
        await self._end_tasks()
        await self._drain()

    async def _end_tasks(self) -> None:
        await self.resync.stop()
        await self.repair.stop()
        await self.faults.stop()

    async def _drain(self) -> None:
        """The gate is shut: what is on its way lands or comes back, and each write is answered, kept or refused."""
        state = self.state
        self.faults.shut()
        self.bitmap_writer.kick()
        state.submitter.submit()
        await state.submitter.drained()
        await self._no_writes()
        state.trace.point("array.drained", slot=state.slot)
        state.windows.clear()
        state.bitmap = None  # its pages belong to a slot that is not ours any more

    async def _no_writes(self) -> None:
        await _none_left(self.writer.in_flight)

    async def _no_flushes(self) -> None:
        """Whoever cannot flush must be recorded as faulty, which only a member of the cluster can do."""
        await _none_left(self.state.flushes)

    def _forget_former_life(self) -> None:
        """Nobody of it is left who would end its reasons to keep requests, or a window that it heard of while it was
        given up: a join may fail while it has some."""
        self._no_contact = self._in_doubt = ""
        self.state.windows.clear()

    def hold(self, reason: str) -> None:
        """Contact is lost for now: requests are kept, what is queued waits at the gate."""
        self._no_contact = reason
        self.state.gate.hold(reason)
        self._keep_or_serve()

    def resume(self) -> None:
        self._no_contact = ""
        self.state.gate.open()
        self._keep_or_serve()

    def doubt(self, reason: str) -> None:
        """The superblocks cannot be confirmed: requests are kept, the gate stays open to read them again."""
        self._in_doubt = reason
        self.state.trace.point("array.doubt", reason=reason)
        self._keep_or_serve()

    def trust(self) -> None:
        self._in_doubt = ""
        self.state.trace.point("array.trust")
        self._keep_or_serve()

    def _keep_or_serve(self) -> None:
        if not self._living or self._lost.is_set():
            return
        self.state.held = self._no_contact or self._in_doubt
        if not self.state.held:
            self.faults.resume()
            self._redispatch()
        self.changed()

    def lost(self, reason: str) -> None:
        """Membership is gone: the gate shuts at once, the rest follows in order."""
        state = self.state
        state.gate.shut(reason)
        state.held = reason
        self._no_contact = self._in_doubt = ""
        state.trace.point("array.lost", slot=state.slot)
        self._lost.set()
        if self.coordinator.excludes:
            self._exclude(reason)
        else:
            state.log.warning("%s: I/O is held until this node has joined again", reason)
        self.changed()

    def _exclude(self, reason: str) -> None:
        """Others may have gone on: whatever is not answered yet is refused, as soon as nothing of it can land."""
        state = self.state
        state.log.warning(
            "%s: others may have gone on without this node, so what clients had asked fails, they have to connect"
            " again, and all I/O fails until this node has joined again",
            reason,
        )
        state.excluded = True
        state.exclusions += 1
        self.writer.exclude()
        self.reader.exclude()
        for flush in state.flushes:
            flush.exclude()
        self.faults.shut()
        parked, state.parked = state.parked, []
        for request in parked:
            state.refuse(request)
        self._shut_out(reason)

    def watch_exclusion(self, shut_out: Callable[[str], None], let_in: Callable[[], None]) -> None:
        """For who serves clients: `shut_out(reason)` when a life ends by exclusion, or at once if one has: its clients
        are to be disconnected when they have their answers; `let_in()` when the next one serves."""
        self._shut_out, self._let_in = shut_out, let_in
        if self.state.excluded:
            shut_out(self.state.held)

    def _outvoted(self, reason: str) -> None:
        """Others went on with members that we have given up: this life ends, the next one begins with what they say."""
        if self.coordinator.clustered and self._living:
            self.lost(reason)

    # --- what the cluster asks (ArraySide) --------------------------------------------------------------

    async def prepare_join(self) -> None:
        """A new life may use the disks: nothing of the old one is in flight."""
        self.state.gate.renew()
        if self._no_contact:
            self.state.gate.hold(self._no_contact)
        await self.metadata.begin_anew()

    async def load_own_slot(self, slot: int) -> None:
        await self.slots.load_own(slot)

    async def merge_slot(self, slot: int) -> list[int]:
        async with self._merging:
            if not self._merges:
                raise Refused("stopping", f"{self.state.name} is being stopped: others take slot {slot} over")
            chunks = await self.slots.merge(slot)
        if chunks and self._living:
            self.resync.wake()
        self.changed()
        return chunks

    def set_window(self, slot: int, lo: int, hi: int) -> None:
        if hi > lo:
            # before it is set: that may let writes go
            self.state.trace.point("window.set", slot=slot, lo=lo, hi=hi)
        self.state.windows.set(slot, lo, hi)
        self.changed()

    def end_window(self, slot: int) -> None:
        self.state.windows.end(slot)
        self.changed()

    async def quiesce(self, lo: int, hi: int) -> bool:
        """Wait for our writes in [lo, hi) (see `ArraySide`)."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + QUIESCE_S
        while True:
            holders = [holder for holder in self.state.ranges.within(lo, hi) if isinstance(holder, WriteOp)]
            if not holders:
                self.state.trace.point("window.quiesced", lo=lo, hi=hi)
                return True
            if any(holder.settling for holder in holders):
                return False
            try:
                await asyncio.wait_for(end_of(holders[0]), max(0.0, min(1.0, end_s - loop.time())))
            except TimeoutError:
                if loop.time() >= end_s:
                    return False

    async def reload(self, announced: int | None = None) -> None:
        await self.metadata.reload(announced=announced)
        self._members_changed()

    def awaits_all(self) -> bool:
        return self.state.unpublished

    def followed(self, by_all: bool) -> None:
        if by_all:
            self.faults.known_to_all()
        else:
            self.faults.publish_soon()

    def working_number(self) -> int:
        return self.state.in_sync[0].number

    def set_unsettled(self) -> None:
        self.state.settled = False

    def wake_resync(self) -> None:
        if self._living:
            self.resync.wake()

    async def adopt(self) -> None:
        await self.metadata.update()

    # --- stop -------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End in order: writes done, bits that may go cleared, the rest handed over, disks closed."""
        state = self.state
        state.stopping = True
        living, self._living = self._living, False
        ticking, others = self._tasks[:1], self._tasks[1:]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if living and not state.held:
            await self._stop_in_order()
        else:
            await self._stop_at_once()
        state.held = "stopped"
        state.gate.shut("stopped")
        self.faults.close()
        self._refuse_parked()
        for member in self.faults.stuck_members():
            state.log.warning("%s: waiting for a request that it does not answer", member.path)
        await self._drain()
        await state.submitter.close()
        for task in ticking:
            task.cancel()
        await asyncio.gather(*ticking, *state.tasks, return_exceptions=True)
        self._refuse_parked()
        if self._zeroes is not None:
            self._zeroes.release()
            self._zeroes = None
        for member in state.members:
            member.device.close()
        self.stopped.set()

    def _refuse_parked(self) -> None:
        parked, self.state.parked = self.state.parked, []
        for request in parked:
            request.error = errno.ESHUTDOWN
            request.owner.completed(request)

    async def _stop_at_once(self) -> None:
        """No contact, or not a member: nothing more goes out, and what we leave dirty is for others."""
        state = self.state
        state.gate.shut("stopped")
        self._merges = False
        left = state.bitmap is not None and next(state.bitmap.dirty_chunks(), None) is not None
        ending = asyncio.get_running_loop().create_task(self._end_tasks())
        await asyncio.wait((ending,), timeout=CUT_S)
        await self._drain()
        await self.coordinator.leave(handover=left)
        await ending  # a lock operation that nobody answers ends with the session

    async def _stop_in_order(self) -> None:
        state = self.state
        state.held = "stopping"
        await self.resync.stop()
        await self.repair.stop()
        await self.activity.done()
        self.faults.resume()
        await self._no_writes()
        await self._no_flushes()
        left = False
        if not state.read_only:
            try:
                left = bool(await self.faults.recorded())
                await self.resync.checkpoint()
                async with self._merging:
                    self._merges = False  # what is merged after the last look would be handed over by nobody
                left |= not await self.sweep.clean()
                left |= bool(await self.faults.recorded())  # its flush may be what finds a fault
                if not self.coordinator.clustered and not state.clean:
                    await self.activity.mark(True)
            except (Refused, OSError) as error:
                state.log.warning("the stop leaves bits behind: %s", error)
                left = True
        await self.faults.stop()
        await self.coordinator.leave(handover=left)

    # --- for people ---------------------------------------------------------------------------------------

    async def idle(self) -> None:
        """Wait until nothing is being copied and nothing waits to be, here or, as far as we know, elsewhere."""
        while True:
            await self.resync.idle()
            if not self.state.windows.any:
                return
            moved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.state.windows.listen(partial(resolve, moved))
            await moved

    def members(self) -> list[Member]:
        return list(self.state.members)

    def status(self) -> ArrayStatus:
        """The values behind mdstat and `--detail`."""
        return report(self.state, self.coordinator, self.resync)


async def _none_left(ops: Collection[Waited]) -> None:
    """Wait until all of them have ended."""
    while ops:
        await end_of(next(iter(ops)))
