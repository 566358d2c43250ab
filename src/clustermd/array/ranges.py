"""Who works where: writes and resync steps in flight on this node, found by range.

Overlapping writes in flight on one node are serialised (rule 18), and a resync step excludes writes to its
range: both are holders of a range in one table. A newcomer that overlaps a holder waits for it and looks
again. The table is a dictionary of granules, so the usual look costs one lookup.
"""

from __future__ import annotations

from typing import Protocol

from clustermd.array.waiters import Waited, tell_waiters

GRANULE_SHIFT = 7  # 128 sectors, 64 KiB


class Holder(Waited, Protocol):
    """Something that holds [lo, hi) until it is removed, which is its end."""

    lo: int
    hi: int


class Ranges:
    """The holders of this node, by granule."""

    __slots__ = ("_by_granule", "count")

    def __init__(self) -> None:
        self._by_granule: dict[int, list[Holder]] = {}
        self.count = 0

    def overlapping(self, lo: int, hi: int) -> Holder | None:
        """Some holder that overlaps [lo, hi), or None."""
        table = self._by_granule
        if not table:
            return None
        for granule in range(lo >> GRANULE_SHIFT, ((hi - 1) >> GRANULE_SHIFT) + 1):
            holders = table.get(granule)
            if holders is not None:
                for holder in holders:
                    if holder.lo < hi and holder.hi > lo:
                        return holder
        return None

    def add(self, holder: Holder) -> None:
        table = self._by_granule
        self.count += 1
        for granule in range(holder.lo >> GRANULE_SHIFT, ((holder.hi - 1) >> GRANULE_SHIFT) + 1):
            holders = table.get(granule)
            if holders is None:
                table[granule] = [holder]
            else:
                holders.append(holder)

    def remove(self, holder: Holder) -> None:
        """Take `holder` out and wake those that waited for it."""
        table = self._by_granule
        self.count -= 1
        for granule in range(holder.lo >> GRANULE_SHIFT, ((holder.hi - 1) >> GRANULE_SHIFT) + 1):
            holders = table[granule]
            if len(holders) == 1:
                del table[granule]
            else:
                holders.remove(holder)
        if holder.waiters:
            tell_waiters(holder)

    def within(self, lo: int, hi: int) -> list[Holder]:
        """All holders that overlap [lo, hi), each once."""
        found: dict[int, Holder] = {}
        for granule, holders in self._by_granule.items():
            if granule < lo >> GRANULE_SHIFT or granule > (hi - 1) >> GRANULE_SHIFT:
                continue
            for holder in holders:
                if holder.lo < hi and holder.hi > lo:
                    found[id(holder)] = holder
        return list(found.values())
