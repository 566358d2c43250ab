"""The real mdadm reads what we write, and says of any superblock what we say.

mdadm is the judge here: `-E` on files, `-X` on read-only loop devices.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clustermd.cli.examine import brief_text, examine_text, export_text, read_member
from clustermd.cli.examine_bitmap import examine_bitmap_text, read_areas
from clustermd.ondisk.bitmap_superblock import BitmapState, BitmapSuperblock
from clustermd.ondisk.create import BitmapKind, CreatePlan, NewMember, plan_create
from clustermd.ondisk.superblock import (
    MAX_SECTOR,
    ROLE_FAULTY,
    ROLE_JOURNAL,
    ROLE_SPARE,
    FeatureMap,
    Superblock,
    find,
    location,
)

pytestmark = [pytest.mark.system, pytest.mark.needs("mdadm")]
MIB = 2048
TIB = 1 << 31
UUID_TEXT = "00010203:04050607:08090a0b:0c0d0e0f"


def mdadm(*arguments: str) -> str:
    """What mdadm prints; it must find the devices good, and complain of nothing."""
    done = subprocess.run(["/sbin/mdadm", *arguments], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    return done.stdout.decode("utf-8", "surrogateescape")


@contextmanager
def loop(path: Path) -> Iterator[str]:
    """A read-only loop device over a file."""
    device = subprocess.run(
        ["/sbin/losetup", "-f", "--show", "-r", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["/sbin/losetup", "-d", device], check=True)


class Image:
    """A sparse file as a member device."""

    def __init__(self, path: Path, sectors: int, writes: tuple[tuple[int, bytes], ...]) -> None:
        self.path, self.sectors = path, sectors
        with path.open("wb") as file:
            file.truncate(sectors * 512)
            for sector, data in writes:
                file.seek(sector * 512)
                file.write(data)

    def read(self, sector: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(sector * 512)
            return file.read(count * 512)


def create(tmp_path: Path, sizes: list[int | None], **wishes: Any) -> tuple[CreatePlan, list[Image]]:
    devices = [None if s is None else NewMember(str(tmp_path / f"d{i}"), s) for i, s in enumerate(sizes)]
    arguments: dict[str, Any] = {
        "devices": devices,
        "raid_disks": 2,
        "name": "shared",
        "homehost": "vmhost",
        "set_uuid": bytes(range(16)),
        "device_uuids": [bytes([0xA0 + i]) * 16 for i in range(len(devices))],
        "now": 1795339163,
        "cluster_name": "hacluster",
    }
    plan = plan_create(**(arguments | wishes))
    present = [d for d in devices if d is not None]
    return plan, [
        Image(Path(member.path), device.sectors, member.writes)
        for member, device in zip(plan.members, present, strict=True)
    ]


def fields(text: str) -> dict[str, str]:
    """`label : value` lines; of several equal labels the last counts."""
    return {
        label.strip(): value.strip()
        for line in text.splitlines()
        for label, _, value in [line.partition(" : ")]
    }


CLUSTERED: dict[str, Any] = {"bitmap": BitmapKind.CLUSTERED}
SHAPES: list[tuple[list[int | None], dict[str, Any]]] = [
    ([64 * MIB, 64 * MIB], CLUSTERED),
    ([64 * MIB, 64 * MIB], CLUSTERED | {"bitmap_chunk_bytes": 65536, "nodes": 9, "assume_clean": True}),
    ([512 * MIB, 600 * MIB, 512 * MIB], CLUSTERED | {"nodes": 2, "daemon_sleep": 1}),
    ([64 * MIB, None], CLUSTERED),
    ([10 * 1024 * MIB + 7, 10 * 1024 * MIB], CLUSTERED | {"bitmap_chunk_bytes": 1 << 20}),
    ([300 * 1024 * MIB] * 2, CLUSTERED | {"bitmap_chunk_bytes": 1 << 20}),
    ([2 * TIB, 2 * TIB], CLUSTERED | {"cluster_name": "x" * 63}),
    ([64 * MIB, 64 * MIB], CLUSTERED | {"data_offset_sectors": 8192, "size_sectors": 20000}),
    ([64 * MIB, 64 * MIB], {"bitmap": BitmapKind.INTERNAL}),
    ([40 * MIB] * 4, {"raid_disks": 3, "bitmap_chunk_bytes": 4096, "write_behind": 256}),
    ([64 * MIB, 64 * MIB], {"bitmap": BitmapKind.NONE}),
    ([64 * MIB, 64 * MIB], {"minor": 1, "bitmap_chunk_bytes": 65536}),
    ([64 * MIB, 65 * MIB + 5], {"minor": 0, "bitmap_chunk_bytes": 4096}),
    ([64 * MIB, 65 * MIB + 5], {"minor": 0, "bitmap": BitmapKind.NONE}),
    ([300 * 1024 * MIB] * 2, {"minor": 0}),
    ([300 * 1024 * MIB] * 2, {"bitmap": BitmapKind.NONE, "minor": 1}),
]


@pytest.mark.parametrize(("sizes", "wishes"), SHAPES, ids=str)
def test_mdadm_reads_what_create_plans(
    tmp_path: Path, sizes: list[int | None], wishes: dict[str, Any]
) -> None:
    plan, images = create(tmp_path, sizes, **wishes)
    for member, image in zip(plan.members, images, strict=True):
        sb = member.superblock
        text = mdadm("-E", str(image.path), "--homehost=vmhost")
        says = fields(text)
        minor = wishes.get("minor", 2)
        assert says["Version"] == f"1.{minor}"
        assert says["Array UUID"] == UUID_TEXT
        assert says["Name"] == "vmhost:shared  (local to host vmhost)"
        assert says["Checksum"].endswith("- correct")
        assert says["Raid Level"] == "raid1" and says["Events"] == "0"
        assert says["Array Size"].startswith(f"{plan.size_sectors // 2} KiB")
        assert says["Avail Dev Size"].startswith(f"{sb.data_size} sectors")
        assert says["Super Offset"] == f"{location(minor, image.sectors)} sectors"
        assert says.get("Data Offset", "0 sectors") == f"{sb.data_offset} sectors"
        assert says["State"] == ("clean" if wishes.get("assume_clean") else "active")
        role = f"Active device {sb.role}" if sb.role != ROLE_SPARE else "spare"
        assert says["Device Role"] == role
        clustered = wishes.get("bitmap") is BitmapKind.CLUSTERED
        assert ("Bad Block Log" in says) is not clustered
        if clustered:
            assert says["Cluster Name"] == wishes.get("cluster_name", "hacluster")
            assert says["Feature Map"] == "0x101"
        parsed, bitmap = read_member(image.read, image.sectors)
        assert text == examine_text(str(image.path), parsed, image.sectors, homehost="vmhost", bitmap=bitmap)
        assert mdadm("-E", "--export", str(image.path)) == export_text(sb)
    listed = [
        (str(image.path), member.superblock) for member, image in zip(plan.members, images, strict=True)
    ]
    paths = [path for path, _ in listed]
    assert mdadm("-E", "--brief", *paths) == brief_text(listed)
    verbose = mdadm("-E", "--brief", "-v", *paths).split("devices=")
    ours = brief_text(listed, verbose=True).split("devices=")
    assert verbose[0] == ours[0], "mdadm lists the devices in an order of its own"
    assert sorted(verbose[1].strip().split(",")) == sorted(ours[1].strip().split(","))


@pytest.mark.needs("loop")
@pytest.mark.parametrize(
    ("sizes", "wishes"), [s for s in SHAPES if s[1].get("bitmap") is not BitmapKind.NONE], ids=str
)
def test_mdadm_reads_the_bitmaps_that_create_plans(
    tmp_path: Path, sizes: list[int | None], wishes: dict[str, Any]
) -> None:
    plan, images = create(tmp_path, sizes, **wishes)
    assert plan.bitmap is not None and plan.geometry is not None
    for image in images:
        with loop(image.path) as device:
            text = mdadm("-X", device)
        sb = find(image.read, image.sectors)
        assert text == examine_bitmap_text(device, read_areas(image.read, sb, image.sectors))
        says = fields(text)
        bits = plan.geometry.bits
        dirty = [line.split(" : ")[1] for line in text.splitlines() if "Bitmap : " in line]
        assert dirty[0] == f"{bits} bits (chunks), {bits} dirty (100.0%)"
        assert dirty[1:] == [f"{bits} bits (chunks), 0 dirty (0.0%)"] * (plan.geometry.slots - 1)
        assert says["UUID"] == UUID_TEXT
        assert says["Daemon"] == f"{wishes.get('daemon_sleep', 5)}s flush period"
        assert says["Sync Size"].split(" ")[0] == str(plan.size_sectors // 2)
        if plan.bitmap.nodes:
            assert says["Cluster nodes"] == str(wishes.get("nodes", 4))
            assert says["Cluster name"] == wishes.get("cluster_name", "hacluster")


@pytest.mark.needs("loop")
def test_dirty_bits_and_states_of_each_slot_are_told_alike(tmp_path: Path) -> None:
    plan, _ = create(tmp_path, [64 * MIB] * 2, bitmap=BitmapKind.CLUSTERED, bitmap_chunk_bytes=4096)
    header, geometry = plan.bitmap, plan.geometry
    assert header is not None and geometry is not None
    writes = list(plan.members[0].writes)
    dirty = ([], [5], [0, geometry.bits - 1], range(0, geometry.bits, 3))
    for slot, bits in enumerate(dirty):
        changed = replace(
            header, events=slot * 10, events_cleared=slot, state=BitmapState([0, 2, 4 + 8, 1 << 15][slot])
        )
        writes[slot] = (writes[slot][0], geometry.area_bytes(changed, bits))
    image = Image(tmp_path / "image", 64 * MIB, tuple(writes))
    with loop(image.path) as device:
        text = mdadm("-X", device)
    sb = find(image.read, image.sectors)
    assert text == examine_bitmap_text(device, read_areas(image.read, sb, image.sectors))
    counts = [line.split(", ")[1].split(" ")[0] for line in text.splitlines() if "Bitmap : " in line]
    assert counts == [str(len(bits)) for bits in dirty]


def odd_superblock(draw: random.Random) -> tuple[Superblock, BitmapSuperblock, int]:
    """A superblock that could be met somewhere: other levels, reshapes, failed and replaced devices."""
    pick = draw.choice
    sectors = pick([81920, 81927, 131072, 1 << 24, 1 << 31])
    minor = pick([0, 1, 2])
    level = pick([1, 1, 1, 10, 0, 4, 5, 6, -1, -4, 77])
    size = pick([79872, 8192, 20000, 100, 20000 * 64])
    size = min(size, 79872) if sectors < 1 << 24 else size
    disks = pick([3, 4, 6]) if level == 6 else pick([2, 3, 4])
    roles = [role if draw.random() < 0.9 else ROLE_SPARE for role in range(disks)]
    roles += [pick([0, 1, 2, 9, ROLE_FAULTY, ROLE_JOURNAL, ROLE_SPARE]) for _ in range(2)]
    feature_map = FeatureMap.BITMAP_OFFSET
    for bit in FeatureMap:
        if bit not in (FeatureMap.PPL, FeatureMap.MULTIPLE_PPLS) and draw.random() < 0.15:
            feature_map |= bit
    uuid = draw.randbytes(16)
    sb = Superblock(
        minor=minor,
        set_uuid=uuid,
        set_name=pick(
            ["vmhost:md0", "other:a b", "vmhost", "", "x:y:z", 'a"b', "a'b c", "n" * 31, "vmhost:", "a/b"]
        ),
        ctime=pick([0, 1795339163, (5 << 40) | 1795339163]),
        level=level,
        size=size,
        raid_disks=disks,
        data_offset=0 if minor == 0 else 2048,
        data_size=pick([size, 79872]),
        super_offset=location(minor, sectors),
        dev_number=pick([0, 0, 1, 2, 3, 200]),
        device_uuid=draw.randbytes(16),
        utime=pick([1795339163, 7]),
        events=pick([0, 5, 1 << 40]),
        resync_offset=pick([MAX_SECTOR, 0, 4096]),
        dev_roles=tuple(roles) + (ROLE_SPARE,) * (128 - len(roles)),
        feature_map=feature_map,
        layout=pick([0x102, 0x201, 0x10201, 0x103, 0x101]) if level == 10 else pick([0, 2, 5, 6, 17]),
        chunksize=pick([0, 128, 1024]),
        bitmap_offset=-16 if minor == 0 else 8,
        reshape_position=pick([0, 100000, 1 << 35]),
        delta_disks=pick([0, 1, -1]),
        new_level=pick([level & 0xFFFF_FFFF, 0, 5]),
        new_layout=pick([0, 2, 0x102]),
        new_chunk=pick([0, 128, 1024]),
        new_offset=pick([0, -1024, 2048]),
        recovery_offset=pick([0, 51456, MAX_SECTOR]),
        devflags=pick([0, 0, 1, 2, 3, 4]),
        bblog_size=pick([0, 8, 1]),
        bblog_offset=pick([0, -8] if minor == 0 else [0, 16, 2032]),
    )
    header = BitmapSuperblock(
        version=5,
        uuid=uuid,
        events=1,
        events_cleared=0,
        sync_size=size,
        chunksize=pick([4096, 65536, 1 << 26]),
        nodes=pick([0, 1, 2, 4]),
        cluster_name=pick(["goldens", "x" * 63]),
    )
    return sb, header, sectors


@pytest.mark.parametrize("seed", range(60))
def test_examine_prints_what_mdadm_prints_of_odd_superblocks(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sb, header, sectors = odd_superblock(draw)
    data = sb.to_bytes()
    if draw.random() < 0.2:
        data = data[:216] + b"\1\2\3\0" + data[220:]
    writes = ((sb.super_offset + sb.bitmap_offset, header.to_bytes()), (sb.super_offset, data))
    image = Image(tmp_path / "image", sectors, writes)
    parsed, bitmap = read_member(image.read, sectors)
    ours = examine_text(str(image.path), parsed, sectors, homehost="vmhost", bitmap=bitmap)
    assert ours == mdadm("-E", str(image.path), "--homehost=vmhost")
    assert export_text(sb) == mdadm("-E", "--export", str(image.path))
    listed = [(str(image.path), sb)]
    assert brief_text(listed) == mdadm("-E", "--brief", str(image.path))
    assert brief_text(listed, verbose=True) == mdadm("-E", "--brief", "-v", str(image.path))
