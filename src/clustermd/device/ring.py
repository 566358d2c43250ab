"""io_uring without a library: system calls by ctypes, rings by mmap (io_uring(7), io_uring_setup(2)).

Two rings are shared with the kernel. The submission ring: we fill entries of 64 bytes, publish a
tail, and io_uring_enter(2) consumes them up to it. The completion ring: the kernel fills entries of 16
bytes and moves its tail, we copy what is there and publish our head. Both indices are 32-bit counters
that run freely and wrap; an entry's place is the counter masked by the ring's size, which is a power of two.

Memory order. The submission tail is read by the kernel inside the io_uring_enter of this very thread
(no SQPOLL), so program order is enough. The completion tail is stored by the kernel after its
entries; x86-64 keeps loads in order, so entries below a tail we have read are complete. A weakly ordered
machine would need a barrier that Python cannot express: `usable_here` is false there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct

_SYS_SETUP, _SYS_ENTER, _SYS_REGISTER = 425, 426, 427
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_SETUP_CQSIZE, _SETUP_SUBMIT_ALL, _SETUP_COOP_TASKRUN = 1 << 3, 1 << 7, 1 << 8
_FEAT_SINGLE_MMAP, _FEAT_NODROP, _FEAT_RW_CUR_POS = 1 << 0, 1 << 1, 1 << 3
_ENTER_GETEVENTS = 1
_REGISTER_EVENTFD = 4
_SQ_CQ_OVERFLOW = 1 << 1
_U32 = 0xFFFFFFFF

OP_NOP, OP_FSYNC, OP_FALLOCATE, OP_READ, OP_WRITE = 0, 3, 17, 22, 23
FSYNC_DATASYNC = 1
RWF_DSYNC = 2
PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

SQE_BYTES, CQE_BYTES = 64, 16

# struct io_uring_params: sq_entries cq_entries flags sq_thread_cpu sq_thread_idle features wq_fd resv[3]
# sq_off: head tail ring_mask ring_entries flags dropped array resv1 user_addr
# cq_off: head tail ring_mask ring_entries overflow cqes flags resv1 user_addr
_PARAMS = struct.Struct("<7I12x 7I4xQ 7I4xQ")

# struct io_uring_sqe, first 40 bytes: (opcode | fd << 32), offset, address, (length | flags << 32), user_data
SQE = struct.Struct("<QQQQQ")
# struct io_uring_cqe: user_data, result (flags are not used)
CQE = struct.Struct("<Qi4x")

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long] * 7
_syscall.restype = ctypes.c_long


def usable_here() -> bool:
    """Whether this machine's memory order lets Python read a completion ring."""
    return platform.machine() in ("x86_64", "AMD64")


class CompletionRing:
    """Our end of a completion ring in `memory` (bytes). Offsets are those the kernel gave.

    `start` is where both counters stand, for tests; the kernel's start at 0.
    """

    __slots__ = ("_entries", "_entries_at", "_head", "_head_at", "_index", "_mask", "_memory", "_tail_at")

    def __init__(
        self, memory: memoryview, head_at: int, tail_at: int, entries_at: int, entries: int, start: int = 0
    ) -> None:
        self._memory = memory
        self._index = memory.cast("I")
        self._head_at = head_at // 4
        self._tail_at = tail_at // 4
        self._entries_at = entries_at
        self._entries = entries
        self._mask = entries - 1
        self._head = start

    def take(self) -> bytes:
        """All entries that are there, copied, oldest first; their places are the kernel's again."""
        tail = self._index[self._tail_at]
        head = self._head
        count = (tail - head) & _U32
        if not count:
            return b""
        first = head & self._mask
        start = self._entries_at + first * CQE_BYTES
        if first + count <= self._entries:
            taken = self._memory[start : start + count * CQE_BYTES].tobytes()
        else:
            end = self._entries_at + self._entries * CQE_BYTES
            rest = (first + count - self._entries) * CQE_BYTES
            taken = self._memory[start:end].tobytes()
            taken += self._memory[self._entries_at : self._entries_at + rest].tobytes()
        self._head = tail
        self._index[self._head_at] = tail
        return taken

    def release(self) -> None:
        self._index.release()
        self._memory.release()


