"""One membership of an array in its cluster: joining, leaving, rights, and taking over the dead.

Joining keeps the order of md-cluster spec 4.6 with our repairs (rule 1): the token is held while the superblocks
are read and `ack` is armed, so no message is missed; the own slot's lock is taken and its block cleared; the own
bitmap is loaded before any other is looked at; each vacant slot's bitmap is merged under that slot's lock; each
living slot's resync window is read. After that the array serves.

A dead member's bitmap is taken over by the first survivor that gets its lock, the others then find it empty; a
takeover that fails is tried again (rule 2, F5). A member that leaves with bits left says BITMAP_NEEDS_SYNC
first, and is treated the same once its lock is free. After a loss the member with the lowest slot publishes the
newest superblock (rule 6). Losing the session ends this life: the array drains and joins again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Protocol

from clustermd.array.coordinator import ArraySide
from clustermd.cluster.channel import Channel
from clustermd.cluster.messages import Message, MessageType
from clustermd.cluster.slot_lock import OwnSlot, forget_window, read_block, slot_lock_name, try_vacant
from clustermd.dlm.lockspace import Lock, Lockspace, LockspaceEvents, Slot
from clustermd.dlm.modes import Mode
from clustermd.errors import ClusterLost, Refused
from clustermd.trace import Trace

RETRY_S = 0.5
RELOADS = 4
"""How often a node tries to read an announced superblock before it fails the members that it cannot read."""
OUTVOTED = ("superblock-unconfirmed", "faults-conflict")
REQUEST_S = 1.0
LOOK_AGAIN_S = 0.05


def _seen(task: asyncio.Future[None]) -> None:
    if not task.cancelled():
        task.exception()


class Link(Protocol):
    """This node's place among the nodes: made by the process that runs the array, closed when a life ends."""

    async def join(self, name: str, events: LockspaceEvents, max_slots: int) -> Lockspace:
        """Join the lockspace. Raises Refused `too-many-nodes`, ClusterLost."""

    async def close(self) -> None:
        """Give up the membership and what proves it; nothing of ours is in flight any more."""


