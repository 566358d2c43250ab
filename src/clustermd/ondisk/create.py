"""What `mdadm --create` would write: where everything lies, which chunk, which names.

`plan_create` takes devices (path and size), wishes, UUIDs and the time, and answers with the bytes for every
member, or refuses in mdadm's words. It is arithmetic only: looking at the devices, drawing the UUIDs and
writing is for the caller, so nothing is written before everything is checked.

The theory, with all numbers in sectors (md-cluster spec 1.10, 1.11, 2.6, 2.7):

- 1.1 and 1.2 leave a headroom before the data, 128 MiB or less on small devices, in which the bitmaps lie;
  the first device decides for all. 1.0 has its bitmap and bad block log right before the superblock.
- The smallest member decides the component size, rounded down to 64 KiB.
- The bitmap's chunk is 64 MiB, or what keeps the bits within the room that the size allows.
- Slot 0 starts with every bit set and drives the first resync; the other slots start clear.
- The superblock is written last: a member half written is none.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clustermd.errors import Refused
from clustermd.ondisk.bitmap_bits import MAX_BITS, BitmapGeometry
from clustermd.ondisk.bitmap_superblock import (
    CLUSTER_NAME_MAX_BYTES,
    HEADER_BYTES,
    MAX_NODES,
    MAX_WRITE_BEHIND,
    VERSION_CLUSTERED,
    VERSION_NORMAL,
    BitmapSuperblock,
)
from clustermd.ondisk.superblock import (
    LEVEL_RAID1,
    MAX_DEVICES,
    MAX_SECTOR,
    MIN_DEVICE_SECTORS,
    ROLE_SPARE,
    FeatureMap,
    Superblock,
    location,
    written_sectors,
)

BAD_BLOCK_LOG_SECTORS = 8
DEFAULT_CHUNK_BYTES = 64 << 20
DEFAULT_NODES = 4
MIN_CHUNK_BYTES = 4096
ROUND_SECTORS = 128
"""RAID1 component sizes are multiples of 64 KiB."""
BITMAP_OFFSET = 8
"""Sectors from a 1.1 or 1.2 superblock to the bitmap of slot 0."""
_GIB = 1 << 21
_MIB = 1 << 11
_ROOM_LIMIT = 256


class BitmapKind(enum.Enum):
    """The value of `--bitmap`."""

    NONE = "none"
    INTERNAL = "internal"
    CLUSTERED = "clustered"


@dataclass(frozen=True, slots=True)
class NewMember:
    """A device for a new array: its path, for messages, and its size."""

    path: str
    sectors: int


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """One member of a new array. `writes` are (device sector, bytes), to be done in this order."""

    path: str
    superblock: Superblock
    writes: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class CreatePlan:
    """A new array. `members` holds the devices that are there; a missing one has no entry."""

    members: tuple[MemberPlan, ...]
    size_sectors: int
    bitmap: BitmapSuperblock | None
    geometry: BitmapGeometry | None


def plan_create(
    *,
    devices: Sequence[NewMember | None],
    raid_disks: int,
    name: str,
    set_uuid: bytes,
    device_uuids: Sequence[bytes],
    now: int,
    homehost: str = "",
    minor: int = 2,
    level: int = LEVEL_RAID1,
    bitmap: BitmapKind = BitmapKind.INTERNAL,
    nodes: int = DEFAULT_NODES,
    cluster_name: str = "",
    bitmap_chunk_bytes: int | None = None,
    data_offset_sectors: int | None = None,
    size_sectors: int | None = None,
    daemon_sleep: int = 5,
    write_behind: int = 0,
    assume_clean: bool = False,
    force: bool = False,
) -> CreatePlan:
    """Plan an array of `devices`: the first `raid_disks` get roles, the others are spares.

    None stands for `missing`. `set_uuid` and each of `device_uuids` (one per entry of `devices`) are 16
    bytes, `now` seconds since 1970, `minor` the metadata version 1.`minor`. `nodes` and `cluster_name`
    count for a clustered bitmap only. Nothing is given for the chunk of the array: RAID1 has none. `force`
    allows an array of one device. Raises Refused, before anything could have been written.
    """
    clustered = bitmap is BitmapKind.CLUSTERED
    _check_shape(devices, raid_disks, minor, level, force)
    _check_wishes(
        set_uuid, device_uuids, devices, bitmap, minor, nodes, cluster_name, daemon_sleep, write_behind
    )
    present = [device for device in devices if device is not None]
    for device in present:
        if device.sectors < MIN_DEVICE_SECTORS:
            raise _too_small(device, 0)
    data_offset = _data_offset(present[0], minor, data_offset_sectors)
    size = _component_size(present, minor, data_offset, size_sectors)

    template = Superblock(
        minor=minor,
        set_uuid=set_uuid,
        set_name=array_name(name, homehost),
        ctime=now,
        level=level,
        size=size,
        raid_disks=raid_disks,
        data_offset=data_offset,
        data_size=0,
        super_offset=0,
        dev_number=0,
        device_uuid=bytes(16),
        utime=now,
        events=0,
        resync_offset=MAX_SECTOR if assume_clean else 0,
        dev_roles=_roles(devices, raid_disks),
    )
    header = None
    if bitmap is not BitmapKind.NONE:
        header = BitmapSuperblock(
            version=VERSION_CLUSTERED if clustered else VERSION_NORMAL,
            uuid=set_uuid,
            events=0,
            events_cleared=0,
            sync_size=size,
            chunksize=choose_chunk_bytes(size, bitmap_chunk_bytes),
            daemon_sleep=daemon_sleep,
            write_behind=write_behind,
            nodes=nodes if clustered else 0,
            cluster_name=cluster_name if clustered else "",
        )
        template = replace(
            template,
            bitmap_offset=_bitmap_offset(minor, BitmapGeometry.of(header)),
            feature_map=FeatureMap.BITMAP_OFFSET | (FeatureMap.CLUSTERED if clustered else FeatureMap(0)),
        )
    members = tuple(
        plan_member(template, header, device=device, dev_number=number, device_uuid=device_uuids[number])
        for number, device in enumerate(devices)
        if device is not None
    )
    return CreatePlan(members, size, header, None if header is None else BitmapGeometry.of(header))


def plan_member(
    template: Superblock,
    header: BitmapSuperblock | None,
    *,
    device: NewMember,
    dev_number: int,
    device_uuid: bytes,
) -> MemberPlan:
    """What makes `device` a member: for a new array, and for `--add` to one.

    `template` gives everything that members share, events and role table as they shall stand in the new
    member's superblock (a table too short for `dev_number` is lengthened with spares); places, device
    number, device UUID and what is known of one device only are this device's. `header` is the array's
    bitmap superblock, None without bitmap: the new member gets all slots' areas, slot 0 with every bit set
    (spec 2.6). Raises Refused when the device is too small or the areas don't fit.
    """
    super_offset = location(template.minor, device.sectors)
    geometry = None if header is None else BitmapGeometry.of(header)
    sb = replace(
        template,
        super_offset=super_offset,
        data_size=_data_size(template, device.sectors, super_offset),
        dev_number=dev_number,
        dev_roles=_lengthened(template.dev_roles, dev_number + 1),
        device_uuid=device_uuid,
        feature_map=template.feature_map & (FeatureMap.BITMAP_OFFSET | FeatureMap.CLUSTERED),
        recovery_offset=0,
        cnt_corrected_read=0,
        devflags=0,
        bblog_shift=0,
        bblog_size=0,
        bblog_offset=0,
    )
    if sb.data_size < sb.size:
        raise _too_small(device, sb.size)
    if geometry is not None and template.minor:
        _check_room(geometry, sb)
    if not (header is not None and header.nodes):
        log_offset = _bad_block_log_offset(sb, geometry)
        if log_offset:
            sb = replace(sb, bblog_size=BAD_BLOCK_LOG_SECTORS, bblog_offset=log_offset)
    writes: list[tuple[int, bytes]] = []
    if header is not None and geometry is not None:
        geometry.check_fits(
            super_offset=super_offset,
            bitmap_offset=sb.bitmap_offset,
            data_offset=sb.data_offset,
            device_sectors=device.sectors,
            size=sb.size,
        )
        writes = [
            (
                geometry.start_sector(super_offset, sb.bitmap_offset, slot),
                geometry.area_bytes(header, all_ones=slot == 0),
            )
            for slot in range(geometry.slots)
        ]
    if sb.has_bad_block_log:
        writes.append((super_offset + sb.bblog_offset, b"\xff" * (sb.bblog_size * 512)))
    data = sb.to_bytes()
    Superblock.from_bytes(data, minor=sb.minor, at_sector=super_offset, device_sectors=device.sectors)
    writes.append((super_offset, data))
    return MemberPlan(device.path, sb, tuple(writes))


def array_name(name: str, homehost: str) -> str:
    """`homehost:name`, or the bare name where there is no home host, it has a colon, or it is too long."""
    whole = f"{homehost}:{name}"
    if homehost and ":" not in name and len(whole.encode("utf-8", "surrogateescape")) < 32:
        return whole
    cut = name.encode("utf-8", "surrogateescape")[:31]
    return cut.decode("utf-8", "surrogateescape")


def bitmap_space_sectors(sectors: int) -> int:
    """Sectors kept for a bitmap on a device, or under a component, of this size (spec 1.11)."""
    if sectors < 128:
        return 0
    if sectors - 128 >= 200 * _GIB:
        return 256
    if sectors - 8 > 8 * _GIB:
        return 128
    return 8


def default_data_offset(device_sectors: int) -> int:
    """Where data starts on a 1.1 or 1.2 RAID1 whose first device has this size (spec 1.11)."""
    headroom = 128 * _MIB
    while headroom << 10 > device_sectors and headroom:
        headroom >>= 1
    return _round_up(24 + bitmap_space_sectors(device_sectors) + headroom, _MIB)


def choose_chunk_bytes(size_sectors: int, wanted_bytes: int | None) -> int:
    """Bytes per bitmap bit for a component of this size (spec 2.7).

    Raises Refused `bad-bitmap-chunk` when the wish is no power of two or makes more bits than there is room.
    """
    room = bitmap_space_sectors(size_sectors)
    if wanted_bytes is None:
        room = min(room, _ROOM_LIMIT)
    max_bits = (room * 512 - HEADER_BYTES) * 8
    if max_bits <= 0:
        raise Refused("bitmap-room", "there is no room for a write-intent bitmap on devices this small")
    smallest = MIN_CHUNK_BYTES
    bits = size_sectors * 512 // smallest + 1
    while bits > min(max_bits, MAX_BITS):
        smallest *= 2
        bits = (bits + 1) // 2
    if wanted_bytes is None:
        return max(smallest, DEFAULT_CHUNK_BYTES)
    if wanted_bytes < smallest or wanted_bytes & (wanted_bytes - 1) or wanted_bytes >= 1 << 32:
        raise Refused(
            "bad-bitmap-chunk",
            f"Given bitmap chunk size not supported: it must be a power of 2 of at least {smallest // 1024}K "
            "on devices of this size.",
            smallest_bytes=smallest,
        )
    return wanted_bytes


def max_nodes(geometry: BitmapGeometry, *, super_offset: int, data_offset: int) -> int:
    """How many slots' areas fit between superblock and data (spec 2.6)."""
    return max(0, (data_offset - super_offset) * 512 - 4096) // geometry.bytes_per_node


