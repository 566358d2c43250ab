"""The fence device on disk: a heartbeat and a message block for each node number.

    block 0          header: which cluster's device this is
    block 1 + 2n     heartbeat of node n, written by node n alone
    block 2 + 2n     message to node n: which of its lives has to end, written by who fences it

Blocks have 4096 bytes, aligned, so that they suit every disk; what counts is in the first 512 of them with a checksum
behind it, since a disk writes one sector whole or not at all. Writer and reader are different machines: all I/O
is direct, and a write is durable when it returns. A block of zeroes was never written. There are two blocks a
node because two machines must not write one: a heartbeat would erase the message it has not read yet.

Nothing here is md's format, and a device is taken only when it is empty. Calls block as long as the disk does; whoever
lives in an event loop makes them beside it. sbd(8) is the model of the idea.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import zlib
from dataclasses import dataclass

from clustermd.device.in_use import in_use_by_kernel
from clustermd.errors import BadBytes, Refused

SLOTS = 1024
"""Node numbers from 0 to 1023."""
BLOCK_BYTES = 4096
SIZE_BYTES = BLOCK_BYTES * (1 + 2 * SLOTS)
HEADER_MAGIC = b"CMDFENCE"
_VERSION = 1

# magic, version, slots, uuid
_HEADER = struct.Struct("<8sII16s476x")
# magic, uuid, node, (zero), incarnation, count, name
_BEAT = struct.Struct("<8s16sI4xQQ64s396x")
# magic, uuid, node, (zero), incarnation, name of the sender
_PILL = struct.Struct("<8s16sI4xQ64s404x")
_SEAL = struct.Struct("<I")
_BEAT_MAGIC, _PILL_MAGIC = b"CMDFBEAT", b"CMDFPILL"
_TAIL_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Beat:
    """A node's word that it lives: `count` grows with each."""

    node: int
    name: str
    incarnation: int
    count: int


@dataclass(frozen=True, slots=True)
class Pill:
    """The message "off" to one life of a node, from the node of the name `sender`."""

    node: int
    incarnation: int
    sender: str


class FenceDisk:
    """An open fence device. Any thread may call; nothing is kept between calls."""

    def __init__(self, path: str, descriptor: int, uuid: bytes) -> None:
        self.path = path
        self._fd = descriptor
        self._uuid = uuid

    @classmethod
    def open(cls, path: str) -> FenceDisk:
        """Raises Refused ("no-fence-device", "not-a-fence-device")."""
        descriptor = _open(path, os.O_RDWR)
        try:
            sector = _read(descriptor, 0, BLOCK_BYTES)[:512]
            magic, version, slots, uuid = _HEADER.unpack_from(_unseal(sector, "its first block"))
            if magic != HEADER_MAGIC:
                raise BadBytes("bad-fence-block", "it begins with something else")
            if (version, slots) != (_VERSION, SLOTS):
                raise BadBytes("bad-fence-block", f"it is of version {version} with {slots} slots")
        except (OSError, BadBytes) as error:
            os.close(descriptor)
            raise Refused(
                "not-a-fence-device",
                f"{path} is no fence device: {error}; make one on an empty disk of its own, never on a member of an"
                f" array, with `clustermd cluster fence-device --create {path}`",
                path=path,
            ) from error
        return cls(path, descriptor, uuid)

    @classmethod
    def create(cls, path: str, uuid: bytes) -> None:
        """Make a fence device of an empty disk, an empty file, or a file that is not there yet.

        `uuid`: 16 random bytes. Raises Refused ("fence-device-not-empty", "device-busy", "no-fence-device" ...),
        having written nothing.
        """
        user = in_use_by_kernel(path)
        if user is not None:
            raise Refused(
                "device-busy", f"{path} is {user}: a fence device needs a disk of its own", path=path
            )
        new = not os.path.lexists(path)
        descriptor = _open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0), exclusive=True)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.fstat(descriptor).st_size == 0:
                os.ftruncate(descriptor, SIZE_BYTES)
            _refuse_content(path, descriptor)
            header = _HEADER.pack(HEADER_MAGIC, _VERSION, SLOTS, uuid)
            _write(descriptor, 0, header)
        except BaseException as error:
            if new:
                os.unlink(path)
            if isinstance(error, OSError):
                raise Refused(
                    "no-fence-device", f"{path} cannot be made a fence device: {error.strerror}", path=path
                ) from error
            raise
        finally:
            os.close(descriptor)

    def close(self) -> None:
        os.close(self._fd)

    def beat(self, node: int) -> Beat | None:
        """The last heartbeat of a node; None when it never gave one. Raises OSError, BadBytes."""
        body = self._read(1 + 2 * node, _BEAT_MAGIC, f"the heartbeat of node {node}")
        if body is None:
            return None
        _, _, number, incarnation, count, name = _BEAT.unpack(body)
        return Beat(number, _text(name), incarnation, count)

    def write_beat(self, beat: Beat) -> None:
        """Raises OSError. Only that node may."""
        body = _BEAT.pack(_BEAT_MAGIC, self._uuid, beat.node, beat.incarnation, beat.count, _name(beat.name))
        _write(self._fd, self._offset(1 + 2 * beat.node), body)

    def pill(self, node: int) -> Pill | None:
        """The last message to a node. Raises OSError, BadBytes."""
        body = self._read(2 + 2 * node, _PILL_MAGIC, f"the message to node {node}")
        if body is None:
            return None
        _, _, number, incarnation, sender = _PILL.unpack(body)
        return Pill(number, incarnation, _text(sender))

    def write_pill(self, pill: Pill) -> None:
        """Raises OSError."""
        body = _PILL.pack(_PILL_MAGIC, self._uuid, pill.node, pill.incarnation, _name(pill.sender))
        _write(self._fd, self._offset(2 + 2 * pill.node), body)

    def beats(self) -> list[Beat]:
        """The heartbeats of all nodes that ever gave one; unreadable blocks are left out. Raises OSError."""
        found = []
        for node in range(SLOTS):
            try:
                beat = self.beat(node)
            except BadBytes:
                continue
            if beat is not None:
                found.append(beat)
        return found

    def _offset(self, block: int) -> int:
        if not 0 < block <= 2 * SLOTS:
            node = (block - 1) // 2
            raise Refused(
                "bad-node-number",
                f"{self.path} has room for node numbers from 0 to {SLOTS - 1}, not for {node}: give the nodes small"
                " numbers (nodeid in corosync.conf)",
                node=node,
            )
        return block * BLOCK_BYTES

    def _read(self, block: int, magic: bytes, what: str) -> bytes | None:
        sector = _read(self._fd, self._offset(block), BLOCK_BYTES)[:512]
        if not any(sector):
            return None
        body = _unseal(sector, what)
        if body[:8] != magic or body[8:24] != self._uuid:
            raise BadBytes("bad-fence-block", f"{what} on {self.path} is of another device or format")
        return body


