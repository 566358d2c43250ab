"""Durable means that the medium was told: an NBD server below the disk logs each flush it is asked for (rule 15)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from device_nbd_disk import loop_over, nbd_file

from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.member_device import Op, Submitter
from clustermd.device.submitter import make_submitter

pytestmark = [pytest.mark.system, pytest.mark.needs("root", "loop", "fuse", "nbdkit", "nbdfuse")]


@dataclass
class Logged:
    """A loop device, over nbdfuse, over nbdkit, which logs what it is asked to do."""

    path: str
    log: Path

    def flushes(self) -> int:
        return sum(" Flush " in line for line in self.log.read_text().splitlines())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Logged]:
    log = tmp_path / "log"
    with nbd_file(tmp_path, "--filter=log", f"logfile={log}") as (file, _), loop_over(file) as loop:
        yield Logged(loop, log)


@pytest.mark.parametrize("how", ["uring", "threads"])
def test_fua_and_flush_reach_the_medium_before_they_complete(
    disk: Logged, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTERMD_IO", how)

    async def story(device: DirectDevice, submitter: Submitter) -> None:
        buffer = submitter.pool.take(4096)
        before = disk.flushes()
        assert await submitter.run(device, Op.WRITE, 0, 4096, buffer) == 4096
        assert disk.flushes() == before
        assert await submitter.run(device, Op.WRITE, 4096, 4096, buffer, fua=True) == 4096
        after_fua = disk.flushes()
        assert after_fua > before
        assert await submitter.run(device, Op.WRITE, 8192, 4096, buffer) == 4096
        assert await submitter.run(device, Op.FLUSH, 0, 0) == 0
        assert disk.flushes() > after_fua

    async def told() -> None:
        device = open_member(disk.path, clustered=True)
        submitter = make_submitter(pool_bytes=16 << 20)
        try:
            await story(device, submitter)
        finally:
            # an open device would keep the disk from being taken down
            await submitter.close()
            device.close()

    asyncio.run(asyncio.wait_for(told(), 20))
