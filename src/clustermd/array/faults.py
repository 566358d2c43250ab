"""Members that fail: out at once in memory, on the surviving disks next, and only then writes are answered.

The same holds for a fault that another node found: who has followed it already writes without that member, but its
answers wait until all have followed (`known_to_all`), else somebody could still read the stale copy.

A write that missed a member may be answered only after that fault is on the surviving disks and every live
node has acknowledged it (rule 17, I11): otherwise another node could read, or copy, the stale one. The last
good member is never failed; its error goes to the client. Faults of one moment are published together.

At the end of a life what waits for a record starts again in the next one; after an exclusion it is refused.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

from clustermd.array.member import Member
from clustermd.array.state import EXCLUDED, ArrayState
from clustermd.array.write import WriteOp, Writer
from clustermd.device.member_device import GateState
from clustermd.errors import ClusterLost, Refused

RETRY_S = 0.5
LAST_ATTEMPTS = 3
"""How often a stopping array tries to record a fault that others do not acknowledge."""


class Faults:
    """Fails members and settles the writes that missed them. `publish()` writes and announces the roles."""

    def __init__(self, state: ArrayState, publish: Callable[[], Awaitable[None]]) -> None:
        self.state = state
        self.writer: Writer | None = None
        self.changed: Callable[[], None] = lambda: None
        self._publish = publish
        self._delayed: list[WriteOp] = []
        self._waiting: list[asyncio.Future[int]] = []
        self._task: asyncio.Task[None] | None = None
        self._over = False
        self._given_up = False

    def fail(self, mask: int, why: str) -> bool:
        """Fail the members in `mask`, but never the last good one. True if all of them are faulty now."""
        state = self.state
        all_failed = True
        for member in state.member_of(mask):
            if member.faulty:
                continue
            if member.in_sync and len(state.in_sync) == 1:
                all_failed = False
                state.log.error("%s: %s, but it is the last good member and stays", member.path, why)
                continue
            member.faulty = True
            member.in_sync = False
            member.fault_recorded = False
            member.why = why
            state.refresh()
            state.log.error("%s: failed, %s", member.path, why)
            state.trace.point("member.failed", number=member.number, why=why)
            state.unpublished = not state.read_only
        if state.unpublished:
            self._start()
            self.changed()
        return all_failed

    def _start(self) -> None:
        if not self._over and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run(), name="faults")

    async def _run(self) -> None:
        state = self.state
        attempts = 0
        said = ""
        while state.unpublished:
            if state.held and not state.stopping:
                return  # goes on when I/O does
            try:
                await self._publish()
            except (Refused, OSError) as error:
                if self._lost(error):
                    if state.stopping:
                        self._release(errno.ESHUTDOWN)
                    return
                if str(error) != said:
                    said = str(error)
                    state.log.warning("a failed member cannot be recorded yet: %s", error)
                attempts += 1
                if state.stopping and attempts >= LAST_ATTEMPTS:
                    self._given_up = True
                    self._release(errno.EIO)
                    return
                if isinstance(error, OSError) or error.code == "superblock-unwritable":
                    self._release(errno.EIO)  # no disk is left that could take the record
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:
                # Writes wait for this task, and it must not leave them.
                state.log.exception("a failed member could not be recorded, unexpectedly")
                await asyncio.sleep(RETRY_S)
                continue
        self._release(0)

    def _lost(self, error: Refused | OSError) -> bool:
        """Whether it failed because this node is no member any more: then no disk takes anything of it, either."""
        return isinstance(error, ClusterLost) or self.state.gate.state is GateState.SHUT

    def settle(self, op: WriteOp) -> None:
        """A write that some member may lack: record the fault, then answer."""
        state = self.state
        writer = self.writer
        assert writer is not None
        if op.redo:
            writer.redo(op)
            return
        op.settling = True
        if op.failed:
            self.fail(op.failed, "a write failed")
        if not state.unpublished:
            self._answer(op, self._verdict(op))
        elif self._over:
            writer.redo(op)
        else:
            self._delayed.append(op)

    def _verdict(self, op: WriteOp) -> int:
        """0 if some good member has the write and none that counts lacks it."""
        for member in self.state.in_sync:
            if not op.succeeded >> member.index & 1:
                return errno.EIO
        if not self.state.in_sync:
            return errno.EIO
        return errno.EOPNOTSUPP if op.unsupported else 0

    def _answer(self, op: WriteOp, error: int) -> None:
        writer = self.writer
        assert writer is not None
        torn = error not in (0, errno.EOPNOTSUPP) and op.succeeded
        if torn:
            self.state.trace.point("write.torn", lo=op.lo, hi=op.hi)
            op.bitmap.mark(op.chunks)  # some members have it and some do not
        writer.finish(op, error)
        if torn:
            self.changed()

    def _release(self, error: int) -> None:
        delayed, self._delayed = self._delayed, []
        for op in delayed:
            self._answer(op, error or self._verdict(op))
        self._tell(error)
        self.state.submitter.submit()

    def _tell(self, error: int) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(error)

    def shut(self) -> None:
        """Membership is gone: delayed writes start again in the next life, or are refused."""
        writer = self.writer
        assert writer is not None
        self._over = True
        delayed, self._delayed = self._delayed, []
        for op in delayed:
            writer.redo(op)
        if self.state.excluded:
            self._tell(EXCLUDED)

    def resume(self) -> None:
        """I/O goes on: faults that were not recorded are published again."""
        self._over = False
        self.publish_soon()

    def known_to_all(self) -> None:
        """Every node has followed the superblocks as they are: what waited for that is answered."""
        state = self.state
        if state.unpublished and all(member.fault_recorded for member in state.members if member.faulty):
            state.unpublished = False
            state.trace.point("member.fault_recorded")
            self._release(0)

    def publish_soon(self) -> None:
        if self.state.unpublished:
            self._start()

    def close(self) -> None:
        """The array is stopped: nobody waits for a record any more."""
        self.shut()
        self._release(errno.ESHUTDOWN)

    async def surely_recorded(self) -> None:
        """Wait until no fault is unrecorded, however long that takes."""
        while await self.recorded():
            await asyncio.sleep(RETRY_S)

    async def recorded(self) -> int:
        """Wait until no fault is unrecorded; 0, or an errno if that could not be done."""
        if not self.state.unpublished:
            return 0
        if self.state.excluded:
            return EXCLUDED
        if self.state.stopping and (self._task is None or self._task.done()):
            return self._no_more()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return await future

    def _no_more(self) -> int:
        """The answer of a stopping array that tries it no more: it could not, or it is the cluster's no longer."""
        return errno.EIO if self._given_up else errno.ESHUTDOWN

    async def stop(self) -> None:
        """Record nothing until `resume`, whatever fails meanwhile: this node is about to leave."""
        self._over = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def stuck_members(self) -> list[Member]:
        """Faulty members that still have a request of ours: they must not come back before it is gone."""
        return [member for member in self.state.members if member.stuck]
