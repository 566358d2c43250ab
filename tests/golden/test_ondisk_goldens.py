"""Every disk that Linux wrote means to us what it meant to Linux and mdadm."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import goldens
import pytest

from clustermd.cli.examine import brief_text, examine_text, read_member
from clustermd.cli.examine_bitmap import examine_bitmap_text, read_areas
from clustermd.errors import BadBytes
from clustermd.ondisk import bad_blocks
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.create import (
    BitmapKind,
    NewMember,
    bitmap_space_sectors,
    default_data_offset,
    plan_create,
)
from clustermd.ondisk.superblock import FeatureMap, find, same_set

SNAPSHOTS = goldens.snapshots()
RENAMED = {"chunk": "chunksize"}
"""Names that info.json has of its own."""


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recorded texts show times of a machine in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def disks(snapshot: goldens.Snapshot) -> list[tuple[str, goldens.Disk, dict]]:
    found = []
    for image in snapshot.images:
        member = snapshot.member(image)
        at_end = member["sb"] is not None and member["sb"]["sb_offset"] > 1 << 20
        disk = goldens.Disk(image, member["bytes"], whole=at_end)
        found.append((image.name.removesuffix(".xz"), disk, member))
    return found


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=str)
def test_superblock_and_bitmaps_are_what_the_recording_says(snapshot: goldens.Snapshot) -> None:
    first = None
    for _, disk, member in disks(snapshot):
        sb = find(disk.read, disk.sectors)
        first = first or sb
        same_set(first, sb)
        raw = disk.read(sb.super_offset, sb.size_on_disk_sectors)
        assert sb.to_bytes() == raw, "unchanged fields must give unchanged bytes"
        recorded = member["sb"]
        if recorded is None:
            continue
        for name, value in recorded.items():
            if name == "sb_offset":
                assert sb.super_offset * 512 == value
            elif name == "dev_roles":
                assert list(sb.dev_roles[: len(value)]) == value
            elif name != "bitmap_slots":
                assert getattr(sb, RENAMED.get(name, name)) == value, name
        check_bitmaps(disk, sb, recorded["bitmap_slots"])


def check_bitmaps(disk: goldens.Disk, sb, recorded: list[dict]) -> None:
    if not sb.has_bitmap:
        assert recorded == []
        return
    geometry = BitmapGeometry.of(
        BitmapSuperblock.from_bytes(disk.read(sb.super_offset + sb.bitmap_offset, 1))
    )
    geometry.check_fits(
        super_offset=sb.super_offset,
        bitmap_offset=sb.bitmap_offset,
        data_offset=sb.data_offset,
        device_sectors=disk.sectors,
        size=sb.size,
    )
    assert geometry.slots == len(recorded)
    for slot, expected in enumerate(recorded):
        at = geometry.start_sector(sb.super_offset, sb.bitmap_offset, slot)
        area = disk.read(at, geometry.sectors_per_node)
        if expected is None:
            with pytest.raises(BadBytes, match="magic"):
                BitmapSuperblock.from_bytes(area)
            continue
        header = BitmapSuperblock.from_bytes(area)
        header.check(sb.set_uuid, nodes=geometry.nodes)
        dirty = geometry.dirty_chunks(area)
        assert (header.version, header.events, header.events_cleared) == (
            expected["version"],
            expected["events"],
            expected["events_cleared"],
        )
        assert (header.state, header.chunksize, header.sync_size, header.nodes) == (
            expected["state"],
            expected["chunk"],
            expected["sync_size"],
            expected["nodes"],
        )
        assert geometry.bits == expected["bits"]
        assert len(dirty) == geometry.dirty_count(area) == expected["dirty"]
        bits = expected["dirty_bits"]
        if isinstance(bits, str):
            low, high = map(int, bits.split(".."))
            bits = list(range(low, high + 1))
        assert dirty == bits
        assert geometry.area_bytes(header, dirty)[: len(area)] == without_tail(geometry, area)


def without_tail(geometry: BitmapGeometry, area: bytes) -> bytes:
    """`area` with the bits behind the last chunk cleared: nobody may rely on those."""
    whole, rest = divmod(geometry.bits, 8)
    end = 256 + whole
    last = bytes([area[end] & ((1 << rest) - 1)]) if rest else b""
    return (area[:end] + last).ljust(len(area), b"\0")


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=str)
def test_examine_says_what_mdadm_said(snapshot: goldens.Snapshot) -> None:
    mine = ""
    for name, disk, _ in disks(snapshot):
        parsed, bitmap = read_member(disk.read, disk.sectors)
        mine += examine_text(name, parsed, disk.sectors, bitmap=bitmap)
    assert mine == snapshot.text("examine.txt")


@pytest.mark.parametrize("snapshot", [s for s in SNAPSHOTS if s.text("examine-bitmap.txt")], ids=str)
def test_examine_bitmap_says_what_mdadm_said(snapshot: goldens.Snapshot) -> None:
    recorded = re.split(r"^==== (disk\d\.img)\n", snapshot.text("examine-bitmap.txt"), flags=re.MULTILINE)
    texts = dict(zip(recorded[1::2], recorded[2::2], strict=True))
    for name, disk, _ in disks(snapshot):
        sb = find(disk.read, disk.sectors)
        mine = examine_bitmap_text(name, read_areas(disk.read, sb, disk.sectors))
        theirs, complaint, _ = texts[name].partition("mdadm: invalid bitmap magic 0x0")
        # mdadm stops at a slot that was never written; the slots behind it are shown here.
        assert mine.startswith(theirs) if complaint else mine == theirs


def test_brief_says_what_mdadm_said() -> None:
    snapshot = goldens.snapshot("c03-both-write/live-dirty")
    members = [(name, find(disk.read, disk.sectors)) for name, disk, _ in disks(snapshot)]
    uuid = "11111111:22222222:33333333:00000002"
    assert brief_text(members) == f"ARRAY /dev/md/c02  metadata=1.2 UUID={uuid} name=node1:c02\n"


def test_bad_block_lists_are_read() -> None:
    snapshot = goldens.snapshot("s21-raid1-badblocks/stopped")
    expected = [[(20001, 3)], [(4096, 8), (10000, 64)]]
    for (_, disk, _), ranges in zip(disks(snapshot), expected, strict=True):
        sb = find(disk.read, disk.sectors)
        assert sb.feature_map & FeatureMap.BAD_BLOCKS
        log = disk.read(sb.super_offset + sb.bblog_offset, sb.bblog_size)
        assert bad_blocks.parse(log, shift=sb.bblog_shift, device_sectors=disk.sectors) == ranges
        assert bad_blocks.format(ranges) == log


CREATED = {
    "c01-create-assume-clean/live-after-create": {"bitmap": BitmapKind.CLUSTERED},
    "c21-nodes2-third-refused/live": {"bitmap": BitmapKind.CLUSTERED, "nodes": 2},
    "s01-raid1/stopped": {},
    "s02-raid1-3dev-spare/stopped": {"raid_disks": 3},
    "s05-raid1-v1.0/stopped": {"minor": 0},
    "s06-raid1-v1.1/stopped": {"minor": 1},
    "s07-raid1-nobitmap/stopped": {"bitmap": BitmapKind.NONE},
    "s08-raid1-bigchunk/stopped": {"bitmap_chunk_bytes": 64 << 20},
    "s09-raid1-4kchunk/stopped": {"bitmap_chunk_bytes": 4096},
}


LATER = {"c21-nodes2-third-refused/live": {"resync_offset"}}
"""What else a start in a cluster has changed in the meantime."""


@pytest.mark.parametrize("name", CREATED)
def test_create_plans_what_mdadm_created(name: str) -> None:
    """Same names, sizes and places; what the first start changes is left out."""
    found = disks(goldens.snapshot(name))
    theirs = [find(disk.read, disk.sectors) for _, disk, _ in found]
    wishes = {"bitmap_chunk_bytes": 65536, "raid_disks": 2} | CREATED[name]
    homehost, _, bare = theirs[0].set_name.partition(":")
    plan = plan_create(
        devices=[NewMember(image, disk.sectors) for image, disk, _ in found],
        name=bare,
        homehost=homehost,
        set_uuid=theirs[0].set_uuid,
        device_uuids=[sb.device_uuid for sb in theirs],
        now=theirs[0].ctime,
        cluster_name="goldens",
        assume_clean=True,
        **wishes,
    )
    for member, (_, disk, _), their in zip(plan.members, found, theirs, strict=True):
        changed = {"events", "utime"} | LATER.get(name, set())
        for field in type(their).__dataclass_fields__:
            if field not in changed:
                assert getattr(member.superblock, field) == getattr(their, field), field
        if plan.bitmap is None or plan.geometry is None:
            continue
        start = their.super_offset + their.bitmap_offset
        header = BitmapSuperblock.from_bytes(disk.read(start, 1))
        for field in ("version", "uuid", "sync_size", "chunksize", "daemon_sleep", "nodes", "cluster_name"):
            assert getattr(plan.bitmap, field) == getattr(header, field), field


def test_the_log_that_mdadm_puts_over_a_bitmap_is_not_used() -> None:
    """A disk added to a clustered array claims a bad block log where slot 1's bitmap lies."""
    found = disks(goldens.snapshot("c05-add-spare/live-recovered"))
    places = []
    for _, disk, _ in found:
        sb = find(disk.read, disk.sectors)
        header = BitmapSuperblock.from_bytes(disk.read(sb.super_offset + sb.bitmap_offset, 1))
        places.append((sb.bblog_offset, bad_blocks.log_place(sb, BitmapGeometry.of(header))))
    assert places == [(0, None), (0, None), (16, None)]
    single = disks(goldens.snapshot("s01-raid1/stopped"))[0][1]
    sb = find(single.read, single.sectors)
    header = BitmapSuperblock.from_bytes(single.read(sb.super_offset + sb.bitmap_offset, 1))
    assert bad_blocks.log_place(sb, BitmapGeometry.of(header)) == (24, 8)


def test_data_offsets_of_the_specification() -> None:
    mib = 2048
    expected = {64: 2048, 512: 2048, 1024: 4096, 8192: 18432, 10240: 18432, 102400: 133120, 1 << 20: 264192}
    assert {size: default_data_offset(size * mib) for size in expected} == expected
    assert [bitmap_space_sectors(s) for s in (127, 128, 8 << 21, (8 << 21) + 9, (200 << 21) + 128)] == [
        0,
        8,
        8,
        128,
        256,
    ]
