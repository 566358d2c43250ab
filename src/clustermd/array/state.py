"""What the parts of one array share: members, bitmap, windows, ranges, and the counters people see.

Each part (write, read, bitmap writer, metadata, faults, resync, sweep) is a class of its own over this state.
`refresh` is called after every change of a member, and keeps the lists the hot path uses.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from clustermd.array.bitmap import Bitmap
from clustermd.array.member import Member
from clustermd.array.ranges import Ranges
from clustermd.array.request import Request
from clustermd.array.waiters import Waited
from clustermd.array.windows import Windows
from clustermd.clock import Clock
from clustermd.device.member_device import Gate, Submitter
from clustermd.layout import raid1
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.superblock import ROLE_LIMIT, Superblock
from clustermd.trace import Trace

EXCLUDED = errno.ENODEV
"""The answer to what may never be done: it was asked of a life that others may have taken for dead."""


class InFlight(Waited, Protocol):
    """Something that waits for members since `tick`."""

    tick: int

    def give_up(self) -> int:
        """Wait no longer; the mask of members that have not answered."""

    def exclude(self) -> None:
        """Whatever members answer, the request is refused: its life was ended by others."""


@dataclass(slots=True)
class Counters:
    """Totals since the start of the process."""

    data_reads: int = 0
    data_writes: int = 0
    bitmap_writes: int = 0
    superblock_writes: int = 0
    resynced_chunks: int = 0
    takeovers: int = 0
    rejoins: int = 0
    read_errors_corrected: int = 0


class ArrayState:
    """The shared state. Sectors are array sectors unless they say otherwise."""

    def __init__(
        self,
        name: str,
        members: list[Member],
        reference: Superblock,
        submitter: Submitter,
        clock: Clock,
        trace: Trace,
        *,
        read_only: bool,
        device_timeout_s: int,
    ) -> None:
        self.name = name
        self.members = members
        self.reference = reference
        self.submitter = submitter
        self.clock = clock
        self.trace = trace
        self.read_only = read_only
        self.device_timeout_s = device_timeout_s
        self.log = logging.getLogger(f"clustermd.{name}")
        self.array_sectors = raid1.array_sectors(reference.size)
        self.raid_disks = reference.raid_disks
        self.events = reference.events
        self.roles: list[int] = list(reference.dev_roles)
        self.bitmap_header: BitmapSuperblock | None = None
        self.bitmap: Bitmap | None = None
        self.slot = 0
        self.windows = Windows()
        self.ranges = Ranges()
        self.counters = Counters()
        self.tick = 0  # seconds in which I/O was not held
        self.tick_s = 1.0
        self.foreground = (
            0  # client requests since the start; a resync sees from it whether others want the disks
        )
        self.held = "not started"
        self.settled = False
        self.unpublished = False
        self.degraded = 0
        self.clean = True  # what the superblocks are to say
        self.active = False  # they say that the array is in use: writes may go
        self.stopping = False
        # a life of ours may count as dead for others: what is asked before the next one serves is refused
        self.excluded = False
        self.exclusions = 0
        self.writable: list[Member] = []
        self.in_sync: list[Member] = []
        # the largest logical block of the writable members: what any of them can read and write
        self.block_sectors = 1
        self.parked: list[Request] = []
        self.flushes: set[InFlight] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.activate: Callable[[], None] = lambda: None  # a write waits for the array to be marked active
        self.refresh()

    @property
    def gate(self) -> Gate:
        return self.submitter.gate

    def keep(self, request: Request) -> None:
        """Start `request` again when I/O goes on; after an exclusion that may not be, and it is refused."""
        if self.excluded:
            self.refuse(request)
        else:
            self.parked.append(request)

    def refuse(self, request: Request) -> None:
        """Answer a request of which nothing is in flight, and nothing will ever be."""
        request.error = EXCLUDED
        request.owner.completed(request)

    def refresh(self) -> None:
        """Recompute what depends on members' roles."""
        with_role = sorted((m for m in self.members if m.writable), key=lambda member: member.role or 0)
        self.writable = with_role
        self.in_sync = [member for member in with_role if member.in_sync]
        self.block_sectors = max((m.device.logical_block_bytes // 512 for m in with_role), default=1)
        self.degraded = self.raid_disks - len({member.role for member in self.in_sync})

    def missing_numbers(self) -> list[int]:
        """Device numbers that have a role according to the superblocks, but no device here."""
        here = {member.number for member in self.members}
        return [number for number, role in enumerate(self.roles) if role < ROLE_LIMIT and number not in here]

    def member_of(self, mask: int) -> list[Member]:
        """The members whose bits are set in `mask`."""
        return [member for member in self.members if mask >> member.index & 1]

    def the_bitmap(self) -> Bitmap:
        """The bitmap of a running array."""
        assert self.bitmap is not None, "an array that is not started has no bitmap"
        return self.bitmap

    def first_copy(self, lo: int, hi: int, without: int = 0) -> Member | None:
        """The first usable member in role order, not in mask `without`; in-sync ones first.

        It is the one that all nodes read while copies may differ, and the source of every copy. How far a
        recovering one is filled, only the node that fills it knows to the sector.
        """
        fallback = None
        for member in self.writable:
            if without >> member.index & 1 or not member.good_for(lo, hi):
                continue
            if member.in_sync and not member.write_mostly:
                return member
            if fallback is None or (member.in_sync and not fallback.in_sync):
                fallback = member
        return fallback
