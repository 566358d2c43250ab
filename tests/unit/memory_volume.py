"""A volume in memory, for tests of whatever serves or drives one; also a program that serves it over NBD.

`MemoryVolume` answers within `submit`, or after a delay, in order or shuffled; it can be held, made to
fail, and it counts what it was asked and which buffers are out. As a program it prints "ready" when it
listens and ends with SIGTERM:

    python memory_volume.py --socket /tmp/x.sock --size 64M [--delay-s 0.001] [--shuffle] [--read-only]
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import mmap
import random
import signal
from collections import Counter
from collections.abc import Callable

from clustermd.array.request import Kind, Request
from clustermd.device.member_device import Buffer, BufferPool

PAGE_BYTES = 4096


class MemoryBuffer:
    """One mapping, whole pages."""

    __slots__ = ("_pool", "address", "out", "view")

    def __init__(self, pool: MemoryPool, length_bytes: int) -> None:
        self._pool = pool
        self.view = memoryview(mmap.mmap(-1, length_bytes))
        self.address = 0
        self.out = True

    def release(self) -> None:
        assert self.out, "a buffer was released twice"
        self.out = False
        self._pool.put(self)


class MemoryPool:
    """Free lists by size. `out` is how many buffers are taken, `peak_bytes` the most that ever were."""

    def __init__(self) -> None:
        self._free: dict[int, list[MemoryBuffer]] = {}
        self.out = 0
        self.out_bytes = 0
        self.peak_bytes = 0
        self.limit_bytes: int | None = None

    def take(self, length_bytes: int) -> Buffer:
        size_bytes = (length_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
        if self.limit_bytes is not None and self.out_bytes + size_bytes > self.limit_bytes:
            raise MemoryError("the pool is exhausted on purpose")
        self.out += 1
        self.out_bytes += size_bytes
        if self.out_bytes > self.peak_bytes:
            self.peak_bytes = self.out_bytes
        free = self._free.get(size_bytes)
        if free:
            buffer = free.pop()
            buffer.out = True
            return buffer
        return MemoryBuffer(self, size_bytes)

    def put(self, buffer: MemoryBuffer) -> None:
        size_bytes = len(buffer.view)
        self.out -= 1
        self.out_bytes -= size_bytes
        self._free.setdefault(size_bytes, []).append(buffer)


class MemoryVolume:
    """A `Volume` over a bytearray.

    `delay_s` None answers within `submit`; 0 in the next turn of the loop. `shuffle` answers what waits in a
    random order. `fail` may return an errno for a request. While `held` is True nothing is answered;
    `release_held()` ends that.
    """

    def __init__(
        self,
        size_bytes: int,
        name: str = "md0",
        read_only: bool = False,
        delay_s: float | None = None,
        shuffle: random.Random | None = None,
    ) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.read_only = read_only
        self.block_bytes = 512
        self.delay_s = delay_s
        self.shuffle = shuffle
        self.fail: Callable[[Request], int] = lambda request: 0
        self.held = False
        self.memory_pool = MemoryPool()
        self.pool: BufferPool = self.memory_pool
        self.data = bytearray(size_bytes)
        self.view = memoryview(self.data)
        self.batches: list[int] = []
        self.keep_batches = False
        self.count: Counter[Kind] = Counter()
        self.fua_count = 0
        self.no_hole_count = 0
        self.largest_bytes = 0
        self._waiting: list[Request] = []

    def submit(self, batch: list[Request]) -> None:
        if self.delay_s is None and not self.held:
            for request in batch:
                self._answer(request)
            return
        self._waiting += batch
        if self.held:
            return
        loop = asyncio.get_running_loop()
        if self.delay_s:
            loop.call_later(self.delay_s, self._sweep)
        else:
            loop.call_soon(self._sweep)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def release_held(self) -> None:
        self.held = False
        self._sweep()

    def _sweep(self) -> None:
        if self.held:
            return
        waiting, self._waiting = self._waiting, []
        if self.shuffle is not None:
            # Overlapping writes keep their order, as in an array (rule 18): shuffle only what is safe.
            writes = [
                request for request in waiting if request.kind in (Kind.WRITE, Kind.TRIM, Kind.WRITE_ZEROES)
            ]
            others = [request for request in waiting if request not in writes]
            self.shuffle.shuffle(others)
            waiting = others[: len(others) // 2] + writes + others[len(others) // 2 :]
        for request in waiting:
            self._answer(request)

    def _answer(self, request: Request) -> None:
        error = self.fail(request)
        request.error = error
        kind = request.kind
        if not error:
            start = request.offset_bytes
            length = request.length_bytes
            if request.buffer is not None:
                if kind is Kind.READ:
                    request.buffer.view[:length] = self.view[start : start + length]
                else:
                    self.view[start : start + length] = request.buffer.view[:length]
            elif length:
                self.view[start : start + length] = bytes(length)
        request.owner.completed(request)


class CountingVolume(MemoryVolume):
    """Counts and checks what it is asked; too slow for a benchmark."""

    def submit(self, batch: list[Request]) -> None:
        assert batch
        self.batches.append(len(batch))
        for request in batch:
            self.count[request.kind] += 1
            self.fua_count += request.fua
            self.no_hole_count += request.no_hole
            self.largest_bytes = max(self.largest_bytes, request.length_bytes)
            assert not (request.offset_bytes | request.length_bytes) % 512
            assert request.offset_bytes + request.length_bytes <= self.size_bytes
            assert request.kind is Kind.FLUSH or request.length_bytes
            assert (request.buffer is not None) == (request.kind in (Kind.READ, Kind.WRITE))
        super().submit(batch)


def size(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1].upper(), 0)
    return int(text[:-1]) * unit if unit else int(text)


async def serve(options: argparse.Namespace) -> None:
    from clustermd.export.nbd import NbdServer

    volume = MemoryVolume(
        size(options.size),
        name=options.name,
        read_only=options.read_only,
        delay_s=options.delay_s,
        shuffle=random.Random(1) if options.shuffle else None,
    )
    if options.bad:
        start, _, end = options.bad.partition("-")
        bad = range(size(start), size(end))
        volume.fail = lambda request: (
            errno.EIO
            if request.kind is not Kind.FLUSH
            and (request.offset_bytes < bad.stop and request.offset_bytes + request.length_bytes > bad.start)
            else 0
        )
    server = NbdServer(volume, options.socket)
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    print("ready", flush=True)
    await stop.wait()
    await server.stop(force=True)
    assert volume.memory_pool.out == 0, "buffers were lost"


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve memory over NBD, for tests.")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--size", default="64M")
    parser.add_argument("--name", default="md0")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--delay-s", type=float)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--bad", help="START-END: every request that touches these bytes fails with EIO")
    options = parser.parse_args()
    gc.freeze()
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
