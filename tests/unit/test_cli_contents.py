"""What -C finds on disks before it takes them."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from clustermd.cli.contents import contents, old_superblock_at
from clustermd.node.disk import Disk

SIZE = 4 << 20


def found(path: Path) -> list[str]:
    with Disk(str(path)) as disk:
        return contents(disk)


def image(tmp_path: Path, *pieces: tuple[int, bytes], size: int = SIZE) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in pieces:
            file.seek(offset)
            file.write(content)
    return path


@pytest.mark.parametrize("size", [0, 512, 4096, SIZE])
def test_an_empty_disk_carries_nothing(tmp_path: Path, size: int) -> None:
    assert found(image(tmp_path, size=size)) == []


def test_random_bytes_are_nothing_known(tmp_path: Path) -> None:
    assert found(image(tmp_path, (0, bytes(range(256)) * 1024))) == []


@pytest.mark.parametrize(
    ("offset", "mark", "words"),
    [
        (0, b"XFSB", "xfs file system"),
        (0x10040, b"_BHRfS_M", "btrfs file system"),
        (3, b"NTFS    ", "ntfs file system"),
        (82, b"FAT32   ", "vfat file system"),
        (0x8001, b"CD001", "iso9660 file system"),
        (0x10000, b"\x01\x16\x19\x70", "gfs2 file system"),
        (0x2000, b"OCFSV2", "ocfs2 file system"),
        (0x218, b"LVM2 001", "LVM2 physical volume"),
        (0, b"LUKS\xba\xbe", "LUKS volume"),
        (4086, b"SWAPSPACE2", "swap area"),
        (512, b"EFI PART", "GPT partition table"),
    ],
)
def test_marks_of_common_formats_are_known_without_any_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, mark: bytes, words: str
) -> None:
    monkeypatch.setattr("clustermd.cli.contents.shutil.which", lambda *_args, **_named: None)
    path = image(tmp_path, (offset, mark))
    assert found(path) == [f"{path} appears to contain a {words}"]


def test_ext_is_worded_as_mdadm_words_it(tmp_path: Path) -> None:
    superblock = bytearray(1024)
    struct.pack_into("<I", superblock, 4, 1000)  # blocks
    struct.pack_into("<I", superblock, 24, 2)  # of 4 KiB
    superblock[56:58] = b"\x53\xef"
    (message,) = found(image(tmp_path, (1024, bytes(superblock))))
    assert " appears to contain an ext2fs file system\n       size=4000K  mtime=" in message


def test_a_table_of_partitions_counts_and_a_bare_boot_sector_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clustermd.cli.contents.shutil.which", lambda *_args, **_named: None)
    sector = bytearray(512)
    sector[510:] = b"\x55\xaa"
    assert found(image(tmp_path, (0, bytes(sector)))) == []
    sector[446:462] = struct.pack("<B3xB3xII", 0x80, 0x83, 8, 1000)
    path = image(tmp_path, (0, bytes(sector)))
    assert found(path) == [f"partition table exists on {path}"]


def test_an_old_superblock_at_the_end_is_an_array(tmp_path: Path) -> None:
    at = (SIZE & ~0xFFFF) - 0x10000
    path = image(tmp_path, (at, struct.pack("<I", 0xA92B4EFC)))
    assert found(path) == [f"{path} appears to be part of a raid array:\n       metadata=0.90"]
    with Disk(str(path)) as disk:
        assert old_superblock_at(disk) == at // 512


@pytest.mark.needs("mkswap", "blkid")
def test_blkid_is_asked_where_there_is_one(tmp_path: Path) -> None:
    path = image(tmp_path)
    subprocess.run(
        ["mkswap", "-q", "-L", "mine", str(path)], check=True, env={"PATH": "/sbin:/usr/sbin:/bin"}
    )
    assert found(path) == [f"{path} appears to contain a swap area named 'mine'"]