def _check_shape(
    devices: Sequence[NewMember | None], raid_disks: int, minor: int, level: int, force: bool
) -> None:
    if level != LEVEL_RAID1:
        raise Refused("bad-level", f"RAID level {level} is not supported: only raid1 is.", level=level)
    if minor not in (0, 1, 2):
        raise Refused("bad-metadata", f"unrecognised metadata version 1.{minor}: 1.0, 1.1 and 1.2 are known.")
    if raid_disks < 1 or len(devices) > MAX_DEVICES:
        raise Refused("bad-raid-disks", f"invalid number of raid devices: {max(raid_disks, len(devices))}")
    if raid_disks == 1 and not force:
        raise Refused(
            "one-device",
            "'1' is an unusual number of drives for an array, so it is probably a mistake. "
            "If you really mean it you will need to specify --force before setting the number of drives.",
        )
    if len(devices) < raid_disks:
        raise Refused(
            "too-few-devices", "You haven't given enough devices (real or missing) to create this array"
        )
    if None in devices[raid_disks:]:
        raise Refused("missing-spare", "'missing' cannot stand for a spare: list it among the first devices.")
    if not any(devices[:raid_disks]):
        raise Refused("no-devices", "No devices given: an array needs at least one that is not missing.")
    paths = [device.path for device in devices if device is not None]
    for path in paths:
        if paths.count(path) > 1:
            raise Refused("device-twice", f"device {path} is given more than once.", path=path)


