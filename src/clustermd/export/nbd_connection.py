"""One NBD connection: the hot path between a client's socket and the array (design 4).

Theory
    What arrives is read into one buffer, as much as one system call gives. All complete requests in it are
    parsed in one pass, each becomes a `Request`, and all of them go to the array in one `submit`. Completions
    come back one by one, within `submit` or in a later sweep of the array, and are collected; one `sendmsg`
    at the end of the event, or of the sweep, carries all of them. There is no task, no future and no copy of
    what is read. A slow client gets fewer, larger batches by itself.

    A long write is different: its payload is received straight into the aligned buffer the array will use.
    After one, the next receive asks for little, so that the next long payload is not copied either.

    Buffers belong to the request until the array completes it. A read's buffer then belongs to the reply,
    until the kernel has taken all of it. A client that vanishes changes nothing of that.

What is bounded: requests and buffer bytes between their arrival and the end of their reply. At the bound the
connection stops reading; the socket fills, and the client waits. So a client that sends without reading
costs a bounded amount of memory.

How it ends: DISC, the end of the stream, a stream that makes no sense, or `finish()`: nothing more is read, what
is in flight is answered, then the socket is closed. `abort()`, or a socket error, closes it at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from clustermd.array.request import Kind, Owner, Request, Volume
from clustermd.device.member_device import Buffer
from clustermd.errors import BadBytes
from clustermd.export.nbd_handshake import Handshake, Phase
from clustermd.export.nbd_protocol import (
    ALLOWED_FLAGS,
    MAXIMUM_BLOCK_BYTES,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    Export,
    NbdError,
    Parsed,
    RequestParser,
    data_chunk,
    empty_chunk,
    error_chunk,
    nbd_error,
    simple_reply,
)

RECEIVE_BYTES = 256 << 10
AFTER_LARGE_BYTES = 4 << 10
REQUESTS_MAX = 1024
BUFFERED_MAX_BYTES = 2 * MAXIMUM_BLOCK_BYTES
VECTORS_MAX = 1024  # IOV_MAX of Linux

_KINDS: dict[int, Kind] = {
    Command.READ: Kind.READ,
    Command.WRITE: Kind.WRITE,
    Command.FLUSH: Kind.FLUSH,
    Command.TRIM: Kind.TRIM,
    Command.WRITE_ZEROES: Kind.WRITE_ZEROES,
}
assert set(_KINDS) == set(ALLOWED_FLAGS)
_READ, _WRITE, _DISC = int(Command.READ), int(Command.WRITE), int(Command.DISC)
_KIND_READ, _KIND_WRITE = Kind.READ, Kind.WRITE
_FUA, _NO_HOLE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE)

_pack_reply = SIMPLE_REPLY.pack


class Connection:
    """A client of one volume. `closed(self)` is called once, when its socket is closed and nothing is in flight."""

    def __init__(
        self,
        client: socket.socket,
        volume: Volume,
        loop: asyncio.AbstractEventLoop,
        closed: Callable[[Connection], None],
    ) -> None:
        """Greets the client. `client` is a connected stream socket, which this takes over."""
        client.setblocking(False)
        self.reason = ""  # why it ended, for people
        self.in_flight = 0  # requests the array has
        self.finishing = False
        self._socket = client
        self._open = True
        self._volume = volume
        self._loop = loop
        self._closed = closed
        self._told = False

        export = Export(volume.name, volume.size_bytes, volume.read_only)
        self._export = export
        self._handshake: Handshake | None = Handshake(export, f"clustermd array {volume.name}")
        self._parser = RequestParser(export, structured=False)
        self._structured = False

        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # unparsed bytes are self._buffer[start:end]
        self._end = 0
        self._window_bytes = RECEIVE_BYTES
        self._skip_bytes = 0  # of a refused payload, still to come
        self._large: Request | None = None  # whose payload is being received
        self._large_buffer: Buffer | None = None
        self._large_filled_bytes = 0
        self._reading = False
        self._full = False

        self._requests = 0  # from arrival to the end of the reply
        self._buffered_bytes = 0
        # Replies collected (out), and those the kernel is taking (sending); each with what it frees when sent.
        self._out: list[bytes | memoryview] = []
        self._out_buffers: list[Buffer] = []
        self._out_requests = 0
        self._out_bytes = 0  # of buffers
        self._sending: list[bytes | memoryview] = []
        self._sending_buffers: list[Buffer] = []
        self._sending_requests = 0
        self._sending_bytes = 0
        self._blocked = False  # waiting until the socket takes more
        self._flush_due = False

        self._out.append(self._handshake.greeting)
        self._read_on()
        self._flush()

    @property
    def transmitting(self) -> bool:
        """An export is open."""
        return self._handshake is None

    def finish(self, reason: str) -> None:
        """Read nothing more, answer what is in flight, then close."""
        if self.finishing or not self._open:
            return
        self.finishing = True
        self.reason = reason
        self._read_off()
        self._full = False
        self._drop_large()
        self._schedule_flush()

    def abort(self, reason: str) -> None:
        """Close at once. What is in flight comes back from the array all the same."""
        if not self._open:
            return
        self.reason = self.reason or reason
        self.finishing = True
        self._open = False
        self._read_off()
        self._drop_large()
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._schedule_flush()

    # Receiving

    def _read_on(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._socket, self._readable)

    def _read_off(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket)

    def _readable(self) -> None:
        try:
            if self._large_buffer is not None:
                filled = self._large_filled_bytes
                length = self._large.length_bytes if self._large is not None else 0
                count = self._socket.recv_into(self._large_buffer.view[filled:length])
                self._large_filled_bytes = filled + count
            else:
                end = self._end
                view = self._view if not end else self._view[end:]
                count = self._socket.recv_into(view, min(self._window_bytes, RECEIVE_BYTES - end))
                self._end = end + count
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.abort(f"receiving failed: {error}")
            return
        if not count:
            self.finish("the client closed the connection")
            return
        self._take_in()

    def _take_in(self) -> None:
        # Whatever is answered within `submit` is sent here, at once.
        self._flush_due = True
        try:
            self._advance()
        except BadBytes as error:
            self.finish(error.message)
        self._flush()

    def _resume(self) -> None:
        if self._full and not self.finishing:
            self._full = False
            self._read_on()
            self._take_in()

    def _advance(self) -> None:
        """Use up what has arrived: skip, negotiate, or parse and submit. Raises BadBytes for a lost stream."""
        if self._large is not None:
            if self._large_filled_bytes < self._large.length_bytes:
                return
            request = self._large
            self._large = self._large_buffer = None
            self._window_bytes = AFTER_LARGE_BYTES
            self.in_flight += 1
            self._volume.submit([request])
            return
        if self._handshake is not None:
            self._negotiate(self._handshake)
        while self._start < self._end and self._handshake is None and not self.finishing:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, self._end - self._start)
                self._skip_bytes -= skipped
                self._start += skipped
                continue
            self._window_bytes = RECEIVE_BYTES
            parsed, start, self._full = self._parser.parse(
                self._buffer,
                self._start,
                self._end,
                REQUESTS_MAX - self._requests,
                BUFFERED_MAX_BYTES - self._buffered_bytes,
            )
            self._start = min(start, self._end)
            if parsed:
                self._submit(parsed)
            if self._full:
                self._read_off()
                return
            if not parsed:
                break
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left

    def _negotiate(self, handshake: Handshake) -> None:
        while not handshake.over:
            start, reply = handshake.feed(self._buffer, self._start, self._end)
            if reply:
                self._out.append(reply)
            if start == self._start:
                return
            self._start = start
        if handshake.phase is Phase.ENDED:
            self.finish("the client ended the negotiation")
            return
        self._structured = handshake.structured
        self._parser = RequestParser(self._export, self._structured)
        self._handshake = None

    def _submit(self, parsed: list[Parsed]) -> None:
        """Make requests of a batch and hand them to the array, all at once."""
        batch: list[Request] = []
        take = self._volume.pool.take
        self._requests += len(parsed)
        for command, flags, cookie, offset, length, payload, error in parsed:
            if command == _DISC:
                self._requests -= 1
                self.finish("the client disconnected")
                continue
            have = self._end - payload if command == _WRITE else length
            if error:
                if have < length:
                    self._skip_bytes = length - have
                self._refuse(command, cookie, error, "refused by its command, flags, offset or length")
                continue
            if not length and command != Command.FLUSH:
                self._answer_nothing(command, cookie)
                continue
            buffer: Buffer | None = None
            if command <= _WRITE:
                try:
                    buffer = take(length)
                except MemoryError:
                    if have < length:
                        self._skip_bytes = length - have
                    self._refuse(command, cookie, NbdError.ENOMEM, "no memory for a buffer")
                    continue
                self._buffered_bytes += length
            if command == _READ:
                batch.append(Request(_KIND_READ, offset, length, buffer, self, cookie))
            elif command == _WRITE:
                assert buffer is not None
                request = Request(_KIND_WRITE, offset, length, buffer, self, cookie, bool(flags & _FUA))
                if have < length:
                    buffer.view[:have] = self._view[payload : self._end]
                    self._large, self._large_buffer, self._large_filled_bytes = request, buffer, have
                    continue
                buffer.view[:length] = self._view[payload : payload + length]
                batch.append(request)
            else:
                fua, no_hole = bool(flags & _FUA), bool(flags & _NO_HOLE)
                whole = Request(_KINDS[command], offset, length, None, self, cookie, fua, no_hole)
                pieces = _pieces(whole)
                self.in_flight += 1 - len(pieces)
                batch += pieces
        if batch:
            self.in_flight += len(batch)
            self._volume.submit(batch)

    # Answering

    def completed(self, request: Request) -> None:
        """The array has answered `request`: collect its reply. See `Owner`."""
        self.in_flight -= 1
        self._out_requests += 1
        buffer = request.buffer
        if buffer is None:
            self._out.append(
                _pack_reply(SIMPLE_REPLY_MAGIC, request.error and nbd_error(request.error), request.cookie)
            )
        else:
            length = request.length_bytes
            self._out_bytes += length
            if request.error:
                buffer.release()
                self._out.append(
                    self._error_reply(request.kind, request.cookie, nbd_error(request.error), "I/O error")
                )
            elif request.kind == _KIND_READ:
                if self._structured:
                    self._out.append(data_chunk(request.cookie, request.offset_bytes, length))
                else:
                    self._out.append(_pack_reply(SIMPLE_REPLY_MAGIC, 0, request.cookie))
                self._out.append(buffer.view[:length])
                self._out_buffers.append(buffer)
            else:
                buffer.release()
                self._out.append(_pack_reply(SIMPLE_REPLY_MAGIC, 0, request.cookie))
        if not self._flush_due:
            self._schedule_flush()

    def _refuse(self, command: int, cookie: int, error: int, text: str) -> None:
        self._out_requests += 1
        self._out.append(self._error_reply(command, cookie, error, text))

    def _answer_nothing(self, command: int, cookie: int) -> None:
        """No bytes asked, none given: done, and nothing for the array to do."""
        self._out_requests += 1
        structured = self._structured and command == _READ
        self._out.append(empty_chunk(cookie) if structured else simple_reply(cookie, 0))

    def _error_reply(self, command: int, cookie: int, error: int, text: str) -> bytes:
        if self._structured and command == _READ:
            return error_chunk(cookie, error, text)
        return simple_reply(cookie, error)

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what was collected; find out whether this was the end."""
        self._flush_due = False
        if self._open and not self._blocked:
            self._send()
        if self.finishing and not self.in_flight:
            if self._open and not self._out and not self._sending:
                self._open = False
                self._socket.close()
            if not self._open:
                self._free_sending()
                self._next_group()
                self._free_sending()
                if not self._told:
                    self._told = True
                    self._closed(self)
        elif not self._open:
            self._free_sending()
            self._next_group()
            self._free_sending()

    def _send(self) -> None:
        while True:
            if not self._sending:
                if not self._out:
                    return
                self._next_group()
            try:
                self._sent(self._socket.sendmsg(self._sending[:VECTORS_MAX]))
            except (BlockingIOError, InterruptedError):
                self._blocked = True
                self._loop.add_writer(self._socket, self._writable)
                return
            except OSError as error:
                self.abort(f"sending failed: {error}")
                return

    def _writable(self) -> None:
        self._blocked = False
        self._loop.remove_writer(self._socket)
        self._flush()

    def _next_group(self) -> None:
        self._sending, self._out = self._out, []
        self._sending_buffers, self._out_buffers = self._out_buffers, []
        self._sending_requests, self._out_requests = self._out_requests, 0
        self._sending_bytes, self._out_bytes = self._out_bytes, 0

    def _sent(self, count: int) -> None:
        """The kernel took `count` bytes of the group: forget them, and the group when it is done."""
        done = 0
        sending = self._sending
        for piece in sending:
            length = len(piece)
            if count < length:
                if count:
                    sending[done] = memoryview(piece)[count:]
                break
            count -= length
            done += 1
        if done < len(sending):
            del sending[:done]
        else:
            self._free_sending()

    def _free_sending(self) -> None:
        self._sending = []
        for buffer in self._sending_buffers:
            buffer.release()
        self._sending_buffers = []
        self._requests -= self._sending_requests
        self._buffered_bytes -= self._sending_bytes
        self._sending_requests = self._sending_bytes = 0
        if self._full:
            self._loop.call_soon(self._resume)

    def _drop_large(self) -> None:
        """Give up a write whose payload did not come; the array never saw it."""
        if self._large is not None and self._large_buffer is not None:
            self._large_buffer.release()
            self._requests -= 1
            self._buffered_bytes -= self._large.length_bytes
            self._large = self._large_buffer = None


class _Pieces:
    """The owner of a long TRIM or WRITE_ZEROES that went to the array in pieces: answered after the last."""

    __slots__ = ("_left", "_whole")

    def __init__(self, whole: Request, count: int) -> None:
        self._whole = whole
        self._left = count

    def completed(self, request: Request) -> None:
        whole = self._whole
        whole.error = whole.error or request.error
        self._left -= 1
        if not self._left:
            whole.owner.completed(whole)


def _pieces(whole: Request) -> list[Request]:
    """What the array gets for `whole`: requests without data may be 4 GiB long, an array sees 32 MiB at most."""
    length = whole.length_bytes
    if length <= MAXIMUM_BLOCK_BYTES:
        return [whole]
    steps = range(0, length, MAXIMUM_BLOCK_BYTES)
    owner: Owner = _Pieces(whole, len(steps))
    return [
        Request(
            whole.kind,
            whole.offset_bytes + step,
            min(MAXIMUM_BLOCK_BYTES, length - step),
            None,
            owner,
            whole.cookie,
            whole.fua,
            whole.no_hole,
        )
        for step in steps
    ]
