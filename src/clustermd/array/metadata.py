"""Superblocks of a running array: read the newest, change, write on every member that works.

One writer at a time, cluster-wide: every change happens inside `coordinator.metadata_update()`, which begins
with a fresh read of all superblocks (the newest counts, rule 6) and ends with all nodes having followed. Events only
grow (rule 14), by one a write. Order inside one write: own bitmap superblock, then the superblocks of all
devices that are not faulty, all durable; a member that refuses is failed and the whole set written again
(md-cluster spec 1.7).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace

from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.coordinator import Coordinator
from clustermd.array.member import Member
from clustermd.array.member_io import bounded
from clustermd.array.state import ArrayState
from clustermd.device.helpers import read_bytes, write_bytes
from clustermd.errors import BadBytes, Refused
from clustermd.ondisk.superblock import (
    MAX_SECTOR,
    ROLE_FAULTY,
    ROLE_LIMIT,
    ROLE_SPARE,
    FeatureMap,
    Superblock,
)

EVENT_MARGIN = 1
"""A device whose events are this far behind the newest is still up to date (spec 1.13)."""


class Metadata:
    """Reads and writes the superblocks. `fail(mask, why)` is told which members refused."""

    def __init__(
        self,
        state: ArrayState,
        coordinator: Coordinator,
        bitmap_writer: BitmapWriter,
        fail: Callable[[int, str], object],
    ) -> None:
        self.state = state
        self.unrecorded: Callable[[], None] = lambda: None  # a fault is to be published, if there is one
        self.outvoted: Callable[[str], None] = lambda why: None  # others went on with what we cannot follow
        self.known_to_all: Callable[[], None] = lambda: None  # every node has followed what is recorded now
        self.coordinator = coordinator
        self.bitmap_writer = bitmap_writer
        self._fail = fail
        self._one = asyncio.Lock()
        self.resync_position: Callable[[], int] = lambda: MAX_SECTOR

    async def update(self, change: Callable[[], None] | None = None) -> None:
        """Adopt the newest superblock, apply `change` to the state, write, and have all nodes follow.

        Raises ClusterLost, LockRefused or Refused; what was written stays, and the caller tries again.
        """
        state = self.state
        try:
            async with self._one, self.coordinator.metadata_update():
                state.trace.point("metadata.token")
                await self.reload(ours=True)
                if change is not None:
                    change()
                    state.refresh()
                await self._write()
                state.trace.point("metadata.written", events=state.events, faulty=self._faulty())
        except (Refused, OSError):
            self.unrecorded()  # what was adopted here may be known to nobody else
            raise
        state.trace.point("metadata.acknowledged", events=state.events)
        self.known_to_all()

    def _faulty(self) -> list[int]:
        """Device numbers that the superblocks call faulty, for the trace."""
        roles = self.state.roles if self.state.trace.on else ()
        return [number for number, role in enumerate(roles) if role == ROLE_FAULTY]

    # --- reading --------------------------------------------------------------------------------

    async def begin_anew(self) -> None:
        """At the start of a life: what the disks say counts. A fault of the former life that no disk knows of is none,
        if the member can be read again; writes that missed it were answered to nobody (rule 17)."""
        for member in self.state.members:
            if member.faulty and not member.fault_recorded and not member.stuck:
                try:
                    await self.read_one(member)
                except (OSError, Refused):
                    continue
                member.faulty = False
                member.why = ""
                self.state.trace.point("member.trusted", number=member.number)
        self.state.refresh()
        # what cannot be read is judged by `check_complete`, once it is known who else is here
        await self.reload(ours=True)

    async def reload(self, *, ours: bool = False, announced: int | None = None) -> None:
        """Read every superblock that can be read and adopt the newest one's roles.

        Raises Refused `superblock-unreadable` if a member that should work gives none: nobody may then go
        on with a state that cannot be confirmed (rule 6). In an update of `ours` nobody else announced anything:
        such a member is failed, and the update records that, as long as another good one can be read.

        A member that only we have failed is read as well: others may have written there what fails all of ours, and
        then it is we who are `outvoted` (Refused `faults-conflict`). The device number `announced` as good must be
        read, else what was announced cannot be known (Refused `superblock-unconfirmed`, outvoted too).
        """
        state = self.state
        working = [member for member in state.members if not member.faulty]
        ours_alone = [
            member
            for member in state.members
            if member.faulty and (not member.fault_recorded or member.number == announced)
        ]
        asked = working + ours_alone
        results = await asyncio.gather(*(self.read_one(member) for member in asked), return_exceptions=True)
        fresh: dict[int, Superblock] = {}
        problems: dict[int, BaseException] = {}
        for member, result in zip(asked, results, strict=True):
            if isinstance(result, Superblock):
                fresh[member.index] = result
            elif isinstance(result, (OSError, Refused)):
                problems[member.index] = result
            else:
                raise result
        if not fresh:
            raise Refused(
                "superblock-unreadable",
                f"{state.name}: no member's superblock can be read: {'; '.join(map(str, problems.values()))}",
            )
        newest = newest_of(list(fresh.values()))
        self._check_votes(newest, ours_alone, problems, announced)
        readable = any(member.index in fresh for member in state.in_sync)
        for member in working:
            if member.index in problems and newest.role_of(member.number) < ROLE_LIMIT:
                if ours and readable:
                    continue
                raise Refused(
                    "superblock-unreadable",
                    f"{state.name}: {member.path} works according to the others, but its superblock cannot be "
                    f"read: {problems[member.index]}",
                    path=member.path,
                )
        self._adopt(newest, fresh)

    def _check_votes(
        self,
        newest: Superblock,
        ours_alone: list[Member],
        problems: dict[int, BaseException],
        announced: int | None,
    ) -> None:
        """Whether others went on with members that we have failed, and without those that we have. Raises Refused."""
        state = self.state
        for member in ours_alone:
            if member.number == announced and member.index in problems:
                words = (
                    f"{state.name}: others go on with {member.path}, which this node cannot read: "
                    f"{problems[member.index]}"
                )
                self.outvoted(words)
                raise Refused("superblock-unconfirmed", words, path=member.path)
        theirs = [member.path for member in ours_alone if newest.role_of(member.number) < ROLE_LIMIT]
        if theirs and not any(newest.role_of(member.number) < ROLE_LIMIT for member in state.in_sync):
            paths = ", ".join(theirs)
            words = (
                f"{state.name}: others have failed every member that this node has, and go on with {paths}"
            )
            self.outvoted(words)
            raise Refused("faults-conflict", words, paths=theirs)

    async def read_one(self, member: Member) -> Superblock:
        """The superblock of `member` as it is on disk now. Raises OSError or BadBytes."""
        device = member.device
        at = member.superblock.super_offset
        count = min(8, device.size_sectors - at)
        reading = read_bytes(self.state.submitter, device, at * 512, count * 512)
        data = await bounded(self.state, member, reading)
        superblock = Superblock.from_bytes(
            data, minor=member.superblock.minor, at_sector=at, device_sectors=device.size_sectors
        )
        if (
            superblock.set_uuid != member.superblock.set_uuid
            or superblock.device_uuid != member.superblock.device_uuid
        ):
            raise BadBytes(
                "not-our-superblock", f"{device.path} carries the superblock of another array or device now"
            )
        return superblock

    def _adopt(self, newest: Superblock, fresh: dict[int, Superblock]) -> None:
        state = self.state
        was_degraded = state.degraded
        state.reference = newest
        state.events = max(state.events, newest.events)
        state.roles = list(newest.dev_roles)
        for member in state.members:
            if member.faulty:
                member.fault_recorded = not newest.role_of(member.number) < ROLE_LIMIT
                if member.number < len(state.roles):
                    state.roles[member.number] = ROLE_FAULTY
                continue
            own = fresh.get(member.index)
            if own is None:
                self._drop(member, "its superblock cannot be read")
                continue
            role = newest.role_of(member.number)
            if role < ROLE_LIMIT and own.events + EVENT_MARGIN < newest.events:
                self._drop(
                    member, f"its superblock is old: event {own.events} where others are at {newest.events}"
                )
            elif role == ROLE_FAULTY:
                self._drop(member, "another node recorded it as faulty")
                member.fault_recorded = True
                state.unpublished = not state.read_only  # until it is certain that all know it, as we do now
            else:
                member.adopt(own, role if role < ROLE_LIMIT else None)
        state.refresh()
        state.trace.point("metadata.adopted", events=newest.events, faulty=self._faulty())
        if any(member.faulty and not member.fault_recorded for member in state.members):
            state.unpublished = not state.read_only
            self.unrecorded()
        if was_degraded and not state.degraded and state.bitmap is not None:
            state.bitmap.whole()
            state.trace.point("bitmap.whole")

    def _drop(self, member: Member, why: str) -> None:
        member.faulty = True
        member.in_sync = False
        member.fault_recorded = False
        member.why = why
        self.state.roles[member.number] = ROLE_FAULTY
        self.state.log.error("%s: failed, %s", member.path, why)
        self.state.trace.point("member.failed", number=member.number, why=why)

    # --- writing --------------------------------------------------------------------------------

    async def _write(self) -> None:
        state = self.state
        while True:
            state.events += 1
            recorded = [member for member in state.members if member.faulty]
            for member in state.members:
                if member.number < len(state.roles):
                    state.roles[member.number] = self._role_value(member)
            await self._write_bitmap_header()
            state.trace.point("metadata.header", events=state.events)
            targets = [member for member in state.members if not member.faulty]
            superblocks = [self._build(member) for member in targets]
            state.trace.point("metadata.write", events=state.events)
            results = await asyncio.gather(
                *(self._write_one(member, sb) for member, sb in zip(targets, superblocks, strict=True)),
                return_exceptions=True,
            )
            refused = 0
            for member, superblock, result in zip(targets, superblocks, results, strict=True):
                if isinstance(result, OSError):
                    if result.errno == errno.ESHUTDOWN:
                        raise result
                    refused |= 1 << member.index
                elif isinstance(result, BaseException):
                    raise result
                else:
                    member.superblock = superblock
                    state.counters.superblock_writes += 1
            if not refused:
                break
            if refused == sum(1 << member.index for member in targets):
                raise Refused("superblock-unwritable", f"{state.name}: no member takes a superblock any more")
            self._fail(refused, "its superblock could not be written")
            if not any(member.faulty for member in state.member_of(refused)):
                raise Refused(
                    "superblock-unwritable", f"{state.name}: the last good member takes no superblock"
                )
        for member in recorded:
            member.fault_recorded = True

    def _role_value(self, member: Member) -> int:
        if member.faulty:
            return ROLE_FAULTY
        return ROLE_SPARE if member.role is None else member.role

    def _build(self, member: Member) -> Superblock:
        state = self.state
        features = member.superblock.feature_map & ~FeatureMap.RECOVERY_OFFSET & ~FeatureMap.RECOVERY_BITMAP
        recovery_offset = member.superblock.recovery_offset
        if member.role is not None and not member.in_sync:
            features |= FeatureMap.RECOVERY_OFFSET
            recovery_offset = member.recovery_offset
        old = member.superblock
        if not member.has_bad_block_log:
            features &= ~FeatureMap.BAD_BLOCKS
            old = replace(old, bblog_offset=0, bblog_size=0)
        return replace(
            old,
            feature_map=features,
            recovery_offset=recovery_offset,
            events=state.events,
            utime=int(state.clock.now_s()),
            resync_offset=self._resync_offset(),
            dev_roles=tuple(state.roles),
            cnt_corrected_read=member.corrected_errors,
        )

    def _resync_offset(self) -> int:
        """Where equality ends: everywhere if clean; a clustered array in use says 0 (spec 1.9)."""
        return self.resync_position() if self.state.clean else 0

    async def _write_one(self, member: Member, superblock: Superblock) -> None:
        content = superblock.to_bytes()
        content += bytes(-len(content) % member.device.logical_block_bytes)
        at = superblock.super_offset * 512
        writing = write_bytes(self.state.submitter, member.device, at, content, fua=True)
        await bounded(self.state, member, writing)
        self.state.trace.point("metadata.superblock", member=member.number, events=superblock.events)

    async def _write_bitmap_header(self) -> None:
        state = self.state
        header, bitmap = state.bitmap_header, state.bitmap
        if header is None or bitmap is None or not bitmap.persistent:
            return
        self.set_header(events=state.events)
        await self.bitmap_writer.flush()

    def set_header(self, *, events: int | None = None, events_cleared: int | None = None) -> None:
        """Change the own slot's bitmap superblock in its page; the next flush writes it."""
        state = self.state
        header, bitmap = state.bitmap_header, state.bitmap
        if header is None or bitmap is None or not bitmap.persistent:
            return
        state.bitmap_header = replace(
            header,
            events=header.events if events is None else events,
            events_cleared=header.events_cleared if events_cleared is None else events_cleared,
        )
        bitmap.pages[0][:256] = state.bitmap_header.to_bytes()
        bitmap.lazy.add(0)


def newest_of(superblocks: list[Superblock]) -> Superblock:
    """The freshest of one array's superblocks: most events among devices with an active role (spec 1.13)."""
    active = [superblock for superblock in superblocks if superblock.role < ROLE_LIMIT]
    return max(active or superblocks, key=lambda superblock: superblock.events)
