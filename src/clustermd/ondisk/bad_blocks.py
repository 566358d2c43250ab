"""The bad block log of a member: bytes <-> ranges.

An array of little-endian u64 words, `sector << 10 | count`, ended by a word of ones, sectors and counts in
units of `1 << bblog_shift` sectors (md-cluster spec 1.12). Sectors are those of the **device**, data_offset
included: that is what the running kernel compares with.

Clustered arrays have no log. A disk that mdadm added to one claims a log all the same, at the very place
of slot 1's bitmap, so `log_place` asks where the bitmaps lie before it believes a superblock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from clustermd.errors import BadBytes, Refused
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.superblock import Superblock

END = 0xFFFF_FFFF_FFFF_FFFF
MAX_UNITS = 512
"""Units in an entry that the kernel keeps in memory; the field would hold 1023."""
MAX_SHIFT = 20
_COUNT_BITS = 10
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_MAX_SECTOR_UNITS = (1 << 54) - 1


def log_place(superblock: Superblock, geometry: BitmapGeometry | None) -> tuple[int, int] | None:
    """Where the log of a member lies, as (device sector, sectors); None where there is none to be used.

    `geometry` is that of the array's bitmaps, None without. A log that overlaps them is none: what stands
    there are bits, and writing it would destroy them.
    """
    if not superblock.has_bad_block_log:
        return None
    start = superblock.super_offset + superblock.bblog_offset
    if geometry is not None:
        low = geometry.start_sector(superblock.super_offset, superblock.bitmap_offset, 0)
        high = geometry.start_sector(superblock.super_offset, superblock.bitmap_offset, geometry.slots)
        if start < high and low < start + superblock.bblog_size:
            return None
    return start, superblock.bblog_size


def parse(data: bytes, *, shift: int = 0, device_sectors: int | None = None) -> list[tuple[int, int]]:
    """The `(sector, count)` ranges of a log, sorted and merged, in sectors of the device.

    Raises BadBytes `bad-bad-block-shift` or, where `device_sectors` is given, `bad-block-out-of-range`.
    """
    if not 0 <= shift <= MAX_SHIFT:
        raise BadBytes("bad-bad-block-shift", f"the bad block log counts in units of 2^{shift} sectors")
    ranges: list[tuple[int, int]] = []
    for (word,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8]):
        if word == END:
            break
        count = (word & _COUNT_MASK) << shift
        if not count:
            continue
        sector = (word >> _COUNT_BITS) << shift
        if device_sectors is not None and sector + count > device_sectors:
            raise BadBytes(
                "bad-block-out-of-range",
                f"the bad block log names sectors {sector} to {sector + count - 1} "
                f"of a device of {device_sectors} sectors",
            )
        ranges.append((sector, count))
    return merge(ranges)


def format(ranges: Iterable[tuple[int, int]], *, size_sectors: int = 8, shift: int = 0) -> bytes:
    """The log for these ranges: `size_sectors` · 512 bytes, unused ones 0xFF.

    Ranges may come in any order and overlap; they are widened to whole units. Raises Refused
    `bad-block-log-full` when they do not fit (the member must then be failed), ValueError for a shift or
    a sector that the format cannot hold.
    """
    if not 0 <= shift <= MAX_SHIFT:
        raise ValueError(f"no bad block unit of 2^{shift} sectors")
    unit = 1 << shift
    words: list[int] = []
    widened = [
        (sector // unit * unit, -(-(sector + count) // unit) * unit - sector // unit * unit)
        for sector, count in ranges
        if count > 0
    ]
    for sector, count in merge(widened):
        at, left = sector >> shift, count >> shift
        if at + left > _MAX_SECTOR_UNITS:
            raise ValueError(f"sector {sector} is beyond what a bad block log can name")
        while left:
            step = min(left, MAX_UNITS)
            words.append(at << _COUNT_BITS | step)
            at += step
            left -= step
    capacity = size_sectors * 512 // 8
    if len(words) > capacity:
        raise Refused(
            "bad-block-log-full",
            f"the bad block log holds {capacity} entries, {len(words)} are needed: the device must be failed",
        )
    return struct.pack(f"<{len(words)}Q", *words).ljust(size_sectors * 512, b"\xff")


def merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same sectors as sorted ranges that neither overlap nor touch; empty ones are dropped."""
    merged: list[tuple[int, int]] = []
    for sector, count in sorted(r for r in ranges if r[1] > 0):
        if merged and sector <= merged[-1][0] + merged[-1][1]:
            start, length = merged[-1]
            merged[-1] = (start, max(length, sector + count - start))
        else:
            merged.append((sector, count))
    return merged
