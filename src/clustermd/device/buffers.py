"""Aligned buffers for direct I/O, taken and given back without a system call.

Direct I/O wants memory that starts at a page and does not move. The pool cuts anonymous mappings
("arenas") into buffers of one size each: powers of two from 4 KiB to 32 MiB. A free buffer waits in the
list of its size, so taking one is a list pop and giving it back an append. The kernel writes into these
pages while requests are in flight; a fork must not make them copy-on-write underneath it, so arenas are
not inherited by children (MADV_DONTFORK: a forked child that does not exec has no pool).

The total is bounded. At the bound, arenas of other sizes in which nothing is taken are unmapped first;
only then is a request for memory refused.
"""

from __future__ import annotations

import ctypes
import mmap

from clustermd.errors import Refused

ALIGNMENT_BYTES = 4096
LARGEST_BYTES = 32 << 20
DEFAULT_POOL_BYTES = 1 << 30
_ARENA_BYTES = 1 << 20
_CLASSES = (LARGEST_BYTES // ALIGNMENT_BYTES).bit_length()


class PoolExhausted(Refused):
    """The pool's bound is reached and nothing in it is free; try again after a completion."""


class PooledBuffer:
    """A `Buffer` of the pool. `view` is all of it (its size class, not the length asked for)."""

    __slots__ = ("_arena", "_home", "_taken", "address", "view")

    def __init__(self, view: memoryview, address: int, home: list[PooledBuffer], arena: _Arena) -> None:
        self.view = view
        self.address = address
        self._home = home
        self._arena = arena
        self._taken = False

    def release(self) -> None:
        """Give it back. Raises RuntimeError the second time: a buffer with two owners corrupts data."""
        if not self._taken:
            raise RuntimeError(f"the buffer at {self.address:#x} was released twice")
        self._taken = False
        self._home.append(self)


class _Arena:
    """One mapping, cut into `count` buffers."""

    __slots__ = ("address", "count", "size_bytes", "view")

    def __init__(self, size_bytes: int, count: int) -> None:
        memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)
        self.size_bytes = size_bytes
        self.count = count
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))


class AlignedPool:
    """The `BufferPool` of a submitter: at most `limit_bytes` of mapped memory."""

    __slots__ = ("_free", "limit_bytes", "mapped_bytes")

    def __init__(self, limit_bytes: int = DEFAULT_POOL_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.mapped_bytes = 0
        self._free: list[list[PooledBuffer]] = [[] for _ in range(_CLASSES)]

    def take(self, length_bytes: int) -> PooledBuffer:
        """A buffer of at least `length_bytes` (1 to 32 MiB), aligned to 4096; content undefined.

        Raises PoolExhausted at the pool's bound, ValueError for a length outside the limits.
        """
        if length_bytes < 1:
            raise ValueError(f"a buffer of {length_bytes} bytes: the least is 1")
        try:
            buffer = self._free[((length_bytes - 1) >> 12).bit_length()].pop()
        except IndexError:
            buffer = self._grow(length_bytes)
        buffer._taken = True
        return buffer

    def close(self) -> None:
        """Forget all free buffers. Memory of buffers still taken lives until they are dropped."""
        for free in self._free:
            free.clear()
        self.mapped_bytes = 0

    def _grow(self, length_bytes: int) -> PooledBuffer:
        index = ((length_bytes - 1) >> 12).bit_length()
        if index >= _CLASSES:
            raise ValueError(f"a buffer of {length_bytes} bytes: the most is {LARGEST_BYTES}")
        size_bytes = ALIGNMENT_BYTES << index
        arena_bytes = max(size_bytes, min(_ARENA_BYTES, size_bytes * 64))
        if self.mapped_bytes + arena_bytes > self.limit_bytes:
            self._unmap_idle(index, self.mapped_bytes + arena_bytes - self.limit_bytes)
        if self.mapped_bytes + arena_bytes > self.limit_bytes:
            arena_bytes = size_bytes
        if self.mapped_bytes + arena_bytes > self.limit_bytes:
            raise PoolExhausted(
                "buffers-exhausted",
                f"no I/O buffer of {size_bytes} bytes is left: {self.mapped_bytes} of {self.limit_bytes} "
                "bytes are mapped and in use; the request can be repeated when others have completed",
                size_bytes=size_bytes,
                limit_bytes=self.limit_bytes,
            )
        arena = _Arena(arena_bytes, arena_bytes // size_bytes)
        self.mapped_bytes += arena_bytes
        home = self._free[index]
        home.extend(
            PooledBuffer(arena.view[at : at + size_bytes], arena.address + at, home, arena)
            for at in range(arena_bytes - size_bytes, -1, -size_bytes)
        )
        return home.pop()

    def _unmap_idle(self, keep_index: int, wanted_bytes: int) -> None:
        """Unmap arenas of other sizes in which every buffer is free, until `wanted_bytes` are back."""
        for index, free in enumerate(self._free):
            if index == keep_index or wanted_bytes <= 0:
                continue
            free_in: dict[int, int] = {}
            for buffer in free:
                free_in[id(buffer._arena)] = free_in.get(id(buffer._arena), 0) + 1
            idle: set[int] = set()
            for buffer in free:
                arena = buffer._arena
                if wanted_bytes > 0 and id(arena) not in idle and free_in[id(arena)] == arena.count:
                    idle.add(id(arena))
                    wanted_bytes -= arena.size_bytes
                    self.mapped_bytes -= arena.size_bytes
            free[:] = [buffer for buffer in free if id(buffer._arena) not in idle]