class Life:
    """One membership: from `join` to `end`. Implements LockspaceEvents."""

    def __init__(self, link: Link, array: ArraySide, trace: Trace) -> None:
        self.link = link
        self.array = array
        self.trace = trace
        self.log = logging.getLogger("clustermd.cluster")
        self.takeovers: set[int] = set()
        self.channel: Channel
        self._lockspace: Lockspace
        self._own: OwnSlot
        self._resync: Lock
        self._resyncing = asyncio.Lock()
        self._right_requested = asyncio.Event()
        self._ready = asyncio.Event()
        self._tasks: dict[object, asyncio.Task[None]] = {}
        self._joined = False
        self._leaving = False
        self._over = False
        self._failed_since_prep = False
        self._recovering = False
        self._gone: set[int] = set()  # slots to take over whose owner is known to be gone
        self._wanting = 0
        self._claimed = False
        self._settles = False  # all who have bits to copy asked for the resync right before we did
        self._reloads = 0
        self._announced = False  # some node may be keeping out of a window of ours

    # --- join and leave -----------------------------------------------------------------------------

    @property
    def slot(self) -> int:
        """Our md slot, from 0."""
        return self._lockspace.our_slot - 1

    @property
    def sent(self) -> int:
        return self.channel.sent if self._joined else 0

    @property
    def all_settled(self) -> bool:
        """Nobody is dead or leaving whose bits have not been taken over."""
        return not self.takeovers and not self._recovering

    @property
    def settles(self) -> bool:
        """Whether a pass under the resync right as we hold it leaves nothing to copy anywhere."""
        return self._settles and self.all_settled

    def peers(self) -> tuple[str, ...]:
        ours = self._lockspace.our_slot
        return tuple(slot.name for slot in self._lockspace.slots if slot.slot != ours)

    async def join(self, name: str) -> None:
        array = self.array
        self._lockspace = await self.link.join(name, self, array.nodes)
        self.channel = Channel(self._lockspace, self.trace, self._handle, array.awaits_all, array.followed)
        self._joined = True
        self.trace.point("join.member", slot=self.slot, nodes=array.nodes)
        await self.channel.open(array.prepare_join)
        await self._lockspace.lock("no-new-dev", Mode.CR)
        self._resync = await self._lockspace.lock("resync")
        # Who finds that a slot has an owner, or that it is empty, takes its bits for copied: we ask before that.
        await self._claim_right()
        self._own = await OwnSlot.claim(self._lockspace, self.slot)
        self.trace.point("join.slot", slot=self.slot)
        await array.load_own_slot(self.slot)
        self.channel.start(self._own)
        for slot in range(array.nodes):
            if slot != self.slot:
                await self._gather(slot)
        self._ready.set()
        self.trace.point("join.gathered", slot=self.slot)

    async def _gather(self, slot: int) -> None:
        """A vacant slot's bits become ours; of a living one the resync window is learnt."""
        while True:
            vacant = await try_vacant(self._lockspace, slot)
            if vacant is not None:
                try:
                    self.trace.point("join.locked", slot=slot)
                    await self.array.merge_slot(slot)
                finally:
                    await vacant.unlock()
                self.trace.point("join.merged", slot=slot)
                return
            if any(member.slot == slot + 1 for member in self._lockspace.slots):
                generation = self._lockspace.generation
                async with self.channel.receiving:  # no message may overtake what is read here
                    block = await read_block(self._lockspace, slot)
                    if slot in self.takeovers & self._gone:
                        continue  # its owner died before we looked: its window stays until its bits are ours
                    if block.hi and generation != self._lockspace.generation:
                        continue  # that may be of who had the slot before, and nobody would ever end its window
                    if block.hi:  # no window there ends none (rule 4): who leaves clears its block
                        self.array.set_window(slot, block.lo, block.hi)
                    self.trace.point("join.window", slot=slot, lo=block.lo, hi=block.hi)
                return
            # Neither vacant nor a member's: somebody takes it over at this moment. Look again, and do not queue for PW:
            # a new member may own it next, and whoever reads its block would have to wait behind us for ever.
            await asyncio.sleep(LOOK_AGAIN_S)

    async def leave(self, handover: bool) -> None:
        """Say what must be said, then let go of everything in the order that survivors rely on."""
        if self._over:
            return
        if self._announced and not (handover and self.peers()):
            await self._finish()
        async with AsyncExitStack() as until_unlocked:
            if handover:
                # Who joins listens from when it has had the token: it hears us, or finds our slot empty.
                await until_unlocked.enter_async_context(self.channel.token())
                if self.peers():
                    self.trace.point("leave.announcing", slot=self.slot)
                    await self.channel.broadcast(Message(MessageType.BITMAP_NEEDS_SYNC, self.slot))
                    self.trace.point("leave.announced", slot=self.slot)
            self._leaving = True  # what begins now would go on without the slot's lock
            await self._stop_tasks()
            self.trace.point("leave.deaf", slot=self.slot)
            await self.channel.stop()
            self._over = True
            self.trace.point("leave.unlocking", slot=self.slot)
            await self._own.release()
        await self._lockspace.leave()
        self.trace.point("leave.done")

    async def end(self) -> None:
        """Whatever happened: no task of this life goes on, and the link is closed."""
        self._over = True
        await self._stop_tasks()
        if self._joined:
            await self.channel.stop()
        self.trace.point("life.over")
        await self.link.close()

    async def _stop_tasks(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def _spawn(self, key: object, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` until it has succeeded, once per key at a time."""
        if key not in self._tasks and not self._leaving and not self._over:
            self._tasks[key] = asyncio.get_running_loop().create_task(self._insist(key, work))

    async def _insist(self, key: object, work: Callable[[], Awaitable[None]]) -> None:
        said = ""
        while True:
            try:
                await work()
            except ClusterLost:
                return
            except (Refused, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    self.log.warning("%s will be tried again: %s", key, error)
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:
                # Nobody waits for this task: were it to end here, the array would never be whole again.
                self.log.exception("%s failed unexpectedly and will be tried again", key)
                await asyncio.sleep(RETRY_S)
                continue
            break
        self._tasks.pop(key, None)

    # --- rights ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def resync_right(self, *, settles: bool = False) -> AsyncIterator[None]:
        """`resync` in EX; "finished" is said before it is given up, unless the task is being stopped.

        Between two tasks of this node it is not given up: whoever gets it next takes the array for settled. What was
        claimed for a pass that settles everything is kept until there is one (`settles`).
        """
        if settles and self._claimed:
            self._claimed = False
        else:
            self._wanting += 1
        self._right_requested.set()
        try:
            await self._resyncing.acquire()
        finally:
            self._wanting -= 1
        try:
            await self._have_right()
            try:
                try:
                    yield
                finally:
                    if self._announced and not self._stopping():
                        await self._finish_surely()
            finally:
                if not self._wanting:
                    self.trace.point("resync.right_given", slot=self.slot)
                    giving = asyncio.ensure_future(self._resync.convert(Mode.NL))
                    giving.add_done_callback(_seen)  # whoever is cancelled here does not hear how it ends
                    with suppress(ClusterLost):
                        await asyncio.shield(giving)
        finally:
            self._resyncing.release()
            if not self._wanting:
                self._right_requested.clear()

    async def _claim_right(self) -> None:
        """Have the resync right requested, for the first pass of this life, before anything is seen of us."""
        self._claimed = True
        self._wanting += 1
        self._spawn("the resync right", self._claim)
        await self._right_requested.wait()

    async def _claim(self) -> None:
        async with self._resyncing:
            self._right_requested.set()
            await self._have_right()

    async def _have_right(self) -> None:
        """`resync` in EX. The right settles if it was asked for when all slots were known to be looked after."""
        if self._resync.mode is not Mode.EX:
            self._settles = self._ready.is_set() and self.all_settled
        await self._resync.convert(Mode.EX)

    def _stopping(self) -> bool:
        task = asyncio.current_task()
        return self._over or (task is not None and task.cancelling() > 0)

    async def announce(self, lo: int, hi: int) -> None:
        """The block first, the message second: who joins between the two reads the block (spec 5.7)."""
        self._announced = True
        await self._own.set_window(lo, hi)
        await self.channel.send(Message(MessageType.RESYNCING, self.slot, lo, hi))

    async def _finish(self) -> None:
        self.trace.point("resync.finishing", slot=self.slot)
        await self._own.set_window(0, 0)
        await self.channel.send(Message(MessageType.RESYNCING, self.slot, 0, 0))
        self._announced = False
        self.trace.point("resync.finished", slot=self.slot)

    async def _finish_surely(self) -> None:
        """Others stay out of the window until they heard this, so it is said until they did."""
        while True:
            try:
                await self._finish()
                return
            except ClusterLost:
                raise
            except Refused as error:
                self.log.warning("the end of the resync window is not known to all yet: %s", error)
                await asyncio.sleep(RETRY_S)

    # --- messages ---------------------------------------------------------------------------------------

    async def _handle(self, message: Message) -> int:
        """Process one message of another node; 0 or an errno. Idempotent, as a sender may die half way."""
        match message.type:
            case MessageType.METADATA_UPDATED:
                return await self._reload(message.raid_slot)
            case MessageType.RESYNCING:
                return await self._resyncing_elsewhere(message)
            case MessageType.BITMAP_NEEDS_SYNC:
                self._take_over(message.slot)
                return 0
            case MessageType.RESYNCING_START:
                return 0
            case _:
                return errno.EOPNOTSUPP

    async def _resyncing_elsewhere(self, message: Message) -> int:
        if message.high == 0:
            self._end_window(message.slot, "finished")
            self.array.wake_resync()
            return 0
        self.array.set_window(message.slot, message.low, message.high)
        if await self.array.quiesce(message.low, message.high):
            return 0
        return errno.EBUSY

    async def _reload(self, announced: int) -> int:
        """Follow the announced superblock, or hold I/O until that is possible (rule 6)."""
        try:
            await self.array.reload(announced)
        except (Refused, OSError) as error:
            if isinstance(error, ClusterLost):
                raise
            if self._over or (isinstance(error, Refused) and error.code in OUTVOTED):
                return errno.EIO  # what a life that is over could not read says nothing about the next one
            if "reload" not in self._tasks:
                self._reloads = 0
            self.array.doubt(f"the superblocks cannot be confirmed: {error}")
            self._spawn("reload", self._reload_again)
            return errno.EIO
        return 0

    async def _reload_again(self) -> None:
        """Until that is done no node can record anything: what only we cannot read is soon a fault of that member."""
        self._reloads += 1
        if self._reloads <= RELOADS:
            async with self.channel.receiving:  # not in the middle of an update of ours
                await self.array.reload()
        else:
            await self.array.adopt()
        self.array.followed(False)
        self.array.trust()

    # --- recovery events (LockspaceEvents) ----------------------------------------------------------------

    def recover_prep(self) -> None:
        self._recovering = True
        self._unsettled()

    def recover_slot(self, slot: Slot) -> None:
        self.trace.point("cluster.lost", slot=slot.slot - 1, node=slot.name)
        self.log.warning("node %s (slot %d) is dead and fenced", slot.name, slot.slot - 1)
        self.takeovers.add(slot.slot - 1)
        self._gone.add(slot.slot - 1)
        self._failed_since_prep = True

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        self._recovering = False
        present = {slot.slot - 1 for slot in slots}
        for owned in sorted(self.takeovers & self._gone & present - {our_slot - 1}):
            # Somebody said that it is taken over; its new owner has loaded what bits it has as its own.
            self._end_takeover(owned)
            task = self._tasks.pop(("takeover", owned), None)
            if task is not None:
                task.cancel()
            self._end_window(owned, "owned")
        self._gone |= self.takeovers - present
        for dead in self.takeovers:
            self._spawn_takeover(dead)
        if self._failed_since_prep:
            self._failed_since_prep = False
            if slots and our_slot == min(slot.slot for slot in slots):
                self._spawn(f"adopting the newest superblock in generation {generation}", self._adopt)
        self.array.wake_resync()

    def suspended(self, reason: str) -> None:
        if not self._over:
            self.array.hold(reason)

    def resumed(self) -> None:
        if not self._over:
            self.array.resume()

    def lost(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self.array.lost(reason)

    async def _adopt(self) -> None:
        await self._ready.wait()
        await self.array.adopt()

    def _end_window(self, slot: int, why: str) -> None:
        self.trace.point("window.end", slot=slot, why=why)  # first: ending it lets writes go
        self.array.end_window(slot)

    # --- takeover -----------------------------------------------------------------------------------------

    def _take_over(self, slot: int) -> None:
        self.takeovers.add(slot)
        self._unsettled()
        self._spawn_takeover(slot)

    def _unsettled(self) -> None:
        """There may be bits that nobody who copies them has asked the right for."""
        self._settles = False
        self.array.set_unsettled()

    def _spawn_takeover(self, slot: int) -> None:
        async def work() -> None:
            await self._merge(slot)

        self._spawn(("takeover", slot), work)

    async def _merge(self, slot: int) -> None:
        """Wait for the slot's lock, take its bits over, and only then let its window and the slot go."""
        await self._ready.wait()
        lock = await self._lockspace.lock(slot_lock_name(slot), Mode.NL, value_block=True)
        try:
            await lock.convert(Mode.PW)
            self.trace.point("takeover.locked", slot=slot)
            chunks = await self.array.merge_slot(slot)
            self._end_window(slot, "merged")
            forget_window(lock)  # who reads the slot's block from now on may take it for the next owner's
            if chunks:
                # Our request for the resync right is queued before any survivor that finds this slot
                # empty can queue its own: nobody takes the array for settled before these are copied.
                self.array.wake_resync()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._right_requested.wait(), REQUEST_S)
            self.trace.point("takeover.done", slot=slot, dirty=len(chunks))
        finally:
            with suppress(ClusterLost):
                await lock.unlock()
        await self._lockspace.recovered(slot + 1)
        self._end_takeover(slot)
        self.array.wake_resync()

    def _end_takeover(self, slot: int) -> None:
        self.takeovers.discard(slot)
        self._gone.discard(slot)
