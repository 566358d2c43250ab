"""The text of `-X`, byte for byte as mdadm 4.2 prints it (md-cluster spec 2.11).

mdadm wants a block device; files do here as well. It stops at a slot that was never written (Linux
leaves such slots on a disk that was added); all slots are shown here, as a later one may hold dirty
bits. Every slot is read within bounds that slot 0's superblock and the device's size give, so a hostile
count costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from clustermd.cli.units import human_chunk, human_size, uuid_text
from clustermd.errors import BadBytes
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import (
    HEADER_BYTES,
    MAGIC,
    BitmapState,
    BitmapSuperblock,
    parse_lenient,
)
from clustermd.ondisk.superblock import Read, Superblock

_READ_SECTORS = 2048
_NO_BITS = "          Bitmap : 0 bits (chunks), 0 dirty (0.0%)"


def read_areas(read: Read, superblock: Superblock, device_sectors: int) -> list[bytes | None]:
    """The areas of all slots, None where one cannot be read.

    Raises BadBytes: `no-bitmap` when the array has none, or what is wrong with slot 0's superblock.
    """
    if not superblock.has_bitmap:
        raise BadBytes("no-bitmap", "the array has no write-intent bitmap")
    start = superblock.super_offset + superblock.bitmap_offset
    if not 0 <= start < device_sectors:
        raise BadBytes("bitmap-out-of-place", f"the bitmap would lie at sector {start}, outside the device")
    geometry = BitmapGeometry.of(BitmapSuperblock.from_bytes(read(start, 1)))
    areas: list[bytes | None] = []
    for slot in range(geometry.slots):
        at = geometry.start_sector(superblock.super_offset, superblock.bitmap_offset, slot)
        area = bytearray()
        end = at + geometry.sectors_per_node
        while at < min(end, device_sectors):
            step = read(at, min(_READ_SECTORS, end - at, device_sectors - at))
            if not step:
                break
            area += step
            at += len(step) // 512
        areas.append(bytes(area) if len(area) >= HEADER_BYTES else None)
    return areas


def examine_bitmap_text(path: str, areas: Sequence[bytes | None]) -> str:
    """`mdadm -X path` for the areas of all slots (superblock and bits), slot 0 first.

    Raises BadBytes when the first one is no bitmap or its geometry is impossible.
    """
    first = BitmapSuperblock.from_bytes(areas[0] or b"")
    lines = [
        f"        Filename : {path}",
        "           Magic : 6d746962",
        f"         Version : {first.version}",
        f"            UUID : {uuid_text(first.uuid)}",
    ]
    if not first.nodes:
        lines += _events(first)
    behind = f"Allow write behind, max {first.write_behind}" if first.write_behind else "Normal"
    lines += [
        f"       Chunksize : {human_chunk(first.chunksize)}",
        f"          Daemon : {first.daemon_sleep}s flush period",
        f"      Write Mode : {behind}",
        f"       Sync Size : {first.sync_size // 2}{human_size(first.sync_size * 512)}",
    ]
    if not first.nodes:
        lines.append(_bitmap(first, areas[0] or b""))
        return "\n".join(lines) + "\n"
    lines += [f"   Cluster nodes : {first.nodes}", f"    Cluster name : {first.cluster_name:<64}"]
    for slot, area in enumerate(areas):
        lines += _slot(slot, area)
    return "\n".join(lines) + "\n"


def unwritten_slots(areas: Sequence[bytes | None]) -> list[int]:
    """Slots whose area bears no bitmap superblock: mdadm warns of those on its error output."""
    magic = MAGIC.to_bytes(4, "little")
    return [slot for slot, area in enumerate(areas) if area is not None and area[:4] != magic]


def _events(header: BitmapSuperblock) -> list[str]:
    return [
        f"          Events : {header.events}",
        f"  Events Cleared : {header.events_cleared}",
        f"           State : {_state(header.state)}",
    ]


def _state(state: BitmapState) -> str:
    if not state:
        return "OK"
    return "Out of date" if state == BitmapState.STALE else "Unknown"


def _bitmap(header: BitmapSuperblock, area: bytes) -> str:
    geometry = BitmapGeometry.of(header)
    dirty = geometry.dirty_count(area)
    share = 100.0 * dirty / (geometry.bits or 1)
    return f"          Bitmap : {geometry.bits} bits (chunks), {dirty} dirty ({share:2.1f}%)"


def _slot(slot: int, area: bytes | None) -> list[str]:
    """The lines of one slot. One that was never written is shown with no bits, as mdadm does."""
    header = None if area is None else parse_lenient(area)
    if area is None or header is None:
        return [f"   Unable to read bitmap on node: {slot}"]
    try:
        bitmap = _bitmap(header, area) if header.chunksize else _NO_BITS
    except BadBytes:
        return [f"   Unable to read bitmap on node: {slot}"]
    return [f"       Node Slot : {slot}", *_events(header), bitmap]
