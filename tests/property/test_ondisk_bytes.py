"""Whatever the fields, bytes and values are each other's inverse; whatever the bytes, the answer is typed."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.cli.examine import brief_text, examine_text, export_text, read_member
from clustermd.cli.examine_bitmap import examine_bitmap_text, read_areas, unwritten_slots
from clustermd.errors import BadBytes, Refused
from clustermd.ondisk import bad_blocks
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapState, BitmapSuperblock
from clustermd.ondisk.create import BitmapKind, NewMember, plan_create
from clustermd.ondisk.superblock import FIXED, FeatureMap, Superblock, checksum, find, location, parse_lenient

U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
S32 = st.integers(-(1 << 31), (1 << 31) - 1)
UUIDS = st.binary(min_size=16, max_size=16)
SECTORS = 4096
BOUND_BYTES = 24 << 20
"""Far less than any count in hostile bytes could ask for."""


def names(limit: int) -> st.SearchStrategy[str]:
    raw = st.binary(max_size=limit).map(lambda b: b.replace(b"\0", b"x"))
    return raw.map(lambda b: b.decode("utf-8", "surrogateescape"))


SUPERBLOCKS = st.builds(
    Superblock,
    minor=st.just(2),
    set_uuid=UUIDS,
    set_name=names(32),
    ctime=U64,
    level=S32,
    size=U64,
    raid_disks=U32,
    data_offset=U64,
    data_size=U64,
    super_offset=st.just(8),
    dev_number=U32,
    device_uuid=UUIDS,
    utime=U64,
    events=U64,
    resync_offset=U64,
    dev_roles=st.lists(U16, max_size=300).map(tuple),
    feature_map=U32.map(FeatureMap),
    layout=U32,
    chunksize=U32,
    bitmap_offset=S32,
    new_level=U32,
    reshape_position=U64,
    delta_disks=S32,
    new_layout=U32,
    new_chunk=U32,
    new_offset=S32,
    recovery_offset=U64,
    cnt_corrected_read=U32,
    devflags=U8,
    bblog_shift=U8,
    bblog_size=U16,
    bblog_offset=S32,
)
HEADERS = st.builds(
    BitmapSuperblock,
    version=st.integers(3, 5),
    uuid=UUIDS,
    events=U64,
    events_cleared=U64,
    sync_size=U64,
    chunksize=st.integers(9, 31).map(lambda shift: 1 << shift),
    state=U32.map(lambda bits: BitmapState(bits & ~4)),
    daemon_sleep=st.integers(1, (1 << 32) - 1),
    write_behind=st.integers(0, 16383),
    sectors_reserved=U32,
    nodes=st.integers(0, 9999),
    cluster_name=names(63),
)


@given(SUPERBLOCKS)
@settings(max_examples=200, deadline=None)
def test_a_superblock_survives_its_bytes(sb: Superblock) -> None:
    data = sb.to_bytes()
    assert len(data) % 512 == 0 and len(data) == sb.size_on_disk_sectors * 512
    parsed = parse_lenient(data, minor=2, at_sector=8)
    assert parsed.superblock == sb and parsed.checksum_ok
    assert parsed.superblock.to_bytes() == data


@given(HEADERS)
@settings(max_examples=200, deadline=None)
def test_a_bitmap_superblock_survives_its_bytes(header: BitmapSuperblock) -> None:
    assert BitmapSuperblock.from_bytes(header.to_bytes()) == header


@given(HEADERS, st.integers(9, 14), st.integers(0, 1 << 18), st.data())
@settings(max_examples=100, deadline=None)
def test_bits_survive_their_bytes(
    header: BitmapSuperblock, shift: int, sync: int, data: st.DataObject
) -> None:
    geometry = BitmapGeometry(1 << shift, sync, 3)
    bits = data.draw(st.sets(st.integers(0, geometry.bits - 1), max_size=50)) if geometry.bits else set()
    area = geometry.area_bytes(header, bits)
    assert len(area) == geometry.bytes_per_node and len(area) % 4096 == 0
    assert geometry.dirty_chunks(area) == sorted(bits)
    assert geometry.dirty_count(area) == len(bits)
    for bit in bits:
        page, byte, mask = geometry.position(bit)
        assert area[page * 4096 + byte] & mask


@given(
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 3000)), max_size=40),
    st.integers(0, 6),
)
@settings(max_examples=100, deadline=None)
def test_bad_blocks_survive_their_bytes(ranges: list[tuple[int, int]], shift: int) -> None:
    read = bad_blocks.parse(bad_blocks.format(ranges, shift=shift), shift=shift)
    unit = 1 << shift
    assert read == bad_blocks.merge(
        (s // unit * unit, -(-(s + n) // unit) * unit - s // unit * unit) for s, n in ranges if n
    )
    assert all(low + n < next_low for (low, n), (next_low, _) in itertools.pairwise(read))


@given(
    st.lists(st.integers(2048 * 3, 1 << 34), min_size=2, max_size=4),
    st.sampled_from([0, 1, 2]),
    st.sampled_from(list(BitmapKind)),
    st.integers(2, 9),
    st.one_of(st.none(), st.integers(12, 27).map(lambda shift: 1 << shift)),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_plan_is_a_set_of_valid_members_that_touch_nothing_twice(
    sizes: list[int], minor: int, bitmap: BitmapKind, nodes: int, chunk: int | None, clean: bool
) -> None:
    plan, code = None, ""
    try:
        plan = plan_create(
            devices=[NewMember(f"d{i}", size) for i, size in enumerate(sizes)],
            raid_disks=2,
            name="n",
            set_uuid=bytes(16),
            device_uuids=[bytes([i]) * 16 for i in range(len(sizes))],
            now=5,
            minor=minor,
            bitmap=bitmap,
            nodes=nodes,
            cluster_name="c",
            bitmap_chunk_bytes=chunk,
            assume_clean=clean,
        )
    except Refused as refused:
        code = refused.code
    if plan is None:
        assert code in ("clustered-metadata", "bad-bitmap-chunk", "no-room-for-bitmaps", "device-too-small")
        return
    assert plan.size_sectors % 128 == 0 and plan.size_sectors > 0
    for member, sectors in zip(plan.members, sizes, strict=True):
        sb = member.superblock
        taken = sorted((sector, sector + len(data) // 512) for sector, data in member.writes)
        taken = sorted([*taken, (sb.data_offset, sb.data_offset + sb.data_size)])
        assert taken[0][0] >= 0 and taken[-1][1] <= sectors
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
        sector, data = member.writes[-1]
        assert sector == location(minor, sectors)
        assert Superblock.from_bytes(data, minor=minor, at_sector=sector, device_sectors=sectors) == sb
        if plan.geometry is not None:
            starts = [
                plan.geometry.start_sector(sb.super_offset, sb.bitmap_offset, slot)
                for slot in range(plan.geometry.slots)
            ]
            assert starts == [at for at, _ in member.writes[: plan.geometry.slots]]


def valid_image() -> bytes:
    """A small member of a clustered array, without its data."""
    plan = plan_create(
        devices=[NewMember("a", SECTORS), NewMember("b", SECTORS)],
        raid_disks=2,
        name="n",
        homehost="h",
        set_uuid=bytes(range(16)),
        device_uuids=[b"a" * 16, b"b" * 16],
        now=5,
        bitmap=BitmapKind.CLUSTERED,
        cluster_name="c",
        bitmap_chunk_bytes=4096,
    )
    image = bytearray(SECTORS * 512)
    for sector, data in plan.members[0].writes:
        image[sector * 512 : sector * 512 + len(data)] = data
    return bytes(image)


IMAGE = valid_image()


def look_at_everything(image: bytes) -> None:
    """All that reads a device: nothing but typed refusals, and no allocation that counts could steer."""
    sectors = len(image) // 512

    def read(sector: int, count: int) -> bytes:
        return image[sector * 512 : (sector + count) * 512]

    tracemalloc.start()
    try:
        for reading in (examine, examine_bits, load):
            try:
                reading(read, sectors)
            except Refused:
                continue
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


def examine(read, sectors: int) -> None:
    parsed, bitmap = read_member(read, sectors)
    assert examine_text("p", parsed, sectors, homehost="h", bitmap=bitmap).endswith("\n")
    assert export_text(parsed.superblock) and brief_text([("p", parsed.superblock)], verbose=True)


def examine_bits(read, sectors: int) -> None:
    parsed, _ = read_member(read, sectors)
    areas = read_areas(read, parsed.superblock, sectors)
    assert examine_bitmap_text("p", areas) and unwritten_slots(areas) is not None


def load(read, sectors: int) -> None:
    sb = find(read, sectors)
    at = sb.super_offset + sb.bitmap_offset
    header = BitmapSuperblock.from_bytes(read(max(at, 0), 1))
    geometry = BitmapGeometry.of(header)
    place = bad_blocks.log_place(sb, geometry)
    if place and 0 <= place[0] < sectors:
        bad_blocks.parse(read(*place), shift=sb.bblog_shift)
    geometry.check_fits(
        super_offset=sb.super_offset,
        bitmap_offset=sb.bitmap_offset,
        data_offset=sb.data_offset,
        device_sectors=sectors,
        size=sb.size,
    )
    geometry.dirty_chunks(read(at, geometry.sectors_per_node))


def test_the_valid_image_is_valid() -> None:
    load(lambda s, n: IMAGE[s * 512 : (s + n) * 512], SECTORS)
    look_at_everything(IMAGE)


def resealed(image: bytearray) -> bytes:
    """The superblock's checksum made right, so that the checks behind it are reached."""
    (max_dev,) = struct.unpack_from("<I", image, 4096 + 220)
    if max_dev <= 1920:
        struct.pack_into("<I", image, 4096 + 216, checksum(image[4096 : 4096 + FIXED.size + 2 * max_dev]))
    return bytes(image)


