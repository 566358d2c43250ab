"""A slot's `bitmapNNNN` lock: whoever holds it in PW owns the bitmap, and is alive.

Its value block carries the owner's resync window and its last answer. Only the owner writes it, by converting
PW to PW; others read it under CR, which goes with PW. An owner clears it when it joins, so that nobody meets the
window of an earlier life (F38). That alone would be too late: a new owner is a member before it has the lock, and a
joiner may look between the two. So whoever ends a life, its owner that leaves or who took it over, leaves no window.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from clustermd.cluster.messages import SlotBlock
from clustermd.dlm.lockspace import Lock, Lockspace
from clustermd.dlm.modes import Mode
from clustermd.errors import LockRefused


def slot_lock_name(slot: int) -> str:
    """The lock of md slot `slot` (from 0)."""
    return f"bitmap{slot:04d}"


class OwnSlot:
    """Our own slot lock, held in PW from join to leave."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._one = asyncio.Lock()
        self.block = SlotBlock()

    @classmethod
    async def claim(cls, lockspace: Lockspace, slot: int) -> OwnSlot:
        """Take the lock and clear its block. Waits while somebody takes the old bits over."""
        lock = await lockspace.lock(slot_lock_name(slot), Mode.NL, value_block=True)
        await lock.convert(Mode.PW)
        own = cls(lock)
        await own._write(SlotBlock())
        return own

    async def set_window(self, lo: int, hi: int) -> None:
        async with self._one:
            await self._write(replace(self.block, lo=lo, hi=hi))

    async def set_answer(self, sequence: int, result: int) -> None:
        async with self._one:
            await self._write(replace(self.block, sequence=sequence, result=result))

    async def _write(self, block: SlotBlock) -> None:
        assert self._lock.lvb is not None
        self._lock.lvb[:] = block.to_bytes()
        await self._lock.convert(Mode.PW)
        self.block = block

    async def release(self) -> None:
        """Give the slot up, and no window with it: whoever heard of one keeps it until our bits are taken over."""
        forget_window(self._lock)
        await self._lock.unlock()


def forget_window(lock: Lock) -> None:
    """Leave no window in the block of a slot's lock that is held in PW, once it is freed (that writes the block)."""
    assert lock.lvb is not None
    lock.lvb[:] = replace(SlotBlock.from_bytes(lock.lvb), lo=0, hi=0).to_bytes()


async def read_block(lockspace: Lockspace, slot: int) -> SlotBlock:
    """What the owner of `slot` says, read under CR.

    A dead owner's word counts until its slot is taken over: the mark that its death leaves on the block is no reason
    to forget its window (dlm.md 6.8.26).
    """
    lock = await lockspace.lock(slot_lock_name(slot), Mode.CR, value_block=True)
    try:
        assert lock.lvb is not None
        return SlotBlock.from_bytes(lock.lvb)
    finally:
        await lock.unlock()


async def try_vacant(lockspace: Lockspace, slot: int, mode: Mode = Mode.PW) -> Lock | None:
    """The lock of `slot` in `mode` if nobody owns the slot, else None. The caller unlocks it."""
    try:
        return await lockspace.lock(slot_lock_name(slot), mode, value_block=True, noqueue=True)
    except LockRefused as error:
        if error.code != "would-block":
            raise
        return None
