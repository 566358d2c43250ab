"""What clients may see, and when: each one's frames in order, held back behind a grant that is not stable.

A replica may apply a message that everybody else then loses together with its sender. So a right is
shown only when the message that gave it is stable (dlm.md 6.2); what follows it to the same client
keeps its place. Giving a right up waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from clustermd.dlm.wire import Frame

NOT_YET = 1 << 62
"""In place of a message index: the next install will say after which message this is stable."""

AT_ONCE = -1


@dataclass(slots=True)
class _Client:
    queue: deque[tuple[int, Frame]] = field(default_factory=deque)
    listens: bool = True


class Shown:
    """The local clients by number, with their queues of (message index that must be stable, frame)."""

    def __init__(self, show: Callable[[int, Frame], None]) -> None:
        self._show = show
        self._clients: dict[int, _Client] = {}
        self._stable = AT_ONCE

    def open(self, number: int) -> None:
        self._clients[number] = _Client()

    def listens(self, number: int) -> bool:
        client = self._clients.get(number)
        return client is not None and client.listens

    def lost(self, number: int) -> None:
        """It hears nothing more."""
        client = self._clients[number]
        client.listens = False
        client.queue.clear()

    def close(self, number: int) -> bool:
        """Forget it. Returns whether it was known."""
        return self._clients.pop(number, None) is not None

    def clear(self) -> None:
        self._clients.clear()

    def put(self, number: int, after: int, frame: Frame) -> None:
        """A frame for a client, to be shown when message `after` is stable."""
        if self.listens(number):
            self._clients[number].queue.append((after, frame))
            self._flush(number)

    def stable(self, index: int) -> None:
        self._stable = max(self._stable, index)
        self._flush_all()

    def new_ring(self) -> None:
        """Message indexes begin anew; what is held back waits for the install."""
        self._stable = AT_ONCE
        for client in self._clients.values():
            client.queue = deque((NOT_YET, frame) for _, frame in client.queue)

    def installed(self, index: int) -> None:
        """What was held back is stable when message `index` of the new ring is."""
        for client in self._clients.values():
            client.queue = deque((min(after, index), frame) for after, frame in client.queue)
        self._flush_all()

    def _flush_all(self) -> None:
        for number in sorted(self._clients):
            self._flush(number)

    def _flush(self, number: int) -> None:
        client = self._clients.get(number)
        while client is not None and client.queue and client.queue[0][0] <= self._stable:
            _, frame = client.queue.popleft()
            self._show(number, frame)
            client = self._clients.get(number)  # showing it may have ended it
