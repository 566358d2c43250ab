"""Bitmap superblock, bits and bad block log: places, checks, limits."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from clustermd.errors import BadBytes, Refused
from clustermd.ondisk import bad_blocks, bitmap_superblock
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapState, BitmapSuperblock

UUID = bytes(range(16))
HEADER = BitmapSuperblock(
    version=5,
    uuid=UUID,
    events=7,
    events_cleared=5,
    sync_size=129024,
    chunksize=65536,
    nodes=4,
    cluster_name="goldens",
)


def test_layout_is_that_of_the_specification() -> None:
    assert bitmap_superblock.FIXED.size == 256
    data = HEADER.to_bytes()
    assert data[:4] == b"bitm"
    assert struct.unpack_from("<QQQ", data, 24) == (7, 5, 129024)
    assert struct.unpack_from("<IIIIII", data, 48) == (0, 65536, 5, 0, 0, 4)
    assert data[72:80] == b"goldens\0"
    assert BitmapSuperblock.from_bytes(data) == HEADER


def test_a_write_error_is_never_written() -> None:
    marked = replace(HEADER, state=BitmapState.STALE | BitmapState.WRITE_ERROR)
    assert BitmapSuperblock.from_bytes(marked.to_bytes()).state == BitmapState.STALE


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("bad-bitmap-version", {"version": 2}),
        ("bad-bitmap-version", {"version": 6}),
        ("bad-bitmap-chunk", {"chunksize": 256}),
        ("bad-bitmap-chunk", {"chunksize": 65537}),
        ("bad-bitmap-chunk", {"chunksize": 0}),
        ("bad-bitmap-delay", {"daemon_sleep": 0}),
        ("bad-bitmap-write-behind", {"write_behind": 16384}),
        ("bad-bitmap-nodes", {"nodes": 0xFFFF_FFFF}),
    ],
)
def test_each_check_has_its_code(code: str, change: dict[str, int]) -> None:
    with pytest.raises(BadBytes) as refused:
        BitmapSuperblock.from_bytes(replace(HEADER, **change).to_bytes())
    assert refused.value.code == code


def test_magic_and_length_are_checked() -> None:
    with pytest.raises(BadBytes) as refused:
        BitmapSuperblock.from_bytes(bytes(256))
    assert refused.value.code == "bad-bitmap-magic"
    with pytest.raises(BadBytes) as refused:
        BitmapSuperblock.from_bytes(HEADER.to_bytes()[:255])
    assert refused.value.code == "short-bitmap"


def test_a_bitmap_of_another_array_slot_count_or_cluster_is_refused() -> None:
    HEADER.check(UUID, nodes=4, cluster_name="goldens")
    for code, arguments in (
        ("bitmap-of-other-array", {"uuid": bytes(16)}),
        ("bitmap-slots-differ", {"uuid": UUID, "nodes": 3}),
        ("other-cluster", {"uuid": UUID, "cluster_name": "else"}),
    ):
        with pytest.raises(BadBytes) as refused:
            HEADER.check(**arguments)
        assert refused.value.code == code


def test_an_older_bitmap_is_stale_only_without_cluster() -> None:
    single = replace(HEADER, version=4, nodes=0)
    assert single.stale_for(8) and not single.stale_for(7)
    assert not HEADER.stale_for(8)
    assert replace(HEADER, state=BitmapState.STALE).stale_for(7)


GIB = 1 << 21


@pytest.mark.parametrize(
    ("sync", "chunk", "bits", "bytes_per_node"),
    [
        (1046528, 64 << 20, 8, 4096),
        (10 * GIB, 64 << 20, 160, 4096),
        (1024 * GIB, 64 << 20, 16384, 4096),
        (16 * 1024 * GIB, 64 << 20, 262144, 36864),
        (100 * 1024 * GIB, 128 << 20, 819200, 106496),
        (129024, 65536, 1008, 4096),
        (30720 * 8 + 1, 4096, 30721, 8192),
        (30720 * 8, 4096, 30720, 4096),
    ],
)
def test_sizes_of_the_specification(sync: int, chunk: int, bits: int, bytes_per_node: int) -> None:
    geometry = BitmapGeometry(chunk, sync, 4)
    assert (geometry.bits, geometry.bytes_per_node) == (bits, bytes_per_node)
    starts = [geometry.start_sector(8, 8, slot) for slot in range(4)]
    assert starts == [16 + slot * bytes_per_node // 512 for slot in range(4)]


def test_page_zero_holds_the_header_and_3840_bytes_of_bits() -> None:
    geometry = BitmapGeometry(4096, 40000 * 8, 2)
    assert geometry.position(0) == (0, 256, 1)
    assert geometry.position(30719) == (0, 4095, 0x80)
    assert geometry.position(30720) == (1, 0, 1)
    area = geometry.area_bytes(HEADER, [0, 9, 30719, 30720])
    assert len(area) == 2 * 4096
    assert area[256:258] == b"\x01\x02"
    assert (area[4095], area[4096]) == (0x80, 1)
    assert geometry.dirty_chunks(area) == [0, 9, 30719, 30720]


def test_bits_behind_the_last_chunk_are_ignored() -> None:
    geometry = BitmapGeometry(65536, 128 * 11, 4)
    area = geometry.area_bytes(HEADER, all_ones=True)
    assert area[256:] == b"\xff" * 3840
    assert geometry.dirty_chunks(area) == list(range(11))
    assert geometry.dirty_count(area) == 11


def test_a_bit_beyond_the_end_and_a_short_area_are_refused() -> None:
    geometry = BitmapGeometry(65536, 128 * 11, 4)
    with pytest.raises(BadBytes) as refused:
        geometry.area_bytes(HEADER, [11])
    assert refused.value.code == "bit-out-of-range"
    with pytest.raises(BadBytes) as refused:
        geometry.dirty_chunks(bytes(257))
    assert refused.value.code == "short-bitmap"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("bad-bitmap-chunk", (1000, 1024, 1)),
        ("bad-bitmap-nodes", (4096, 1024, 10000)),
        ("bad-bitmap-nodes", (4096, 1024, -1)),
        ("bitmap-too-large", (512, (1 << 64) - 1, 4)),
        ("bitmap-too-large", (4096, -1, 4)),
    ],
)
def test_impossible_counts_are_refused_before_anything_is_allocated(
    code: str, arguments: tuple[int, int, int]
) -> None:
    with pytest.raises(BadBytes) as refused:
        BitmapGeometry(*arguments)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "place",
    [
        {"super_offset": 8, "bitmap_offset": 8, "data_offset": 47, "device_sectors": 4096},
        {"super_offset": 8, "bitmap_offset": -8, "data_offset": 2048, "device_sectors": 4096},
        {"super_offset": 8, "bitmap_offset": -16, "data_offset": 2048, "device_sectors": 4096},
        {"super_offset": 4080, "bitmap_offset": -32, "data_offset": 0, "device_sectors": 4096, "size": 4049},
        {"super_offset": 4080, "bitmap_offset": -24, "data_offset": 0, "device_sectors": 4096, "size": 1024},
        {"super_offset": 4080, "bitmap_offset": 8, "data_offset": 0, "device_sectors": 4096},
    ],
)
def test_areas_that_would_hit_something_are_refused(place: dict[str, int]) -> None:
    geometry = BitmapGeometry(65536, 129024, 4)
    with pytest.raises(BadBytes) as refused:
        geometry.check_fits(**place)
    assert refused.value.code == "bitmap-out-of-place"


def test_areas_that_just_fit_are_taken() -> None:
    geometry = BitmapGeometry(65536, 129024, 4)
    geometry.check_fits(super_offset=8, bitmap_offset=8, data_offset=48, device_sectors=4096)
    geometry.check_fits(super_offset=4080, bitmap_offset=-32, data_offset=0, device_sectors=4096, size=4048)


def test_bad_blocks_are_sorted_merged_and_split() -> None:
    log = bad_blocks.format([(5000, 2000), (100, 3), (102, 5)])
    words = struct.unpack("<512Q", log)
    assert words[0] == 100 << 10 | 7
    assert words[1:5] == tuple((5000 + 512 * i) << 10 | min(512, 2000 - 512 * i) for i in range(4))
    assert set(words[5:]) == {(1 << 64) - 1}
    assert bad_blocks.parse(log) == [(100, 7), (5000, 2000)]


def test_bad_blocks_count_in_units() -> None:
    assert bad_blocks.parse(bad_blocks.format([(101, 1), (115, 2)], shift=3), shift=3) == [(96, 8), (112, 8)]


def test_bad_block_logs_have_limits() -> None:
    with pytest.raises(Refused) as refused:
        bad_blocks.format([(i * 10, 1) for i in range(513)])
    assert refused.value.code == "bad-block-log-full"
    with pytest.raises(BadBytes) as refused:
        bad_blocks.parse(b"", shift=255)
    assert refused.value.code == "bad-bad-block-shift"
    with pytest.raises(BadBytes) as refused:
        bad_blocks.parse(struct.pack("<Q", 1000 << 10 | 8), device_sectors=1007)
    assert refused.value.code == "bad-block-out-of-range"
