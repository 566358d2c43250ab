"""The superblock codec: each of the kernel's acceptance checks refuses with its own code."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from clustermd.errors import BadBytes, Refused
from clustermd.ondisk.superblock import (
    FIXED,
    MAX_SECTOR,
    ROLE_SPARE,
    FeatureMap,
    Superblock,
    checksum,
    find,
    find_all,
    location,
    parse_lenient,
    same_set,
)

SECTORS = 131072
GOOD = Superblock(
    minor=2,
    set_uuid=bytes(range(16)),
    set_name="node1:md0",
    ctime=1795339163,
    level=1,
    size=129024,
    raid_disks=2,
    data_offset=2048,
    data_size=129024,
    super_offset=8,
    dev_number=0,
    device_uuid=bytes(range(16, 32)),
    utime=1795339163,
    events=3,
    resync_offset=MAX_SECTOR,
    dev_roles=(0, 1) + (ROLE_SPARE,) * 126,
    feature_map=FeatureMap.BITMAP_OFFSET | FeatureMap.CLUSTERED,
    bitmap_offset=8,
)


def load(data: bytes, *, minor: int = 2, sectors: int = SECTORS) -> Superblock:
    at = location(minor, sectors)
    return Superblock.from_bytes(data, minor=minor, at_sector=at, device_sectors=sectors)


def sealed(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with bytes replaced and the checksum made right again."""
    changed = bytearray(data)
    changed[at : at + len(new)] = new
    (max_dev,) = struct.unpack_from("<I", changed, 220)
    if max_dev <= 1920:
        struct.pack_into("<I", changed, 216, checksum(changed[: 256 + 2 * max_dev]))
    return bytes(changed)


def test_layout_is_that_of_the_specification() -> None:
    noise = bytes(range(256))
    assert FIXED.unpack(noise) == struct.unpack("<4I16s32sQiIQIIiIQiIIiQQQQII16sBBHiQQQII32s", noise)
    assert FIXED.size == 256
    data = GOOD.to_bytes()
    assert len(data) == 512
    assert struct.unpack_from("<Q", data, 80) == (129024,), "size"
    assert struct.unpack_from("<Q", data, 200) == (3,), "events"
    assert struct.unpack_from("<HHH", data, 256) == (0, 1, 0xFFFF)


def test_a_good_one_comes_back() -> None:
    assert load(GOOD.to_bytes()) == GOOD
    assert GOOD.clustered and GOOD.has_bitmap and GOOD.clean and not GOOD.recovering
    assert (GOOD.role, GOOD.role_of(1), GOOD.role_of(500)) == (0, 1, ROLE_SPARE)


def test_an_odd_role_table_is_summed_by_its_last_half_word() -> None:
    odd = replace(GOOD, dev_roles=(0, 1, 0x1234))
    data = odd.to_bytes()
    assert load(data) == odd
    assert not parse_lenient(data[:260] + b"\x35" + data[261:], minor=2, at_sector=8).checksum_ok


@pytest.mark.parametrize(
    ("code", "at", "new"),
    [
        ("bad-magic", 0, b"\0"),
        ("bad-version", 4, b"\2"),
        ("unknown-feature", 9, b"\x21"),
        ("nonzero-pad", 12, b"\1"),
        ("nonzero-pad", 255, b"\1"),
        ("bad-super-offset", 144, struct.pack("<Q", 16)),
        ("bad-max-dev", 220, struct.pack("<I", 1921)),
        ("bad-max-dev", 220, b"\xff\xff\xff\xff"),
        ("short-superblock", 220, struct.pack("<I", 129)),
        ("data-too-small", 136, struct.pack("<Q", 9)),
        ("data-overlaps-superblock", 128, struct.pack("<Q", 8)),
        ("device-shrunk", 136, struct.pack("<Q", 129025)),
        ("device-shrunk", 136, b"\xff" * 8),
        ("size-over-data", 80, struct.pack("<Q", 129025)),
        ("too-many-disks", 92, b"\xff\xff\xff\xff"),
        ("bad-bad-block-log", 8, b"\x09\x01"),
        ("bad-recovery-offset", 152, b"\xff" * 8),
    ],
)
def test_each_check_has_its_code(code: str, at: int, new: bytes) -> None:
    source = GOOD
    if code == "bad-recovery-offset":
        source = replace(GOOD, feature_map=GOOD.feature_map | FeatureMap.RECOVERY_OFFSET)
    with pytest.raises(BadBytes) as refused:
        load(sealed(source.to_bytes(), at, new))
    assert refused.value.code == code


def test_a_changed_byte_breaks_the_checksum_and_the_right_one_is_known() -> None:
    data = bytearray(GOOD.to_bytes())
    data[200] ^= 1
    with pytest.raises(BadBytes) as refused:
        load(bytes(data))
    assert refused.value.code == "bad-checksum"
    parsed = parse_lenient(bytes(data), minor=2, at_sector=8)
    assert not parsed.checksum_ok
    struct.pack_into("<I", data, 216, parsed.computed_checksum)
    assert load(bytes(data)).events == 2


def test_places_of_the_three_versions() -> None:
    assert [location(minor, 81927) for minor in (0, 1, 2)] == [81904, 0, 8]
    with pytest.raises(BadBytes) as refused:
        location(2, 23)
    assert refused.value.code == "device-too-small"


def reader(data: bytes | bytearray):
    return lambda sector, count: bytes(data[sector * 512 : (sector + count) * 512])


def test_the_latest_creation_wins() -> None:
    small = 4096
    new = replace(GOOD, size=1024, data_size=2048)
    old = replace(
        new, minor=0, super_offset=location(0, small), data_offset=0, ctime=GOOD.ctime - 1, bitmap_offset=-16
    )
    data = bytearray(small * 512)
    for sb in (new, old):
        data[sb.super_offset * 512 : sb.super_offset * 512 + 512] = sb.to_bytes()
    assert find(reader(data), small) == new
    assert [parsed.superblock.minor for parsed in find_all(reader(data), small)] == [0, 2]
    newer = replace(old, ctime=GOOD.ctime + 1)
    data[newer.super_offset * 512 : newer.super_offset * 512 + 512] = newer.to_bytes()
    assert find(reader(data), small) == newer
    # Torn, it still counts as the newest: the older one must not be taken instead.
    data[newer.super_offset * 512 + 208] ^= 1
    with pytest.raises(BadBytes) as refused:
        find(reader(data), small)
    assert refused.value.code == "bad-checksum"


def test_an_empty_device_has_none() -> None:
    with pytest.raises(BadBytes) as refused:
        find(reader(bytes(4096 * 512)), 4096)
    assert refused.value.code == "no-superblock"


def test_members_of_one_array_are_told_from_others() -> None:
    same_set(GOOD, replace(GOOD, device_uuid=bytes(16), dev_number=1, events=9, data_offset=4096))
    with pytest.raises(Refused) as refused:
        same_set(GOOD, replace(GOOD, set_uuid=bytes(16)))
    assert refused.value.code == "other-array"
    for field in ("ctime", "level", "layout", "chunksize"):
        with pytest.raises(Refused) as refused:
            same_set(GOOD, replace(GOOD, **{field: 4}))
        assert (refused.value.code, refused.value.data["field"]) == ("shapes-differ", field)
    with pytest.raises(Refused) as refused:
        same_set(GOOD, replace(GOOD, dev_number=1))
    assert refused.value.code == "same-device-twice"