class Ring:
    """One io_uring instance with its rings mapped. Raises OSError where the kernel refuses it.

    `sqes` is the table of submission entries (`entries` of 64 bytes, all zero), `completions` the
    completion ring of `completion_entries`. The caller fills entry `n & (entries - 1)` for its n-th request
    and enters.
    """

    __slots__ = (
        "_flags_at",
        "_index",
        "_maps",
        "_tail_at",
        "completion_entries",
        "completions",
        "entries",
        "fd",
        "sqes",
    )

    def __init__(self, entries: int, completion_entries: int) -> None:
        self.fd, params = _set_up(entries, completion_entries)
        try:
            self._map(params)
        except BaseException:
            os.close(self.fd)
            raise

    def _map(self, params: bytes) -> None:
        fields = _PARAMS.unpack(params)
        self.entries, self.completion_entries, features = fields[0], fields[1], fields[5]
        needed = _FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_RW_CUR_POS
        if features & needed != needed:
            raise OSError(errno.ENOSYS, "this kernel's io_uring is older than 5.6")
        _, sq_tail, _, _, sq_flags, _, sq_array, _ = fields[7:15]
        cq_head, cq_tail, _, _, _, cqes, _, _ = fields[15:23]
        ring_bytes = max(sq_array + self.entries * 4, cqes + self.completion_entries * CQE_BYTES)
        kind = mmap.MAP_SHARED | mmap.MAP_POPULATE
        rings = mmap.mmap(self.fd, ring_bytes, kind, offset=_OFF_SQ_RING)
        sqes = mmap.mmap(self.fd, self.entries * SQE_BYTES, kind, offset=_OFF_SQES)
        self._maps = (rings, sqes)
        self.sqes = memoryview(sqes)
        # cast("I") wants a length that is a multiple of four
        memory = memoryview(rings)[: ring_bytes & ~3]
        self._index = memory.cast("I")
        self._tail_at = sq_tail // 4
        self._flags_at = sq_flags // 4
        for place in range(self.entries):
            self._index[sq_array // 4 + place] = place
        self.completions = CompletionRing(memory, cq_head, cq_tail, cqes, self.completion_entries)

    def register_eventfd(self, event_fd: int) -> None:
        """Have the kernel signal `event_fd` after completions."""
        number = ctypes.c_int(event_fd)
        if _syscall(_SYS_REGISTER, self.fd, _REGISTER_EVENTFD, ctypes.addressof(number), 1, 0, 0) < 0:
            raise _last_error("io_uring_register")

    def publish(self, tail: int) -> None:
        """Entries below the running count `tail` are filled."""
        self._index[self._tail_at] = tail & _U32

    def enter(self, count: int) -> int:
        """Submit `count` published entries; how many were consumed, or -EAGAIN / -EBUSY to try later."""
        while True:
            done: int = _syscall(_SYS_ENTER, self.fd, count, 0, 0, 0, 0)
            if done >= 0:
                return done
            error = ctypes.get_errno()
            if error in (errno.EAGAIN, errno.EBUSY):
                return -error
            if error != errno.EINTR:
                raise OSError(error, f"io_uring_enter: {os.strerror(error)}")

    @property
    def overflowed(self) -> bool:
        """The kernel keeps completions that found no place in the ring."""
        return bool(self._index[self._flags_at] & _SQ_CQ_OVERFLOW)

    def flush_overflow(self) -> None:
        """Let the kernel move kept completions into the ring."""
        if _syscall(_SYS_ENTER, self.fd, 0, 0, _ENTER_GETEVENTS, 0, 0) < 0:
            error = ctypes.get_errno()
            if error not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise OSError(error, f"io_uring_enter: {os.strerror(error)}")

    def close(self) -> None:
        """Unmap and close. Requests must have completed."""
        self.completions.release()
        self._index.release()
        self.sqes.release()
        for mapped in self._maps:
            mapped.close()
        os.close(self.fd)


def _set_up(entries: int, completion_entries: int) -> tuple[int, bytes]:
    params = ctypes.create_string_buffer(_PARAMS.size)
    # newest flags first: 5.19 knows both, 5.18 SUBMIT_ALL, older ones neither
    for flags in (_SETUP_SUBMIT_ALL | _SETUP_COOP_TASKRUN, _SETUP_SUBMIT_ALL, 0):
        struct.pack_into("<III", params, 0, 0, completion_entries, flags | _SETUP_CQSIZE)
        fd: int = _syscall(_SYS_SETUP, entries, ctypes.addressof(params), 0, 0, 0, 0)
        if fd >= 0:
            return fd, params.raw
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise _last_error("io_uring_setup")


def _last_error(call: str) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, f"{call}: {os.strerror(error)}")
