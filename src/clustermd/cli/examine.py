"""The text of `-E`, `-E --export` and `-E --brief`, byte for byte as mdadm 4.2 prints it.

Order, labels and blank lines are conventions that people and scripts read (md-cluster spec 1.14). A
superblock is shown as it stands: a wrong checksum is named together with the right one, levels that
clustermd cannot run are shown too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clustermd.cli.units import human_size, human_size_brief, local_time, uuid_text
from clustermd.errors import BadBytes
from clustermd.ondisk import bitmap_superblock
from clustermd.ondisk.bitmap_superblock import HEADER_BYTES, BitmapSuperblock
from clustermd.ondisk.superblock import (
    FAIL_FAST,
    MAX_DEVICES,
    ROLE_FAULTY,
    ROLE_JOURNAL,
    ROLE_LIMIT,
    WRITE_MOSTLY,
    FeatureMap,
    Parsed,
    Read,
    Superblock,
    find_lenient,
)

LEVELS = {
    -4: "multipath",
    -1: "linear",
    0: "raid0",
    1: "raid1",
    4: "raid4",
    5: "raid5",
    6: "raid6",
    10: "raid10",
}
_RAID0_LAYOUTS = {0: "dangerous", 1: "original", 2: "alternate"}
_RAID5_LAYOUTS = {
    0: "left-asymmetric",
    1: "right-asymmetric",
    2: "left-symmetric",
    3: "right-symmetric",
    4: "parity-first",
    5: "parity-last",
}
_RAID6_LAYOUTS = _RAID5_LAYOUTS | {
    8: "ddf-zero-restart",
    9: "ddf-N-restart",
    10: "ddf-N-continue",
    16: "left-asymmetric-6",
    17: "right-asymmetric-6",
    18: "left-symmetric-6",
    19: "right-symmetric-6",
    20: "parity-first-6",
}
_QUOTES = "\"'"
_NEEDS_QUOTES = _QUOTES + " \t"
_U64 = 1 << 64
_IN_DEVICE_NAME = str.maketrans({" ": "_", "\t": "_", "/": "-"})
_NOTHING_KNOWN = 1
"""mdadm's space behind the data when it found none to compute; it prints no line then."""
_AFTER_SUPERBLOCK = 72
"""Sectors behind a superblock that the kernel reserved for a small bitmap in former times."""


def read_member(read: Read, device_sectors: int) -> tuple[Parsed, BitmapSuperblock | None]:
    """What `-E` shows of a device: its superblock, and the superblock of its first bitmap.

    Raises BadBytes as `find_lenient` does.
    """
    parsed = find_lenient(read, device_sectors)
    sb = parsed.superblock
    at = sb.super_offset + sb.bitmap_offset
    if not sb.has_bitmap or not 0 <= at < device_sectors:
        return parsed, None
    data = read(at, 1)
    if len(data) < HEADER_BYTES or int.from_bytes(data[:4], "little") != bitmap_superblock.MAGIC:
        return parsed, None
    bitmap = bitmap_superblock.parse_lenient(data)
    return parsed, bitmap if bitmap.uuid == sb.set_uuid else None


