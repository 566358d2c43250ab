"""The version-1 superblock: bytes <-> values.

Every member of an array carries one superblock. It says which array (`set_uuid`), which device of it
(`dev_number`, `device_uuid`), which role each device number plays (`dev_roles`), where data, bitmap and
bad block log lie, and how new it is (`events`). The three minor versions differ only in its place: 1.0
near the end of the device, 1.1 at its start, 1.2 at 4 KiB. All integers are little-endian, a sector is
512 bytes, UUIDs are raw bytes.

`Superblock.from_bytes` refuses whatever the kernel refuses (md-cluster spec 1.6), each with a code of its
own, so nothing above this floor meets a superblock whose numbers are not sane. `parse_lenient` is for
people who look at a broken one.

The minor version of a device is not known beforehand: all three places are tried, and of those that load
the one created last counts (spec 1.1), as an old superblock of another version may have been left behind.
Devices of one array agree on identity and shape (spec 1.6, 1.13); events, roles and offsets may differ,
and deciding between those is the array's work.

`FIELDS` is the layout of md-cluster spec 1.3; nothing here knows an offset by itself.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clustermd.errors import BadBytes, Refused

MAGIC = 0xA92B4EFC
MAJOR_VERSION = 1
MAX_SECTOR = 0xFFFF_FFFF_FFFF_FFFF
ROLE_JOURNAL = 0xFFFD
ROLE_FAULTY = 0xFFFE
ROLE_SPARE = 0xFFFF
ROLE_LIMIT = 0xFF00
"""Roles of working members are below this."""
SUPERBLOCK_BYTES = 4096
"""What is read; what is written is shorter, see `Superblock.to_bytes`."""
SUPERBLOCK_SECTORS = SUPERBLOCK_BYTES // 512
MAX_DEVICES = (SUPERBLOCK_BYTES - 256) // 2
MIN_DEVICE_SECTORS = 24
MIN_DATA_SECTORS = 10
MAX_BAD_BLOCK_LOG_SECTORS = 8
"""The kernel reads the bad block log into one page."""
LEVEL_RAID1 = 1
WRITE_MOSTLY = 1
FAIL_FAST = 2

FIELDS: tuple[tuple[str, str], ...] = (
    ("magic", "I"),
    ("major_version", "I"),
    ("feature_map", "I"),
    ("pad0", "I"),
    ("set_uuid", "16s"),
    ("set_name", "32s"),
    ("ctime", "Q"),
    ("level", "i"),
    ("layout", "I"),
    ("size", "Q"),
    ("chunksize", "I"),
    ("raid_disks", "I"),
    ("bitmap_offset", "i"),
    ("new_level", "I"),
    ("reshape_position", "Q"),
    ("delta_disks", "i"),
    ("new_layout", "I"),
    ("new_chunk", "I"),
    ("new_offset", "i"),
    ("data_offset", "Q"),
    ("data_size", "Q"),
    ("super_offset", "Q"),
    ("recovery_offset", "Q"),
    ("dev_number", "I"),
    ("cnt_corrected_read", "I"),
    ("device_uuid", "16s"),
    ("devflags", "B"),
    ("bblog_shift", "B"),
    ("bblog_size", "H"),
    ("bblog_offset", "i"),
    ("utime", "Q"),
    ("events", "Q"),
    ("resync_offset", "Q"),
    ("sb_csum", "I"),
    ("max_dev", "I"),
    ("pad3", "32s"),
)
FIXED = struct.Struct("<" + "".join(code for _, code in FIELDS))
_NAMES = tuple(name for name, _ in FIELDS)
_NOT_STORED_AS_IS = frozenset({"magic", "major_version", "pad0", "sb_csum", "max_dev", "pad3"})
_CHECKSUM_AT = struct.calcsize("<" + "".join(code for _, code in FIELDS[: _NAMES.index("sb_csum")]))


class FeatureMap(enum.IntFlag):
    """Bits of `feature_map` (md-cluster spec 1.4). An unknown one makes a superblock unusable."""

    BITMAP_OFFSET = 0x0001
    RECOVERY_OFFSET = 0x0002
    RESHAPE_ACTIVE = 0x0004
    BAD_BLOCKS = 0x0008
    REPLACEMENT = 0x0010
    RESHAPE_BACKWARDS = 0x0020
    NEW_OFFSET = 0x0040
    RECOVERY_BITMAP = 0x0080
    CLUSTERED = 0x0100
    JOURNAL = 0x0200
    PPL = 0x0400
    MULTIPLE_PPLS = 0x0800
    RAID0_LAYOUT = 0x1000


_KNOWN_FEATURES = 0x1FFF
_NO_FEATURES = FeatureMap(0)
_SECONDS = (1 << 40) - 1
Read = Callable[[int, int], bytes]
"""`read(sector, count) -> bytes`: up to `count` sectors; shorter at the end of the device."""


@dataclass(slots=True, frozen=True)
class Superblock:
    """One superblock, fields named as on disk (md-cluster spec 1.3).

    `size`, `data_offset`, `data_size`, `super_offset`, `recovery_offset`, `resync_offset`, `chunksize` and
    `bblog_size` are sectors; `bitmap_offset` and `bblog_offset` sectors relative to `super_offset`; `ctime`
    and `utime` hold seconds in the low 40 bits and microseconds above. `minor` (0, 1, 2) is not stored: it
    is where the superblock lies.
    """

    minor: int
    set_uuid: bytes
    set_name: str
    ctime: int
    level: int
    size: int
    raid_disks: int
    data_offset: int
    data_size: int
    super_offset: int
    dev_number: int
    device_uuid: bytes
    utime: int
    events: int
    resync_offset: int
    dev_roles: tuple[int, ...]
    feature_map: FeatureMap = _NO_FEATURES
    layout: int = 0
    chunksize: int = 0
    bitmap_offset: int = 0
    new_level: int = 0
    reshape_position: int = 0
    delta_disks: int = 0
    new_layout: int = 0
    new_chunk: int = 0
    new_offset: int = 0
    recovery_offset: int = 0
    cnt_corrected_read: int = 0
    devflags: int = 0
    bblog_shift: int = 0
    bblog_size: int = 0
    bblog_offset: int = 0

    @classmethod
    def from_bytes(cls, data: bytes, *, minor: int, at_sector: int, device_sectors: int) -> Superblock:
        """The superblock in `data`, which starts at `at_sector` of a device of `device_sectors`.

        `data` holds 4096 bytes, or what the device has. Raises BadBytes with a code per check of
        md-cluster spec 1.6: nothing that the kernel would refuse gets past here.
        """
        parsed = parse_lenient(data, minor=minor, at_sector=at_sector)
        if parsed.stored_checksum != parsed.computed_checksum:
            raise _bad(
                "bad-checksum",
                at_sector,
                f"its checksum is {parsed.stored_checksum:x}, but its bytes give "
                f"{parsed.computed_checksum:x}: it was torn or damaged",
            )
        if parsed.pad0 or any(parsed.pad3):
            raise _bad("nonzero-pad", at_sector, "bytes that must be zero are not: a newer format is in use")
        _check(parsed.superblock, device_sectors)
        return parsed.superblock

    def to_bytes(self) -> bytes:
        """256 + 2 bytes per entry of `dev_roles`, rounded up to 512 with zeroes, checksum computed."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in _NAMES if name not in _NOT_STORED_AS_IS
        }
        values |= {
            "magic": MAGIC,
            "major_version": MAJOR_VERSION,
            "pad0": 0,
            "set_name": self.set_name.encode("utf-8", "surrogateescape"),
            "sb_csum": 0,
            "max_dev": len(self.dev_roles),
            "pad3": b"",
        }
        data = bytearray(FIXED.pack(*(values[name] for name in _NAMES)))
        data += struct.pack(f"<{len(self.dev_roles)}H", *self.dev_roles)
        struct.pack_into("<I", data, _CHECKSUM_AT, checksum(data))
        data += bytes(-len(data) % 512)
        return bytes(data)

    @property
    def max_dev(self) -> int:
        """Number of entries in `dev_roles`."""
        return len(self.dev_roles)

    @property
    def size_on_disk_sectors(self) -> int:
        """Sectors that `to_bytes` fills."""
        return written_sectors(len(self.dev_roles))

    @property
    def clustered(self) -> bool:
        return bool(self.feature_map & FeatureMap.CLUSTERED)

    @property
    def has_bitmap(self) -> bool:
        return bool(self.feature_map & FeatureMap.BITMAP_OFFSET)

    @property
    def recovering(self) -> bool:
        """This device has a role but is good only below `recovery_offset` (a device address)."""
        return bool(self.feature_map & FeatureMap.RECOVERY_OFFSET)

    @property
    def has_bad_block_log(self) -> bool:
        return self.bblog_offset != 0 and self.bblog_size != 0

    @property
    def clean(self) -> bool:
        """What `mdadm -E` calls clean. A clustered array never is, once started (spec 1.9)."""
        return self.resync_offset == MAX_SECTOR

    @property
    def role(self) -> int:
        """The role of the device that carries this superblock."""
        return self.role_of(self.dev_number)

    def role_of(self, dev_number: int) -> int:
        """The role of a device number; ROLE_SPARE for one outside the table, as the kernel takes it."""
        if 0 <= dev_number < len(self.dev_roles):
            return self.dev_roles[dev_number]
        return ROLE_SPARE


