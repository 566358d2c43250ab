"""The lease in front of the I/O gate: until when this node may submit, as 8 bytes that all its processes map.

Nodes that lost contact cannot tell each other so. Therefore a node may write only while its lease runs, and the
others count it as harmless only when that lease must have run out (dlm.md 6.2). The node's lockd writes the moment of
CLOCK_BOOTTIME, in nanoseconds, into `$CLUSTERMD_RUN/$CLUSTERMD_NODE/lease`; each array process reads it before every
submission. That clock goes on while a process is stopped or the machine asleep, so one that wakes up late finds its
lease over, before it has heard anything (dlm.md 6.8, 32 and 33).

A look is one load of an aligned 64-bit word, which no writer can tear, and one reading of the clock. A lockd that
dies leaves a lease that runs out by itself. The next one makes a file of its own: what it renews counts for who has
joined through it, and never for a process that slept through the end of the former one and still holds requests of a
life that others took for dead.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from clustermd.errors import Refused

UNBOUNDED_NS = (1 << 63) - 1
"""A lease that needs no renewal."""
_BYTES = 8


class Lease(Protocol):
    """What the gate asks before each submission."""

    def valid(self) -> bool:
        """Whether this node may submit now. Called from any thread."""


class LeaseFile:
    """The lease of one node. lockd `make`s it and renews it, array processes `open` it and look.

    `now_ns()` reads CLOCK_BOOTTIME.
    """

    __slots__ = ("_map", "_now_ns", "_until")

    def __init__(self, descriptor: int, now_ns: Callable[[], int], writable: bool) -> None:
        self._now_ns = now_ns
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(descriptor, _BYTES, access=access)
        self._until = memoryview(self._map).cast("Q")

    @classmethod
    def make(cls, path: Path, now_ns: Callable[[], int]) -> LeaseFile:
        """For lockd: a new file, with no lease yet; who has a former one open sees nothing of it. Raises OSError."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _BYTES)
            lease = cls(descriptor, now_ns, writable=True)
        finally:
            os.close(descriptor)
        lease.expire()
        return lease

    @classmethod
    def open(cls, path: Path, now_ns: Callable[[], int]) -> LeaseFile:
        """For who does I/O. Raises Refused ("no-lease") when this node's lockd has made none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(
                "no-lease",
                f"the lease of this node, {path}, cannot be opened ({error.strerror}), so nothing may be written:"
                " its lockd was started for another engine, or somebody removed the file; stop the arrays of this"
                " node and start them again",
                path=str(path),
            ) from error
        try:
            if os.fstat(descriptor).st_size != _BYTES:
                raise Refused(
                    "no-lease", f"{path} is no lease: it has to have {_BYTES} bytes", path=str(path)
                )
            return cls(descriptor, now_ns, writable=False)
        finally:
            os.close(descriptor)

    def valid(self) -> bool:
        return self._now_ns() < self._until[0]

    @property
    def until_ns(self) -> int:
        """The moment of CLOCK_BOOTTIME at which it ends."""
        return self._until[0]

    def renew(self, until_ns: int) -> None:
        """Let it end at `until_ns`, unless it ends later already."""
        if until_ns > self._until[0]:
            self._until[0] = until_ns

    def expire(self) -> None:
        """End it now."""
        self._until[0] = 0

    def close(self) -> None:
        self._until.release()
        self._map.close()
