"""NBD transmission as bytes: requests in, replies out. Pure: no socket, no clock, no buffer of its own.

Theory
    An NBD connection has two lives. In the first, *negotiation* (`nbd_handshake`), the client says which
    export it wants and learns its size and abilities. In the second, *transmission* (this file), it sends
    requests and the server answers each one, in any order; the 64-bit cookie of a request comes back in
    its reply and is all that ties them together.

    A request is a header of 28 bytes; only WRITE is followed by a payload, as long as its header says:

        magic u32 | flags u16 | type u16 | cookie u64 | offset u64 | length u32        (big endian)

    A simple reply is 16 bytes, for a READ without error followed by the data:

        magic u32 | error u32 | cookie u64

    A client that asked for structured replies gets a READ's answer as chunks. We always send exactly one,
    so its wish not to fragment (DF) is kept by itself. For all other commands the simple reply stays legal.

        magic u32 | flags u16 | type u16 | cookie u64 | length u32 | [offset u64, data] or [error u32, text]

    The stream has no framing but these lengths. So the payload of a request that cannot be granted is
    skipped, and then answered with an error (clients take an answer to what they still send for a fault);
    but when the magic is wrong, or a payload is of absurd length, the place of the next request is lost and
    the connection must end.

What comes in is parsed a batch at a time (design 4): `RequestParser.parse` takes all complete requests out of
a buffer and judges each in the same pass. A long WRITE may be the last of its batch with its payload
incomplete, so that its caller can receive the rest straight to where it belongs.

Sources: the NBD protocol (doc/proto.md of the NBD project), the md array's promise in design 7 rule 19.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from struct import Struct

from clustermd.errors import BadBytes

REQUEST = Struct(">IHHQQI")
SIMPLE_REPLY = Struct(">IIQ")
DATA_CHUNK = Struct(">IHHQIQ")  # chunk header and the offset of the data that follows
EMPTY_CHUNK = Struct(">IHHQI")
ERROR_CHUNK = Struct(">IHHQIIH")  # chunk header, error, length of the text that follows

REQUEST_BYTES = REQUEST.size
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

SECTOR_BYTES = 512
PREFERRED_BLOCK_BYTES = 4096
MAXIMUM_BLOCK_BYTES = 32 << 20
# A payload that we refuse is read and thrown away up to this length; a longer one is no mistake of
# degree but a lost stream. Well-known clients never send more than this (libnbd: 64 MiB).
MAXIMUM_SKIP_BYTES = 64 << 20
# A WRITE longer than this is handed out before its payload is complete. A receive buffer must hold one
# header and this much.
DIRECT_BYTES = 64 << 10


class Command(enum.IntEnum):
    """Request types that we serve; every other is answered with EINVAL."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


# The hot path compares with plain numbers: looking up a member of an enum costs as much as a header.
_READ, _WRITE, _DISC = int(Command.READ), int(Command.WRITE), int(Command.DISC)


class CommandFlag(enum.IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    FAST_ZERO = 1 << 4


class TransmissionFlag(enum.IntFlag):
    """What the server says it can do with an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


class NbdError(enum.IntEnum):
    """The error numbers of the wire; they are Linux's, and these are all there are."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ChunkType(enum.IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    ERROR = (1 << 15) + 1


CHUNK_DONE = 1  # the only flag of a chunk: it is the last of its reply

ALLOWED_FLAGS: dict[int, int] = {
    # FUA is legal with every command, whatever it means there; DF is added when chunks were agreed on.
    Command.READ: CommandFlag.FUA,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE,
}

_NBD_ERRORS: dict[int, int] = {int(error): int(error) for error in NbdError} | {
    errno.EROFS: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
}


def nbd_error(number: int) -> int:
    """The wire's number for a positive errno; what the wire cannot say is EIO."""
    return _NBD_ERRORS.get(number, NbdError.EIO)


@dataclass(frozen=True, slots=True)
class Export:
    """What is served. `""`, the default export, is the same as `name`. Size in bytes, of whole sectors.

    `block_bytes` is the least that can be read or written, and what offsets are multiples of.
    """

    name: str
    size_bytes: int
    read_only: bool
    block_bytes: int = SECTOR_BYTES

    def flags(self, structured: bool) -> int:
        """Transmission flags. Several connections to one server are one cache (design rule 19)."""
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.CAN_MULTI_CONN
        )
        if self.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
        if structured:
            flags |= TransmissionFlag.SEND_DF
        return int(flags)


# command, flags, cookie, offset_bytes, length_bytes, where its payload starts, NbdError or 0
Parsed = tuple[int, int, int, int, int, int, int]


