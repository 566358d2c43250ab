"""Who in the kernel uses a disk: mounts, device-mapper and md above it, swap, loop devices over a file.

O_EXCL says only that a block device is busy, and nothing about files. A person wants to know by what,
and a file with a loop device over it must not become a member: the loop device's cache would hide our
writes, and ours its (rule 20). A read-only loop device only looks on, as `losetup -r` for mdadm -X does, and is
no user. Facts come from sysfs and /proc (sysfs(5), proc(5)).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
from pathlib import Path

_LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64: lo_device lo_inode, then what is of no use here; 232 bytes
_LOOP_INFO = struct.Struct("<QQ216x")


def in_use_by_kernel(path: str) -> str | None:
    """What uses `path`, in words ("mounted on /srv"), or None. A path that is not there is not in use."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(info.st_mode):
        return _block_in_use(info)
    if stat.S_ISREG(info.st_mode):
        return _swap_on(info) or _loop_over(info)
    return None


def _block_in_use(info: os.stat_result) -> str | None:
    directory = Path(f"/sys/dev/block/{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}")
    whole = [directory]
    if (directory / "partition").exists():
        # what holds the whole disk holds each of its partitions
        whole.append(directory.resolve().parent)
    partitions = [entry.parent for entry in directory.glob("*/partition")] if directory.exists() else []
    for device in (*whole, *partitions):
        name = device.resolve().name
        holder = _first_name(device / "holders")
        if holder:
            return f"part of {holder}" if device is directory else f"part of {holder} (through {name})"
        number = _number(device)
        where = _mounted(number, name) if number else None
        if where:
            return f"mounted on {where}" if device is directory else f"mounted on {where} (through {name})"
        array = _md_array(name)
        if array:
            return f"a member of {array}"
    return _swap_on(info) or _loop_over(info)


def _first_name(directory: Path) -> str | None:
    try:
        return min((entry.name for entry in directory.iterdir()), default=None)
    except OSError:
        return None


def _number(device: Path) -> str | None:
    try:
        return (device / "dev").read_text().strip()
    except OSError:
        return None


def _mounted(number: str, name: str) -> str | None:
    """Where a device is mounted: by number, or by name where the file system has a number of its own."""
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split(" ")
        source = fields[fields.index("-") + 2] if "-" in fields[6:] else ""
        if fields[2] == number or source == f"/dev/{name}":
            return _unescape(fields[4])
    return None


def _md_array(name: str) -> str | None:
    member = re.compile(rf" {re.escape(name)}\[\d+\]")
    for line in _lines("/proc/mdstat"):
        if member.search(line):
            return line.split(" ", 1)[0]
    return None


def _swap_on(info: os.stat_result) -> str | None:
    for line in _lines("/proc/swaps")[1:]:
        if _same(_unescape(line.split()[0]), info):
            return "swap space"
    return None


def _loop_over(info: os.stat_result) -> str | None:
    """The writable loop device over this file or device, by inode where we may ask it, else by path."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        name = backing.parent.parent.name
        try:
            if (backing.parent.parent / "ro").read_text().strip() == "1":
                continue
            file = backing.read_text().rstrip("\n")
            if _same(file, info) or _loop_inode(name) == (_kernel_dev(info.st_dev), info.st_ino):
                return f"the backing file of /dev/{name}"
        except OSError:
            continue
    return None


def _loop_inode(name: str) -> tuple[int, int] | None:
    try:
        fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        answer = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    except OSError:
        return None
    finally:
        os.close(fd)
    device, inode = _LOOP_INFO.unpack(answer)
    return device, inode


def _kernel_dev(number: int) -> int:
    """A device number as the kernel encodes it in 64 bits (huge_encode_dev)."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _same(path: str, info: os.stat_result) -> bool:
    try:
        other = os.stat(path)
    except OSError:
        return False
    if stat.S_ISBLK(info.st_mode):
        return stat.S_ISBLK(other.st_mode) and other.st_rdev == info.st_rdev
    return (other.st_dev, other.st_ino) == (info.st_dev, info.st_ino)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    """Octal escapes of /proc (a blank is \\040)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