def examine_text(
    path: str,
    parsed: Parsed,
    device_sectors: int,
    *,
    homehost: str = "",
    bitmap: BitmapSuperblock | None = None,
) -> str:
    """`mdadm -E path`: `bitmap` is the first bitmap's superblock, None where there is none.

    A bitmap that the feature map promises and that isn't there is not shown, as in mdadm; the checksum,
    which mdadm then miscounts, is that of the bytes on the disk.
    """
    sb = parsed.superblock
    if bitmap is None:
        sb = replace(sb, feature_map=sb.feature_map & ~FeatureMap.BITMAP_OFFSET)
    before, after = _unused(sb, device_sectors, bitmap)
    lines = [f"{path}:"]
    add = lines.append
    add("          Magic : a92b4efc")
    add(f"        Version : 1.{sb.minor}")
    add(f"    Feature Map : 0x{int(sb.feature_map):x}")
    add(f"     Array UUID : {uuid_text(sb.set_uuid)}")
    add(f"           Name : {sb.set_name}{_local(sb.set_name, homehost)}")
    if bitmap is not None and bitmap.nodes > 0 and sb.has_bitmap:
        add(f"   Cluster Name : {bitmap.cluster_name:<64}")
    add(f"  Creation Time : {local_time(sb.ctime)}")
    add(f"     Raid Level : {LEVELS.get(sb.level, '-unknown-')}")
    add(f"   Raid Devices : {sb.raid_disks}")
    add("")
    add(f" Avail Dev Size : {sb.data_size} sectors{human_size(sb.data_size << 9)}")
    if sb.level != 0:
        array_bytes = _array_bytes(sb)
        if array_bytes is not None:
            add(f"     Array Size : {array_bytes >> 10} KiB{human_size(array_bytes)}")
        if sb.size != sb.data_size:
            add(f"  Used Dev Size : {sb.size} sectors{human_size(sb.size << 9)}")
    if sb.data_offset:
        add(f"    Data Offset : {sb.data_offset} sectors")
    if sb.new_offset and sb.feature_map & FeatureMap.NEW_OFFSET:
        add(f"     New Offset : {(sb.data_offset + sb.new_offset) % _U64} sectors")
    add(f"   Super Offset : {sb.super_offset} sectors")
    if sb.recovering:
        add(f"Recovery Offset : {sb.recovery_offset} sectors")
    if after != _NOTHING_KNOWN and not sb.feature_map & FeatureMap.NEW_OFFSET:
        tail = f"after={after} sectors" if after >= 0 else f"after=-{-after - 1} sectors DEVICE TOO SMALL"
        add(f"   Unused Space : before={before} sectors, {tail}")
    truncated = " TRUNCATED DEVICE" if after < 0 else ""
    add(f"          State : {'clean' if sb.clean else 'active'}{truncated}")
    add(f"    Device UUID : {uuid_text(sb.device_uuid)}")
    add("")
    if sb.has_bitmap:
        add(f"Internal Bitmap : {sb.bitmap_offset} sectors from superblock")
    lines += _reshape(sb)
    if sb.devflags:
        flags = (" write-mostly" if sb.devflags & WRITE_MOSTLY else "") + (
            " failfast" if sb.devflags & FAIL_FAST else ""
        )
        add(f"          Flags :{flags}")
    add(f"    Update Time : {local_time(sb.utime)}")
    if sb.has_bad_block_log:
        present = " - bad blocks present." if sb.feature_map & FeatureMap.BAD_BLOCKS else ""
        entries = sb.bblog_size * 512 // 8
        add(f"  Bad Block Log : {entries} entries available at offset {sb.bblog_offset} sectors{present}")
    verdict = "correct" if parsed.checksum_ok else f"expected {parsed.computed_checksum:x}"
    add(f"       Checksum : {parsed.stored_checksum:x} - {verdict}")
    add(f"         Events : {sb.events}")
    add("")
    lines += _layout(sb)
    add("")
    add(f"   Device Role : {_role(sb)}")
    lines += _array_state(sb)
    return "\n".join(lines) + "\n"


def export_text(superblock: Superblock) -> str:
    """`mdadm -E --export`: KEY=value lines."""
    lines = [
        f"MD_LEVEL={LEVELS.get(superblock.level, '(null)')}",
        f"MD_DEVICES={superblock.raid_disks}",
    ]
    name = superblock.set_name.split("\n", 1)[0]
    if name:
        lines.append(f"MD_NAME={name}")
    array_bytes = _array_bytes(superblock) if superblock.level > 0 else None
    if array_bytes is not None:
        lines.append(f"MD_ARRAY_SIZE={human_size_brief(array_bytes)}")
    lines += [
        f"MD_UUID={uuid_text(superblock.set_uuid)}",
        f"MD_UPDATE_TIME={superblock.utime & ((1 << 40) - 1)}",
        f"MD_DEV_UUID={uuid_text(superblock.device_uuid)}",
        f"MD_EVENTS={superblock.events}",
    ]
    return "\n".join(lines) + "\n"


