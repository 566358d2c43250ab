"""What a new array gets, and which wishes are refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from clustermd.errors import Refused
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.create import (
    BitmapKind,
    CreatePlan,
    NewMember,
    array_name,
    choose_chunk_bytes,
    max_nodes,
    plan_create,
    plan_member,
)
from clustermd.ondisk.superblock import MAX_SECTOR, ROLE_SPARE, FeatureMap, Superblock

MIB = 2048


def plan(*sizes_mib: int | None, **wishes: Any) -> CreatePlan:
    devices = [None if s is None else NewMember(f"d{i}", s * MIB) for i, s in enumerate(sizes_mib)]
    arguments: dict[str, Any] = {
        "devices": devices,
        "raid_disks": 2,
        "name": "md0",
        "homehost": "h",
        "set_uuid": bytes(range(16)),
        "device_uuids": [bytes([i + 1]) * 16 for i in range(len(devices))],
        "now": 1795339163,
        "bitmap": BitmapKind.CLUSTERED,
        "cluster_name": "c",
    }
    return plan_create(**(arguments | wishes))


def test_a_clustered_mirror() -> None:
    made = plan(64, 64)
    assert [m.path for m in made.members] == ["d0", "d1"]
    first, second = (m.superblock for m in made.members)
    assert first.feature_map == FeatureMap.BITMAP_OFFSET | FeatureMap.CLUSTERED
    assert (first.size, first.data_offset, first.data_size, first.bitmap_offset) == (129024, 2048, 129024, 8)
    assert (first.events, first.resync_offset, first.bblog_size, first.bblog_offset) == (0, 0, 0, 0)
    assert (first.dev_number, second.dev_number, first.max_dev) == (0, 1, 128)
    assert first.dev_roles[:3] == (0, 1, ROLE_SPARE)
    assert first.device_uuid != second.device_uuid and first.set_name == "h:md0"
    assert made.bitmap is not None and made.geometry is not None
    assert (made.bitmap.chunksize, made.bitmap.nodes, made.bitmap.version) == (64 << 20, 4, 5)


def test_slot_zero_starts_dirty_the_others_clean_and_the_superblock_comes_last() -> None:
    made = plan(64, 64, bitmap_chunk_bytes=65536)
    geometry = made.geometry
    assert geometry is not None
    for member in made.members:
        assert [sector for sector, _ in member.writes] == [16, 24, 32, 40, 8]
        *areas, last = (data for _, data in member.writes)
        assert [geometry.dirty_count(area) for area in areas] == [1008, 0, 0, 0]
        assert all(BitmapSuperblock.from_bytes(area) == made.bitmap for area in areas)
        assert Superblock.from_bytes(last, minor=2, at_sector=8, device_sectors=64 * MIB) == member.superblock


def test_the_smallest_member_decides_and_the_first_gives_the_offset() -> None:
    made = plan(1024, 512)
    assert {m.superblock.data_offset for m in made.members} == {4096}
    assert made.size_sectors == (512 * MIB - 4096) // 128 * 128
    assert [m.superblock.data_size for m in made.members] == [1024 * MIB - 4096, 512 * MIB - 4096]


def test_missing_and_spare_devices() -> None:
    made = plan(64, None, 64, raid_disks=2)
    assert [m.superblock.dev_number for m in made.members] == [0, 2]
    assert made.members[0].superblock.dev_roles[:3] == (0, ROLE_SPARE, ROLE_SPARE)
    assert made.members[1].superblock.role == ROLE_SPARE


def test_many_devices_lengthen_the_role_table() -> None:
    made = plan(*[64] * 129, raid_disks=129, bitmap=BitmapKind.NONE)
    assert made.members[128].superblock.max_dev == 384
    assert made.members[128].superblock.role == 128


def test_an_array_of_one_node_gets_a_bad_block_log() -> None:
    made = plan(64, 64, bitmap=BitmapKind.INTERNAL)
    sb = made.members[0].superblock
    assert (sb.bblog_size, sb.bblog_offset, sb.bblog_shift) == (8, 16, 0)
    assert (24, b"\xff" * 4096) in made.members[0].writes
    assert made.bitmap is not None and (made.bitmap.version, made.bitmap.nodes) == (4, 0)
    assert plan(64, 64, assume_clean=True).members[0].superblock.resync_offset == MAX_SECTOR


def test_names_as_mdadm_makes_them() -> None:
    assert array_name("md0", "h") == "h:md0"
    assert array_name("a:b", "h") == "a:b"
    assert array_name("n", "") == "n"
    assert array_name("x" * 29, "h") == "h:" + "x" * 29
    assert array_name("x" * 30, "h") == "x" * 30
    assert array_name("x" * 40, "h") == "x" * 31
    assert len(array_name("ü" * 40, "").encode("utf-8", "surrogateescape")) == 31


@pytest.mark.parametrize(
    ("gib", "chunk_mib"), [(1, 64), (1024, 64), (16 << 10, 64), (63 << 10, 64), (100 << 10, 128)]
)
def test_default_chunks_of_the_specification(gib: int, chunk_mib: int) -> None:
    assert choose_chunk_bytes(gib << 21, None) == chunk_mib << 20


def test_a_chunk_that_makes_too_many_bits_is_refused() -> None:
    assert choose_chunk_bytes(64 * MIB, 4096) == 4096
    with pytest.raises(Refused) as refused:
        choose_chunk_bytes(10 << 21, 4096)
    assert refused.value.code == "bad-bitmap-chunk"
    smallest = refused.value.data["smallest_bytes"]
    assert choose_chunk_bytes(10 << 21, smallest) == smallest


@pytest.mark.parametrize(
    ("code", "sizes", "wishes"),
    [
        ("bad-level", (64, 64), {"level": 5}),
        ("bad-metadata", (64, 64), {"minor": 3}),
        ("one-device", (64,), {"raid_disks": 1}),
        ("bad-raid-disks", (64,), {"raid_disks": 0}),
        ("too-few-devices", (64,), {}),
        ("no-devices", (None, None), {}),
        ("missing-spare", (64, 64, None), {}),
        ("clustered-metadata", (64, 64), {"minor": 0}),
        ("clustered-write-behind", (64, 64), {"write_behind": 256}),
        ("bad-write-behind", (64, 64), {"write_behind": 16384}),
        ("bad-nodes", (64, 64), {"nodes": 1}),
        ("bad-nodes", (64, 64), {"nodes": 10000}),
        ("bad-cluster-name", (64, 64), {"cluster_name": "x" * 64}),
        ("bad-cluster-name", (64, 64), {"cluster_name": ""}),
        ("bad-delay", (64, 64), {"daemon_sleep": 0}),
        ("bad-bitmap-chunk", (64, 64), {"bitmap_chunk_bytes": 2048}),
        ("bad-bitmap-chunk", (64, 64), {"bitmap_chunk_bytes": 5000}),
        ("bad-bitmap-chunk", (64, 64), {"bitmap_chunk_bytes": 1 << 32}),
        ("bad-data-offset", (64, 64), {"data_offset_sectors": 8}),
        ("bad-data-offset", (64, 64), {"data_offset_sectors": 2049}),
        ("bad-data-offset", (64, 64), {"minor": 0, "bitmap": BitmapKind.NONE, "data_offset_sectors": 8}),
        ("no-room-for-bitmaps", (64, 64), {"data_offset_sectors": 40}),
        ("no-room-for-bitmaps", (64, 64), {"nodes": 255}),
        ("bad-size", (64, 64), {"size_sectors": 100}),
        ("device-too-small", (64, 64), {"size_sectors": 63 * MIB + 8}),
        ("device-too-small", (64, 1), {}),
        ("device-too-small", (64, 0), {}),
    ],
)
def test_wishes_that_cannot_be_are_refused(
    code: str, sizes: tuple[int | None, ...], wishes: dict[str, Any]
) -> None:
    with pytest.raises(Refused) as refused:
        plan(*sizes, **wishes)
    assert refused.value.code == code


def test_a_device_given_twice_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        plan(64, 64, devices=[NewMember("same", 64 * MIB)] * 2)
    assert refused.value.code == "device-twice"


def test_as_many_slots_as_fit() -> None:
    geometry = BitmapGeometry(65536, 129024, 254)
    assert max_nodes(geometry, super_offset=8, data_offset=2048) == 254
    plan(64, 64, nodes=254)


def test_a_device_for_an_array_that_exists() -> None:
    made = plan(64, 64, bitmap_chunk_bytes=65536)
    running = replace(
        made.members[0].superblock,
        events=9,
        dev_roles=(0, 1),
        recovery_offset=77,
        devflags=1,
        feature_map=made.members[0].superblock.feature_map | FeatureMap.RECOVERY_OFFSET,
    )
    added = plan_member(
        running, made.bitmap, device=NewMember("new", 80 * MIB), dev_number=130, device_uuid=b"n" * 16
    )
    sb = added.superblock
    assert (sb.dev_number, sb.role, sb.max_dev, sb.events) == (130, ROLE_SPARE, 384, 9)
    assert (sb.data_size, sb.size, sb.devflags, sb.recovering) == (80 * MIB - 2048, 129024, 0, False)
    assert [sector for sector, _ in added.writes] == [16, 24, 32, 40, 8]
    with pytest.raises(Refused) as refused:
        plan_member(
            running, made.bitmap, device=NewMember("new", 60 * MIB), dev_number=2, device_uuid=bytes(16)
        )
    assert refused.value.code == "device-too-small"
