"""How fast one process mirrors 4 KiB requests onto two RAM files through the device floor.

    .venv/bin/python benchmarks/device.py [--seconds 2] [--directory /dev/shm]

Prints, for io_uring and for threads, mirrored writes/s (one write is two requests, one on each file) and
reads/s at depth 1, 16 and 32, and how many seconds of processor time one second of it took.
Nothing is above the device floor here: this bounds what any array can reach.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.member_device import Buffer, Op, Submitter
from clustermd.device.submitter import VARIABLE, make_submitter

BLOCK_BYTES = 4096
FILE_BYTES = 256 << 20


class Load:
    """`depth` requests in flight; each that completes starts the next at a random place."""

    def __init__(self, submitter: Submitter, devices: list[DirectDevice], write: bool, depth: int) -> None:
        self.submitter = submitter
        self.devices = devices
        self.write = write
        self.missing = [0] * depth
        self.buffers: list[Buffer] = [submitter.pool.take(BLOCK_BYTES) for _ in range(depth)]
        self.completed = 0
        self.going = True
        # places are drawn before the clock starts: the load is not what is measured
        blocks = FILE_BYTES // BLOCK_BYTES
        drawn = random.Random(1)
        self.places = [drawn.randrange(blocks) * BLOCK_BYTES for _ in range(1 << 16)]
        self.turn = 0

    def start(self, tag: int) -> None:
        self.turn = (self.turn + 1) & 0xFFFF
        offset = self.places[self.turn]
        queue = self.submitter.queue
        buffer = self.buffers[tag]
        if self.write:
            self.missing[tag] = len(self.devices)
            for device in self.devices:
                queue(device, Op.WRITE, offset, BLOCK_BYTES, buffer, 0, self, tag)
        else:
            self.missing[tag] = 1
            queue(self.devices[self.turn & 1], Op.READ, offset, BLOCK_BYTES, buffer, 0, self, tag)

    def io_done(self, tag: int, result: int) -> None:
        if result != BLOCK_BYTES:
            raise OSError(-result, os.strerror(-result))
        self.missing[tag] -= 1
        if not self.missing[tag]:
            self.completed += 1
            if self.going:
                self.start(tag)


@contextmanager
def mirror(directory: str) -> Iterator[list[DirectDevice]]:
    """Two files of `FILE_BYTES`, written once so that no block is a hole."""
    devices = []
    with tempfile.TemporaryDirectory(dir=directory) as place:
        for name in ("a", "b"):
            path = os.path.join(place, name)
            with open(path, "wb") as file:
                for _ in range(FILE_BYTES >> 20):
                    file.write(bytes(1 << 20))
            devices.append(open_member(path))
        try:
            yield devices
        finally:
            for device in devices:
                device.close()


async def measure(
    devices: list[DirectDevice], write: bool, depth: int, seconds: float
) -> tuple[str, float, float]:
    """Kind of submitter, requests a second, processor seconds a second."""
    submitter = make_submitter()
    load = Load(submitter, devices, write, depth)
    for tag in range(depth):
        load.start(tag)
    before, used = time.perf_counter(), _processor_s()
    submitter.submit()
    await asyncio.sleep(seconds)
    elapsed, used = time.perf_counter() - before, _processor_s() - used
    completed = load.completed
    load.going = False
    kind = type(submitter).__name__
    await submitter.close()
    return kind, completed / elapsed, used / elapsed


def _processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--directory", default="/dev/shm")
    arguments = parser.parse_args()
    print(f"{'through':16} {'what':16} {'depth':>5} {'per second':>11} {'processors':>10}")
    with mirror(arguments.directory) as devices:
        for choice in ("auto", "threads"):
            os.environ[VARIABLE] = choice
            for write in (True, False):
                for depth in (1, 16, 32):
                    kind, rate, used = asyncio.run(measure(devices, write, depth, arguments.seconds))
                    what = "mirrored write" if write else "read"
                    print(f"{kind:16} {what:16} {depth:5} {rate:11,.0f} {used:10.2f}")


if __name__ == "__main__":
    main()