def _open(path: str, flags: int, exclusive: bool = False) -> int:
    """A descriptor for direct I/O. Files may do without, where their file system knows none."""
    try:
        mode = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
        if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
            raise Refused("no-fence-device", f"{path} is neither a disk nor a file", path=path)
        if stat.S_ISBLK(mode) and exclusive:
            flags |= os.O_EXCL
        try:
            return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL or stat.S_ISBLK(mode):
                raise
            # a refused O_DIRECT may have made the file all the same (open(2))
            return os.open(path, (flags & ~os.O_EXCL) | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            "no-fence-device", f"the fence device {path} cannot be opened: {error.strerror}", path=path
        ) from error


def _refuse_content(path: str, descriptor: int) -> None:
    """Refuse a disk that is too small or has anything on it where superblocks and partition tables lie."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size < SIZE_BYTES:
        raise Refused(
            "fence-device-too-small", f"{path} has {size} bytes, a fence device needs {SIZE_BYTES}", path=path
        )
    if _read(descriptor, 0, BLOCK_BYTES)[:8] == HEADER_MAGIC:
        raise Refused("fence-device-exists", f"{path} is a fence device already", path=path)
    ranges = [(0, SIZE_BYTES), (max(SIZE_BYTES, size - _TAIL_BYTES) & -BLOCK_BYTES, size & -BLOCK_BYTES)]
    for start, end in ranges:
        for at in range(start, end, _PIECE_BYTES):
            if any(_read(descriptor, at, min(_PIECE_BYTES, end - at))):
                raise Refused(
                    "fence-device-not-empty",
                    f"{path} is not empty (there is something behind byte {at}): a fence device takes no disk that"
                    " may have data; if this one has none, clear it with wipefs and dd first",
                    path=path,
                )


def _read(descriptor: int, offset: int, length: int) -> bytes:
    with mmap.mmap(-1, length) as buffer:
        if os.preadv(descriptor, [buffer], offset) != length:
            raise OSError(errno.EIO, "it ends too early")
        return buffer[:]


def _write(descriptor: int, offset: int, body: bytes) -> None:
    """One block, durable at return."""
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        buffer[: len(body) + _SEAL.size] = body + _SEAL.pack(zlib.crc32(body))
        if os.pwritev(descriptor, [buffer], offset, os.RWF_DSYNC) != BLOCK_BYTES:
            raise OSError(errno.EIO, "a block was written in part")


def _unseal(sector: bytes, what: str) -> bytes:
    """The content of a sector whose checksum is right."""
    body = sector[: -_SEAL.size]
    if _SEAL.unpack(sector[-_SEAL.size :])[0] != zlib.crc32(body):
        raise BadBytes("bad-fence-block", f"{what} has a wrong checksum")
    return body


def _name(name: str) -> bytes:
    return name.encode()[:64]


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")