def _check_wishes(
    set_uuid: bytes,
    device_uuids: Sequence[bytes],
    devices: Sequence[NewMember | None],
    bitmap: BitmapKind,
    minor: int,
    nodes: int,
    cluster_name: str,
    daemon_sleep: int,
    write_behind: int,
) -> None:
    if len(device_uuids) != len(devices) or any(len(uuid) != 16 for uuid in (set_uuid, *device_uuids)):
        raise ValueError("one UUID of 16 bytes for the array and for each device is needed")
    if not 1 <= daemon_sleep < 1 << 32:
        raise Refused("bad-delay", f"invalid bitmap delay: {daemon_sleep} seconds; it must be at least 1.")
    if not 0 <= write_behind <= MAX_WRITE_BEHIND:
        raise Refused(
            "bad-write-behind", f"Invalid value for maximum outstanding write-behind writes: {write_behind}."
        )
    if bitmap is not BitmapKind.CLUSTERED:
        return
    if minor != 2:
        raise Refused("clustered-metadata", "--bitmap=clustered needs metadata version 1.2.")
    if write_behind:
        raise Refused("clustered-write-behind", "write-behind mode is not supported with --bitmap=clustered.")
    if not 2 <= nodes <= MAX_NODES:
        raise Refused(
            "bad-nodes",
            f"clustered array needs two nodes at least, and at most {MAX_NODES}: {nodes}",
            nodes=nodes,
        )
    name_bytes = len(cluster_name.encode("utf-8", "surrogateescape"))
    if not 1 <= name_bytes <= CLUSTER_NAME_MAX_BYTES:
        raise Refused(
            "bad-cluster-name",
            f"a cluster name has 1 to {CLUSTER_NAME_MAX_BYTES} bytes; {cluster_name!r} has {name_bytes}.",
        )


