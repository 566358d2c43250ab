"""NBD negotiation: fixed newstyle, as a state machine over bytes. Pure.

Theory
    The server greets with two magics and its flags; the client answers with its own flags. Then the client
    sends *options*, each with a length, and the server answers each with one or more replies that carry the
    option's number:

        "IHAVEOPT" u64 | option u32 | length u32 | data          ->
        magic u64 | option u32 | reply u32 | length u32 | data   <-

    GO opens an export and ends the negotiation; INFO says the same about it and doesn't. LIST names the
    exports, ABORT says goodbye, STRUCTURED_REPLY changes how reads are answered later. EXPORT_NAME is the
    ancestor of GO: it cannot say no, so an unknown name ends the connection. Any other option (TLS, metadata
    contexts, longer headers) is answered with ERR_UNSUP, which a client must expect.

    | option           | answered with                                                    |
    |------------------|------------------------------------------------------------------|
    | EXPORT_NAME      | size, flags, 124 zero bytes unless waived; or the end            |
    | ABORT            | ACK, the end                                                     |
    | LIST             | SERVER (name), ACK                                               |
    | INFO, GO         | INFO (export, block size; name, description if asked), ACK       |
    | STRUCTURED_REPLY | ACK                                                              |
    | anything else    | ERR_UNSUP                                                        |
    | too long         | ERR_TOO_BIG after its data was skipped; or the end               |
    | malformed        | ERR_INVALID                                                      |
    | unknown export   | ERR_UNKNOWN                                                      |

Nothing here grows with what a client sends: data, names and the number of options are limited.

Source: the NBD protocol (doc/proto.md of the NBD project), sections on negotiation.
"""

from __future__ import annotations

import enum
from struct import Struct

from clustermd.errors import BadBytes
from clustermd.export.nbd_protocol import (
    MAXIMUM_BLOCK_BYTES,
    PREFERRED_BLOCK_BYTES,
    Export,
)

GREETING = Struct(">8sQH")
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
EXPORT_NAME_REPLY = Struct(">QH")
INFO_EXPORT = Struct(">HQH")
INFO_BLOCK_SIZE = Struct(">HIII")

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9

FIXED_NEWSTYLE = 1  # the same bit in the server's and in the client's flags
NO_ZEROES = 2

