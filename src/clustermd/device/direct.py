"""Opening a disk or an image file as a member device, or refusing it in a sentence.

Direct I/O is what makes a disk shared: nothing of it stays in this machine's page cache. A block device of a
clustered array is therefore opened with O_DIRECT or refused (rule 20). A regular file may go through
the page cache, which all processes of one machine share: it does where its file system knows no
direct I/O or wants more than 512 bytes at a time, so a file always has blocks of 512 bytes.

A writable device can be claimed. For a block device that is O_EXCL, the kernel's own word for "in use"
(open(2)); for a file a lock on the byte below the witness bytes: whole for an array of one machine,
shared among the nodes of a clustered array, so the two never meet on one file. Nodes of a clustered array
on one machine do not claim block devices: their sequencer holds `claim_exclusive` for all of them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from pathlib import Path

from clustermd.device.in_use import in_use_by_kernel
from clustermd.device.witness import CLAIM_OFFSET, lock_byte
from clustermd.errors import DeviceRefused

LEAST_SECTORS = 24
"""Superblock at sector 8, its 4 KiB, and one bitmap page: less cannot be a member."""

_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_DIO_OFFSET_ALIGN_AT = 0x9C

_libc = ctypes.CDLL(None, use_errno=True)

# f_type of statfs(2): ext4 (and ext2, ext3), xfs, btrfs, tmpfs, f2fs, gfs2, ocfs2, ceph
_PUNCHING_FILE_SYSTEMS = frozenset(
    (0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0xF2F52010, 0x01161970, 0x7461636F, 0x00C36400)
)


class DirectDevice:
    """An open member device. `direct`: O_DIRECT; `block`: a block device; `identity` as `identity()`.

    `fd` does all the I/O and carries the witness lock; -1 once closed.
    """

    __slots__ = (
        "block",
        "direct",
        "discard_zeroes",
        "fd",
        "identity",
        "logical_block_bytes",
        "path",
        "read_only",
        "size_sectors",
    )

    def __init__(self, path: str, fd: int, read_only: bool, direct: bool) -> None:
        info = os.fstat(fd)
        self.path = path
        self.fd = fd
        self.read_only = read_only
        self.direct = direct
        self.block = stat.S_ISBLK(info.st_mode)
        self.identity = _identity(info)
        if self.block:
            self.logical_block_bytes = _ioctl_int(fd, _BLKSSZGET, 4)
            self.size_sectors = _ioctl_int(fd, _BLKGETSIZE64, 8) // 512
            self.discard_zeroes = not read_only and _block_zeroes(info.st_rdev)
        else:
            self.logical_block_bytes = 512
            self.size_sectors = info.st_size // 512
            self.discard_zeroes = not read_only and _file_punches(fd)

    def close(self) -> None:
        """Close it, once. Nothing of it may be queued or in flight: descriptor numbers are reused."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        kind = "block device" if self.block else "file"
        return f"<{kind} {self.path}, {self.size_sectors} sectors{', read only' if self.read_only else ''}>"


def open_member(
    path: str, *, read_only: bool = False, clustered: bool = False, exclusive: bool = True
) -> DirectDevice:
    """Open `path` as a member device. Raises DeviceRefused, having changed nothing.

    `clustered`: a member of a clustered array. `exclusive`: if writable, refuse it when the kernel uses it
    and claim it (see above); a reader claims nothing and is kept out by nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _refused_open(path, error, read_only) from error
    block = stat.S_ISBLK(mode)
    if not block and not stat.S_ISREG(mode):
        raise DeviceRefused(
            "not-a-disk",
            f"{path} is neither a block device nor a regular file, so it cannot be a member",
            path=path,
        )
    if exclusive and not read_only:
        _refuse_if_in_use(path)
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    if block and exclusive and not clustered and not read_only:
        flags |= os.O_EXCL
    device = _open(path, flags, block, clustered, read_only)
    try:
        if device.size_sectors < LEAST_SECTORS:
            raise DeviceRefused(
                "device-too-small",
                f"{path} has {device.size_sectors} sectors of 512 bytes, too small for a member: "
                f"a superblock and a bitmap need {LEAST_SECTORS}",
                path=path,
                size_sectors=device.size_sectors,
            )
        if (
            exclusive
            and not read_only
            and not block
            and not lock_byte(device.fd, CLAIM_OFFSET, shared=clustered)
        ):
            raise DeviceRefused(
                "device-busy",
                f"{path} is in use by another array on this machine: stop that array, or use another file",
                path=path,
            )
    except BaseException:
        device.close()
        raise
    return device


def _refuse_if_in_use(path: str) -> None:
    user = in_use_by_kernel(path)
    if user is not None:
        raise DeviceRefused(
            "device-busy",
            f"{path} is in use: {user}. Free it first, or use another device",
            path=path,
            user=user,
        )


def _open(path: str, flags: int, block: bool, clustered: bool, read_only: bool) -> DirectDevice:
    """Open with O_DIRECT where that works and is wanted, else without, else refuse."""
    try:
        fd = os.open(path, flags | os.O_DIRECT)
        direct = True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _refused_open(path, error, read_only) from error
        if block and clustered:
            raise _refused_buffered(path) from error
        fd, direct = _open_buffered(path, flags, read_only), False
    if direct and not block and not _direct_by_512(fd):
        os.close(fd)
        fd, direct = _open_buffered(path, flags, read_only), False
    try:
        return DirectDevice(path, fd, read_only, direct)
    except OSError as error:
        os.close(fd)
        raise _refused_open(path, error, read_only) from error


def _open_buffered(path: str, flags: int, read_only: bool) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        raise _refused_open(path, error, read_only) from error


def identity(path: str) -> tuple[int, int]:
    """What all nodes of a `local` cluster must share: (device, inode) of a file, (rdev, inode) of a disk.

    Record locks of a block device belong to the inode of its device node, so two device nodes of one disk
    are not the same.
    Raises DeviceRefused if it cannot be looked at.
    """
    try:
        return _identity(os.stat(path))
    except OSError as error:
        raise _refused_open(path, error, True) from error


def _identity(info: os.stat_result) -> tuple[int, int]:
    return (info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev, info.st_ino)


def claim_exclusive(path: str) -> int:
    """A descriptor that claims the block device `path` (O_EXCL) until it is closed.

    While it is open the kernel refuses mounts, md, dm and other exclusive openers. Raises DeviceRefused.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise _refused_open(path, error, True) from error


