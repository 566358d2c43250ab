"""Suspended windows: where other nodes resync, and where this node must not write meanwhile.

One window a slot (rule 4). A window ends when its slot says "finished", or when that slot's bitmap has been
merged; never because of another slot. Every change that lets writes go notifies the listeners (rule 3).
Sectors are array sectors, ranges are half open.
"""

from __future__ import annotations

from collections.abc import Callable


class Windows:
    """The windows of all other slots. `any` is what the hot path looks at first."""

    __slots__ = ("_by_slot", "_listeners", "any")

    def __init__(self) -> None:
        self._by_slot: dict[int, tuple[int, int]] = {}
        self._listeners: list[Callable[[], None]] = []
        self.any = False

    def listen(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def set(self, slot: int, lo: int, hi: int) -> None:
        """Slot `slot` resyncs [lo, hi); hi == 0 ends it."""
        if hi <= lo:
            self.end(slot)
            return
        moved = slot in self._by_slot
        self._by_slot[slot] = (lo, hi)
        self.any = True
        if moved:
            self._notify()

    def end(self, slot: int) -> None:
        if self._by_slot.pop(slot, None) is not None:
            self.any = bool(self._by_slot)
            self._notify()

    def clear(self) -> None:
        """Forget all: this node left the cluster and will read them again when it joins."""
        self._by_slot.clear()
        self.any = False
        self._notify()

    def blocked(self, lo: int, hi: int) -> bool:
        """Whether a write to [lo, hi) must wait."""
        return any(lo < window_hi and hi > window_lo for window_lo, window_hi in self._by_slot.values())

    def of(self, slot: int) -> tuple[int, int] | None:
        return self._by_slot.get(slot)

    def all(self) -> dict[int, tuple[int, int]]:
        return dict(self._by_slot)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()
