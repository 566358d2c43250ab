"""What the clients of one replica asked for, numbered, and kept until it was seen applied.

Operations go out in order, as many in a message as fit. After an install everything that is not applied goes
out again, for what was under way may be lost; the numbers make repeats harmless (dlm.md 6.1, 6.5). They are
kept as the bytes that are sent, so that what waits costs nothing while it waits.

While nobody orders them they pile up here, so there are bounds: who has asked for too much is refused more (dlm.md 6.8,
39). What gives something back is always taken, since nobody could do without it.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import islice

from clustermd.dlm.wire import Frame, pack
from clustermd.errors import Refused

OVERHEAD_BYTES = 64
OF_A_SESSION = 4096
OF_A_NODE = 1 << 16
"""Operations that may wait to be ordered before a session, or all of a node, may not ask for more."""
_ASKS = frozenset(("join", "request", "convert", "purge"))


class Outbox:
    """Operations by number, from 1. `sent` is the last one that went out in this view."""

    def __init__(self) -> None:
        self._first = 1
        self._waiting: deque[bytes] = deque()
        self._whose: deque[int] = deque()
        self._of: Counter[int] = Counter()
        self.sent = 0

    def check_room(self, session: int, word: str) -> None:
        """Raises Refused ("too-many-operations") if `session` may not ask for `word` now."""
        if word not in _ASKS:
            return
        whose, waiting, most = "this session", self._of[session], OF_A_SESSION
        if len(self._waiting) >= OF_A_NODE:
            whose, waiting, most = "this node", len(self._waiting), OF_A_NODE
        if waiting >= most:
            raise Refused(
                "too-many-operations",
                f"{waiting} lock operations of {whose} wait to be ordered, and no more than {most} may: wait until "
                "some are done (clustermd cluster status says why the cluster stands still)",
                waiting=waiting,
            )

    def add(self, op: Frame) -> None:
        """`op` is [session, word, ...]."""
        self._waiting.append(pack(op))
        self._whose.append(op[0])
        self._of[op[0]] += 1

    def clear(self) -> None:
        self._first += len(self._waiting)
        self._waiting.clear()
        self._whose.clear()
        self._of.clear()

    def applied(self, last: int) -> None:
        """Operations up to `last` are part of the state."""
        while self._waiting and self._first <= last:
            self._waiting.popleft()
            self._first += 1
            session = self._whose.popleft()
            self._of[session] -= 1
            if not self._of[session]:
                del self._of[session]
        self.sent = max(self.sent, last)

    def send_again_after(self, last: int) -> None:
        """Only what is applied counts as sent."""
        self.sent = last
        self.applied(last)

    def next_batch(self, max_bytes: int) -> tuple[int, list[bytes]]:
        """(number of the first, packed operations) that are to be sent next; no operations if there are none."""
        first = max(self._first, self.sent + 1)
        size = OVERHEAD_BYTES
        batch: list[bytes] = []
        for op in islice(self._waiting, first - self._first, None):
            size += len(op)
            if batch and size > max_bytes:
                break
            batch.append(op)
        return first, batch
