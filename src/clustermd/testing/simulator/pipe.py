"""A connection between two simulated processes: frames arrive in order, each batch after a delay of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from clustermd.testing.simulator.dice import Stream
from clustermd.testing.simulator.loop import Process, SimLoop

DELAYS_S = (0.00002, 0.00003, 0.00005, 0.0001, 0.0003)


class Pipe:
    """One direction. `receive(frame)` runs in the receiving process; `ended()` there when the sender is gone."""

    __slots__ = ("_delivering", "_draw", "_ended", "_frames", "_loop", "_process", "_receive")

    def __init__(
        self,
        loop: SimLoop,
        draw: Stream,
        process: Process,
        receive: Callable[[Any], None],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._draw = draw
        self._process = process
        self._receive = receive
        self._ended = ended
        self._frames: deque[Any] = deque()
        self._delivering = False

    def send(self, frame: Any) -> None:
        self._frames.append(frame)
        self._soon()

    def end(self) -> None:
        """The sender is gone: what it sent arrives first."""
        self._frames.append(_END)
        self._soon()

    def _soon(self) -> None:
        if not self._delivering and self._frames:
            self._delivering = True
            delay_s = DELAYS_S[self._draw.below(len(DELAYS_S))]
            self._loop.call_later(delay_s, self._deliver, context=self._process.context.copy())

    def _deliver(self) -> None:
        for _ in range(1 + self._draw.below(len(self._frames))):
            frame = self._frames.popleft()
            if frame is _END:
                self._frames.clear()
                self._ended()
                break
            self._receive(frame)
        self._delivering = False
        self._soon()


_END = object()
