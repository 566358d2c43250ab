"""Whole reads and writes for superblocks and bitmaps: not the hot path, nothing short, errors raised."""

from __future__ import annotations

import errno
import os

from clustermd.device.member_device import MemberDevice, Op, Submitter

_STEP_BYTES = 4 << 20


async def read_bytes(submitter: Submitter, device: MemberDevice, offset_bytes: int, length: int) -> bytes:
    """Exactly `length` bytes at `offset_bytes`, both multiples of the logical block.

    Raises OSError with the device's errno (EIO where the device ends early), ValueError if unaligned.
    """
    _check_aligned(device, offset_bytes, length)
    parts: list[bytes] = []
    for at in range(0, length, _STEP_BYTES):
        step = min(_STEP_BYTES, length - at)
        parts.append(await _transfer(submitter, device, Op.READ, offset_bytes + at, step, None, False))
    return b"".join(parts)


async def write_bytes(
    submitter: Submitter,
    device: MemberDevice,
    offset_bytes: int,
    data: bytes | bytearray | memoryview,
    fua: bool = True,
) -> None:
    """Write all of `data` at `offset_bytes`, both multiples of the logical block; durable if `fua`.

    Raises OSError with the device's errno, ValueError if unaligned. After an error any part may be written.
    """
    view = memoryview(data)
    _check_aligned(device, offset_bytes, view.nbytes)
    for at in range(0, view.nbytes, _STEP_BYTES):
        part = view[at : at + _STEP_BYTES]
        await _transfer(submitter, device, Op.WRITE, offset_bytes + at, part.nbytes, part, fua)


def _check_aligned(device: MemberDevice, offset_bytes: int, length: int) -> None:
    block = device.logical_block_bytes
    if offset_bytes < 0 or length < 0 or offset_bytes % block or length % block:
        raise ValueError(
            f"{device.path}: {length} bytes at {offset_bytes} are not whole blocks of {block} bytes"
        )


async def _transfer(
    submitter: Submitter,
    device: MemberDevice,
    op: Op,
    offset_bytes: int,
    length: int,
    data: memoryview | None,
    fua: bool,
) -> bytes:
    """One buffer's worth, repeated where the kernel moves less than asked."""
    buffer = submitter.pool.take(length)
    try:
        if data is not None:
            buffer.view[:length] = data
        moved = 0
        while moved < length:
            result = await submitter.run(device, op, offset_bytes + moved, length - moved, buffer, moved, fua)
            if result < 0:
                raise OSError(-result, os.strerror(-result), device.path)
            # direct I/O can go on only at a block; what is half done is done again
            moved += result - result % device.logical_block_bytes
            if result < device.logical_block_bytes:
                raise OSError(errno.EIO, "the device ends early", device.path)
        return bytes(buffer.view[:length]) if data is None else b""
    finally:
        buffer.release()
