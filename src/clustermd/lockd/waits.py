"""Since when locks have been held, and for how long requests have been waiting.

The lock engine reads no clock, as its replicas must agree; a daemon looks at the queues at every tick at which anything
was applied, and remembers when it first saw a lock with its modes. So an age is known to a tick, and shown from the
first tick on. What a daemon finds at its first look has been there for longer: its age is the least it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_IV = -1


class Waits:
    """Remembers locks by id and modes: one may be held in another mode, or wait again for something else."""

    def __init__(self) -> None:
        self._applied = -1
        self._held: dict[tuple[int, int], float] = {}
        self._wanted: dict[tuple[int, int], float] = {}
        self._older: frozenset[int] | None = None

    def look(self, applied: int, modes: Callable[[], Iterable[tuple[int, int, int]]], now_s: float) -> None:
        """After `applied` entries: `modes()` gives (lock id, granted mode, wanted mode; IV is none) of every lock."""
        if applied == self._applied:
            return
        self._applied = applied
        held, wanted = self._held, self._wanted
        self._held, self._wanted = {}, {}
        for lock, granted, wants in modes():
            if granted != _IV:
                self._held[lock, granted] = held.get((lock, granted), now_s)
            if wants != _IV:
                self._wanted[lock, wants] = wanted.get((lock, wants), now_s)
        if self._older is None:
            self._older = frozenset(lock for lock, _ in (*self._held, *self._wanted))

    def add_to(self, status: dict[str, Any], now_s: float) -> None:
        """Put `held_s` into every lock of a replica's status that is held, `waits_s` into every one that waits.

        `age_at_least` is true where this daemon began to look only after the lock was there.
        """
        held = {lock: began_s for (lock, _), began_s in self._held.items()}
        wanted = {lock: began_s for (lock, _), began_s in self._wanted.items()}
        older = self._older or frozenset()
        for space in status["lockspaces"].values():
            for resource in space["resources"].values():
                for lock in resource["granted"] + resource["converting"]:
                    lock["held_s"] = round(now_s - held.get(lock["id"], now_s), 1)
                for lock in resource["converting"] + resource["waiting"]:
                    lock["waits_s"] = round(now_s - wanted.get(lock["id"], now_s), 1)
                for lock in resource["granted"] + resource["converting"] + resource["waiting"]:
                    lock["age_at_least"] = lock["id"] in older