def brief_text(members: Sequence[tuple[str, Superblock]], *, verbose: bool = False) -> str:
    """`mdadm -E --brief` and `--scan` over `(path, superblock)`: one ARRAY entry for each array."""
    arrays: dict[bytes, list[tuple[str, Superblock]]] = {}
    for path, sb in members:
        arrays.setdefault(sb.set_uuid, []).append((path, sb))
    lines: list[str] = []
    for found in arrays.values():
        sb = found[0][1]
        lines.append(_array_line(sb, verbose))
        spares = sum(1 for _, member in found if not _role(member).startswith("Active"))
        detail = f"   spares={spares}" if spares else ""
        if verbose:
            detail += "   devices=" + ",".join(path for path, _ in found)
        if detail:
            lines.append(detail)
    return "".join(line + "\n" for line in lines)


def _array_line(sb: Superblock, verbose: bool) -> str:
    words = ["ARRAY"]
    if sb.set_name:
        words.append("/dev/md/" + sb.set_name.split(":", 1)[-1].translate(_IN_DEVICE_NAME))
    level = f" level={LEVELS[sb.level]}" if verbose and sb.level in LEVELS else ""
    line = " ".join(words) + " " + level + f" metadata=1.{sb.minor} "
    if verbose:
        line += f"num-devices={sb.raid_disks} "
    line += f"UUID={uuid_text(sb.set_uuid)}"
    if sb.set_name:
        line += f" name={_quoted(sb.set_name)}"
    return line


def _quoted(text: str) -> str:
    """In quotes where it holds blanks or quotes; a quote of the kind in use closes it and opens the other."""
    special = [c for c in text if c in _NEEDS_QUOTES]
    if not special:
        return text
    quote = "'" if next((c for c in special if c in _QUOTES), "") == '"' else '"'
    out = [quote]
    for c in text:
        if c == quote:
            out.append(quote)
            quote = _QUOTES[1 - _QUOTES.index(quote)]
            out.append(quote)
        out.append(c)
    return "".join(out) + quote


def _local(name: str, homehost: str) -> str:
    """mdadm says so when the part before the colon is this machine's home host."""
    return f"  (local to host {homehost})" if homehost and name.startswith(homehost + ":") else ""


def _array_bytes(sb: Superblock) -> int | None:
    """The array's size, None for a level that has no rule."""
    data_disks, divisor = 0, 1
    if sb.level == 1:
        data_disks = 1
    elif sb.level in (4, 5):
        data_disks = sb.raid_disks - 1
    elif sb.level == 6:
        data_disks = sb.raid_disks - 2
    elif sb.level == 10:
        data_disks = sb.raid_disks
        divisor = (sb.layout & 255) * (sb.layout >> 8 & 255)
    if not data_disks or not divisor:
        return None
    return (sb.size << 9) * data_disks // divisor


def _unused(sb: Superblock, device_sectors: int, bitmap: BitmapSuperblock | None) -> tuple[int, int]:
    """Sectors free before and behind the data; negative behind: the device is too small."""
    used = sb.data_size if sb.level <= 0 else sb.size
    start = sb.super_offset
    log = start + sb.bblog_offset if sb.has_bad_block_log else None
    bitmap_offset = sb.bitmap_offset if sb.has_bitmap else 0
    if sb.data_offset < start:
        end = min(start, start + bitmap_offset)
        if log is not None:
            end = min(end, log)
        free = end - used - sb.data_offset
        return sb.data_offset, free if free > 0 else _NOTHING_KNOWN
    earliest = start + _AFTER_SUPERBLOCK
    if bitmap_offset > 0:
        earliest = max(earliest, bitmap_offset + (_area_sectors(bitmap) if bitmap else 8))
    if log is not None:
        earliest = max(earliest, log + sb.bblog_size)
    return max(0, sb.data_offset - earliest), device_sectors - used - sb.data_offset


