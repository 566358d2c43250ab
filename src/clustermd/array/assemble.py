"""From paths to members: open, read the superblocks, choose the freshest, say who belongs and who does not.

Nothing is written here. The rules are md-cluster spec 1.13: most events decide; a device one event behind is
up to date; one that is older, or that the freshest calls faulty or does not know, is left out. A clustered array
is assembled the same way on every node, and looks again after it has joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clustermd.array.member import Member
from clustermd.array.metadata import EVENT_MARGIN, newest_of
from clustermd.array.state import ArrayState
from clustermd.device.helpers import read_bytes
from clustermd.device.member_device import MemberDevice, Submitter
from clustermd.errors import BadBytes, Refused
from clustermd.ondisk import bad_blocks
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.superblock import (
    ROLE_FAULTY,
    ROLE_JOURNAL,
    ROLE_LIMIT,
    ROLE_SPARE,
    FeatureMap,
    Superblock,
    find,
    location,
)

Opener = Callable[[str], MemberDevice]

UNSUPPORTED = {
    FeatureMap.RESHAPE_ACTIVE: "a reshape is in progress",
    FeatureMap.REPLACEMENT: "a replacement is in progress",
    FeatureMap.JOURNAL: "it has a journal",
    FeatureMap.PPL: "it has a partial parity log",
    FeatureMap.MULTIPLE_PPLS: "it has partial parity logs",
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A device that was given but is not used, and why."""

    path: str
    why: str


@dataclass(slots=True)
class Assembly:
    """What an array is made of. `template` is a valid bitmap superblock, or None without a bitmap."""

    members: list[Member]
    reference: Superblock
    template: BitmapSuperblock | None
    left_out: list[LeftOut]

    @property
    def clustered(self) -> bool:
        return self.reference.clustered

    def close(self) -> None:
        for member in self.members:
            member.device.close()