INTERESTING = st.sampled_from(
    [
        b"\0" * 4,
        b"\xff" * 4,
        b"\xff" * 8,
        b"\0" * 8,
        b"\1\0\0\0",
        b"\0\0\0\x80",
        b"\xff\xff\xff\x7f",
        b"\0\0\0\4",
    ]
)


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(4096, 4096 + 400), st.integers(8192, 8192 + 140), st.integers(12288, 12428)
            ),
            st.one_of(INTERESTING, st.binary(min_size=1, max_size=8)),
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.one_of(st.just(len(IMAGE)), st.integers(0, len(IMAGE) // 8)),
)
@settings(max_examples=400, deadline=None)
def test_mutated_and_truncated_images_are_refused_in_words(
    changes: list[tuple[int, bytes]], seal: bool, length: int
) -> None:
    image = bytearray(IMAGE)
    for at, new in changes:
        image[at : at + len(new)] = new
    look_at_everything((resealed(image) if seal else bytes(image))[:length])


@given(st.binary(max_size=8192), st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused_in_words(noise: bytes, sector: int) -> None:
    image = bytearray(64 * 512)
    image[sector * 512 : sector * 512 + len(noise)] = noise
    look_at_everything(bytes(image[: 64 * 512]))


def test_huge_counts_cost_nothing() -> None:
    header = BitmapSuperblock.from_bytes(IMAGE[8192:8448])
    for change in (
        {"sync_size": (1 << 64) - 1, "chunksize": 512},
        {"sync_size": (1 << 26) * 8, "chunksize": 4096, "nodes": 9999},
        {"nodes": 9999},
    ):
        image = bytearray(IMAGE)
        image[8192:8448] = replace(header, **change).to_bytes()
        look_at_everything(bytes(image))
    for name in ("raid_disks", "level", "dev_number", "delta_disks"):
        sb = Superblock.from_bytes(IMAGE[4096:8192], minor=2, at_sector=8, device_sectors=SECTORS)
        image = bytearray(IMAGE)
        image[4096:4608] = replace(sb, feature_map=sb.feature_map | 4, **{name: (1 << 31) - 1}).to_bytes()
        look_at_everything(bytes(image))


def test_too_few_bytes_are_refused_as_such() -> None:
    for garbage in (b"", b"x", bytes(255)):
        for reading in (BitmapSuperblock.from_bytes, lambda b: parse_lenient(b, minor=2, at_sector=8)):
            with pytest.raises(BadBytes, match="only"):
                reading(garbage)