def _area_sectors(bitmap: BitmapSuperblock) -> int:
    if not bitmap.chunksize:
        return 8
    bits = -(-bitmap.sync_size * 512 // bitmap.chunksize)
    return -(-(HEADER_BYTES + (bits + 7) // 8) // 4096) * 8


def _reshape(sb: Superblock) -> list[str]:
    if not sb.feature_map & FeatureMap.RESHAPE_ACTIVE:
        return []
    lines = [f"  Reshape pos'n : {sb.reshape_position // 2}{human_size(sb.reshape_position << 9)}"]
    if sb.delta_disks:
        old = sb.raid_disks - sb.delta_disks
        lines.append(f"  Delta Devices : {sb.delta_disks} ({old}->{sb.raid_disks})")
    if sb.new_level != sb.level & 0xFFFF_FFFF:
        lines.append(f"      New Level : {LEVELS.get(sb.new_level, '-unknown-')}")
    if sb.new_layout != sb.layout:
        layout = _layout_text(sb.level, sb.new_layout)
        if layout is not None:
            lines.append(f"     New Layout :{layout}")
    if sb.new_chunk != sb.chunksize:
        lines.append(f"  New Chunksize : {sb.new_chunk // 2}K")
    lines.append("")
    return lines


def _layout(sb: Superblock) -> list[str]:
    layout = _layout_text(sb.level, sb.layout)
    if sb.level == 0 and sb.feature_map & FeatureMap.RAID0_LAYOUT:
        layout = " " + _RAID0_LAYOUTS.get(sb.layout, "-unknown-")
    lines = [] if layout is None else [f"         Layout :{layout}"]
    if sb.level in (0, 4, 5, 6, 10):
        lines.append(f"     Chunk Size : {sb.chunksize // 2}K")
    elif sb.level == -1:
        lines.append(f"       Rounding : {sb.chunksize // 2}K")
    return lines


def _layout_text(level: int, layout: int) -> str | None:
    """A layout in words, with a leading space; None where the level has none."""
    if level == 5:
        return " " + _RAID5_LAYOUTS.get(layout, "-unknown-")
    if level == 6:
        return " " + _RAID6_LAYOUTS.get(layout, "-unknown-")
    return _raid10_layout(layout) if level == 10 else None


def _raid10_layout(layout: int) -> str:
    near, far = layout & 255, layout >> 8 & 255
    parts = [f" near={near}"] if near != 1 else []
    if far != 1:
        parts.append(f" {'offset' if layout & 0x10000 else 'far'}={far}")
    return ",".join(parts) or "NO REDUNDANCY"


def _role(sb: Superblock) -> str:
    role = sb.role
    if role >= ROLE_FAULTY:
        return "spare"
    if role == ROLE_JOURNAL:
        return "Journal"
    if sb.feature_map & FeatureMap.REPLACEMENT:
        return f"Replacement device {role}"
    return f"Active device {role}"


def _array_state(sb: Superblock) -> list[str]:
    disks = sb.raid_disks
    if sb.feature_map & FeatureMap.RESHAPE_ACTIVE and sb.delta_disks < 0:
        disks -= sb.delta_disks
    if disks > MAX_DEVICES:
        raise BadBytes("too-many-disks", f"the superblock claims {disks} raid disks, {MAX_DEVICES} fit")
    holders = [0] * disks
    for role in sb.dev_roles:
        if role < disks:
            holders[role] += 1
    letters = ".AR" if sb.level else ".A"
    state = "".join(letters[n] if n < len(letters) else "?" for n in holders)
    lines = [f"   Array State : {state} ('A' == active, '.' == missing, 'R' == replacing)"]
    if "?" in state or any(disks < role <= ROLE_LIMIT for role in sb.dev_roles):
        lines.append("WARNING Array state is inconsistent - each number should appear only once")
        table = ("-" if role >= ROLE_FAULTY else str(role) for role in sb.dev_roles)
        lines.append("".join(f" {number}:{role}" for number, role in enumerate(table)))
    return lines
