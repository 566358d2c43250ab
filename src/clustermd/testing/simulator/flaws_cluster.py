"""Flaws of messages, windows and metadata: F6-F8, F15-F21, F34, F38, and rules 5 to 10."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from clustermd.array.array import Array
from clustermd.array.member import Member
from clustermd.array.metadata import Metadata
from clustermd.array.windows import Windows
from clustermd.cluster import life as life_module
from clustermd.cluster import slot_lock as slot_lock_module
from clustermd.cluster.channel import Channel
from clustermd.cluster.cluster import Cluster
from clustermd.cluster.life import Life
from clustermd.cluster.messages import Message, SlotBlock
from clustermd.cluster.slot_lock import OwnSlot, read_block
from clustermd.dlm.modes import Mode
from clustermd.dlm.session import SessionLock
from clustermd.errors import LockRefused, Refused
from clustermd.ondisk.superblock import Superblock
from clustermd.testing.simulator.flaws import flaw

_process, _update, _announce = Channel._process, Cluster.metadata_update, Cluster.announce
_gather, _block_write, _reload = Life._gather, OwnSlot._write, Metadata.reload
_metadata_write, _build = Metadata._write, Metadata._build


def _any_recovery_ends_it(self: Windows, slot: int) -> None:
    self.clear()


def _end_silently(self: Windows, slot: int) -> None:
    self._by_slot.pop(slot, None)
    self.any = bool(self._by_slot)


async def _whatever_they_say(self: Cluster, lo: int, hi: int) -> None:
    with suppress(LockRefused):
        await _announce(self, lo, hi)


async def _no_answer(self: Channel, block: bytes) -> int:
    result = await _process(self, block)
    if result:
        await asyncio.Event().wait()
    return result


async def _leave_it_queued(self: SessionLock, future: Any, before: Mode) -> None:
    return None


@asynccontextmanager
async def _keeps_the_way(self: Channel) -> AsyncIterator[None]:
    await self._sending.acquire()
    await self._token.convert(Mode.EX)
    try:
        async with self.receiving:
            yield
    finally:
        await self._settle(self._token, Mode.NL)
        self._sending.release()


@asynccontextmanager
async def _anyway(self: Cluster) -> AsyncIterator[None]:
    begun = False
    try:
        async with _update(self):
            begun = True
            yield
    except LockRefused:
        if begun:
            raise
        yield


async def _no_reload(self: Life) -> None:
    return None


async def _any_good_answer(self: Channel, message: Message) -> None:
    for member in self.lockspace.slots:
        if member.slot != self.lockspace.our_slot:
            block = await read_block(self.lockspace, member.slot - 1)
            if block.result:
                raise LockRefused("peer-failed", "it said so")


async def _believe_every_answer(self: Channel, message: Message) -> None:
    return None


async def _gather_or_not(self: Life, slot: int) -> None:
    with suppress(Refused):
        await _gather(self, slot)


async def _not_when_it_joins(self: OwnSlot, block: SlotBlock) -> None:
    if block != SlotBlock():
        await _block_write(self, block)


async def _no_block(self: OwnSlot, lo: int, hi: int) -> None:
    return None


async def _quiesce_nothing(self: Array, lo: int, hi: int) -> bool:
    return True


async def _no_message(self: Life, lo: int, hi: int) -> None:
    self._announced = True
    await self._own.set_window(lo, hi)


async def _right_for_all(self: Life) -> None:
    """The right is taken by whoever wants it, without its lock."""
    self._settles = self._ready.is_set() and self.all_settled


async def _first_read_counts(self: Metadata, *, ours: bool = False, announced: int | None = None) -> None:
    """Superblocks are written from what this node remembers."""
    if not ours:
        await _reload(self, ours=ours)


async def _events_back(self: Metadata) -> None:
    self.state.events = max(1, self.state.events - 3)
    await _metadata_write(self)


def _build_old_ones(self: Metadata, member: Member) -> Superblock:
    """Every other set of superblocks carries events of long ago."""
    superblock = _build(self, member)
    return replace(superblock, events=max(1, superblock.events - superblock.events % 2 * 5))


async def _follow_nothing(self: Array, announced: int | None = None) -> None:
    return None


def _deaf_to_callbacks(self: Channel, mode: Mode) -> None:
    """Lets go of `ack` when asked, and never looks at the message."""

    async def let_go() -> None:
        await self._ack.convert(Mode.NL)
        await self._message.convert(Mode.PR)
        await self._ack.convert(Mode.CR)
        await self._message.convert(Mode.NL)

    if mode == Mode.EX:
        asyncio.get_running_loop().create_task(let_go(), name="deaf")


_never = property(lambda self: -1, lambda self, value: None)

FLAWS = (
    flaw("F6", "ends every window when any slot is taken over", (Windows, "end", _any_recovery_ends_it)),
    flaw("F8", "copies in a window that was not acknowledged", (Cluster, "announce", _whatever_they_say)),
    flaw("F15", "gives no answer when it cannot follow", (Channel, "_process", _no_answer)),
    flaw("F16", "leaves a request queued that timed out", (SessionLock, "_give_up", _leave_it_queued)),
    flaw("F17", "keeps the way to send after a refused token", (Channel, "token", _keeps_the_way)),
    flaw("F18", "writes superblocks without the token", (Cluster, "metadata_update", _anyway)),
    flaw("F19", "adopts nothing after a node died between writing and telling", (Life, "_adopt", _no_reload)),
    flaw(
        "F20", "takes an answer to an older message for this one's", (Channel, "_answers", _any_good_answer)
    ),
    flaw("F20b", "processes a message as often as it is woken", (Channel, "_last_sequence", _never)),
    flaw("F21", "serves although a slot's window could not be read", (Life, "_gather", _gather_or_not)),
    flaw("F34", "ends a window without waking who waits", (Windows, "end", _end_silently)),
    flaw(
        "F38",
        "keeps the window of the slot's former owner",
        (OwnSlot, "_write", _not_when_it_joins),
        (life_module, "forget_window", lambda lock: None),
        (slot_lock_module, "forget_window", lambda lock: None),
    ),
    flaw("I10", "does not write its window where joiners look", (OwnSlot, "set_window", _no_block)),
    flaw("I8", "acknowledges a window over writes in flight", (Array, "quiesce", _quiesce_nothing)),
    flaw("I8b", "copies without telling anybody", (Life, "announce", _no_message)),
    flaw("I7", "copies without the resync right", (Life, "_have_right", _right_for_all)),
    flaw("rule 6", "takes every answer for a good one", (Channel, "_answers", _believe_every_answer)),
    flaw("rule 6b", "does not read a superblock it is told of", (Array, "reload", _follow_nothing)),
    flaw("I12", "writes superblocks from memory", (Metadata, "reload", _first_read_counts)),
    flaw("rule 14", "lets events go back", (Metadata, "_write", _events_back)),
    flaw("rule 14b", "writes old events", (Metadata, "_build", _build_old_ones)),
    flaw("I13", "lets go of a message it has not read", (Channel, "_blocking", _deaf_to_callbacks)),
)
