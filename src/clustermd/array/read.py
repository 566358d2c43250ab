"""The read path: one member a read; which one depends on whether the copies may differ.

Copies may differ while a window covers the range, while a dead node's bits are not merged and copied, or while
a chunk of our own awaits its copy. Then every node reads the first usable member in role order, which is also the
source of the resync (I17, rule 10). Otherwise reads are balanced: a sequential reader stays on its member,
others go where fewest reads are in flight. A failed read is answered from another member, and the
bad copy repaired behind it; a member that has failed meanwhile is not believed either. A read whose life ended
by exclusion is refused, whatever came of it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from clustermd.array.member import Member
from clustermd.array.member_io import Shared, transfer
from clustermd.array.request import Request
from clustermd.array.state import EXCLUDED, ArrayState
from clustermd.device.member_device import Op
from clustermd.errors import Refused


class ReadOp:
    """One read in flight on one member."""

    __slots__ = ("buffer", "given_up", "member", "reader", "request", "tick", "tried")

    def __init__(self, reader: Reader, request: Request, member: Member) -> None:
        self.reader = reader
        self.request = request
        self.member = member
        self.buffer = request.buffer
        self.tick = reader.state.tick
        self.tried = 0
        self.given_up = False

    def io_done(self, tag: int, result: int) -> None:
        self.member.reads -= 1
        if self.given_up:
            self.member.stuck -= 1
            if self.buffer is not None:
                self.buffer.release()
            return
        request = self.request
        if result != request.length_bytes:
            self.reader.failed(self, result)
        elif not self.reader.overtaken(self):
            self.reader.in_flight.discard(self)
            request.owner.completed(request)


class Reader:
    """Takes READ requests. `repair(member, lo, hi)` is told of a copy that could not be read but has a good one."""

    def __init__(self, state: ArrayState, repair: Callable[[Member, int, int], None]) -> None:
        self.state = state
        self._repair = repair
        self.in_flight: set[ReadOp] = set()

    def start(self, request: Request) -> None:
        state = self.state
        state.foreground += 1
        if state.held:
            state.keep(request)
            return
        lo = request.offset_bytes >> 9
        hi = lo + (request.length_bytes >> 9)
        member = self.choose(lo, hi)
        if member is None:
            request.error = errno.EIO
            request.owner.completed(request)
            return
        self._issue(ReadOp(self, request, member))

    def _issue(self, op: ReadOp) -> None:
        member = op.member
        request = op.request
        member.reads += 1
        member.next_sector = (request.offset_bytes + request.length_bytes) >> 9
        self.in_flight.add(op)
        self.state.submitter.queue(
            member.device,
            Op.READ,
            member.data_offset_bytes + request.offset_bytes,
            request.length_bytes,
            op.buffer,
            0,
            op,
            member.index,
        )

    def exclude(self) -> None:
        """This life is over, and others may write by now: what is still read here is answered with an error."""
        for op in self.in_flight:
            op.request.error = EXCLUDED

    def choose(self, lo: int, hi: int) -> Member | None:
        """The member to read [lo, hi) from, or None if no copy can be read."""
        state = self.state
        if self.read_first(lo, hi):
            return state.first_copy(lo, hi)
        best = None
        for member in state.in_sync:
            if (member.bad_blocks and not member.good_for(lo, hi)) or member.superblock.devflags & 1:
                continue
            if member.next_sector == lo and member.reads < 4:
                return member
            if best is None or member.reads < best.reads:
                best = member
        return best or state.first_copy(lo, hi)

    def read_first(self, lo: int, hi: int) -> bool:
        """Whether copies of [lo, hi) may differ, so that all nodes must read the same one."""
        state = self.state
        if not state.settled or (state.windows.any and state.windows.blocked(lo, hi)):
            return True
        bitmap = state.bitmap
        if bitmap is None or not bitmap.unreconciled:
            return False
        return any(chunk in bitmap.unreconciled for chunk in bitmap.chunks_of(lo, hi))

    def failed(self, op: ReadOp, result: int) -> None:
        """The member did not deliver: try the next one that can, and have this copy repaired."""
        state = self.state
        request = op.request
        self.in_flight.discard(op)
        if result == -errno.ESHUTDOWN:
            state.keep(request)
            return
        lo = request.offset_bytes >> 9
        hi = lo + (request.length_bytes >> 9)
        op.tried |= 1 << op.member.index
        state.log.warning(
            "%s: read error at sector %d (%d), trying another member", op.member.path, lo, result
        )
        member = state.first_copy(lo, hi, op.tried)
        if member is None:
            request.error = errno.EIO
            request.owner.completed(request)
            return
        if not op.given_up:
            self._repair(op.member, lo, hi)
            if hi - lo > 1 and self.read_first(lo, hi):
                task = asyncio.get_running_loop().create_task(self._in_parts(request, lo, hi), name="read")
                state.tasks.add(task)
                task.add_done_callback(state.tasks.discard)
                return
        self._again(op, member, op.tried)

    def overtaken(self, op: ReadOp) -> bool:
        """Whether the member failed before it answered, so that another one is asked instead."""
        request = op.request
        lo = request.offset_bytes >> 9
        member = self._instead_of(op.member, lo, lo + (request.length_bytes >> 9), op.tried)
        if member is None or request.error:
            return False
        self.in_flight.discard(op)
        self._again(op, member, op.tried | 1 << op.member.index)
        return True

    def _instead_of(self, member: Member, lo: int, hi: int, tried: int) -> Member | None:
        """Whom to read after a late answer of a member that has failed. None: the answer counts.

        Without it the copies may be taken for settled by now: what it had may be what nobody reads any more.
        """
        return self.state.first_copy(lo, hi, tried | 1 << member.index) if member.faulty else None

    def _again(self, op: ReadOp, member: Member, tried: int) -> None:
        again = ReadOp(self, op.request, member)
        again.tried = tried
        self._issue(again)

    async def _in_parts(self, request: Request, lo: int, hi: int) -> None:
        """Answer a read of what may differ, of which the first copy cannot deliver all: block by block from the first
        that can, as a resync will copy it. Another copy may differ in the blocks that the first one has (I17)."""
        state = self.state
        assert request.buffer is not None
        step = state.block_sectors
        exclusions = state.exclusions
        for at in range(lo, hi, step):
            tried = 0
            while True:
                member = state.first_copy(at, at + step, tried)
                if member is None:
                    request.error = errno.EIO
                    request.owner.completed(request)
                    return
                shared = Shared(state.submitter.pool.take(step * 512))
                try:
                    result = await transfer(state, member, Op.READ, at, step * 512, shared)
                    if state.exclusions != exclusions:
                        state.refuse(request)
                        return
                    if result == -errno.ESHUTDOWN:
                        state.keep(request)
                        return
                    if result == step * 512 and self._instead_of(member, at, at + step, tried) is None:
                        place = (at - lo) * 512
                        request.buffer.view[place : place + result] = shared.buffer.view[:result]
                        break
                finally:
                    shared.drop()
                tried |= 1 << member.index
        request.owner.completed(request)

    def overdue(self, limit_ticks: int) -> int:
        """Give up reads older than `limit_ticks` seconds and read elsewhere, into another buffer."""
        stuck = 0
        for op in [op for op in self.in_flight if self.state.tick - op.tick > limit_ticks]:
            try:
                op.request.buffer = self.state.submitter.pool.take(op.request.length_bytes)
            except Refused:
                continue  # no memory now: the next second tries again
            stuck |= 1 << op.member.index
            op.given_up = True
            op.member.stuck += 1
            self.failed(op, -errno.ETIMEDOUT)
        return stuck
