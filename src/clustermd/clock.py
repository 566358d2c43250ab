"""Time and randomness, handed in so that a simulator can replace them.

`monotonic_s` is for intervals, `boottime_s` goes on while the process is stopped (leases), `now_s`
is wall time for what is written to disks. Nothing below `node` reads a clock in any other way.
"""

from __future__ import annotations

import os
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float: ...

    def boottime_s(self) -> float: ...

    def now_s(self) -> float: ...


class Random(Protocol):
    def bytes(self, count: int) -> bytes: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def boottime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def now_s(self) -> float:
        return time.time()


class SystemRandom:
    """The kernel's random numbers."""

    def bytes(self, count: int) -> bytes:
        return os.urandom(count)
