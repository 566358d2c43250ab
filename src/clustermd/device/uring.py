"""The submitter over io_uring: one system call for a batch, no object per request but one tuple.

`queue` packs the request straight into the submission ring, behind the tail that the kernel has been told
of, and notes (target, tag, buffer) in a table of slots; the slot's number travels as the entry's user
data. What is packed but not published costs nothing to hold back or to take back, which is all that the
gate needs. `submit` asks the gate, publishes the tail and enters once. Completions wake the loop by an
eventfd; one sweep copies what the completion ring holds, gives the slots back, calls the targets.

There are as many slots as completion entries, so the completion ring cannot overflow by us; requests
beyond slots or ring wait in a backlog, in order. FLUSH is fdatasync, FUA is RWF_DSYNC, DISCARD punches a hole
(io_uring_enter(2), pwritev2(2), fallocate(2)). Rules 12 and 15.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections import deque
from collections.abc import Callable

from clustermd.device.buffers import DEFAULT_POOL_BYTES, AlignedPool
from clustermd.device.member_device import Buffer, BufferPool, Gate, GateState, MemberDevice, Op, Target
from clustermd.device.ring import (
    CQE,
    CQE_BYTES,
    FSYNC_DATASYNC,
    OP_FALLOCATE,
    OP_FSYNC,
    OP_NOP,
    OP_READ,
    OP_WRITE,
    PUNCH_HOLE_KEEP_SIZE,
    RWF_DSYNC,
    SQE,
    SQE_BYTES,
    Ring,
)
from clustermd.device.sweep import Sweep, run_one

ENTRIES = 2048
COMPLETION_ENTRIES = 4096
_RETRY_S = 0.001
# looking a member up in its enum costs as much as packing a request
_READ, _WRITE, _FLUSH, _DISCARD = Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD
_FUA_FLAG = RWF_DSYNC << 32
_NO_FD, _NO_OP = 0x7FFFFFFF << 32, 0xFF
_DATASYNC_FLAG = FSYNC_DATASYNC << 32

_Request = tuple[MemberDevice, Op, int, int, Buffer | None, int, Target, int, bool]


class _Nobody:
    """The target of an empty slot."""

    def io_done(self, tag: int, result: int) -> None:
        raise RuntimeError("the kernel completed a request that nobody made")


_EMPTY: tuple[Target, int, Buffer | None] = (_Nobody(), 0, None)


class UringSubmitter:
    """`Submitter` over one io_uring. Raises OSError where the kernel refuses one."""

    __slots__ = (
        "_backlog",
        "_event_fd",
        "_free",
        "_in_flight",
        "_loop",
        "_mask",
        "_pool",
        "_ring",
        "_room_to",
        "_slots",
        "_sqes",
        "_submitted",
        "_sweep",
        "_tail",
        "gate",
        "pool",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gate: Gate | None = None,
        pool_bytes: int = DEFAULT_POOL_BYTES,
        entries: int = ENTRIES,
        completion_entries: int = COMPLETION_ENTRIES,
        slots: int | None = None,
    ) -> None:
        self.gate = gate if gate is not None else Gate()
        self._pool = AlignedPool(pool_bytes)
        self.pool: BufferPool = self._pool
        self._loop = loop
        self._ring = Ring(entries, completion_entries)
        self._sqes = self._ring.sqes
        self._mask = self._ring.entries - 1
        # running counts of entries filled, given to the kernel, and the count at which the ring is full
        self._tail = 0
        self._submitted = 0
        self._room_to = self._ring.entries
        self._in_flight = 0
        slots = slots if slots is not None else self._ring.completion_entries
        self._slots: list[tuple[Target, int, Buffer | None]] = [_EMPTY] * slots
        self._free = list(range(slots))
        self._backlog: deque[_Request] = deque()
        self._sweep = Sweep(loop, self.gate, self.submit)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._ring.register_eventfd(self._event_fd)
        except OSError:
            self._ring.close()
            os.close(self._event_fd)
            raise
        loop.add_reader(self._event_fd, self._completed)

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
        tail = self._tail
        if tail == self._room_to or not self._free or self._backlog:
            self._backlog.append(
                (device, op, offset_bytes, length_bytes, buffer, buffer_offset, target, tag, fua)
            )
            return
        # only devices with a descriptor can be given to the kernel; others come with a submitter of their own
        fd: int = device.fd << 32  # type: ignore[attr-defined]
        if op is _WRITE:
            # the kernel knows addresses, not buffers: behind this one lies another request's
            assert buffer is not None and 0 <= buffer_offset <= len(buffer.view) - length_bytes
            address = buffer.address + buffer_offset
            fd |= OP_WRITE
            if fua:
                length_bytes |= _FUA_FLAG
        elif op is _READ:
            assert buffer is not None and 0 <= buffer_offset <= len(buffer.view) - length_bytes
            address = buffer.address + buffer_offset
            fd |= OP_READ
        elif op is _FLUSH:
            fd |= OP_FSYNC
            offset_bytes = address = 0
            length_bytes = _DATASYNC_FLAG
        elif op is _DISCARD:
            fd |= OP_FALLOCATE
            address = length_bytes
            length_bytes = PUNCH_HOLE_KEEP_SIZE
        else:
            raise ValueError(f"{op!r} is no Op")
        slot = self._free.pop()
        place = (tail & self._mask) * SQE_BYTES
        try:
            SQE.pack_into(self._sqes, place, fd, offset_bytes, address, length_bytes, slot)
        except struct.error:
            # a closed device, or numbers no disk has: let the kernel refuse it in its turn
            SQE.pack_into(self._sqes, place, OP_READ | _NO_FD if fd < 0 else _NO_OP, 0, 0, 0, slot)
        self._slots[slot] = (target, tag, buffer)
        self._tail = tail + 1

    def submit(self) -> None:
        if self._tail == self._submitted and not self._backlog:
            return
        state = self._sweep.verdict()
        if state is not GateState.OPEN:
            if state is GateState.SHUT:
                self._refuse_queued(errno.ESHUTDOWN)
            return
        while True:
            count = self._tail - self._submitted
            if count:
                self._ring.publish(self._tail)
                done = self._ring.enter(count)
                if done <= 0:
                    # the kernel is short of memory or keeps completions for us: let it breathe
                    self._sweep.submit_later(_RETRY_S)
                    return
                self._submitted += done
                self._room_to += done
                self._in_flight += done
                if done < count:
                    continue
            if not self._backlog or not self._free:
                return
            self._refill()

    def _refill(self) -> None:
        """Move requests from the backlog into ring and slots, as many as fit."""
        backlog, self._backlog = self._backlog, deque()
        while backlog and self._free and self._tail != self._room_to:
            self.queue(*backlog.popleft())
        self._backlog = backlog

    def _completed(self) -> None:
        """The eventfd woke us: one sweep."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass
        ring = self._ring
        completions = ring.completions.take()
        while ring.overflowed:
            ring.flush_overflow()
            more = ring.completions.take()
            if not more:
                break
            completions += more
        self._in_flight -= len(completions) // CQE_BYTES
        slots, free = self._slots, self._free
        for slot, result in CQE.iter_unpack(completions):
            entry = slots[slot]
            slots[slot] = _EMPTY
            free.append(slot)
            try:
                entry[0].io_done(entry[1], result)
            except Exception as error:
                self._sweep.failed(entry, error)
        self._sweep.end()
        if self._in_flight == 0 and self._sweep.awaits_drain:
            self._sweep.drained()

    def _refuse_queued(self, error: int) -> None:
        """Take back what is queued and complete it with `-error` in a later sweep."""
        refused: list[tuple[Target, int]] = []
        for count in range(self._submitted, self._tail):
            slot = SQE.unpack_from(self._sqes, (count & self._mask) * SQE_BYTES)[4]
            target, tag, _ = self._slots[slot]
            refused.append((target, tag))
            self._slots[slot] = _EMPTY
            self._free.append(slot)
        self._tail = self._submitted
        refused.extend((request[6], request[7]) for request in self._backlog)
        self._backlog.clear()
        self._sweep.refuse(refused, error)

    def _withdraw(self, target: Target) -> bool:
        """Turn the queued request of `target` into nothing; False if it is in flight."""
        for count in range(self._submitted, self._tail):
            at = (count & self._mask) * SQE_BYTES
            slot = SQE.unpack_from(self._sqes, at)[4]
            entry = self._slots[slot]
            if entry[0] is target:
                SQE.pack_into(self._sqes, at, OP_NOP, 0, 0, 0, slot)
                return True
        for request in self._backlog:
            if request[6] is target:
                self._backlog.remove(request)
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
        """Requests that are still queued complete with -ECANCELED; those in flight are awaited."""
        if self._sweep.closed:
            return
        self._sweep.close()
        self._refuse_queued(errno.ECANCELED)
        while self._in_flight or self._sweep.has_refused:
            await self.drained()
            await asyncio.sleep(0)
            self._refuse_queued(errno.ECANCELED)
        self._loop.remove_reader(self._event_fd)
        self._ring.close()
        os.close(self._event_fd)
        self._pool.close()
