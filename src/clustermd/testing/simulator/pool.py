"""Buffers of a simulated array process. Their content survives a release, as in real memory: who reads a buffer that
was given back sees what the next owner writes, and the model tells."""

from __future__ import annotations


class SimBuffer:
    """Memory of the pool; its content survives a release, as real memory does."""

    __slots__ = ("_pool", "_size", "_taken", "address", "view")

    def __init__(self, pool: SimPool, size: int) -> None:
        self._pool = pool
        self._size = size
        self._taken = True
        self.view = memoryview(bytearray(size))
        self.address = 0

    def release(self) -> None:
        if not self._taken:
            raise RuntimeError("a buffer was released twice")
        self._taken = False
        self._pool.put(self, self._size)


class SimPool:
    """Buffers in free lists by size. `out` counts those that are taken."""

    def __init__(self) -> None:
        self._free: dict[int, list[SimBuffer]] = {}
        self.out = 0

    def take(self, length_bytes: int) -> SimBuffer:
        size = -(-length_bytes // 4096) * 4096
        self.out += 1
        free = self._free.get(size)
        if free:
            buffer = free.pop()
            buffer._taken = True
            return buffer
        return SimBuffer(self, size)

    def put(self, buffer: SimBuffer, size: int) -> None:
        self.out -= 1
        self._free.setdefault(size, []).append(buffer)
