"""What an exerciser writes: 4 KiB blocks that say who wrote them, where, and for the how manieth time.

The content of a block is a pure function of (node, block, generation). So a judge needs no copy of
what was written: it reads a block, parses the header, and compares with what those three numbers
must look like. Every 512-byte sector of a block differs from the same sector of any other
generation, so a block torn between two writes is neither of them and shows.

Generation 0 is what was there before the first write: zeroes.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

BLOCK_BYTES = 4096
_MAGIC = b"CMDBLOCK"
_HEADER = struct.Struct("<8sIIQQ")  # magic, checksum of all that follows, node, block, generation
_SUMMED_FROM = 12
_PATTERN_BYTES = 64
ZEROES = bytes(BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which node wrote which 4 KiB block for the how manieth time (from 1)."""

    node: int
    block: int
    generation: int


def content(node: int, block: int, generation: int) -> bytes:
    """The 4096 bytes of that block. Generation 0 is zeroes."""
    if generation == 0:
        return ZEROES
    numbers = struct.pack("<IQQ", node, block, generation)
    pattern = hashlib.blake2b(numbers, digest_size=_PATTERN_BYTES).digest()
    filler = (pattern * (BLOCK_BYTES // _PATTERN_BYTES))[_HEADER.size :]
    summed = numbers + filler
    return _MAGIC + struct.pack("<I", zlib.crc32(summed)) + summed


def parse(data: bytes | bytearray | memoryview) -> Identity | None:
    """Whose block this is, or None when it is not exactly what one write of an exerciser leaves."""
    raw = bytes(data)
    if len(raw) != BLOCK_BYTES:
        return None
    magic, checksum, node, block, generation = _HEADER.unpack_from(raw)
    if magic != _MAGIC or checksum != zlib.crc32(raw[_SUMMED_FROM:]):
        return None
    return Identity(node, block, generation)