@dataclass(slots=True, frozen=True)
class Parsed:
    """A superblock as it stands, right or wrong: what `-E` shows."""

    superblock: Superblock
    stored_checksum: int
    computed_checksum: int
    pad0: int = 0
    pad3: bytes = bytes(32)

    @property
    def checksum_ok(self) -> bool:
        return self.stored_checksum == self.computed_checksum


def parse_lenient(data: bytes, *, minor: int, at_sector: int) -> Parsed:
    """The superblock in `data` if it is one at all: magic, major version, table size and place are checked.

    Raises BadBytes `short-superblock`, `bad-magic`, `bad-version`, `bad-max-dev` or `bad-super-offset`.
    """
    if len(data) < FIXED.size:
        raise _bad("short-superblock", at_sector, f"only {len(data)} bytes of it could be read")
    values: dict[str, Any] = dict(zip(_NAMES, FIXED.unpack_from(data), strict=True))
    if values["magic"] != MAGIC:
        raise _bad("bad-magic", at_sector, f"the magic number is {values['magic']:08x}, not {MAGIC:08x}")
    if values["major_version"] != MAJOR_VERSION:
        raise _bad(
            "bad-version", at_sector, f"the major version is {values['major_version']}, only 1 is known"
        )
    max_dev = values["max_dev"]
    if max_dev > MAX_DEVICES:
        raise _bad("bad-max-dev", at_sector, f"it claims {max_dev} devices, {MAX_DEVICES} fit")
    end = FIXED.size + 2 * max_dev
    if len(data) < end:
        raise _bad("short-superblock", at_sector, f"only {len(data)} of its {end} bytes could be read")
    if values["super_offset"] != at_sector:
        raise _bad(
            "bad-super-offset",
            at_sector,
            f"it says that it lies at sector {values['super_offset']}: "
            "the device was resized, or this is a copy of a part of another",
        )
    stored = values["sb_csum"]
    pad0, pad3 = values["pad0"], values["pad3"]
    for name in _NOT_STORED_AS_IS:
        del values[name]
    values["feature_map"] = FeatureMap(values["feature_map"])
    values["set_name"] = values["set_name"].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    roles = struct.unpack_from(f"<{max_dev}H", data, FIXED.size)
    superblock = Superblock(minor=minor, dev_roles=roles, **values)
    return Parsed(superblock, stored, checksum(data[:end]), pad0, pad3)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The checksum over `data`, 256 + 2·max_dev bytes; the stored one inside counts as zero (spec 1.5)."""
    words = len(data) // 4
    total: int = sum(struct.unpack_from(f"<{words}I", data))
    if len(data) % 4 >= 2:
        total += int(struct.unpack_from("<H", data, words * 4)[0])
    total -= int(struct.unpack_from("<I", data, _CHECKSUM_AT)[0])
    return ((total & 0xFFFF_FFFF) + (total >> 32)) & 0xFFFF_FFFF


def written_sectors(max_dev: int) -> int:
    """Sectors a superblock with `max_dev` roles fills on disk."""
    return (FIXED.size + 2 * max_dev + 511) // 512


def location(minor: int, device_sectors: int) -> int:
    """The sector at which a superblock of this minor version starts (spec 1.1).

    Raises BadBytes `device-too-small` below 24 sectors, ValueError for another minor version.
    """
    if device_sectors < MIN_DEVICE_SECTORS:
        raise BadBytes(
            "device-too-small",
            f"the device has {device_sectors} sectors; a superblock needs at least {MIN_DEVICE_SECTORS}",
            sectors=device_sectors,
        )
    if minor == 0:
        return (device_sectors - 16) & ~7
    if minor == 1:
        return 0
    if minor == 2:
        return 8
    raise ValueError(f"no metadata version 1.{minor}")


def find(read: Read, device_sectors: int) -> Superblock:
    """The superblock of a device, every check passed. The latest creation time wins.

    Raises BadBytes: `no-superblock` when there is none, else what is wrong with the one that counts.
    A newer broken one is not passed over for an older good one of another version.
    """
    lenient = find_lenient(read, device_sectors)
    sb = lenient.superblock
    data = read(sb.super_offset, min(SUPERBLOCK_SECTORS, device_sectors - sb.super_offset))
    return Superblock.from_bytes(
        data, minor=sb.minor, at_sector=sb.super_offset, device_sectors=device_sectors
    )


def find_lenient(read: Read, device_sectors: int) -> Parsed:
    """As `find`, but a wrong checksum or impossible numbers are left for the reader to judge.

    Raises BadBytes `no-superblock`, `device-too-small`, or what is wrong with one that bears the magic.
    """
    found = find_all(read, device_sectors)
    if found:
        return max(found, key=lambda parsed: _age(parsed.superblock.ctime))
    reasons: list[BadBytes] = []
    for minor in (0, 1, 2):
        try:
            _read_one(read, minor, device_sectors)
        except BadBytes as error:
            reasons.append(error)
    for reason in reasons:
        if reason.code not in ("bad-magic", "short-superblock"):
            raise reason
    raise BadBytes(
        "no-superblock",
        "no md superblock was found: the device is not a member of an array, or its superblock is gone",
        tried=[reason.message for reason in reasons],
    )


def find_all(read: Read, device_sectors: int) -> list[Parsed]:
    """Everything that is a superblock by magic, version and place, in order of the minor version.

    For `--zero-superblock`, and for asking before an array is created over old ones. Raises BadBytes
    `device-too-small`.
    """
    found: list[Parsed] = []
    for minor in (0, 1, 2):
        location(minor, device_sectors)
        try:
            found.append(_read_one(read, minor, device_sectors))
        except BadBytes:
            continue
    return found


def same_set(a: Superblock, b: Superblock) -> None:
    """Return when `a` and `b` are members of one array; raise Refused with the reason otherwise."""
    if a.set_uuid != b.set_uuid:
        raise Refused(
            "other-array",
            f"the devices belong to different arrays: {a.set_uuid.hex()} ({a.set_name}) "
            f"and {b.set_uuid.hex()} ({b.set_name})",
        )
    for field in ("ctime", "level", "layout", "chunksize"):
        if getattr(a, field) != getattr(b, field):
            raise Refused(
                "shapes-differ",
                f"the devices carry the same array UUID but different {field}: "
                f"{getattr(a, field)} and {getattr(b, field)}; one of them was created anew",
                field=field,
            )
    if a.device_uuid == b.device_uuid and a.dev_number != b.dev_number:
        raise Refused(
            "same-device-twice", "two devices carry the same device UUID: one is a copy of the other"
        )


def _check(sb: Superblock, device_sectors: int) -> None:
    """The kernel's acceptance checks beyond `parse_lenient` (spec 1.6), and bounds for our own tables."""
    at = sb.super_offset
    unknown = int(sb.feature_map) & ~_KNOWN_FEATURES
    if unknown:
        raise _bad("unknown-feature", at, f"feature bits 0x{unknown:x} are unknown: a newer md made it")
    if sb.data_size < MIN_DATA_SECTORS:
        raise _bad("data-too-small", at, f"its data area of {sb.data_size} sectors is too small")
    after_superblock = at + sb.size_on_disk_sectors
    if sb.minor and sb.data_offset < after_superblock:
        raise _bad(
            "data-overlaps-superblock", at, f"its data would start at sector {sb.data_offset}, inside it"
        )
    limit = device_sectors if sb.minor else at
    if sb.data_offset + sb.data_size > limit:
        raise _bad(
            "device-shrunk",
            at,
            f"its data ends at sector {sb.data_offset + sb.data_size}, "
            f"but only sectors below {limit} can hold data: the device is smaller than it was",
        )
    if sb.level != 0 and sb.size > sb.data_size:
        raise _bad("size-over-data", at, f"it uses {sb.size} sectors of a data area of {sb.data_size}")
    if sb.raid_disks > MAX_DEVICES:
        raise _bad(
            "too-many-disks", at, f"it claims {sb.raid_disks} raid disks; at most {MAX_DEVICES} are possible"
        )
    if (
        sb.feature_map & FeatureMap.NEW_OFFSET
        and sb.minor
        and sb.data_offset + sb.new_offset < after_superblock
    ):
        raise _bad("data-overlaps-superblock", at, "the data offset it reshapes to lies inside it")
    if sb.feature_map & FeatureMap.BAD_BLOCKS and (
        sb.bblog_offset == 0 or sb.bblog_size > MAX_BAD_BLOCK_LOG_SECTORS
    ):
        raise _bad(
            "bad-bad-block-log", at, f"its bad block log of {sb.bblog_size} sectors has no valid place"
        )
    if sb.feature_map & FeatureMap.RECOVERY_OFFSET and sb.recovery_offset > MAX_SECTOR >> 1:
        raise _bad("bad-recovery-offset", at, f"its recovery offset {sb.recovery_offset} is not a sector")


def _bad(code: str, at_sector: int, why: str) -> BadBytes:
    return BadBytes(code, f"the superblock at sector {at_sector} is not usable: {why}", sector=at_sector)


def _read_one(read: Read, minor: int, device_sectors: int) -> Parsed:
    at = location(minor, device_sectors)
    data = read(at, min(SUPERBLOCK_SECTORS, device_sectors - at))
    return parse_lenient(data, minor=minor, at_sector=at)


def _age(ctime: int) -> tuple[int, int]:
    return ctime & _SECONDS, ctime >> 40
