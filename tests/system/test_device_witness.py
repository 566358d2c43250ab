"""A killed process's last request can land seconds after its death: the witness lock lasts until then.

The medium is slow on purpose: nbdkit delays each write, nbdfuse makes a file of it, a loop device a disk
of that. A child process writes to it through an open member and is killed with SIGKILL while the write is
under way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from device_nbd_disk import loop_over, nbd_file

from clustermd.device.direct import identity
from clustermd.device.witness import WITNESS_BASE, probe

pytestmark = [pytest.mark.system]

DELAY_S = 2.0
NODE_BYTE = WITNESS_BASE + 7
WRITTEN = b"late" * 1024

WRITER = """
import asyncio, sys
from clustermd.device.direct import open_member
from clustermd.device.member_device import Op
from clustermd.device.submitter import make_submitter
from clustermd.device.witness import WITNESS_BASE, hold

class Nobody:
    def io_done(self, tag, result):
        print("completed", result, flush=True)

async def main():
    device = open_member(sys.argv[1], clustered=True)
    submitter = make_submitter()
    assert hold(device.fd, WITNESS_BASE + 7)
    buffer = submitter.pool.take(4096)
    buffer.view[:4096] = b"late" * 1024
    submitter.queue(device, Op.WRITE, 65536, 4096, buffer, 0, Nobody(), 0, True)
    submitter.submit()
    print("submitted", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@dataclass
class Slow:
    """`path` is what members open; `landed()` looks at the medium itself, without the delay."""

    path: str
    backing: Path

    def landed(self) -> bool:
        with open(self.backing, "rb") as medium:
            medium.seek(65536)
            return medium.read(4096) == WRITTEN


@pytest.fixture
def slow_file(tmp_path: Path) -> Iterator[Slow]:
    """A regular file, by FUSE, whose writes take DELAY_S."""
    with nbd_file(tmp_path, "--filter=delay", f"wdelay={DELAY_S:.0f}") as (file, backing):
        yield Slow(file, backing)


@pytest.fixture
def slow_disk(slow_file: Slow) -> Iterator[Slow]:
    """A loop device over that file: a block device whose direct writes take DELAY_S."""
    with loop_over(slow_file.path) as loop:
        yield Slow(loop, slow_file.backing)


def _kill_while_writing(slow: Slow, how: str) -> float:
    """Seconds from the kill until the witness says that the last write has landed."""
    who = identity(slow.path)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, slow.path],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"CLUSTERMD_IO": how},
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "submitted\n"
        # the write is under way when the slow medium has it, a moment later
        time.sleep(0.3)
        assert not probe(slow.path, *who, NODE_BYTE)
        assert probe(slow.path, *who, NODE_BYTE + 1)
        os.kill(writer.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert not slow.landed()
        # nothing may say "landed" before the medium has it
        while not probe(slow.path, *who, NODE_BYTE):
            time.sleep(0.005)
            assert time.monotonic() < killed + 15
        took = time.monotonic() - killed
        assert slow.landed()
        return took
    finally:
        writer.kill()
        writer.wait(20)
        assert writer.stdout is not None
        writer.stdout.close()


@pytest.mark.needs("root", "loop", "fuse", "nbdkit", "nbdfuse")
@pytest.mark.parametrize("how", ["uring", "threads"])
def test_witness_of_a_disk_lasts_until_the_killed_writers_request_has_landed(
    slow_disk: Slow, how: str
) -> None:
    took = _kill_while_writing(slow_disk, how)
    print(f"witness free {took:.2f} s after SIGKILL")
    assert took > DELAY_S / 2


@pytest.mark.needs("root", "fuse", "nbdkit", "nbdfuse")
@pytest.mark.parametrize("how", ["uring", "threads"])
def test_witness_of_a_file_lasts_until_the_killed_writers_request_has_landed(
    slow_file: Slow, how: str
) -> None:
    took = _kill_while_writing(slow_file, how)
    print(f"witness free {took:.2f} s after SIGKILL")
    assert took > DELAY_S / 2
