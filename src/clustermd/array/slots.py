"""The bitmaps of the slots: loading the own one, taking over a vacant one.

A slot's area is read from every in-sync member and the bits are joined: a bitmap write that a crash cut
short may have reached only some of them, and one bit too many costs a copy, one too few costs data. An area whose
superblock is not valid (a disk added while that slot's node was away) counts as nothing as long as another
member has a valid one, and as all dirty when none has.

Taking over keeps the order that no crash can break (rule 1, F1, F4): our own bits are on every writable
member before the source is cleared, and the source's superblock is made valid on every one (rule 14). What is
returned is the list of dirty chunks, so that chunk 0 is as good as any other (rule 2, F2, F3).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace

from clustermd.array.bitmap import PAGE_BYTES, Bitmap
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.member import Member
from clustermd.array.member_io import bounded
from clustermd.array.state import ArrayState
from clustermd.device.helpers import read_bytes, write_bytes
from clustermd.errors import BadBytes, Refused
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapState, BitmapSuperblock
from clustermd.ondisk.superblock import MAX_SECTOR

NO_BITMAP_CHUNK_BYTES = 1 << 20
"""An array without a bitmap remembers in memory, by chunks of this size, what is not equal yet."""


class Slots:
    """Reads and writes slot areas. `template` is the valid bitmap superblock found when the array was assembled."""

    def __init__(
        self,
        state: ArrayState,
        writer: BitmapWriter,
        template: BitmapSuperblock | None,
        fail: Callable[[int, str], object],
    ) -> None:
        self.state = state
        self.writer = writer
        self._fail = fail
        self.template = template

    @property
    def nodes(self) -> int:
        return self.template.nodes if self.template else 0

    def _geometry(self) -> BitmapGeometry:
        template = self.template
        assert template is not None
        return BitmapGeometry(template.chunksize, self.state.array_sectors, template.nodes)

    async def load_own(self, slot: int) -> None:
        """Make `slot` ours: its bits in memory, its area equal and valid on every writable member."""
        state = self.state
        if self.template is None:
            self._load_none()
            return
        geometry = self._geometry()
        areas = await self._read_areas(slot)
        header, chunks = self._join(areas, slot)
        if state.reference.events == 0 and state.reference.resync_offset == MAX_SECTOR:
            chunks = []  # made with --assume-clean and never started: mdadm sets all bits of slot 0 all the same
        bitmap = Bitmap(geometry)
        bitmap.mark(chunks, on_disk=True)
        if header is None:
            header = replace(self.template, events=0, events_cleared=0)
        header = replace(header, state=BitmapState(0), sync_size=state.array_sectors)
        state.slot = slot
        state.bitmap_header = header
        state.bitmap = bitmap
        bitmap.pages[0][:256] = header.to_bytes()
        state.trace.point("slot.loaded", slot=slot, dirty=len(chunks), chunks=chunks)
        wanted = b"".join(bytes(page) for page in bitmap.pages)
        if any(areas.get(member.index) != wanted for member in state.writable) and not state.read_only:
            bitmap.lazy.update(range(len(bitmap.pages)))
            await self.writer.flush()
        state.trace.point("slot.stable", slot=slot)

    def _load_none(self) -> None:
        """No bitmap on disk: what resync_offset leaves open is what must be copied."""
        state = self.state
        bitmap = Bitmap(BitmapGeometry(NO_BITMAP_CHUNK_BYTES, state.array_sectors, 0), persistent=False)
        if state.reference.resync_offset < state.array_sectors:
            bitmap.mark(bitmap.chunks_of(state.reference.resync_offset, state.array_sectors))
        state.bitmap = bitmap
        state.bitmap_header = None

    async def load_for_reading(self) -> None:
        """Nothing is ours and nothing is written: chunks that any slot calls dirty are read from one member."""
        state = self.state
        if self.template is None:
            self._load_none()
            return
        bitmap = Bitmap(self._geometry(), persistent=False)
        for slot in range(max(1, self.nodes)):
            _, chunks = self._join(await self._read_areas(slot), slot)
            bitmap.mark(chunks)
        state.bitmap_header = self.template
        state.bitmap = bitmap

    async def merge(self, slot: int) -> list[int]:
        """Take over the bits of `slot`, whose lock the caller holds. The chunks that were dirty there."""
        state = self.state
        bitmap = state.the_bitmap()
        geometry = bitmap.geometry
        areas = await self._read_areas(slot)
        header, chunks = self._join(areas, slot)
        state.trace.point("takeover.read", slot=slot, dirty=len(chunks), chunks=chunks)
        if chunks:
            state.settled = False
            bitmap.mark(chunks)
            state.trace.point("takeover.merged", slot=slot)
            await self.writer.flush()
            state.counters.takeovers += 1
        state.trace.point("takeover.own_stable", slot=slot)
        if header is None:
            assert self.template is not None
            header = replace(self.template, events=0, events_cleared=0)
        header = replace(header, state=BitmapState(0), sync_size=state.array_sectors)
        clean = geometry.area_bytes(header)
        targets = [member for member in state.writable if areas.get(member.index) != clean]
        results = await asyncio.gather(
            *(self._write_area(member, slot, clean) for member in targets), return_exceptions=True
        )
        # All have ended: nothing of this may land after the slot's lock was given back.
        for member, result in zip(targets, results, strict=True):
            if isinstance(result, OSError) and result.errno != errno.ESHUTDOWN:
                self._fail(1 << member.index, f"the bitmap of slot {slot} could not be cleared ({result})")
                if member.faulty:
                    continue
            if result is not None:
                raise result
        state.trace.point("takeover.source_cleared", slot=slot)
        return chunks

    def _join(self, areas: dict[int, bytes], slot: int) -> tuple[BitmapSuperblock | None, list[int]]:
        """The newest valid superblock of a slot and the union of its bits over the in-sync members."""
        state = self.state
        geometry = self._geometry()
        newest: BitmapSuperblock | None = None
        chunks: set[int] = set()
        for member in state.in_sync:
            area = areas.get(member.index)
            if area is None:
                continue
            try:
                header = BitmapSuperblock.from_bytes(area[:256])
                header.check(state.reference.set_uuid, nodes=self.nodes)
                if header.chunksize != geometry.chunk_bytes:
                    raise BadBytes("bitmap-slots-differ", f"its chunk is {header.chunksize} bytes")
            except BadBytes as error:
                state.log.warning("%s: the bitmap of slot %d is not valid: %s", member.path, slot, error)
                continue
            if newest is None or header.events > newest.events:
                newest = header
            if header.stale_for(state.reference.events):
                state.log.warning(
                    "%s: the bitmap of slot %d is out of date, all chunks count", member.path, slot
                )
                return header, list(range(geometry.bits))
            chunks.update(geometry.dirty_chunks(area))
        if newest is None:
            state.log.warning("no member has a valid bitmap for slot %d: all chunks count as dirty", slot)
            return None, list(range(geometry.bits))
        return newest, sorted(chunks)

    async def _read_areas(self, slot: int) -> dict[int, bytes]:
        """The area of `slot` on each writable member that can be read, by member index."""
        state = self.state
        length = self._geometry().bytes_per_node
        areas: dict[int, bytes] = {}
        members = state.writable  # some may fail while they are read
        results = await asyncio.gather(
            *(
                bounded(
                    state,
                    member,
                    read_bytes(state.submitter, member.device, self._offset(member, slot), length),
                )
                for member in members
            ),
            return_exceptions=True,
        )
        for member, result in zip(members, results, strict=True):
            if isinstance(result, bytes):
                areas[member.index] = result
            elif isinstance(result, OSError):
                state.log.warning("%s: the bitmap of slot %d cannot be read: %s", member.path, slot, result)
            else:
                raise result
        if not any(member.index in areas for member in state.in_sync):
            raise Refused(
                "bitmap-unreadable",
                f"{state.name}: the bitmap of slot {slot} cannot be read from any in-sync member",
                slot=slot,
            )
        return areas

    def _offset(self, member: Member, slot: int) -> int:
        superblock = member.superblock
        return self._geometry().start_sector(superblock.super_offset, superblock.bitmap_offset, slot) * 512

    async def _write_area(self, member: Member, slot: int, area: bytes) -> None:
        """Write a whole area, the first page first: its superblock must be valid before the rest counts."""
        start = self._offset(member, slot)
        for at in range(0, len(area), PAGE_BYTES):
            page = area[at : at + PAGE_BYTES]
            writing = write_bytes(self.state.submitter, member.device, start + at, page, fua=True)
            await bounded(self.state, member, writing)
            self.state.counters.bitmap_writes += 1
            self.state.trace.point(
                "takeover.source_written",
                slot=slot,
                member=member.number,
                page=at // PAGE_BYTES,
                last=at + PAGE_BYTES >= len(area),
            )
