"""The coordinator of a clustered array: one `Life` after the other, and what the array may ask of the present one.

Losing the session ends a life (`life`): the array drains and joins again, as a new member with a life of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from clustermd.array.coordinator import ArraySide
from clustermd.cluster.life import Life, Link
from clustermd.cluster.messages import Message, MessageType
from clustermd.errors import ClusterLost
from clustermd.trace import Trace

LEAVE_S = 20.0
"""How long a stop tries to say goodbye; after that its end counts as a death."""


class Cluster:
    """The Coordinator of a clustered array. `connect()` makes a Link, `lockspace` is the array's UUID as 8-4-4-4-12.

    `excludes`: nodes are machines of which a lost one may be replaced while it lives (see `Coordinator`).
    """

    clustered = True

    def __init__(
        self, lockspace: str, connect: Callable[[], Awaitable[Link]], trace: Trace, *, excludes: bool = False
    ) -> None:
        self.excludes = excludes
        self._name = lockspace
        self._connect = connect
        self._trace = trace
        self._life: Life | None = None
        self._sent_before = 0

    async def join(self, array: ArraySide) -> int:
        """Begin a life. Returns the md slot."""
        await self._end_life()
        life = Life(await self._connect(), array, self._trace)
        self._life = life
        try:
            await life.join(self._name)
        except BaseException:
            await self._end_life()
            raise
        return life.slot

    async def leave(self, *, handover: bool) -> None:
        life = self._life
        if life is None:
            return
        leaving = asyncio.get_running_loop().create_task(life.leave(handover))
        await asyncio.wait((leaving,), timeout=LEAVE_S)
        if not leaving.done():
            life.log.warning("no goodbye within %.0f s: the others will take over what is left", LEAVE_S)
        elif (error := leaving.exception()) is not None:
            life.log.warning("left without goodbye: %s", error)
        await self._end_life()
        # without quorum a lock is never given back, and nobody answers any more
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)

    async def abandon(self) -> None:
        await self._end_life()

    async def _end_life(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            self._sent_before += life.sent
            await life.end()

    def _living(self) -> Life:
        if self._life is None:
            raise ClusterLost("not-a-member", "this node is not a member of the array's cluster now")
        return self._life

    @asynccontextmanager
    async def metadata_update(self) -> AsyncIterator[None]:
        life = self._living()
        async with life.channel.token():
            yield
            number = life.array.working_number()
            await life.channel.broadcast(Message(MessageType.METADATA_UPDATED, life.slot, raid_slot=number))

    @asynccontextmanager
    async def resync_right(self, *, settles: bool = False) -> AsyncIterator[None]:
        async with self._living().resync_right(settles=settles):
            yield

    async def announce(self, lo: int, hi: int) -> None:
        await self._living().announce(lo, hi)

    def all_settled(self) -> bool:
        return self._life is not None and self._life.all_settled

    def settles(self) -> bool:
        return self._life is not None and self._life.settles

    def takeovers(self) -> Iterable[int]:
        return sorted(self._life.takeovers) if self._life else ()

    def peers(self) -> tuple[str, ...]:
        return self._life.peers() if self._life else ()

    @property
    def messages_sent(self) -> int:
        return self._sent_before + (self._life.sent if self._life else 0)
