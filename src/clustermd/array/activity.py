"""What the superblocks say of use: an array is marked active before its first write, and clean when it came to rest.

An array of one node that was not stopped in order is found active, and resynced: by its bits, or from `resync_offset`
where it has no bitmap. A clustered array is active from its first start on (md-cluster spec 1.9). A member whose device
is absent is marked faulty at the same occasion, so that it is not taken for a good one when it turns up again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clustermd.array.metadata import Metadata
from clustermd.array.state import ArrayState
from clustermd.errors import Refused
from clustermd.ondisk.superblock import MAX_SECTOR, ROLE_FAULTY

RETRY_S = 0.5


class Activity:
    """Marks the array. `writing()` tells whether a write is in flight, `marked()` starts what waited again."""

    def __init__(
        self, state: ArrayState, metadata: Metadata, writing: Callable[[], bool], marked: Callable[[], None]
    ) -> None:
        self.state = state
        self.metadata = metadata
        self.task: asyncio.Task[None] | None = None
        self._writing = writing
        self._marked = marked
        state.activate = self._activate
        metadata.resync_position = self._resync_position

    async def begin(self, clustered: bool) -> None:
        """At the start of a life: note who is missing; a clustered array is in use from here on."""
        state = self.state
        if clustered:
            await self.metadata.update(self._in_use)
            state.active = True
        elif state.missing_numbers() or not state.events:
            await self.metadata.update(self._without_missing)  # the first start counts as an event

    def _without_missing(self) -> None:
        for number in self.state.missing_numbers():
            self.state.roles[number] = ROLE_FAULTY

    def _in_use(self) -> None:
        self.state.clean = False
        self._without_missing()

    def _activate(self) -> None:
        """A write waits for the array to be marked active on disk."""
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self.mark(False), name="activate")

    async def mark(self, clean: bool) -> None:
        """Have the superblocks say so. Clean is tried once, and not done while a write is in flight."""
        state = self.state

        def change() -> None:
            if not (clean and self._writing()):
                state.clean = clean
                state.active = False

        while not state.stopping or clean:
            try:
                await self.metadata.update(change)
                state.active = not state.clean
                break
            except (Refused, OSError) as error:
                state.log.warning("cannot be marked %s yet: %s", "clean" if clean else "active", error)
                if clean:
                    return
                await asyncio.sleep(RETRY_S)
        self._marked()

    def _resync_position(self) -> int:
        bitmap = self.state.bitmap
        if bitmap is None or bitmap.persistent or not bitmap.unreconciled:
            return MAX_SECTOR
        return min(bitmap.unreconciled) * bitmap.chunk_sectors

    async def done(self) -> None:
        """Wait for a mark that is on its way."""
        if self.task is not None:
            await self.task
