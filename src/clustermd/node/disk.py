"""A disk or image file as it is read before and beside a running array: plain reads, no claim.

What an array does with its members goes through the device floor; this is for looking at superblocks (-E, -X,
-Q, and before an array is started), and for the few sectors that -C and --zero-superblock write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable

from clustermd.device.witness import CLAIM_OFFSET
from clustermd.errors import BadBytes, DeviceRefused
from clustermd.ondisk.superblock import Superblock, find

SECTOR = 512
_BLKGETSIZE64 = 0x80081272
_FLOCK = struct.Struct("@hhqqi")


class Disk:
    """An open disk. `path` is as the person gave it. Use it in a `with` block."""

    def __init__(self, path: str, *, writable: bool = False) -> None:
        """Raises DeviceRefused in mdadm's words: `cannot open x: No such file or directory`."""
        self.path = path
        try:
            self.fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceRefused(
                "cannot-open", f"cannot open {path}: {os.strerror(error.errno or errno.EIO)}", path=path
            ) from error
        info = os.fstat(self.fd)
        self.inode = (info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev, info.st_ino)
        self.block = stat.S_ISBLK(info.st_mode)
        if not self.block and not stat.S_ISREG(info.st_mode):
            os.close(self.fd)
            raise DeviceRefused(
                "not-a-disk", f"{path} is neither a block device nor a regular file.", path=path
            )
        size_bytes = info.st_size
        if self.block:
            size_bytes = int.from_bytes(fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)), "little")
        self.size_sectors = size_bytes // SECTOR

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, sector: int, count: int) -> bytes:
        """Up to `count` sectors; shorter at the end of the disk. Raises BadBytes if unreadable."""
        if sector < 0 or count <= 0 or sector >= self.size_sectors:
            return b""
        try:
            return os.pread(self.fd, min(count, self.size_sectors - sector) * SECTOR, sector * SECTOR)
        except OSError as error:
            raise BadBytes(
                "cannot-read",
                f"{self.path} cannot be read at sector {sector}: {os.strerror(error.errno or errno.EIO)}",
                path=self.path,
            ) from error

    def superblock(self) -> Superblock:
        """The md superblock, all checks passed. Raises BadBytes."""
        return find(self.read, self.size_sectors)

    def write(self, writes: Iterable[tuple[int, bytes]]) -> None:
        """Write at sectors, then wait until it is durable. Raises DeviceRefused."""
        try:
            for sector, content in writes:
                done = 0
                while done < len(content):
                    done += os.pwrite(self.fd, content[done:], sector * SECTOR + done)
            os.fsync(self.fd)
        except OSError as error:
            raise DeviceRefused(
                "cannot-write",
                f"writing to {self.path} failed: {os.strerror(error.errno or errno.EIO)}",
                path=self.path,
            ) from error

    def in_use_by_array(self) -> bool:
        """Whether a running array of this machine has the disk open, on any node: claim and witness locks."""
        answer = fcntl.fcntl(
            self.fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, CLAIM_OFFSET, 0, 0)
        )
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