def probe_exclusive(path: str) -> None:
    """Raise DeviceRefused if the kernel or another exclusive opener holds the block device `path`.

    Regular files have no such claim and pass.
    """
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            os.close(claim_exclusive(path))
    except OSError as error:
        raise _refused_open(path, error, True) from error


def _refused_open(path: str, error: OSError, read_only: bool) -> DeviceRefused:
    number = error.errno or errno.EIO
    code, sentence = {
        errno.ENOENT: (
            "no-such-device",
            f"there is no {path}: check the name, or create the image file first",
        ),
        errno.ENOTDIR: ("no-such-device", f"there is no {path}: a part of its path is not a directory"),
        errno.ELOOP: ("no-such-device", f"{path} is a symbolic link that leads in a circle"),
        errno.EACCES: (
            "device-permission",
            f"you may not {'read' if read_only else 'read and write'} {path}: "
            "become root, or get its owner to allow it",
        ),
        errno.EROFS: ("device-read-only", f"{path} is write-protected: use --readonly, or another device"),
        errno.EBUSY: (
            "device-busy",
            f"{path} is in use (mounted, part of another array or volume, or opened exclusively): "
            "free it first, or use another device",
        ),
        errno.ENXIO: ("no-such-device", f"{path} is a device node without a device behind it"),
        errno.ENOMEDIUM: ("no-such-device", f"{path} has no medium in it"),
        errno.ETXTBSY: ("device-busy", f"{path} is in use as swap space or as a running program"),
    }.get(number, ("device-open-failed", f"{path} cannot be opened: {os.strerror(number)}"))
    if number == errno.EPERM:
        code, sentence = (
            "device-permission",
            f"the system forbids opening {path} (immutable, or kept from this user)",
        )
    return DeviceRefused(code, sentence, path=path, errno=number)


def _refused_buffered(path: str) -> DeviceRefused:
    return DeviceRefused(
        "no-direct-io",
        f"{path} knows no direct I/O (O_DIRECT), so what one node writes would stay in its own memory: "
        "a clustered array needs a block device with direct I/O",
        path=path,
    )


def _ioctl_int(fd: int, request: int, size_bytes: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(size_bytes)), "little")


def _direct_by_512(fd: int) -> bool:
    """Whether direct I/O on the file works in blocks of 512 bytes: statx(2) STATX_DIOALIGN, else a trial."""
    answer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) == 0:
        mask: int = struct.unpack_from("<I", answer, 0)[0]
        if mask & _STATX_DIOALIGN:
            align: int = struct.unpack_from("<I", answer, _STATX_DIO_OFFSET_ALIGN_AT)[0]
            return 0 < align <= 512
    memory = mmap.mmap(-1, 4096)
    try:
        os.preadv(fd, [memoryview(memory)[:512]], 512)
    except OSError:
        return False
    return True


def _file_punches(fd: int) -> bool:
    """Whether the file's file system is known to punch holes (fallocate(2)); trying would change the file."""
    answer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, answer) != 0:
        return False
    magic: int = struct.unpack_from("@l", answer, 0)[0]
    return magic & 0xFFFFFFFF in _PUNCHING_FILE_SYSTEMS


def _block_zeroes(rdev: int) -> bool:
    """Whether the device writes zeroes by itself; punching a hole in it then leaves zeroes."""
    device = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    for queue in (device / "queue", device / ".." / "queue"):
        try:
            return int((queue / "write_zeroes_max_bytes").read_text()) > 0
        except (OSError, ValueError):
            continue
    return False
