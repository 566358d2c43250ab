"""What stands on the disks of an array right now, for whoever looks from outside.

Reads superblocks and bitmaps of members with the product's own codecs and nothing else of it: no lock
is taken, no process is asked. A running array changes them meanwhile, so hold it or wait.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clustermd.device import witness
from clustermd.errors import BadBytes
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import HEADER_BYTES, BitmapSuperblock
from clustermd.ondisk.superblock import Superblock, find
from clustermd.testing.judge import compare_halves

_SECTOR = 512
_MOST_NODES = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot's bitmap on one disk. `header` is None where it is not valid: no bit counts then."""

    header: BitmapSuperblock | None
    dirty: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """One member as it stands: its superblock and all slots."""

    path: str
    superblock: Superblock
    slots: tuple[Slot, ...]

    @property
    def data_offset_bytes(self) -> int:
        return self.superblock.data_offset * _SECTOR

    @property
    def size_bytes(self) -> int:
        """Bytes of the component that the array uses on each member."""
        return self.superblock.size * _SECTOR

    @property
    def chunk_bytes(self) -> int:
        """What one bit covers. 0 without a bitmap."""
        return next((slot.header.chunksize for slot in self.slots if slot.header is not None), 0)

    @property
    def dirty(self) -> list[list[int]]:
        """The dirty chunks of each slot."""
        return [list(slot.dirty) for slot in self.slots]


def look(path: str | Path) -> Disk:
    """Read one member. Raises BadBytes when it has no superblock a kernel would accept."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(file, 0, os.SEEK_END)

        def read(sector: int, count: int) -> bytes:
            return os.pread(file, count * _SECTOR, sector * _SECTOR)

        superblock = find(read, size // _SECTOR)
        slots: list[Slot] = []
        if superblock.has_bitmap:
            first = superblock.super_offset + superblock.bitmap_offset
            geometry = BitmapGeometry.of(BitmapSuperblock.from_bytes(read(first, 1)[:HEADER_BYTES]))
            for number in range(geometry.slots):
                start = geometry.start_sector(superblock.super_offset, superblock.bitmap_offset, number)
                slots.append(_slot(geometry, read(start, geometry.sectors_per_node)))
        return Disk(str(path), superblock, tuple(slots))
    finally:
        os.close(file)


def _slot(geometry: BitmapGeometry, area: bytes) -> Slot:
    try:
        header = BitmapSuperblock.from_bytes(area[:HEADER_BYTES])
    except BadBytes:
        return Slot(None, ())
    return Slot(header, tuple(geometry.dirty_chunks(area)))


def dirty_chunks(paths: Sequence[str | Path], slot: int) -> set[int]:
    """The chunks whose bit is set in `slot` on any of the disks."""
    return {chunk for path in paths for chunk in look(path).slots[slot].dirty}


def all_clear(paths: Sequence[str | Path]) -> bool:
    """Whether no slot on any disk has a dirty chunk."""
    return not any(slot.dirty for path in paths for slot in look(path).slots)


def differing_blocks(paths: Sequence[str | Path]) -> list[int]:
    """The 4 KiB blocks of the array in which the members differ. All members must be in sync."""
    disks = [look(path) for path in paths]
    (data_offset,) = {disk.data_offset_bytes for disk in disks}
    (size,) = {disk.size_bytes for disk in disks}
    return compare_halves(paths, data_offset, size)


def writers_of(path: str | Path) -> set[int]:
    """The numbers of the nodes that may still have a request in flight to this disk (`device.witness`)."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return {node for node in range(_MOST_NODES) if witness.held(file, witness.WITNESS_BASE + node)}
    finally:
        os.close(file)