async def read_superblock(submitter: Submitter, device: MemberDevice) -> Superblock:
    """The superblock of a device, whichever minor version. Raises BadBytes, or OSError if unreadable.

    Of the three places where one may be, those that cannot be read do not matter where another holds one.
    """
    parts: dict[int, bytes] = {}
    unreadable: OSError | None = None
    for minor in (0, 1, 2):
        at = location(minor, device.size_sectors)
        block_sectors = max(1, device.logical_block_bytes // 512)
        count = min(8, device.size_sectors - at) // block_sectors * block_sectors
        if at % block_sectors == 0 and count > 0:
            try:
                parts[at] = await read_bytes(submitter, device, at * 512, count * 512)
            except OSError as error:
                unreadable = unreadable or error
    try:
        return find(lambda sector, count: parts.get(sector, b"")[: count * 512], device.size_sectors)
    except BadBytes:
        if unreadable is not None:
            raise unreadable from None
        raise


async def load_members(paths: Sequence[str], opener: Opener, submitter: Submitter) -> Assembly:
    """Open and judge the devices of one array. Raises Refused, having closed what was opened.

    Codes: `not-one-array`, `no-good-member`, `unsupported-array`, `no-valid-bitmap`, and those of the device and
    of the bytes.
    """
    devices: list[MemberDevice] = []
    try:
        found: list[tuple[MemberDevice, Superblock]] = []
        for path in paths:
            device = opener(path)
            devices.append(device)
            try:
                found.append((device, await read_superblock(submitter, device)))
            except BadBytes as error:
                raise BadBytes(error.code, f"{path}: {error.message}", path=path) from error
            except OSError as error:
                raise Refused(
                    "superblock-unreadable",
                    f"{path} cannot be read ({error.strerror}): check the disk",
                    path=path,
                ) from error
        assembly = _judge(found)
        used = {id(member.device) for member in assembly.members}
        for device in devices:
            if id(device) not in used:
                device.close()
        assembly.template = await _read_template(assembly, submitter)
        await _read_bad_blocks(assembly, submitter)
    except BaseException:
        for device in devices:
            device.close()
        raise
    return assembly


def _judge(found: list[tuple[MemberDevice, Superblock]]) -> Assembly:
    first_path, first = found[0][0].path, found[0][1]
    for device, superblock in found[1:]:
        if superblock.set_uuid != first.set_uuid:
            raise Refused(
                "not-one-array",
                f"{device.path} and {first_path} belong to different arrays: name the devices of one array only",
                paths=[first_path, device.path],
            )
    newest = newest_of([superblock for _, superblock in found])
    _supported(newest)
    members: list[Member] = []
    left_out: list[LeftOut] = []
    taken: dict[int, str] = {}
    for device, superblock in sorted(found, key=lambda pair: -pair[1].events):
        role = newest.role_of(superblock.dev_number)
        why = _why_not(superblock, newest, role)
        if not why and superblock.dev_number in taken:
            why = f"it is a copy of {taken[superblock.dev_number]} (device {superblock.dev_number} twice)"
        if why:
            left_out.append(LeftOut(device.path, why))
            continue
        taken[superblock.dev_number] = device.path
        member = Member(device, superblock, len(members))
        member.adopt(superblock, role if role < ROLE_LIMIT else None)
        members.append(member)
    members.sort(key=lambda member: member.number)
    for index, member in enumerate(members):
        member.index = index
    good = {member.role for member in members if member.in_sync}
    if not good:
        why = "; ".join(f"{out.path}: {out.why}" for out in left_out) or "all are spares or still recovering"
        raise Refused("no-good-member", f"none of these devices is an up to date, in-sync member: {why}")
    return Assembly(members, newest, None, left_out)


def _supported(superblock: Superblock) -> None:
    if superblock.level != 1:
        raise Refused(
            "unsupported-array",
            f"this array has level {superblock.level}; only raid1 can be run",
            level=superblock.level,
        )
    for feature, why in UNSUPPORTED.items():
        if superblock.feature_map & feature:
            raise Refused(
                "unsupported-array", f"this array cannot be run: {why}; finish that with Linux md first"
            )
    if superblock.clustered and superblock.minor != 2:
        raise Refused("unsupported-array", "a clustered array has metadata 1.2, this one has another version")


def _why_not(superblock: Superblock, newest: Superblock, role: int) -> str:
    """Why this device cannot be a member now, or ""."""
    for field in ("level", "layout", "chunksize", "size", "raid_disks", "bitmap_offset"):
        if getattr(superblock, field) != getattr(newest, field):
            return f"its {field} ({getattr(superblock, field)}) differs from the others' ({getattr(newest, field)})"
    if role == ROLE_JOURNAL:
        return "it is a journal"
    if role == ROLE_FAULTY:
        return "the newest superblock calls it faulty"
    if role == ROLE_SPARE:
        if superblock.role < ROLE_LIMIT:
            return "the newest superblock does not count it as a member any more"
        return ""
    if superblock.events + EVENT_MARGIN < newest.events:
        return f"it is out of date: event {superblock.events}, the newest is {newest.events}"
    return ""


async def _read_bad_blocks(assembly: Assembly, submitter: Submitter) -> None:
    """The logs of members that have one. mdadm's --add gives a disk of a clustered array a log in the
    place of slot 1's bitmap: that is none, and our superblocks do not claim it any more."""
    reference, template = assembly.reference, assembly.template
    geometry = BitmapGeometry(template.chunksize, reference.size, template.nodes) if template else None
    for member in assembly.members:
        superblock = member.superblock
        place = bad_blocks.log_place(superblock, geometry)
        member.has_bad_block_log = place is not None
        if place is None or not superblock.feature_map & FeatureMap.BAD_BLOCKS:
            continue
        data = await read_bytes(submitter, member.device, place[0] * 512, place[1] * 512)
        member.bad_blocks = bad_blocks.parse(
            data, shift=superblock.bblog_shift, device_sectors=member.device.size_sectors
        )


async def _read_template(assembly: Assembly, submitter: Submitter) -> BitmapSuperblock | None:
    """A valid bitmap superblock: slot 0's of the first in-sync member that has one (spec 2.5)."""
    reference = assembly.reference
    if not reference.has_bitmap:
        return None
    problems = []
    for member in assembly.members:
        if not member.in_sync:
            continue
        superblock = member.superblock
        at = superblock.super_offset + superblock.bitmap_offset
        block = max(512, member.device.logical_block_bytes)
        try:
            header = BitmapSuperblock.from_bytes(
                (await read_bytes(submitter, member.device, at * 512, block))[:256]
            )
            header.check(reference.set_uuid)
            geometry = BitmapGeometry(header.chunksize, reference.size, header.nodes)
            geometry.check_fits(
                super_offset=superblock.super_offset,
                bitmap_offset=superblock.bitmap_offset,
                data_offset=superblock.data_offset,
                device_sectors=member.device.size_sectors,
                size=superblock.size,
            )
            if reference.clustered and header.nodes < 1:
                raise BadBytes("bitmap-slots-differ", "the array is clustered, its bitmap is not")
        except (BadBytes, OSError) as error:
            problems.append(f"{member.path}: {error}")
            continue
        return header
    raise Refused(
        "no-valid-bitmap",
        f"no in-sync member has a valid bitmap superblock ({'; '.join(problems)}): the array cannot be started "
        "without knowing what may differ",
    )


def check_complete(state: ArrayState, peers: Sequence[str], allow_degraded: bool) -> None:
    """A node must see every device that its `peers` use; alone, it may be told to do without.

    Raises Refused `no-good-member`, `member-missing-here`, `degraded`.
    """
    missing = state.missing_numbers()
    if not state.in_sync:
        raise Refused("no-good-member", f"{state.name}: no in-sync member is left")
    doubtful = [member.path for member in state.members if member.faulty and not member.fault_recorded]
    if doubtful and (peers or not allow_degraded):
        rest = f", so {', '.join(peers)} may go on with it" if peers else ": start the array anew with --run"
        raise Refused(
            "member-missing-here",
            f"{state.name}: {', '.join(doubtful)} cannot be used here, and no disk says that it has failed{rest}",
            paths=doubtful,
        )
    if not missing:
        return
    roles = ", ".join(str(state.roles[number]) for number in missing)
    if peers:
        raise Refused(
            "member-missing-here",
            f"{state.name}: the member with role {roles} is in use on {', '.join(peers)}, but was not found here: "
            "give this node the same devices, or fail that member first",
            numbers=missing,
        )
    if not allow_degraded:
        raise Refused(
            "degraded",
            f"{state.name}: the member with role {roles} is missing: give all devices, or insist with --run",
            numbers=missing,
        )
