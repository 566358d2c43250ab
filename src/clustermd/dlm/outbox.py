"""What the clients of one replica asked for, numbered, and kept until it was seen applied.

Operations go out in order, as many in a message as fit. After an install everything that is not applied goes
out again, for what was under way may be lost; the numbers make repeats harmless (dlm.md 6.1, 6.5).
"""

from __future__ import annotations

from collections import deque

from clustermd.dlm.wire import Frame, pack

OVERHEAD_BYTES = 64


class Outbox:
    """Operations by number, from 1. `sent` is the last one that went out in this view."""

    def __init__(self) -> None:
        self._next = 1
        self._waiting: deque[tuple[int, Frame]] = deque()
        self.sent = 0

    def add(self, op: Frame) -> None:
        self._waiting.append((self._next, op))
        self._next += 1

    def clear(self) -> None:
        self._waiting.clear()

    def applied(self, last: int) -> None:
        """Operations up to `last` are part of the state."""
        while self._waiting and self._waiting[0][0] <= last:
            self._waiting.popleft()
        self.sent = max(self.sent, last)

    def send_again_after(self, last: int) -> None:
        """Only what is applied counts as sent."""
        self.sent = last
        self.applied(last)

    def next_batch(self, max_bytes: int) -> tuple[int, list[Frame]]:
        """(number of the first, operations) that are to be sent next; no operations if there are none."""
        first, size = 0, OVERHEAD_BYTES
        batch: list[Frame] = []
        for number, op in self._waiting:
            if number <= self.sent:
                continue
            size += len(pack(op))
            if batch and size > max_bytes:
                break
            first = first or number
            batch.append(op)
        return first, batch