def _roles(devices: Sequence[NewMember | None], raid_disks: int) -> tuple[int, ...]:
    """The role table: device i has role i, all else is spare."""
    roles = tuple(
        ROLE_SPARE if device is None or number >= raid_disks else number
        for number, device in enumerate(devices)
    )
    return _lengthened(roles, len(devices))


def _lengthened(roles: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """A table for at least that many devices, as long as fills its last sector (spec 1.2)."""
    entries = (_round_up(256 + 2 * max(devices, len(roles)), 512) - 256) // 2
    return roles + (ROLE_SPARE,) * (entries - len(roles))


def _data_offset(first: NewMember, minor: int, wanted: int | None) -> int:
    if minor == 0:
        if wanted:
            raise Refused("bad-data-offset", "--data-offset cannot be used with metadata version 1.0.")
        return 0
    offset = default_data_offset(first.sectors) if wanted is None else wanted
    lowest = location(minor, first.sectors) + 8
    if offset < lowest or offset % 8:
        raise Refused(
            "bad-data-offset",
            f"data offset {offset // 2}K is not possible: "
            f"it must be a multiple of 4K and at least {lowest // 2}K.",
        )
    return offset


def _component_size(present: Sequence[NewMember], minor: int, data_offset: int, wanted: int | None) -> int:
    smallest = min(present, key=lambda device: device.sectors)
    if minor:
        available = smallest.sectors - data_offset
    else:
        # Superblock, bad block log, bitmap.
        available = smallest.sectors - 16 - BAD_BLOCK_LOG_SECTORS - bitmap_space_sectors(smallest.sectors)
    # An explicit size is kept to 4 KiB, as mdadm --size=10000 (KiB) is; a computed one to 64 KiB.
    size = max(available, 0) // ROUND_SECTORS * ROUND_SECTORS if wanted is None else wanted // 8 * 8
    if size < ROUND_SECTORS and wanted is not None:
        raise Refused("bad-size", f"size {wanted // 2}K is too small: a component has at least 64K.")
    if size < ROUND_SECTORS or size > available:
        raise _too_small(smallest, size)
    return size


def _bitmap_offset(minor: int, geometry: BitmapGeometry) -> int:
    if minor:
        return BITMAP_OFFSET
    return -(geometry.sectors_per_node + BAD_BLOCK_LOG_SECTORS)


def _data_size(template: Superblock, device_sectors: int, super_offset: int) -> int:
    if template.minor:
        return max(0, device_sectors - template.data_offset)
    behind = BAD_BLOCK_LOG_SECTORS + bitmap_space_sectors(template.size)
    behind = max(behind, -template.bitmap_offset)
    return max(0, super_offset - behind)


def _bad_block_log_offset(sb: Superblock, geometry: BitmapGeometry | None) -> int:
    """Sectors from the superblock to the log, 0 where none fits."""
    if sb.minor == 0:
        return -BAD_BLOCK_LOG_SECTORS
    taken = bitmap_space_sectors(sb.size) if geometry is None else geometry.sectors_per_node
    gap = sb.data_offset - sb.super_offset
    behind_bitmap = BITMAP_OFFSET + taken
    if gap >= behind_bitmap + BAD_BLOCK_LOG_SECTORS:
        return behind_bitmap
    if geometry is None and gap >= written_sectors(sb.max_dev) + BAD_BLOCK_LOG_SECTORS + 8:
        return gap - BAD_BLOCK_LOG_SECTORS
    return 0


def _check_room(geometry: BitmapGeometry, sb: Superblock) -> None:
    """All slots' areas lie between superblock and data (spec 2.6)."""
    fit = max_nodes(geometry, super_offset=sb.super_offset, data_offset=sb.data_offset)
    if geometry.slots > fit:
        raise Refused(
            "no-room-for-bitmaps",
            f"there is room for the bitmaps of {fit} nodes before the data, {geometry.slots} are wanted: "
            "use a larger --bitmap-chunk, a larger --data-offset or fewer --nodes.",
            max_nodes=fit,
        )


def _too_small(device: NewMember, size: int) -> Refused:
    needed = f"; {size // 2}K of data are needed" if size else ""
    return Refused(
        "device-too-small", f"{device.path} is too small: {device.sectors // 2}K{needed}.", path=device.path
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
