"""The third waist: what a running array asks of the cluster, and the cluster of the array.

`Alone` answers for an array that one node runs: it has every right at once. `cluster.Cluster`
answers for a clustered one. The calls are named after what the protocol guards, not after messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol


class ArraySide(Protocol):
    """What the cluster asks of the array it coordinates."""

    nodes: int

    async def prepare_join(self) -> None:
        """Called with the token held, before anything else of a join: read the superblocks anew."""

    async def load_own_slot(self, slot: int) -> None:
        """Read the bitmap of md slot `slot`, make it ours: header valid on every member, bits kept."""

    async def merge_slot(self, slot: int) -> list[int]:
        """Take over the bits of vacant `slot`: ours stable first, then its area cleared. The dirty chunks."""

    def set_window(self, slot: int, lo: int, hi: int) -> None:
        """Writes to [lo, hi) wait from now on, because `slot` resyncs there; hi == 0 ends it."""

    def end_window(self, slot: int) -> None: ...

    async def quiesce(self, lo: int, hi: int) -> bool:
        """Wait until no write started here is in flight in [lo, hi). False if one of them waits for a failed
        member to be recorded, which cannot be before the caller lets go."""

    async def reload(self, announced: int | None = None) -> None:
        """Read the superblocks again and adopt the newest, that of device `announced` among them. Raises Refused."""

    def awaits_all(self) -> bool:
        """Whether something here waits until all nodes have followed what was announced."""

    def followed(self, by_all: bool) -> None:
        """An announced superblock that this node reloaded was followed `by_all` nodes, or nobody knows by whom."""

    def working_number(self) -> int:
        """The device number of the first member whose superblock is good (`raid_slot` in METADATA_UPDATED)."""

    def set_unsettled(self) -> None:
        """Some node may have died: until its bits are merged and copied all nodes read the first copy."""

    def wake_resync(self) -> None:
        """There may be something to copy, or a pass to make."""

    async def adopt(self) -> None:
        """After a loss: adopt the newest superblock and write it on all members that work (rule 6)."""

    def hold(self, reason: str) -> None:
        """Contact is lost for now: keep requests, send nothing."""

    def resume(self) -> None: ...

    def doubt(self, reason: str) -> None:
        """The superblocks cannot be confirmed: keep requests; disks are still read."""

    def trust(self) -> None: ...

    def lost(self, reason: str) -> None:
        """Membership is gone: what is in flight may land, nothing more goes out in this life."""


class Coordinator(Protocol):
    """What an array asks. All calls raise ClusterLost when membership is gone."""

    clustered: bool
    excludes: bool
    """Whether the others may have gone on as if this node were dead when its membership ends, and what stands above the
    array with them. Then nothing that this node was asked before may go out after it has joined again."""

    async def join(self, array: ArraySide) -> int:
        """Become a member; return the own md slot (from 0). Own bitmap loaded, vacant ones merged (rule 1)."""

    async def leave(self, *, handover: bool) -> None:
        """Leave; `handover`: our bitmap still has bits that somebody should take over."""

    async def abandon(self) -> None:
        """End a membership that came to nothing; what it had taken over is for others. Nothing may be in flight."""

    def metadata_update(self) -> AbstractAsyncContextManager[None]:
        """Hold the right to write superblocks; publish on a clean exit, and raise if somebody did not follow."""

    def resync_right(self, *, settles: bool = False) -> AbstractAsyncContextManager[None]:
        """Be the one node that resyncs, with `settles` until nothing is left to copy.

        "Finished" is announced before the right is given up.
        """

    async def announce(self, lo: int, hi: int) -> None:
        """No other node writes in [lo, hi) when this returns (needs the resync right)."""

    def all_settled(self) -> bool:
        """No takeover is outstanding: a pass under the resync right may settle everything."""

    def settles(self) -> bool:
        """A pass that ends now under the right as it is held settles everything: when it was asked for no takeover was
        outstanding, so all who have something to copy had asked before, and gave it back when that was done."""

    def takeovers(self) -> Iterable[int]:
        """Slots whose takeover is outstanding."""

    def peers(self) -> tuple[str, ...]:
        """Names of the other nodes that run this array now."""

    @property
    def messages_sent(self) -> int: ...


class Alone:
    """The coordinator of an array that only this node runs: every right, no messages."""

    clustered = False
    excludes = False
    messages_sent = 0

    async def join(self, array: ArraySide) -> int:
        await array.prepare_join()
        await array.load_own_slot(0)
        return 0

    async def leave(self, *, handover: bool) -> None:
        return None

    async def abandon(self) -> None:
        return None

    @asynccontextmanager
    async def metadata_update(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def resync_right(self, *, settles: bool = False) -> AsyncIterator[None]:
        yield

    async def announce(self, lo: int, hi: int) -> None:
        return None

    def all_settled(self) -> bool:
        return True

    def settles(self) -> bool:
        return True

    def takeovers(self) -> Iterable[int]:
        return ()

    def peers(self) -> tuple[str, ...]:
        return ()
