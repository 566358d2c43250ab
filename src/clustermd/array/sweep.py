"""The sweep: bits of chunks that came to rest are cleared, lazily and in the one safe order.

Every `daemon_sleep` seconds: chunks at rest age by one pass; for those at rest for a whole pass the caches of all
writable members are flushed (rule 15), events_cleared is made stable (I3), and only then their bits
are cleared, unless somebody wrote meanwhile (md-cluster spec 3.5). A degraded array clears nothing that a
missing member lacks: those chunks carry NEEDED and never come to rest.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.member_io import flush
from clustermd.array.metadata import Metadata
from clustermd.array.state import ArrayState


class Sweep:
    """Clears bits. One pass at a time."""

    def __init__(
        self,
        state: ArrayState,
        writer: BitmapWriter,
        metadata: Metadata,
        fail: Callable[[int, str], object],
    ) -> None:
        self.state = state
        self.writer = writer
        self.metadata = metadata
        self._fail = fail
        self._one = asyncio.Lock()

    async def once(self) -> int:
        """One pass; how many bits were cleared. Raises OSError with ESHUTDOWN when the gate is shut."""
        async with self._one:
            state = self.state
            bitmap = state.bitmap
            if bitmap is None or state.read_only or bitmap.all_clean:
                return 0
            ready = bitmap.begin_sweep()
            if not ready:
                return 0
            state.trace.point("sweep.begin", chunks=ready)
            if not await self.flush_members():
                return 0
            state.trace.point("sweep.flushed", chunks=ready)
            header = state.bitmap_header
            if header is not None and header.events_cleared < state.events and not state.degraded:
                self.metadata.set_header(events_cleared=state.events)
                await self.writer.flush()
                state.trace.point("sweep.header", events=state.events)
            going = [chunk for chunk in ready if bitmap.counters[chunk] == 1] if state.trace.on else []
            cleared = bitmap.clear(ready)
            state.trace.point("sweep.cleared", count=cleared, chunks=going)
            await self.writer.flush()
            state.trace.point("sweep.done", count=cleared)
            return cleared

    async def flush_members(self) -> bool:
        """Flush every writable member's cache. False if one refused (it is failed then)."""
        state = self.state
        members = list(state.writable)
        results = await asyncio.gather(*(flush(state, member) for member in members))
        fine = True
        for member, result in zip(members, results, strict=True):
            if result == -errno.ESHUTDOWN:
                raise OSError(errno.ESHUTDOWN, "the gate is shut")
            if result < 0:
                self._fail(1 << member.index, f"a flush failed ({result})")
                fine = False
        return fine

    async def clean(self) -> bool:
        """Before a stop: clear all that may be cleared, now. True if no bit is left."""
        for _ in range(3):
            await self.once()
        bitmap = self.state.bitmap
        return bitmap is None or next(bitmap.dirty_chunks(), None) is None
