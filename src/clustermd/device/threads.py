"""The submitter over a pool of threads, for places where io_uring is refused (containers, old kernels).

Same contract, same order of calls: `queue` remembers, `submit` passes the gate and hands the batch to
the threads, an eventfd wakes the loop, one sweep answers all that is done. Only the plain system calls
run in the threads; everything else stays on the loop's thread.

Behind a disk that hangs, a request can wait for a thread as long as it likes after it has passed the gate. So a thread
looks at the lease once more, right before its system call, and hands back what came too late.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from clustermd.device.buffers import DEFAULT_POOL_BYTES, AlignedPool
from clustermd.device.member_device import Buffer, BufferPool, Gate, GateState, MemberDevice, Op, Target
from clustermd.device.ring import PUNCH_HOLE_KEEP_SIZE
from clustermd.device.sweep import Sweep, run_one

THREADS = 16

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_Request = tuple[MemberDevice, Op, int, int, Buffer | None, int, Target, int, bool]


class ThreadSubmitter:
    """`Submitter` over `threads` threads: so many requests can be in the kernel at once."""

    __slots__ = (
        "_done",
        "_event_fd",
        "_in_flight",
        "_loop",
        "_pool",
        "_queued",
        "_sweep",
        "_threads",
        "_work",
        "gate",
        "pool",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gate: Gate | None = None,
        pool_bytes: int = DEFAULT_POOL_BYTES,
        threads: int = THREADS,
    ) -> None:
        self.gate = gate if gate is not None else Gate()
        self._pool = AlignedPool(pool_bytes)
        self.pool: BufferPool = self._pool
        self._loop = loop
        self._queued: list[_Request] = []
        self._work: SimpleQueue[_Request | None] = SimpleQueue()
        self._done: deque[tuple[_Request, int | None]] = deque()
        self._in_flight = 0
        self._sweep = Sweep(loop, self.gate, self.submit)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.add_reader(self._event_fd, self._completed)
        # daemon: a disk that never answers must not keep the process from ending
        self._threads = [
            threading.Thread(target=self._serve, name=f"member-io-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

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
        self._queued.append((device, op, offset_bytes, length_bytes, buffer, buffer_offset, target, tag, fua))

    def submit(self) -> None:
        if not self._queued:
            return
        state = self._sweep.verdict()
        if state is GateState.SHUT:
            self._refuse_queued(errno.ESHUTDOWN)
        elif state is GateState.OPEN:
            batch, self._queued = self._queued, []
            self._in_flight += len(batch)
            for request in batch:
                self._work.put(request)

    def _serve(self) -> None:
        """One thread: take a request, make its system call, put the result down, wake the loop.

        None for a result: the lease was over, nothing was done.
        """
        while (request := self._work.get()) is not None:
            lease = self.gate.lease
            late = lease is not None and not lease.valid()
            self._done.append((request, None if late else _perform(request)))
            os.eventfd_write(self._event_fd, 1)

    def _completed(self) -> None:
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass
        completions: list[tuple[Target, int, int]] = []
        again: list[_Request] = []
        while self._done:
            request, result = self._done.popleft()
            self._in_flight -= 1
            if result is None:
                again.append(request)
            else:
                completions.append((request[6], request[7], result))
        self._queued[:0] = again
        self._sweep.deliver(completions)
        if self._in_flight == 0 and self._sweep.awaits_drain:
            self._sweep.drained()

    def _refuse_queued(self, error: int) -> None:
        """Complete what is queued with `-error` in a later sweep."""
        queued, self._queued = self._queued, []
        self._sweep.refuse([(request[6], request[7]) for request in queued], error)

    def _withdraw(self, target: Target) -> bool:
        """Drop the queued request of `target`; False if it is in flight."""
        for place, request in enumerate(self._queued):
            if request[6] is target:
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
        """Requests that are still queued complete with -ECANCELED; those in flight are awaited."""
        if self._sweep.closed:
            return
        self._sweep.close()
        self._refuse_queued(errno.ECANCELED)
        while self._in_flight or self._sweep.has_refused:
            await self.drained()
            await asyncio.sleep(0)
            self._refuse_queued(errno.ECANCELED)
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._loop.remove_reader(self._event_fd)
        os.close(self._event_fd)
        self._pool.close()


def _perform(request: _Request) -> int:
    """The system call of one request; bytes moved or -errno."""
    device, op, offset_bytes, length_bytes, buffer, buffer_offset, _, _, fua = request
    # only devices with a descriptor can be given to the kernel; others come with a submitter of their own
    fd: int = device.fd  # type: ignore[attr-defined]
    try:
        if op is Op.READ and buffer is not None:
            return os.preadv(fd, [buffer.view[buffer_offset : buffer_offset + length_bytes]], offset_bytes)
        if op is Op.WRITE and buffer is not None:
            data = buffer.view[buffer_offset : buffer_offset + length_bytes]
            return os.pwritev(fd, [data], offset_bytes, os.RWF_DSYNC if fua else 0)
        if op is Op.FLUSH:
            os.fdatasync(fd)
            return 0
        if op is Op.DISCARD:
            if _fallocate(fd, PUNCH_HOLE_KEEP_SIZE, offset_bytes, length_bytes) == 0:
                return 0
            return -ctypes.get_errno()
    except OSError as error:
        return -(error.errno or errno.EIO)
    except (ValueError, OverflowError):
        return -errno.EBADF if fd < 0 else -errno.EINVAL
    return -errno.EINVAL
