"""A small NBD client: what an exerciser needs to keep many requests in flight.

Fixed newstyle handshake with GO, simple replies, requests pipelined under 64-bit handles
(NBD protocol, "Fixed newstyle negotiation", "Transmission phase"). It is a test's own other end, so
it believes nothing: an unknown handle, a wrong magic or a short reply is a `ProtocolError`.

Not for hot paths of the product: one synchronous socket, one reply at a time.
"""

from __future__ import annotations

import enum
import select
import socket
import struct
from dataclasses import dataclass

_INIT_MAGIC = 0x4E42444D41474943  # NBDMAGIC
_OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
_OPTION_REPLY_MAGIC = 0x0003E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698

_FLAG_FIXED_NEWSTYLE = 1
_FLAG_NO_ZEROES = 2
_OPT_GO = 7
_REP_ACK = 1
_REP_INFO = 3
_INFO_EXPORT = 0

_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, handle, offset, length
_REPLY = struct.Struct(">IIQ")  # magic, error, handle
_MAX_OPTION_REPLY_BYTES = 1 << 16

FUA = 1
NO_HOLE = 2


class ProtocolError(Exception):
    """The server said what no NBD server may say, or refused the handshake."""


class Disconnected(Exception):
    """The server closed the connection or died."""


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `error` is 0 or an NBD (Linux) errno; `data` only for reads that succeeded."""

    handle: int
    error: int
    data: bytes


class NbdClient:
    """One connection to an export over a unix socket.

    `send` puts a request on its way and returns its handle; `receive` returns the next reply, of
    whichever request it is. `call` does both and expects no other request in flight.
    Raises Disconnected when the server goes away, ProtocolError when it misbehaves.
    """

    def __init__(self, path: str, export: str = "", timeout_s: float = 10.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._pending: dict[int, tuple[Command, int]] = {}
        self._next_handle = 1
        try:
            self._socket.connect(path)
            self.size_bytes, self.flags = self._negotiate(export)
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return len(self._pending)

    def send(
        self,
        command: Command,
        offset_bytes: int = 0,
        length_bytes: int = 0,
        data: bytes = b"",
        flags: int = 0,
    ) -> int:
        """Send one request; for WRITE the length is that of `data`. Returns its handle."""
        if command is Command.WRITE:
            length_bytes = len(data)
        handle = self._next_handle
        self._next_handle += 1
        header = _REQUEST.pack(_REQUEST_MAGIC, flags, command, handle, offset_bytes, length_bytes)
        try:
            self._socket.sendall(header + data if data else header)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Disconnected(f"the server went away: {error}") from error
        self._pending[handle] = (command, length_bytes)
        return handle

    def readable(self, timeout_s: float) -> bool:
        """Whether a reply (or the end of the connection) waits, within `timeout_s`."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def receive(self) -> Reply:
        """The next reply. Blocks until there is one."""
        magic, error, handle = _REPLY.unpack(self._exactly(_REPLY.size))
        if magic != _SIMPLE_REPLY_MAGIC:
            raise ProtocolError(f"reply with magic {magic:#010x}")
        pending = self._pending.pop(handle, None)
        if pending is None:
            raise ProtocolError(f"reply to handle {handle}, which is not in flight")
        command, length = pending
        data = self._exactly(length) if command is Command.READ and error == 0 else b""
        return Reply(handle, error, data)

    def call(
        self,
        command: Command,
        offset_bytes: int = 0,
        length_bytes: int = 0,
        data: bytes = b"",
        flags: int = 0,
    ) -> bytes:
        """Send one request and wait for its reply. Returns what was read; raises OSError for an NBD error."""
        handle = self.send(command, offset_bytes, length_bytes, data, flags)
        reply = self.receive()
        if reply.handle != handle:
            raise ProtocolError("another request was in flight")
        if reply.error:
            raise OSError(reply.error, f"NBD {command.name} at {offset_bytes}+{length_bytes} failed")
        return reply.data

    def close(self) -> None:
        """Say goodbye, if the server still listens, and close. Requests in flight are abandoned."""
        try:
            self._socket.settimeout(1)
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0))
        except OSError:
            pass  # it went first
        self._socket.close()

    def _negotiate(self, export: str) -> tuple[int, int]:
        init, option, server_flags = struct.unpack(">QQH", self._exactly(18))
        if init != _INIT_MAGIC or option != _OPTION_MAGIC or not server_flags & _FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("no fixed newstyle NBD server")
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        client_flags = _FLAG_FIXED_NEWSTYLE | (server_flags & _FLAG_NO_ZEROES)
        self._socket.sendall(
            struct.pack(">I", client_flags) + struct.pack(">QII", _OPTION_MAGIC, _OPT_GO, len(body)) + body
        )
        size_and_flags: tuple[int, int] | None = None
        while True:
            magic, asked, kind, length = struct.unpack(">QIII", self._exactly(20))
            if magic != _OPTION_REPLY_MAGIC or asked != _OPT_GO or length > _MAX_OPTION_REPLY_BYTES:
                raise ProtocolError("malformed option reply")
            payload = self._exactly(length)
            if kind == _REP_ACK:
                break
            if kind != _REP_INFO:
                raise ProtocolError(
                    f"the server refused export {export!r}: {kind:#x} {payload.decode(errors='replace')}"
                )
            if length >= 12 and struct.unpack_from(">H", payload)[0] == _INFO_EXPORT:
                size_and_flags = struct.unpack_from(">QH", payload, 2)
        if size_and_flags is None:
            raise ProtocolError("the server acknowledged GO without the size of the export")
        return size_and_flags

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                data = self._socket.recv(length - len(parts))
            except ConnectionResetError as error:
                raise Disconnected(f"the server went away: {error}") from error
            if not data:
                raise Disconnected("the server closed the connection")
            parts += data
        return bytes(parts)
