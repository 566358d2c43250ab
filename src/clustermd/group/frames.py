"""Frames: how daemons and their clients talk over unix sockets.

A frame is a list whose first element is a word, packed with msgpack behind a four-byte big-endian
length. A length beyond `MAX_FRAME_BYTES`, bytes that are no msgpack, and anything that is not such a
list are `BadBytes`: the link that brought them is closed, the process lives on. Nothing is allocated
for a length before it is checked, and no byte of a partial frame is interpreted.

`FrameLink` is one connection. It calls `on_frame(link, frame)` for each frame and `on_lost(link, reason)`
exactly once at its end, however it ends, except after its own `close()`. A `Refused` raised by `on_frame` is
bad input of this peer and ends this link only.

What is sent in one turn of the event loop leaves together at its end: one system call, and the other end is
woken once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgpack

from clustermd.errors import BadBytes, Refused

Frame: TypeAlias = list[Any]

MAX_FRAME_BYTES = 4 << 20
MAX_SOCKET_PATH_BYTES = 107  # unix(7): sun_path with its final zero is 108
_LENGTH = struct.Struct(">I")
_UCRED = struct.Struct("3i")
_PACKER = msgpack.Packer(use_bin_type=True)
"""One for all: a new one takes a quarter of a megabyte to begin with."""


def encode(frame: Frame) -> bytes:
    """The bytes of one frame. Raises Refused ("frame-too-large")."""
    body: bytes = _PACKER.pack(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise Refused(
            "frame-too-large",
            f"a {frame[0]!r} frame has {len(body)} bytes, a link carries {MAX_FRAME_BYTES} at most",
            length_bytes=len(body),
        )
    return _LENGTH.pack(len(body)) + body


def bad_frame(what: str) -> BadBytes:
    """The error for a peer that says something its protocol does not have."""
    return BadBytes(
        "bad-frame", f"{what}; the other end is no clustermd of this version, or its bytes are damaged"
    )


class Decoder:
    """Cuts a stream into frames. After a BadBytes nothing more can be read from that stream."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises BadBytes ("bad-frame")."""
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                raise bad_frame(f"a frame says it has {length} bytes, {MAX_FRAME_BYTES} are allowed")
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            with memoryview(buffer)[at + _LENGTH.size : end] as body:
                frames.append(_unpack(body))
            at = end
        del buffer[:at]
        return frames


def _unpack(body: memoryview) -> Frame:
    try:
        frame = msgpack.unpackb(body, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise bad_frame(f"a frame of {len(body)} bytes is no msgpack ({error})") from None
    if not isinstance(frame, list) or not frame or not isinstance(frame[0], str):
        raise bad_frame("a frame is not a list that starts with a word")
    return frame


class FrameLink(asyncio.Protocol):
    """One connection that carries frames both ways. Made by `open_link` or `serve_links`."""

    def __init__(
        self,
        on_frame: Callable[[FrameLink, Frame], None],
        on_lost: Callable[[FrameLink, str], None],
        on_made: Callable[[FrameLink], None] | None = None,
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_made = on_made
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self._out: list[bytes] = []
        self.peer_pid = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock: socket.socket = transport.get_extra_info("socket")
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.peer_pid = _UCRED.unpack(credentials)[0]
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                if self._ended:
                    return
                self._on_frame(self, frame)
        except Refused as error:
            self.fail(error.message)
        except Exception as error:
            # our own failure, not the peer's; a transport would swallow an OSError of ours as its socket's
            context = {"message": "a frame could not be handled", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            self.fail(f"the frame could not be handled here: {error!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(str(exc) if exc else "the other end closed the connection")

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def unsent_bytes(self) -> int:
        """What the kernel has not taken yet."""
        unwritten = sum(map(len, self._out))
        return unwritten + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def send(self, *frame: Any) -> None:
        """Send one frame. On a link that has ended it goes nowhere: its owner has heard `on_lost`."""
        data = encode(list(frame))
        if not self._ended:
            if not self._out:
                asyncio.get_running_loop().call_soon(self._write)
            self._out.append(data)

    def send_bytes(self, data: bytes) -> None:
        """Send frames that are encoded already, at once."""
        if not self._ended:
            self._out.append(data)
            self._write()

    def _write(self) -> None:
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(out))

    def close(self) -> None:
        """End it from this side, after what was sent has left. `on_lost` is not called."""
        self._ended = True
        self._write()
        if self._transport is not None:
            self._transport.close()

    def fail(self, reason: str) -> None:
        """Cut it now, and say so to its owner."""
        if self._transport is not None:
            self._transport.abort()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._on_lost(self, reason)


def check_socket_path(path: Path) -> str:
    """`path` as unix(7) can carry it. Raises Refused ("socket-path-too-long")."""
    text = os.fspath(path)
    if len(os.fsencode(text)) > MAX_SOCKET_PATH_BYTES:
        raise Refused(
            "socket-path-too-long",
            f"{text} has more than the {MAX_SOCKET_PATH_BYTES} bytes a unix socket path may have: "
            "set CLUSTERMD_RUN to a shorter directory",
        )
    return text


async def open_link(
    path: Path, on_frame: Callable[[FrameLink, Frame], None], on_lost: Callable[[FrameLink, str], None]
) -> FrameLink:
    """Connect to the daemon at `path`. Raises OSError as connect(2) does, Refused for a long path."""
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(lambda: FrameLink(on_frame, on_lost), check_socket_path(path))
    return link


async def serve_links(
    path: Path,
    on_made: Callable[[FrameLink], None],
    on_frame: Callable[[FrameLink, Frame], None],
    on_lost: Callable[[FrameLink, str], None],
) -> asyncio.AbstractServer:
    """Listen at `path` (0600), in place of a dead socket there. The caller holds the daemon's file lock."""
    loop = asyncio.get_running_loop()
    text = check_socket_path(path)
    server = await loop.create_unix_server(lambda: FrameLink(on_frame, on_lost, on_made), text, backlog=128)
    os.chmod(text, 0o600)
    return server


def stop_serving(server: asyncio.AbstractServer, path: Path) -> None:
    """Listen no more and leave no socket behind. The caller still holds the daemon's file lock."""
    server.close()
    path.unlink(missing_ok=True)
