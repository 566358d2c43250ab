"""What the array process asks of the array it runs, and the order in which Linux lists members.

`start_array` makes a `RunningArray` of real members and a real NBD server; tests make one of plain values.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from clustermd.array.status import ArrayStatus
from clustermd.node.config import ArrayConfig
from clustermd.rundir import RunDir
from clustermd.trace import Trace


class RunningArray(Protocol):
    """An array that serves I/O, until it is stopped or ends by itself.

    `changed` is set whenever the status may have changed.
    """

    changed: asyncio.Event

    def status(self) -> ArrayStatus: ...

    def clients(self) -> list[str]:
        """Who is connected by NBD, in words for people."""

    async def idle(self) -> None:
        """Return when no sync runs or is pending."""

    async def stop(self, force: bool) -> None:
        """End requests in flight, disconnect clients (only with `force` there are any), leave, close."""

    async def ended(self) -> str:
        """Return when the array cannot go on, with the reason. Never returns otherwise."""


Notice = Callable[[str], None]
"""Says why a start takes long, to the person who waits for it."""

StartArray = Callable[[ArrayConfig, RunDir, Trace, Notice], Awaitable[RunningArray]]


class MemberOrder:
    """The order of Linux's list of members, newest first, which mdstat shows.

    -C adds members in the order of their numbers. -A adds the one it read the array from last, so that it
    comes first and the others follow backwards. What is added later comes before all. Seen in mdstat files
    recorded from Linux 6.1: `vdc[1] vdb[0]` after -C, `vdb[0] vdc[1]` after -A, `vdd[2] vdc[1] vdb[0]` after
    --add.
    """

    def __init__(self, created: bool) -> None:
        self._created = created
        self._numbers: list[int] = []

    def apply(self, status: ArrayStatus) -> ArrayStatus:
        """`status` with its members in that order."""
        present = {member.number: member for member in status.members}
        if not self._numbers:
            numbers = sorted(present)
            active = [number for number in numbers if present[number].role is not None]
            last_added = numbers if self._created else active[:1]
            others = [number for number in numbers if number not in last_added]
            self._numbers = [*reversed(last_added), *reversed(others)]
        self._numbers = [number for number in self._numbers if number in present]
        for number in sorted(set(present) - set(self._numbers)):
            self._numbers.insert(0, number)
        return replace(status, members=tuple(present[number] for number in self._numbers))
