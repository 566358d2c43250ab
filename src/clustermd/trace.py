"""Named points of the protocol, for the log, for tests and for crash harnesses.

`trace.point("takeover.merged", slot=1)` costs one attribute test when nobody listens. Names are
`<concept>.<step>`; the steps of appendix D of the md-cluster specification are all points.
A listener may raise or end the process: that is how a crash at a point is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]


class Trace:
    """A fan-out of points to listeners. `on` is False while there is no listener."""

    __slots__ = ("_listeners", "on")

    def __init__(self) -> None:
        self.on = False
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)
        self.on = True

    def point(self, name: str, **fields: Any) -> None:
        if self.on:
            for listener in self._listeners:
                listener(name, fields)
