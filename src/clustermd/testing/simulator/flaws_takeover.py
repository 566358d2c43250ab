"""Flaws of joining and of taking the bits of the dead over: F1-F5, F13, F27, F30, F33, F35, F36, F39, F40."""

from __future__ import annotations

import asyncio
from typing import Any

from clustermd.array.array import Array
from clustermd.array.bitmap import Bitmap
from clustermd.array.read import Reader
from clustermd.array.resync import Resync
from clustermd.array.slots import Slots
from clustermd.cluster import life as life_module
from clustermd.cluster.channel import Channel
from clustermd.cluster.life import Life
from clustermd.cluster.slot_lock import OwnSlot
from clustermd.dlm.lockspace import Slot
from clustermd.dlm.modes import Mode
from clustermd.testing.simulator.flaws import flaw

_join, _merge, _mark = Life.join, Slots.merge, Bitmap.mark
_leave, _work, _lost = Life.leave, Resync.work, Life.recover_slot


async def _join_and_gather_first(self: Any, name: str) -> None:
    """The pages of the own slot are still blank while other slots' bits are put into them."""
    array = self.array
    self._lockspace = await self.link.join(name, self, array.nodes)
    self.channel = Channel(self._lockspace, self.trace, self._handle, array.awaits_all, array.followed)
    self._joined = True
    self.trace.point("join.member", slot=self.slot, nodes=array.nodes)
    await self.channel.open(array.prepare_join)
    self._own = await OwnSlot.claim(self._lockspace, self.slot)
    self._resync = await self._lockspace.lock("resync")
    self.trace.point("join.slot", slot=self.slot)
    state, template = array.state, array.slots.template
    state.slot, state.bitmap_header = self.slot, template
    state.bitmap = Bitmap(array.slots._geometry())
    state.bitmap.pages[0][:256] = template.to_bytes()
    self.channel.start(self._own)
    for slot in range(array.nodes):
        if slot != self.slot:
            await self._gather(slot)
    await array.load_own_slot(self.slot)
    self._ready.set()
    self.trace.point("join.gathered", slot=self.slot)


async def _gather_nothing(self: Life, slot: int) -> None:
    return None


async def _nothing_below_chunk_1(self: Slots, slot: int) -> list[int]:
    chunks = await _merge(self, slot)
    if max(chunks, default=0) == 0:
        self.state.the_bitmap().unreconciled.clear()
        return []
    return chunks


async def _take_over_and_copy_nothing(self: Slots, slot: int) -> list[int]:
    await _merge(self, slot)
    self.state.the_bitmap().unreconciled.clear()
    return []


def _balanced_below_lo(self: Reader, lo: int, hi: int) -> bool:
    """The lowest dirty chunk is looked for with 0 meaning none; everything above it is read from the first copy."""
    bitmap = self.state.the_bitmap()
    least = 0
    for chunk in sorted(bitmap.unreconciled):
        if least == 0:
            least = chunk
    return bool(least) and hi > least * bitmap.chunk_sectors


async def _clear_the_source_first(self: Slots, slot: int) -> list[int]:
    state = self.state
    bitmap = state.the_bitmap()
    header, chunks = self._join(await self._read_areas(slot), slot)
    assert header is not None
    state.trace.point("takeover.read", slot=slot, dirty=len(chunks), chunks=chunks)
    for member in state.writable:
        await self._write_area(member, slot, bitmap.geometry.area_bytes(header))
    state.trace.point("takeover.source_cleared", slot=slot)
    bitmap.mark(chunks)
    await self.writer.flush()
    return chunks


async def _leave_the_source(self: Slots, slot: int) -> list[int]:
    _, chunks = self._join(await self._read_areas(slot), slot)
    self.state.the_bitmap().mark(chunks)
    await self.writer.flush()
    return chunks


def _in_memory_only(self: Bitmap, chunks: Any, *, on_disk: bool = False) -> None:
    _mark(self, chunks, on_disk=True)


async def _give_up_at_once(self: Life, key: object, work: Any) -> None:
    try:
        await work()
    except Exception as error:
        self.log.warning("given up: %s", error)
    self._tasks.pop(key, None)


async def _ready_at_once(self: Life, name: str) -> None:
    self._ready.set()
    await _join(self, name)


async def _into_what_is_there(self: Slots, slot: int) -> list[int]:
    state, template = self.state, self.template
    if state.bitmap is None and template is not None:
        state.bitmap_header, state.bitmap = template, Bitmap(self._geometry())
        state.bitmap.pages[0][:256] = template.to_bytes()
    return await _merge(self, slot)


class _Nothing:
    async def unlock(self) -> None:
        return None


async def _everything_is_vacant(lockspace: Any, slot: int, mode: Mode = Mode.PW) -> Any:
    return _Nothing()


def _balance_at_once(self: Array) -> None:
    self.state.settled = True


def _auto_read_only(self: Resync) -> str | None:
    return _work(self) if self.state.foreground else None


async def _leave_without_a_word(self: Life, handover: bool) -> None:
    await _leave(self, False)


def _end_the_window_at_once(self: Life, slot: Slot) -> None:
    _lost(self, slot)
    self.array.end_window(slot.slot - 1)


async def _do_not_wait_for_the_lock(self: Any, slot: int) -> None:
    """Bits are taken over without the slot's lock."""
    await self._ready.wait()
    await asyncio.sleep(0)
    await self.array.merge_slot(slot)
    self._end_window(slot, "merged")
    await self._lockspace.recovered(slot + 1)
    self._end_takeover(slot)
    self.array.wake_resync()


FLAWS = (
    flaw("F1", "merges other slots before the own bits are loaded", (Life, "join", _join_and_gather_first)),
    flaw(
        "F2", "takes a slot with only chunk 0 dirty for a clean one", (Slots, "merge", _nothing_below_chunk_1)
    ),
    flaw(
        "F3", "takes chunk 0 for no chunk when reads are balanced", (Reader, "read_first", _balanced_below_lo)
    ),
    flaw(
        "F4", "clears the source bitmap before its own is stable", (Slots, "merge", _clear_the_source_first)
    ),
    flaw("F5", "gives a takeover up that failed", (Life, "_insist", _give_up_at_once)),
    flaw("F13", "merges the bitmap of a living node", (life_module, "try_vacant", _everything_is_vacant)),
    flaw("F27", "marks chunks in memory without bits on disk", (Bitmap, "mark", _in_memory_only)),
    flaw(
        "F33",
        "balances reads before the dead node's bits are merged",
        (Array, "set_unsettled", _balance_at_once),
    ),
    flaw("F35", "leaves with bits and says nothing", (Life, "leave", _leave_without_a_word)),
    flaw("F36", "leaves the source as it is for others to take again", (Slots, "merge", _leave_the_source)),
    flaw(
        "F39",
        "takes over before the own bitmap is loaded",
        (Life, "join", _ready_at_once),
        (Slots, "merge", _into_what_is_there),
    ),
    flaw("rule 1", "serves before vacant slots are merged", (Life, "_gather", _gather_nothing)),
    flaw("rule 2", "copies nothing of what it took over", (Slots, "merge", _take_over_and_copy_nothing)),
    flaw(
        "rule 4",
        "ends a dead node's window before its bits are merged",
        (Life, "recover_slot", _end_the_window_at_once),
    ),
    flaw("rule 6 slots", "takes a slot over without its lock", (Life, "_merge", _do_not_wait_for_the_lock)),
    flaw("rule 13", "repairs only after its users wrote", (Resync, "work", _auto_read_only)),
)
