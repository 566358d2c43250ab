"""Whole reads and writes: complete or an error with the device's errno."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.helpers import read_bytes, write_bytes
from clustermd.device.member_device import Buffer, MemberDevice, Op, Submitter
from clustermd.device.submitter import make_submitter

T = TypeVar("T")
SIZE_BYTES = 12 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    image = tmp_path / "member.img"
    with open(image, "wb") as file:
        file.truncate(SIZE_BYTES)
    return str(image)


def with_device(path: str, story: Callable[[Submitter, DirectDevice], Awaitable[T]]) -> T:
    async def whole() -> T:
        device = open_member(path)
        submitter = make_submitter(pool_bytes=16 << 20)
        try:
            return await story(submitter, device)
        finally:
            await submitter.close()
            device.close()

    return asyncio.run(whole())


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 4096), (4096, 9 << 20), (0, 0)])
def test_what_is_written_is_read(path: str, offset: int, length: int) -> None:
    data = os.urandom(length)

    async def story(submitter: Submitter, device: DirectDevice) -> bytes:
        await write_bytes(submitter, device, offset, data)
        return await read_bytes(submitter, device, offset, length)

    assert with_device(path, story) == data
    content = Path(path).read_bytes()
    assert content == bytes(offset) + data + bytes(SIZE_BYTES - offset - length)


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 100), (-512, 512), (512, 513)])
def test_parts_of_blocks_are_refused_before_anything_is_written(path: str, offset: int, length: int) -> None:
    async def story(submitter: Submitter, device: DirectDevice) -> None:
        with pytest.raises(ValueError, match="whole blocks of 512"):
            await write_bytes(submitter, device, offset, b"x" * length)
        with pytest.raises(ValueError, match="whole blocks of 512"):
            await read_bytes(submitter, device, offset, length)

    with_device(path, story)
    assert Path(path).read_bytes() == bytes(SIZE_BYTES)


def test_a_device_that_ends_early_is_an_io_error(path: str) -> None:
    async def story(submitter: Submitter, device: DirectDevice) -> None:
        with pytest.raises(OSError, match="ends early") as raised:
            await read_bytes(submitter, device, SIZE_BYTES - 512, 1024)
        assert raised.value.errno == errno.EIO

    with_device(path, story)


def test_the_devices_error_is_raised(path: str) -> None:
    async def story(submitter: Submitter, device: DirectDevice) -> None:
        reader = open_member(path, read_only=True)
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            await write_bytes(submitter, reader, 0, bytes(512))
        assert raised.value.errno == errno.EBADF and raised.value.filename == path
        reader.close()

    with_device(path, story)


def test_short_transfers_are_continued_at_a_block(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(8192)

    async def story(submitter: Submitter, device: DirectDevice) -> bytes:
        whole = type(submitter).run

        async def short(
            self: Submitter,
            device: MemberDevice,
            op: Op,
            offset_bytes: int,
            length_bytes: int,
            buffer: Buffer | None = None,
            buffer_offset: int = 0,
            fua: bool = False,
        ) -> int:
            part = min(length_bytes, 1536)
            result = await whole(self, device, op, offset_bytes, part, buffer, buffer_offset, fua)
            # as if the last sector had come only in part
            return result - 100 if part == 1536 else result

        monkeypatch.setattr(type(submitter), "run", short)
        await write_bytes(submitter, device, 512, data)
        return await read_bytes(submitter, device, 512, 8192)

    assert with_device(path, story) == data
    assert Path(path).read_bytes()[512 : 512 + 8192] == data
