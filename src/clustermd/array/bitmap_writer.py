"""Bitmap pages to disk: one batch at a time, to every writable member, durable when complete.

All chunks that one batch of requests dirties cost one write of their page a member; writes that wait for it go
out together. The next batch starts when the previous is complete, so pages never overtake one another
(rules 15 and I1: no data before its bit is stable on all writable members).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Protocol

from clustermd.array.bitmap import PAGE_BYTES, chunks_in
from clustermd.array.member import Member
from clustermd.array.state import ArrayState
from clustermd.device.member_device import Buffer, Op


class Waiting(Protocol):
    """A write that waits for its bits: called once they are stable, or with an errno."""

    def bits_stable(self, error: int) -> None: ...


class Batch:
    """Pages on their way to every writable member, with the writes and flushes that wait for them."""

    __slots__ = (
        "buffers",
        "failed",
        "flushing",
        "on_way",
        "pages",
        "shut",
        "succeeded",
        "tick",
        "writer",
        "writing",
    )

    def __init__(
        self,
        writer: BitmapWriter,
        pages: list[int],
        writing: list[Waiting],
        flushing: list[asyncio.Future[None]],
    ) -> None:
        self.writer = writer
        self.pages = pages
        self.writing = writing
        self.flushing = flushing
        self.buffers: list[Buffer] = []
        self.on_way: dict[int, int] = {}
        self.failed = 0
        self.succeeded = 0
        self.shut = False
        self.tick = writer.state.tick

    def io_done(self, tag: int, result: int) -> None:
        index, length = tag >> 16, tag & 0xFFFF
        if result == -errno.ESHUTDOWN:
            self.shut = True
        elif result != length:
            self.failed |= 1 << index
        else:
            self.succeeded |= 1 << index
        left = self.on_way[index] - 1
        if left:
            self.on_way[index] = left
        else:
            del self.on_way[index]
            state = self.writer.state
            if state.trace.on:
                state.trace.point(
                    "bitmap.member",
                    slot=state.slot,
                    member=state.members[index].number,
                    good=bool(self.succeeded >> index & 1) and not self.failed >> index & 1,
                    left=len(self.on_way),
                    writes=len(self.writing),
                )
            self.writer.answered(self)


class BitmapWriter:
    """Writes the dirty pages of the own slot. `fail(mask, why)` is told which members refused a page."""

    def __init__(self, state: ArrayState, fail: Callable[[int, str], object]) -> None:
        self.state = state
        self._fail = fail
        self._waiting: list[Waiting] = []
        self._flushers: list[asyncio.Future[None]] = []
        self._batch: Batch | None = None
        self._stalled = False  # the last batch failed: the next one starts when somebody waits for it

    def wait(self, write: Waiting) -> None:
        """`write` goes on after the next flush; the caller's batch ends with `kick`."""
        self._waiting.append(write)

    def kick(self) -> None:
        """Start a flush if something is dirty and none runs. Queues only; the caller submits."""
        bitmap = self.state.bitmap
        if self._batch is not None or bitmap is None:
            return
        awaited = bool(self._waiting or self._flushers)
        if bitmap.wants_flush:
            if awaited or not self._stalled:
                self._start(bitmap.begin_flush())
        elif awaited:
            self._start({})

    def _start(self, pages: dict[int, bytes]) -> None:
        state = self.state
        if state.trace.on:
            chunks = [chunk for page, content in pages.items() for chunk in chunks_in(page, content)]
            writes = len(self._waiting)
            state.trace.point(
                "bitmap.flush", pages=list(pages), slot=state.slot, chunks=chunks, writes=writes
            )
        batch = self._batch = Batch(self, list(pages), self._waiting, self._flushers)
        self._waiting, self._flushers = [], []
        queue = state.submitter.queue
        for page, content in pages.items():
            length = self._page_length(page)
            buffer = state.submitter.pool.take(length)
            buffer.view[:length] = content[:length]
            batch.buffers.append(buffer)
            for member in state.writable:
                index = member.index
                batch.on_way[index] = batch.on_way.get(index, 0) + 1
                at = self._page_offset_bytes(member, page)
                queue(member.device, Op.WRITE, at, length, buffer, 0, batch, index << 16 | length, True)
                state.counters.bitmap_writes += 1
        if not batch.on_way:
            self._finish(batch)

    def _page_length(self, page: int) -> int:
        bitmap = self.state.the_bitmap()
        return min(PAGE_BYTES, bitmap.geometry.bytes_per_node - page * PAGE_BYTES)

    def _page_offset_bytes(self, member: Member, page: int) -> int:
        superblock = member.superblock
        geometry = self.state.the_bitmap().geometry
        start = geometry.start_sector(superblock.super_offset, superblock.bitmap_offset, self.state.slot)
        return start * 512 + page * PAGE_BYTES

    def answered(self, batch: Batch) -> None:
        """One member has answered all pages of `batch`, in time or late."""
        if batch is self._batch:
            if not batch.on_way:
                self._finish(batch)
        elif not batch.on_way:
            self._release(batch)

    def overdue(self, limit_ticks: int) -> int:
        """Give up pages older than `limit_ticks` seconds; the mask of members that have them."""
        batch = self._batch
        if batch is None or self.state.tick - batch.tick <= limit_ticks:
            return 0
        stuck = 0
        for index in batch.on_way:
            stuck |= 1 << index
        batch.failed |= stuck
        self._finish(batch)
        return stuck

    def _finish(self, batch: Batch) -> None:
        state = self.state
        error = 0
        if batch.shut:
            error = errno.ESHUTDOWN
        elif batch.pages and not batch.succeeded & ~batch.failed:
            error = errno.EIO
        if not batch.on_way:
            self._release(batch)
        if batch.failed and not batch.shut:
            self._fail(batch.failed, "a bitmap write failed")
        if state.bitmap is not None:
            if error:
                state.bitmap.dirty.update(batch.pages)
            else:
                state.bitmap.end_flush()
                writes = len(batch.writing)
                state.trace.point("bitmap.stable", slot=state.slot, pages=batch.pages, writes=writes)
        self._batch = None
        self._stalled = bool(error)
        for write in batch.writing:
            write.bits_stable(error)
        for future in batch.flushing:
            if not future.done():
                if error:
                    future.set_exception(OSError(error, "bitmap pages could not be written"))
                else:
                    future.set_result(None)
        if not error or self._waiting or self._flushers:
            self.kick()

    def _release(self, batch: Batch) -> None:
        for buffer in batch.buffers:
            buffer.release()
        batch.buffers = []

    async def flush(self) -> None:
        """Everything that is dirty now is on disk when this returns. Raises OSError if no member took it."""
        bitmap = self.state.bitmap
        if bitmap is None or not bitmap.persistent:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushers.append(future)
        self.kick()
        self.state.submitter.submit()
        await future