MAXIMUM_NAME_BYTES = 4096
MAXIMUM_OPTION_BYTES = 16 << 10
MAXIMUM_SKIP_BYTES = 1 << 20
MAXIMUM_OPTIONS = 64


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class Reply(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = (1 << 31) + 1
    ERR_INVALID = (1 << 31) + 3
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_TOO_BIG = (1 << 31) + 9


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Phase(enum.Enum):
    """FLAGS: the client's flags are next. OPTIONS: an option. SKIP: an option's data that nobody wants.
    TRANSMISSION: an export is open. ENDED: the connection is to be closed."""

    FLAGS = "flags"
    OPTIONS = "options"
    SKIP = "skip"
    TRANSMISSION = "transmission"
    ENDED = "ended"


class Handshake:
    """One negotiation for one export. `greeting` is sent first; then feed it what the client says."""

    __slots__ = (
        "_description",
        "_export",
        "_fixed",
        "_no_zeroes",
        "_options",
        "_skip_bytes",
        "phase",
        "structured",
    )

    def __init__(self, export: Export, description: str) -> None:
        self._export = export
        self._description = description
        self._fixed = False
        self._no_zeroes = False
        self._options = 0
        self._skip_bytes = 0
        self.phase = Phase.FLAGS
        self.structured = False

    @property
    def greeting(self) -> bytes:
        return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES)

    @property
    def over(self) -> bool:
        return self.phase in (Phase.TRANSMISSION, Phase.ENDED)

    def feed(self, buffer: bytearray | memoryview | bytes, start: int, end: int) -> tuple[int, bytes]:
        """Take one step from `buffer[start:end]`: where the rest starts, and what to send.

        The rest starts at `start` when more bytes are needed. A buffer of MAXIMUM_OPTION_BYTES plus a
        header always suffices. Raises BadBytes, and changes nothing, when the stream makes no sense.
        """
        if self.phase is Phase.FLAGS:
            return self._client_flags(buffer, start, end)
        if self.phase is Phase.OPTIONS:
            return self._option(buffer, start, end)
        if self.phase is Phase.SKIP:
            skipped = min(self._skip_bytes, end - start)
            self._skip_bytes -= skipped
            if not self._skip_bytes:
                self.phase = Phase.OPTIONS
            return start + skipped, b""
        return start, b""

    def _client_flags(
        self, buffer: bytearray | memoryview | bytes, start: int, end: int
    ) -> tuple[int, bytes]:
        if end - start < CLIENT_FLAGS.size:
            return start, b""
        (flags,) = CLIENT_FLAGS.unpack_from(buffer, start)
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise BadBytes(
                "nbd-client-flags", f"an NBD client sent flags {flags:#x}, of which only 0x3 exist"
            )
        self._fixed = bool(flags & FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & NO_ZEROES)
        self.phase = Phase.OPTIONS
        return start + CLIENT_FLAGS.size, b""

    def _option(self, buffer: bytearray | memoryview | bytes, start: int, end: int) -> tuple[int, bytes]:
        if end - start < OPTION.size:
            return start, b""
        magic, option, length = OPTION.unpack_from(buffer, start)
        if magic != OPTION_MAGIC:
            raise BadBytes("nbd-option-magic", f"an NBD option starts with {magic:#018x}: the stream is lost")
        if length > MAXIMUM_SKIP_BYTES:
            raise BadBytes("nbd-option-length", f"NBD option {option} claims {length} bytes of data")
        if self._options >= MAXIMUM_OPTIONS:
            raise BadBytes("nbd-options", f"an NBD client sent more than {MAXIMUM_OPTIONS} options")
        if not self._fixed and option != Option.EXPORT_NAME:
            raise BadBytes("nbd-old-client", f"NBD option {option} from a client without fixed newstyle")
        data_start = start + OPTION.size
        if option == Option.EXPORT_NAME:
            if length > MAXIMUM_NAME_BYTES:
                raise BadBytes("nbd-export-name", f"an NBD export name of {length} bytes")
        elif length > MAXIMUM_OPTION_BYTES:
            self._options += 1
            self._skip_bytes = length
            self.phase = Phase.SKIP
            return data_start, _reply(option, Reply.ERR_TOO_BIG, b"the option's data is too long")
        if end - data_start < length:
            return start, b""
        data = bytes(buffer[data_start : data_start + length])
        answer = self._answer(option, data)
        self._options += 1
        return data_start + length, answer

    def _answer(self, option: int, data: bytes) -> bytes:
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        if option in (Option.INFO, Option.GO):
            return self._info(option, data)
        if option == Option.ABORT:
            self.phase = Phase.ENDED
            return _reply(option, Reply.ACK)
        if option == Option.LIST:
            if data:
                return _reply(option, Reply.ERR_INVALID, b"LIST takes no data")
            name = self._export.name.encode()
            return _reply(option, Reply.SERVER, len(name).to_bytes(4, "big") + name) + _reply(
                option, Reply.ACK
            )
        if option == Option.STRUCTURED_REPLY:
            if data:
                return _reply(option, Reply.ERR_INVALID, b"STRUCTURED_REPLY takes no data")
            self.structured = True
            return _reply(option, Reply.ACK)
        return _reply(option, Reply.ERR_UNSUP, b"this server does not know the option")

    def _knows(self, name: bytes) -> bool:
        return name in (b"", self._export.name.encode())

    def _export_name(self, name: bytes) -> bytes:
        if not self._knows(name):
            raise BadBytes("nbd-export-name", f"there is no export {name!r} here, only {self._export.name!r}")
        self.phase = Phase.TRANSMISSION
        reply = EXPORT_NAME_REPLY.pack(self._export.size_bytes, self._export.flags(self.structured))
        return reply if self._no_zeroes else reply + bytes(124)

    def _info(self, option: int, data: bytes) -> bytes:
        """Data is: name length u32, name, count u16, that many u16 of what is asked."""
        name_bytes = int.from_bytes(data[:4], "big")
        count = int.from_bytes(data[4 + name_bytes : 6 + name_bytes], "big")
        if name_bytes > MAXIMUM_NAME_BYTES or len(data) != 6 + name_bytes + 2 * count:
            return _reply(option, Reply.ERR_INVALID, b"the lengths in the option do not agree")
        name = data[4 : 4 + name_bytes]
        if not self._knows(name):
            only = f"the only export here is {self._export.name!r}"
            return _reply(option, Reply.ERR_UNKNOWN, only.encode())
        asked = {int.from_bytes(data[at : at + 2], "big") for at in range(6 + name_bytes, len(data), 2)}
        export = self._export
        infos = [
            INFO_EXPORT.pack(Info.EXPORT, export.size_bytes, export.flags(self.structured)),
            INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE, export.block_bytes, PREFERRED_BLOCK_BYTES, MAXIMUM_BLOCK_BYTES
            ),
        ]
        if Info.NAME in asked:
            infos.append(Info.NAME.to_bytes(2, "big") + export.name.encode())
        if Info.DESCRIPTION in asked:
            infos.append(Info.DESCRIPTION.to_bytes(2, "big") + self._description.encode())
        if option == Option.GO:
            self.phase = Phase.TRANSMISSION
        return b"".join(_reply(option, Reply.INFO, info) for info in infos) + _reply(option, Reply.ACK)


def _reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data
