"""What a disk carries before -C takes it: another array, a file system, a partition table.

Asked of blkid(8) where it is installed, which knows them all; otherwise the marks of the common ones are
looked for here. Each finding is a message in mdadm's words, where it has some.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time

from clustermd.cli.units import local_time
from clustermd.errors import BadBytes
from clustermd.node.disk import SECTOR, Disk
from clustermd.node.mdstat import level_name
from clustermd.ondisk.superblock import MIN_DEVICE_SECTORS, find_all

_BLKID_S = 10
_AMBIVALENT = 8

# (name, byte offset, mark): on-disk formats that -C must not destroy unasked.
_MARKS: tuple[tuple[str, int, bytes], ...] = (
    ("xfs file system", 0, b"XFSB"),
    ("btrfs file system", 0x10040, b"_BHRfS_M"),
    ("ntfs file system", 3, b"NTFS    "),
    ("vfat file system", 82, b"FAT32   "),
    ("vfat file system", 54, b"FAT1"),
    ("iso9660 file system", 0x8001, b"CD001"),
    ("squashfs file system", 0, b"hsqs"),
    ("gfs2 file system", 0x10000, b"\x01\x16\x19\x70"),
    ("ocfs2 file system", 0x2000, b"OCFSV2"),
    ("ocfs2 file system", 0x1000, b"OCFSV2"),
    ("LVM2 physical volume", 0x218, b"LVM2 001"),
    ("LUKS volume", 0, b"LUKS\xba\xbe"),
    ("swap area", 4086, b"SWAPSPACE2"),
    ("GPT partition table", 512, b"EFI PART"),
    ("fence device of clustermd", 0, b"CMDFENCE"),
)
_EXT_MAGIC = b"\x53\xef"
_NOUNS = {"filesystem": "file system", "crypto": "volume", "raid": "volume"}
"""What blkid calls the usage of a format, in words."""
_MD_090_MAGIC = 0xA92B4EFC


def contents(disk: Disk) -> list[str]:
    """Messages for what is on the disk; empty if nothing is known to be there."""
    found = _arrays(disk)
    others = _file_system(disk) or _by_blkid(disk) or _by_marks(disk)
    return found + others


def _arrays(disk: Disk) -> list[str]:
    messages = []
    if disk.size_sectors >= MIN_DEVICE_SECTORS:
        try:
            for parsed in find_all(disk.read, disk.size_sectors):
                sb = parsed.superblock
                shape = f"level={level_name(sb.level)} devices={sb.raid_disks} ctime={local_time(sb.ctime)}"
                messages.append(f"{disk.path} appears to be part of a raid array:\n       {shape}")
        except BadBytes:
            pass  # unreadable places are found when the disk is opened for the array
    if not messages and old_superblock_at(disk) is not None:
        messages.append(f"{disk.path} appears to be part of a raid array:\n       metadata=0.90")
    return messages


def old_superblock_at(disk: Disk) -> int | None:
    """The sector of a superblock of version 0.90, which lies in the last whole 64 KiB but one; or None."""
    sector = (disk.size_sectors & ~127) - 128
    magic = disk.read(sector, 1)[:4] if sector >= 0 else b""
    return sector if magic == struct.pack("<I", _MD_090_MAGIC) else None


def _file_system(disk: Disk) -> list[str]:
    """An ext2, 3 or 4 file system, as mdadm words it: size and the time of its last mount or write."""
    data = disk.read(2, 2)
    if len(data) < 1024 or data[56:58] != _EXT_MAGIC:
        return []
    blocks, log_size = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 24)[0]
    mtime = struct.unpack_from("<I", data, 44)[0]
    size = blocks << log_size if log_size < 16 else blocks
    return [
        f"{disk.path} appears to contain an ext2fs file system\n"
        f"       size={size}K  mtime={time.ctime(mtime)}"
    ]


def _by_blkid(disk: Disk) -> list[str]:
    program = shutil.which("blkid", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "-p", "-o", "export", "--", disk.path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_BLKID_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode == _AMBIVALENT:
        return [f"{disk.path} carries the marks of several formats at once"]
    fields = dict(
        line.split("=", 1) for line in answer.stdout.decode("utf-8", "replace").splitlines() if "=" in line
    )
    messages = []
    kind = fields.get("TYPE", "")
    if kind and kind != "linux_raid_member":
        label = f" named {fields['LABEL']!r}" if fields.get("LABEL") else ""
        messages.append(
            f"{disk.path} appears to contain a {kind} {_NOUNS.get(fields.get('USAGE', ''), 'area')}{label}"
        )
    if fields.get("PTTYPE"):
        messages.append(f"partition table exists on {disk.path}")
    return messages


def _by_marks(disk: Disk) -> list[str]:
    found = []
    for name, offset, mark in _MARKS:
        sector, within = divmod(offset, SECTOR)
        data = disk.read(sector, 2)
        if data[within : within + len(mark)] == mark and name not in found:
            found.append(name)
    messages = [f"{disk.path} appears to contain a {name}" for name in found]
    if not found and _dos_partitions(disk.read(0, 1)):
        messages.append(f"partition table exists on {disk.path}")
    return messages


def _dos_partitions(sector: bytes) -> bool:
    """A boot sector with at least one partition of a type and a size."""
    if len(sector) < SECTOR or sector[510:] != b"\x55\xaa":
        return False
    entries = [sector[446 + 16 * number : 462 + 16 * number] for number in range(4)]
    if any(entry[0] not in (0, 0x80) for entry in entries):
        return False
    return any(entry[4] and entry[12:16] != bytes(4) for entry in entries)