class RequestParser:
    """Takes requests out of a stream for one export. It keeps no state between calls."""

    __slots__ = ("_allowed", "_export", "_size_bytes")

    def __init__(self, export: Export, structured: bool) -> None:
        self._export = export
        self._size_bytes = export.size_bytes
        self._allowed = dict(ALLOWED_FLAGS)
        if structured:
            self._allowed[Command.READ] |= CommandFlag.DF

    def parse(
        self, buffer: bytearray | memoryview | bytes, start: int, end: int, requests: int, room_bytes: int
    ) -> tuple[list[Parsed], int, bool]:
        """Requests in `buffer[start:end]`, where the next one starts, and whether room ran out.

        At most `requests` of them, whose reads and writes need at most `room_bytes` of buffers. DISC ends
        the list. A WRITE longer than DIRECT_BYTES may be last with less than its payload before `end`;
        "next" is then past `end`. Raises BadBytes, when nothing precedes it, for a stream that is lost.
        """
        parsed: list[Parsed] = []
        unpack = REQUEST.unpack_from
        size_bytes = self._size_bytes
        writable = not self._export.read_only
        while end - start >= REQUEST_BYTES:
            if len(parsed) >= requests:
                return parsed, start, True
            magic, flags, command, cookie, offset, length = unpack(buffer, start)
            if magic != REQUEST_MAGIC:
                if parsed:
                    break
                raise BadBytes("nbd-magic", f"an NBD request starts with {magic:#010x}: the stream is lost")
            payload = start + REQUEST_BYTES
            if (
                (command == _READ or (command == _WRITE and writable))
                and not flags
                and not (offset | length) & (SECTOR_BYTES - 1)
                and length <= MAXIMUM_BLOCK_BYTES
                and offset + length <= size_bytes
            ):
                error = 0
            else:
                error = self.judge(command, flags, offset, length)
            following = payload
            if command == _WRITE:
                following += length
                if following > end and length <= DIRECT_BYTES:
                    break
                if length > MAXIMUM_SKIP_BYTES:
                    if parsed:
                        break
                    raise BadBytes("nbd-payload", f"an NBD write of {length} bytes: the stream is lost")
            if command <= _WRITE and not error:
                room_bytes -= length
                if room_bytes < 0:
                    return parsed, start, True
            parsed.append((command, flags, cookie, offset, length, payload, error))
            start = following
            if command == _DISC:
                break
        return parsed, start, False

    def judge(self, command: int, flags: int, offset_bytes: int, length_bytes: int) -> int:
        """0, or the NbdError with which such a request is refused."""
        if command == Command.DISC:
            return 0
        allowed = self._allowed.get(command)
        if allowed is None:
            return NbdError.EINVAL
        if flags & ~allowed:
            # Zeroing that must be fast or fail: whether it is fast only the members know.
            fast = command == Command.WRITE_ZEROES and flags & CommandFlag.FAST_ZERO
            return NbdError.ENOTSUP if fast else NbdError.EINVAL
        if command == Command.FLUSH:
            return NbdError.EINVAL if offset_bytes or length_bytes else 0
        if command != Command.READ and self._export.read_only:
            return NbdError.EPERM
        if (offset_bytes | length_bytes) & (SECTOR_BYTES - 1):
            return NbdError.EINVAL
        if command in (Command.READ, Command.WRITE) and length_bytes > MAXIMUM_BLOCK_BYTES:
            return NbdError.EINVAL
        if offset_bytes + length_bytes > self._size_bytes:
            grows = command in (Command.WRITE, Command.WRITE_ZEROES)
            return NbdError.ENOSPC if grows else NbdError.EINVAL
        return 0


def simple_reply(cookie: int, error: int) -> bytes:
    """A whole reply, except that a READ's data follows when `error` is 0."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def data_chunk(cookie: int, offset_bytes: int, length_bytes: int) -> bytes:
    """The head of a READ's only chunk; `length_bytes` (> 0) of data follow."""
    return DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_DATA, cookie, 8 + length_bytes, offset_bytes
    )


def empty_chunk(cookie: int) -> bytes:
    """The whole reply to a READ of no bytes; a chunk of data must have some."""
    return EMPTY_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE, cookie, 0)


def error_chunk(cookie: int, error: int, text: str) -> bytes:
    """The whole reply to a READ that failed, with a sentence for people."""
    words = text.encode()[:4096]
    return (
        ERROR_CHUNK.pack(
            STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.ERROR, cookie, 6 + len(words), error, len(words)
        )
        + words
    )
