"""For how long queued lock requests have been waiting.

The lock engine reads no clock, as its replicas must agree; a daemon looks at the queues at every tick and remembers
when it first saw a request there. So a wait is known to a tick, and shown from the first tick on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Waits:
    """Remembers queued requests by lock id and wanted mode: a lock may wait again for something else."""

    def __init__(self) -> None:
        self._since_s: dict[tuple[int, int], float] = {}

    def look(self, queued: Iterable[tuple[int, int]], now_s: float) -> None:
        """What is queued now, as (lock id, wanted mode)."""
        before = self._since_s
        self._since_s = {request: before.get(request, now_s) for request in queued}

    def add_to(self, status: dict[str, Any], now_s: float) -> None:
        """Put `waits_s` into every converting and waiting lock of a replica's status."""
        since = {lock: began_s for (lock, _), began_s in self._since_s.items()}
        for space in status["lockspaces"].values():
            for resource in space["resources"].values():
                for lock in resource["converting"] + resource["waiting"]:
                    lock["waits_s"] = round(now_s - since.get(lock["id"], now_s), 1)
