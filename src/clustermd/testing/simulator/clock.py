"""The clocks and random numbers of simulated nodes: virtual time, numbers from the dice."""

from __future__ import annotations

from clustermd.testing.simulator.loop import SimLoop

BEGUN_S = 1_700_000_000
"""Wall time at the start of every run."""


class SimClock:
    """Virtual time. It goes on while a process is paused, as all clocks do."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def monotonic_s(self) -> float:
        return self._loop.time()

    def boottime_s(self) -> float:
        return self._loop.time()

    def now_s(self) -> float:
        return BEGUN_S + self._loop.time()
