"""The bits of a write-intent bitmap and where each slot's lie.

A slot's area is its 256-byte superblock and right behind it the bits, rounded up to 4096; the areas of all
slots are packed, slot 0 first, from `super_offset + bitmap_offset` on (md-cluster spec 2.3, 2.4). Bit n
covers the sectors `[n·C, (n+1)·C)` of the array, lowest bit of a byte first, and 1 means that the
mirrors may differ there. Pages are 4096 bytes; the first holds the superblock and 3840 bytes of bits.

Counts come from disks, so they are bounded before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from clustermd.errors import BadBytes
from clustermd.ondisk.bitmap_superblock import HEADER_BYTES, MAX_NODES, MIN_CHUNK_BYTES, BitmapSuperblock

PAGE_BYTES = 4096
PAGE_SECTORS = PAGE_BYTES // 512
MAX_BITS = 1 << 24
"""2 MiB of bits in a slot; `mdadm --create` makes at most a million bits, and growing doubles the chunk."""
_BITS_OF_BYTE = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))
_DIRTY_BYTES = re.compile(rb"[^\0]+")


class BitPosition(NamedTuple):
    """Where a bit lies: page of the slot's area, byte in the page, mask in the byte."""

    page: int
    byte: int
    mask: int


@dataclass(slots=True, frozen=True)
class BitmapGeometry:
    """The arithmetic of one array's bitmaps.

    `chunk_bytes` per bit (a power of two >= 512), `sync_sectors` covered, `nodes` slots (0 as 1: one
    bitmap without cluster). Raises BadBytes `bad-bitmap-chunk`, `bitmap-too-large`, `bad-bitmap-nodes`.
    """

    chunk_bytes: int
    sync_sectors: int
    nodes: int

    def __post_init__(self) -> None:
        chunk = self.chunk_bytes
        if chunk < MIN_CHUNK_BYTES or chunk & (chunk - 1):
            raise BadBytes(
                "bad-bitmap-chunk", f"a bitmap chunk of {chunk} bytes is not a power of two of 512 or more"
            )
        if not 0 <= self.nodes <= MAX_NODES:
            raise BadBytes(
                "bad-bitmap-nodes", f"a bitmap of {self.nodes} nodes: at most {MAX_NODES} are possible"
            )
        if self.sync_sectors < 0 or self.bits > MAX_BITS:
            raise BadBytes(
                "bitmap-too-large",
                f"a bitmap over {self.sync_sectors} sectors with {chunk} bytes per bit has {self.bits} bits; "
                f"at most {MAX_BITS} are supported",
            )

    @classmethod
    def of(cls, header: BitmapSuperblock) -> BitmapGeometry:
        """The geometry that a bitmap superblock describes."""
        return cls(header.chunksize, header.sync_size, header.nodes)

    @property
    def chunk_sectors(self) -> int:
        return self.chunk_bytes // 512

    @property
    def bits(self) -> int:
        """Number of chunks, the last one possibly short."""
        return -(-self.sync_sectors // self.chunk_sectors)

    @property
    def slots(self) -> int:
        """Number of areas on disk."""
        return max(self.nodes, 1)

    @property
    def bytes_per_node(self) -> int:
        return self.pages * PAGE_BYTES

    @property
    def sectors_per_node(self) -> int:
        return self.pages * PAGE_SECTORS

    @property
    def pages(self) -> int:
        """Pages of one slot's area."""
        return -(-(HEADER_BYTES + (self.bits + 7) // 8) // PAGE_BYTES)

    def start_sector(self, superblock_sector: int, bitmap_offset: int, slot: int) -> int:
        """The device sector at which a slot's area starts (spec 2.4)."""
        return superblock_sector + bitmap_offset + slot * self.sectors_per_node

    def position(self, bit: int) -> BitPosition:
        """Where bit `bit` lies in its slot's area."""
        page, byte = divmod(HEADER_BYTES + (bit >> 3), PAGE_BYTES)
        return BitPosition(page, byte, 1 << (bit & 7))

    def check_fits(
        self, *, super_offset: int, bitmap_offset: int, data_offset: int, device_sectors: int, size: int = 0
    ) -> None:
        """Refuse areas that touch the superblock, the data or the end of the device (spec 2.10).

        All in sectors and named as in the superblock; `size` is the component size, needed where the data
        lies before the bitmap (1.0). The bad block log is not looked at: see `bad_blocks.log_place`.
        Raises BadBytes `bitmap-out-of-place`.
        """
        start = self.start_sector(super_offset, bitmap_offset, 0)
        end = self.start_sector(super_offset, bitmap_offset, self.slots)
        conflict = ""
        if start < 0 or end > device_sectors:
            conflict = "end of the device"
        elif start <= super_offset < end:
            conflict = "superblock"
        elif end > data_offset > super_offset or start < data_offset + size <= super_offset:
            conflict = "data"
        if conflict:
            raise BadBytes(
                "bitmap-out-of-place",
                f"the bitmap's {self.slots} areas in sectors {start} to {end} run into the {conflict}",
                start_sector=start,
                end_sector=end,
            )

    def dirty(self, area: bytes | bytearray | memoryview) -> Iterator[int]:
        """The set bits of a slot's area, ascending; bits behind the last chunk are ignored."""
        bits = self.bits
        payload = self._payload(area)
        for run in _DIRTY_BYTES.finditer(payload):
            at = run.start() * 8
            for byte in run.group():
                for bit in _BITS_OF_BYTE[byte]:
                    if at + bit >= bits:
                        return
                    yield at + bit
                at += 8

    def dirty_chunks(self, area: bytes | bytearray | memoryview) -> list[int]:
        """`dirty` as a list. Raises BadBytes `short-bitmap` when `area` is not a whole one."""
        return list(self.dirty(area))

    def dirty_count(self, area: bytes | bytearray | memoryview) -> int:
        """Number of set bits among the first `bits`, without a list."""
        payload = self._payload(area)
        whole, rest = divmod(self.bits, 8)
        count = int.from_bytes(payload[:whole], "little").bit_count()
        if rest:
            count += (payload[whole] & ((1 << rest) - 1)).bit_count()
        return count

    def area_bytes(
        self, header: BitmapSuperblock, bits: Iterable[int] = (), *, all_ones: bool = False
    ) -> bytes:
        """A slot's whole area: `header`, then the given bits, or every bit of the area (spec 2.6).

        Raises BadBytes `bit-out-of-range` for a bit the array doesn't have.
        """
        head = header.to_bytes()
        if all_ones:
            return head + b"\xff" * (self.bytes_per_node - len(head))
        area = bytearray(self.bytes_per_node)
        area[: len(head)] = head
        limit = self.bits
        for bit in bits:
            if not 0 <= bit < limit:
                raise BadBytes("bit-out-of-range", f"there is no bit {bit} in a bitmap of {limit} bits")
            area[HEADER_BYTES + (bit >> 3)] |= 1 << (bit & 7)
        return bytes(area)

    def _payload(self, area: bytes | bytearray | memoryview) -> bytes:
        end = HEADER_BYTES + (self.bits + 7) // 8
        if len(area) < end:
            raise BadBytes("short-bitmap", f"only {len(area)} of a bitmap's {end} bytes could be read")
        return bytes(area[HEADER_BYTES:end])
