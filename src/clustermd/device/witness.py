"""The witness lock: proof that a dead process's last request has reached the medium.

A process killed with SIGKILL is gone at once; its io_uring and direct requests are not, they can land seconds
later. A request in flight keeps the open file description it was made on, and an open-file-description
lock (fcntl(2), F_OFD_SETLK) lives exactly as long as its description. So each incarnation of a node
write-locks one byte of its own, far behind any data, through the very descriptor that does its I/O. Who
finds that byte unlocked knows that nothing of the holder is in flight any more (design section 5).

Probing asks with F_OFD_GETLK: it sees every conflicting lock, needs no right to write, and never stands in
the way of a holder that comes back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from clustermd.errors import DeviceRefused

WITNESS_BASE = 1 << 60
"""The byte of node n is WITNESS_BASE + n."""

CLAIM_OFFSET = WITNESS_BASE - 1
"""The byte by which arrays on one machine claim a regular file."""

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
# struct flock: l_type l_whence l_start l_len l_pid; l_pid must be 0
_FLOCK = struct.Struct("hhqqi4x")


def hold(fd: int, offset: int) -> bool:
    """Write-lock byte `offset` through `fd`; False while another description holds it.

    Raises DeviceRefused where the file has no locks or `fd` is not open for writing.
    """
    return lock_byte(fd, offset, shared=False)


def release(fd: int, offset: int) -> None:
    """Unlock byte `offset`."""
    _set_lock(fd, fcntl.F_UNLCK, offset)


def lock_byte(fd: int, offset: int, *, shared: bool) -> bool:
    """Lock one byte for this description, `shared` or whole; False if others are in the way."""
    return _set_lock(fd, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, offset)


def held(fd: int, offset: int) -> bool:
    """Whether another description than `fd`'s holds a lock on byte `offset`. Raises DeviceRefused."""
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        raise _no_locks(fd, error) from error
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def probe(path: str, dev: int, inode: int, offset: int) -> bool:
    """Whether the holder of byte `offset` is gone together with its last request.

    `dev` and `inode` are the `identity` of what the holder opened: locks of another inode prove nothing.
    Raises DeviceRefused if `path` is another one by now or cannot be opened or locked.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceRefused(
            "witness-open-failed",
            f"{path} cannot be opened ({error.strerror}), so nobody can tell whether a dead node's writes "
            "have landed there: bring it back, or fence by hand",
            path=path,
            errno=error.errno or 0,
        ) from error
    try:
        info = os.fstat(fd)
        found = (info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev, info.st_ino)
        if found != (dev, inode):
            raise DeviceRefused(
                "witness-other-inode",
                f"{path} is not the file or device node that the dead node had open (it was replaced), so "
                "its lock proves nothing: put the old one back under this name",
                path=path,
            )
        return not held(fd, offset)
    finally:
        os.close(fd)


def _set_lock(fd: int, kind: int, offset: int) -> bool:
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise _no_locks(fd, error) from error
    return True


def _no_locks(fd: int, error: OSError) -> DeviceRefused:
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        path = f"descriptor {fd}"
    return DeviceRefused(
        "no-locks",
        f"{path} cannot be locked ({error.strerror}), so a dead node's late writes could not be told from "
        "finished ones: use a block device or a file on a file system with record locks, opened for writing",
        path=path,
        errno=error.errno or 0,
    )
