"""How far the members are, and whether they still agree.

Members tell how many entries they have applied, so that nobody keeps entries that all have, and, at the same
places of the history, a digest of their state. Whoever differs from most of the others starts anew;
of as many the side with the lowest node number is right (dlm.md 6.5, I3).
"""

from __future__ import annotations

from collections.abc import Mapping

from clustermd.dlm.machine import NodeKey

ACK_EVERY = 128
DIGEST_EVERY = 1024


class Agreement:
    """What the members of the installed view told."""

    def __init__(self) -> None:
        self._applied: dict[NodeKey, int] = {}
        self._digests: dict[int, dict[NodeKey, bytes]] = {}

    def begin(self, applied: Mapping[NodeKey, int]) -> None:
        """A new view is installed."""
        self._applied = dict(applied)
        self._digests = {}

    def told(self, member: NodeKey, applied: int) -> None:
        self._applied[member] = max(self._applied.get(member, 0), applied)

    def everybody_has(self, members: tuple[NodeKey, ...]) -> int:
        """The number of entries that all members have applied."""
        return min((self._applied.get(member, 0) for member in members), default=0)

    def digest(
        self, member: NodeKey, place: int, digest: bytes, members: tuple[NodeKey, ...]
    ) -> tuple[NodeKey, ...]:
        """`member` told the digest of its state after `place` entries. Returns who differs, once all told."""
        told = self._digests.setdefault(place, {})
        told[member] = digest
        if any(other not in told for other in members):
            return ()
        del self._digests[place]
        sides: dict[bytes, list[NodeKey]] = {}
        for other in sorted(members):
            sides.setdefault(told[other], []).append(other)
        right = min(sides.values(), key=lambda side: (-len(side), side[0]))
        return tuple(other for other in sorted(members) if other not in right)
