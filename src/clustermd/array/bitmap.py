"""The write-intent bitmap in memory: one counter a chunk, and the 4 KiB pages of the own slot.

Theory. A bit on disk says: the copies of this chunk may differ. It is set, and stable on every writable
member, before the first write to the chunk goes out; it stays set while writes run and for a while after,
so that a steady writer never waits for it; it is cleared lazily. In memory each chunk has a counter with md's
meaning (md-cluster spec 3.1):

    0            clean, the bit on disk is clear
    1            the bit is set, the next sweep may clear it
    2            the bit is set, no write runs
    n >= 3       the bit is set, n - 2 writes run
    | NEEDED     the chunk must be copied to some member before its bit may go (rule 11: always with the bit)

Beside the counters: `unreconciled`, the chunks whose in-sync copies may differ (from a crash, or merged
from a dead node's slot): a resync takes them out. A degraded array keeps NEEDED after that, because
the missing member lacks the chunk. `unstable`, the chunks whose bit is set in a page that is not on disk yet.

A bitmap that is not `persistent` (an array without one) counts and remembers in memory only.

A flush takes `begin_flush()`, writes those pages, and says `end_flush`. A sweep asks `begin_sweep()` for
chunks that may be cleared, has the members' caches flushed, and says `clear(chunks)`: those that no write touched
meanwhile are cleared in their pages. Pages are written by one writer at a time, so no older page can
overtake a newer one. Nothing here does I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from clustermd.ondisk.bitmap_bits import BitmapGeometry

NEEDED = 0x8000
COUNT_MASK = 0x3FFF
COUNT_MAX = 16383
PAGE_BYTES = 4096
HEADER_BYTES = 256
COUNTERS_PER_PAGE = 2048
_NOT_ZERO = re.compile(rb"[^\0]", re.DOTALL)


def chunks_in(page: int, content: bytes) -> list[int]:
    """The chunks whose bit is set in page number `page` of a slot with that content."""
    first = (page * PAGE_BYTES - HEADER_BYTES) * 8
    return [
        first + found.start() * 8 + bit
        for found in _NOT_ZERO.finditer(content, HEADER_BYTES if page == 0 else 0)
        for bit in range(8)
        if content[found.start()] >> bit & 1
    ]


class Bitmap:
    """Counters and pages of one slot. Chunks are numbered from 0; sectors are array sectors.

    `dirty` are pages with set bits that are not on disk, `lazy` pages that only lost bits or changed
    their header.
    """

    __slots__ = (
        "_flushing",
        "_idle",
        "chunk_sectors",
        "counters",
        "dirty",
        "geometry",
        "lazy",
        "mark_serial",
        "pages",
        "persistent",
        "unreconciled",
        "unstable",
    )

    def __init__(self, geometry: BitmapGeometry, *, persistent: bool = True) -> None:
        self.geometry = geometry
        self.persistent = persistent
        self.mark_serial = 0
        self.chunk_sectors = geometry.chunk_bytes // 512
        self.counters: list[int] = [0] * geometry.bits
        self.pages = [bytearray(PAGE_BYTES) for _ in range(-(-geometry.bytes_per_node // PAGE_BYTES))]
        self.dirty: set[int] = set()
        self.lazy: set[int] = set()
        self.unstable: set[int] = set()
        self.unreconciled: set[int] = set()
        self._idle: set[int] = set()
        self._flushing: set[int] = set()

    # --- where a bit is -------------------------------------------------------------------------

    def page_of(self, chunk: int) -> int:
        return (HEADER_BYTES + (chunk >> 3)) // PAGE_BYTES

    def _set_bit(self, chunk: int) -> None:
        at = HEADER_BYTES + (chunk >> 3)
        self.pages[at // PAGE_BYTES][at % PAGE_BYTES] |= 1 << (chunk & 7)

    def _clear_bit(self, chunk: int) -> None:
        at = HEADER_BYTES + (chunk >> 3)
        self.pages[at // PAGE_BYTES][at % PAGE_BYTES] &= ~(1 << (chunk & 7)) & 0xFF

    def bit(self, chunk: int) -> bool:
        at = HEADER_BYTES + (chunk >> 3)
        return bool(self.pages[at // PAGE_BYTES][at % PAGE_BYTES] >> (chunk & 7) & 1)

    def chunks_of(self, first_sector: int, end_sector: int) -> range:
        """The chunks that [first_sector, end_sector) touches."""
        return range(first_sector // self.chunk_sectors, -(-end_sector // self.chunk_sectors))

    # --- writes -----------------------------------------------------------------------------------

    def start_write(self, chunks: Iterable[int]) -> bool:
        """Count one write on each chunk. True if every bit is stable, so data may go now.

        Refuses nothing: `full` tells beforehand whether a counter has no room.
        """
        stable = True
        counters = self.counters
        for chunk in chunks:
            value = counters[chunk]
            if value < 2:
                if value == 0:
                    self._set_bit(chunk)
                    if self.persistent:
                        self.dirty.add(self.page_of(chunk))
                        self.unstable.add(chunk)
                value = 2
            counters[chunk] = value + 1
            if stable and self.unstable and chunk in self.unstable:
                stable = False
        return stable

    def full(self, chunks: Iterable[int]) -> bool:
        return any(self.counters[chunk] & COUNT_MASK >= COUNT_MAX for chunk in chunks)

    def end_write(self, chunks: Iterable[int], degraded: bool) -> None:
        """A write ended. `degraded`: some member lacks it, so the bit must stay (NEEDED)."""
        counters = self.counters
        for chunk in chunks:
            value = counters[chunk] - 1
            if degraded:
                value |= NEEDED
            counters[chunk] = value
            if value == 2:
                self._idle.add(chunk)

    # --- pages to disk ----------------------------------------------------------------------------

    def begin_flush(self) -> dict[int, bytes]:
        """The pages with new bits, as they are now, and all other pages that wait: page -> content."""
        pages = self.dirty | self.lazy
        self._flushing = set(self.unstable)
        self.dirty.clear()
        self.lazy.clear()
        return {page: bytes(self.pages[page]) for page in sorted(pages)}

    def end_flush(self) -> None:
        """Those pages are stable on every writable member."""
        self.unstable -= self._flushing
        self._flushing = set()

    @property
    def wants_flush(self) -> bool:
        return bool(self.dirty or self.lazy)

    # --- the sweep --------------------------------------------------------------------------------

    def begin_sweep(self) -> list[int]:
        """Age idle chunks by one pass; return those that may be cleared once members' caches are flushed."""
        ready = []
        counters = self.counters
        for chunk in sorted(self._idle):
            value = counters[chunk]
            if value == 2:
                counters[chunk] = 1
            elif value == 1:
                ready.append(chunk)
            else:
                self._idle.discard(chunk)
        return ready

    def clear(self, chunks: Iterable[int]) -> int:
        """Clear the bits of those chunks that nothing touched since `begin_sweep`; how many that were."""
        cleared = 0
        for chunk in chunks:
            if self.counters[chunk] == 1:
                self.counters[chunk] = 0
                self._idle.discard(chunk)
                self._clear_bit(chunk)
                if self.persistent:
                    self.lazy.add(self.page_of(chunk))
                cleared += 1
        return cleared

    @property
    def all_clean(self) -> bool:
        """Nothing for a sweep to do."""
        return not self._idle

    # --- what must be copied ----------------------------------------------------------------------

    def mark(self, chunks: Iterable[int], *, on_disk: bool = False) -> None:
        """These chunks may differ between in-sync members: keep their bits and have them copied.

        `on_disk`: the own slot has the bits on every member already; else their pages become dirty.
        """
        self.mark_serial += 1
        for chunk in chunks:
            value = self.counters[chunk]
            if value < 2:
                value = 2
            self.counters[chunk] = value | NEEDED
            self.unreconciled.add(chunk)
            if not self.bit(chunk):
                self._set_bit(chunk)
                if on_disk:
                    continue
            elif on_disk or chunk not in self.unstable:
                continue
            if self.persistent:
                self.unstable.add(chunk)
                self.dirty.add(self.page_of(chunk))

    def reconciled(self, chunk: int, degraded: bool) -> None:
        """The in-sync members are equal in `chunk`. The bit may go, unless a member is missing."""
        self.unreconciled.discard(chunk)
        if not degraded:
            self._settle(chunk)

    def whole(self) -> None:
        """No member is missing any more, and the last one was filled completely: drop what was kept for it."""
        for chunk, value in enumerate(self.counters):
            if value & NEEDED and chunk not in self.unreconciled:
                self._settle(chunk)

    def _settle(self, chunk: int) -> None:
        value = self.counters[chunk] & ~NEEDED
        self.counters[chunk] = value
        if value == 2:
            self._idle.add(chunk)

    def needed(self, chunk: int) -> bool:
        return bool(self.counters[chunk] & NEEDED)

    def dirty_chunks(self) -> Iterator[int]:
        """Chunks whose bit is set in the pages."""
        return (chunk for chunk, value in enumerate(self.counters) if value)

    def pages_used(self) -> tuple[int, int]:
        """(pages of 2048 counters that are in memory, all such pages), as mdstat counts them.

        A clustered array has all of its pages in memory, another one those with a counter that is not 0.
        """
        total = -(-len(self.counters) // COUNTERS_PER_PAGE)
        if self.geometry.nodes:
            return total, total
        return len({chunk // COUNTERS_PER_PAGE for chunk in self.dirty_chunks()}), total
