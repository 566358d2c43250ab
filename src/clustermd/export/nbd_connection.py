"""One NBD connection: the hot path between a client's socket and the array (design 4).

Theory
    What arrives is read into one buffer, as much as one system call gives. All complete requests in it are
    parsed in one pass, each becomes a `Request`, and all of them go to the array in one `submit`; replies
    are collected and sent by `nbd_replies`. There is no task, no future, and no copy of what is read. A slow
    server gets fewer, larger batches by itself.

    A long write is different: its payload is received straight into the aligned buffer the array will use.
    After one, the next receive asks for little, so that the next long payload is not copied either.

What is bounded: requests and buffer bytes between their arrival and the end of their reply. At the bound the
connection stops reading; the socket fills, and the client waits. So a client that sends without reading
costs a bounded amount of memory.

How it ends: DISC, the end of the stream, a stream that makes no sense, or `finish()`: nothing more is read,
what is in flight is answered, then the socket is closed. A socket error, or `abort()`, closes it at once;
what is in flight then comes back from the array all the same, and its buffers go back to the pool.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from clustermd.array.request import Kind, Owner, Request, Volume
from clustermd.device.member_device import Buffer
from clustermd.errors import BadBytes, Refused
from clustermd.export.nbd_handshake import Handshake, Phase
from clustermd.export.nbd_protocol import (
    ALLOWED_FLAGS,
    MAXIMUM_BLOCK_BYTES,
    Command,
    CommandFlag,
    Export,
    NbdError,
    Parsed,
    RequestParser,
)
from clustermd.export.nbd_replies import Budget, Replies

RECEIVE_BYTES = 256 << 10
AFTER_LARGE_BYTES = 4 << 10
REQUESTS_MAX = 1024
BUFFERED_MAX_BYTES = 2 * MAXIMUM_BLOCK_BYTES

_KINDS: dict[int, Kind] = {
    Command.READ: Kind.READ,
    Command.WRITE: Kind.WRITE,
    Command.FLUSH: Kind.FLUSH,
    Command.TRIM: Kind.TRIM,
    Command.WRITE_ZEROES: Kind.WRITE_ZEROES,
}
assert set(_KINDS) == set(ALLOWED_FLAGS)
# Looking up a member of an enum costs as much as parsing a header.
_READ, _WRITE, _DISC, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.DISC), int(Command.FLUSH)
_KIND_READ, _KIND_WRITE = Kind.READ, Kind.WRITE
_FUA, _NO_HOLE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE)


class Connection:
    """A client of one volume. `closed(self)` is called once, when nothing is open or in flight any more."""

    def __init__(
        self,
        client: socket.socket,
        volume: Volume,
        loop: asyncio.AbstractEventLoop,
        budget: Budget,
        closed: Callable[[Connection], None],
    ) -> None:
        """Greets the client. `client` is a connected stream socket, which this takes over."""
        client.setblocking(False)
        self.reason = ""  # why it ended, for people
        self.finishing = False
        self._socket = client
        self._volume = volume
        self._loop = loop
        self._budget = budget
        self._closed = closed
        self._open = True
        self._told = False
        self._replies = Replies(client, loop, budget, self._after_flush)

        self._export = Export(volume.name, volume.size_bytes, volume.read_only, volume.block_bytes)
        self._handshake: Handshake | None = Handshake(self._export, f"clustermd array {volume.name}")
        self._parser = RequestParser(self._export, structured=False)

        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # what is not parsed yet is self._buffer[start:end]
        self._end = 0
        self._window_bytes = RECEIVE_BYTES  # how much to ask of the next receive
        self._skip_bytes = 0  # of a refused payload, still to come
        self._skip_cookie = self._skip_error = 0  # what to answer after it
        self._large: tuple[Request, Buffer] | None = None  # whose payload is being received
        self._large_filled_bytes = 0
        self._full = False  # not reading: the next request does not fit within the bounds

        self._loop.add_reader(client, self._readable)
        self._replies.say(self._handshake.greeting)
        self._replies.schedule_flush()

    @property
    def transmitting(self) -> bool:
        """An export is open."""
        return self._handshake is None

    @property
    def in_flight(self) -> int:
        """Requests the array has."""
        return self._replies.in_flight

    def finish(self, reason: str) -> None:
        """Read nothing more, answer what is in flight, then close."""
        if self.finishing:
            return
        self.finishing = True
        self.reason = reason
        self._loop.remove_reader(self._socket)
        if self._large is not None:  # its payload will not come, and the array has not seen it
            request, buffer = self._large
            self._large = None
            buffer.release()
            self._replies.give_back(1, request.length_bytes)
        self._replies.schedule_flush()

    def abort(self, reason: str) -> None:
        """Close at once."""
        self.finish(reason)
        self._replies.close()
        self._close()
        self._replies.schedule_flush()  # which finds that this was the end, now or when the array answers

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._socket.close()

    def _after_flush(self) -> None:
        replies = self._replies
        if replies.error is not None and self._open:
            self.abort(f"sending failed: {replies.error}")
        if self.finishing and replies.idle and not self._told:
            self._told = True
            self._close()
            self._closed(self)

    def _readable(self) -> None:
        try:
            if self._large is not None:
                request, buffer = self._large
                count = self._socket.recv_into(buffer.view[self._large_filled_bytes : request.length_bytes])
                self._large_filled_bytes += count
            else:
                end = self._end
                room_bytes = min(self._window_bytes, RECEIVE_BYTES - end)
                count = self._socket.recv_into(self._view[end:] if end else self._view, room_bytes)
                self._end = end + count
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.abort(f"receiving failed: {error}")
            return
        if count:
            self._take_in()
        else:
            self.finish("the client closed the connection")

    def _take_in(self) -> None:
        """Use up what has arrived, and send at once what is answered within `submit`."""
        if self.finishing:
            return
        self._replies.hold_flush()
        try:
            if self._handshake is not None:
                self._negotiate(self._handshake)
            if self._large is not None:
                self._take_large()
            elif self._handshake is None:
                self._take_requests()
            self._keep_rest()
        except BadBytes as error:
            self.finish(error.message)
        self._replies.flush()

    def _negotiate(self, handshake: Handshake) -> None:
        while not handshake.over:
            start, answer = handshake.feed(self._buffer, self._start, self._end)
            if answer:
                self._replies.say(answer)
            if start == self._start:
                return
            self._start = start
        if handshake.phase is Phase.ENDED:
            self.finish("the client ended the negotiation")
            return
        self._replies.structured = handshake.structured
        self._parser = RequestParser(self._export, handshake.structured)
        self._handshake = None

    def _take_large(self) -> None:
        if self._large is not None and self._large_filled_bytes == self._large[0].length_bytes:
            request, _ = self._large
            self._large = None
            self._window_bytes = AFTER_LARGE_BYTES
            self._replies.in_flight += 1
            self._volume.submit([request])

    def _take_requests(self) -> None:
        """Skip, parse and submit. Raises BadBytes for a lost stream."""
        replies = self._replies
        while self._start < self._end and not self.finishing:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, self._end - self._start)
                self._skip_bytes -= skipped
                self._start += skipped
                if not self._skip_bytes:
                    replies.refuse(False, self._skip_cookie, self._skip_error, "")
                continue
            self._window_bytes = RECEIVE_BYTES
            parsed, start, full = self._parser.parse(
                self._buffer,
                self._start,
                self._end,
                REQUESTS_MAX - replies.requests,
                min(BUFFERED_MAX_BYTES - replies.buffered_bytes, self._budget.room_bytes),
            )
            self._start = min(start, self._end)
            if parsed:
                self._submit(parsed)
            if full and not self.finishing:
                self._stop_reading()
                return
            if not parsed:
                return

    def _stop_reading(self) -> None:
        """The next request waits in the buffer until there is room."""
        self._full = True
        self._loop.remove_reader(self._socket)
        self._budget.wait(self._look_again)

    def _look_again(self) -> None:
        """Somebody gave back: what is in the buffer may fit now; if it does, read on."""
        if self.finishing:
            return
        self._full = False
        self._take_in()
        if not (self._full or self.finishing):
            self._loop.add_reader(self._socket, self._readable)

    def _keep_rest(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            left_bytes = self._end - self._start
            self._view[:left_bytes] = self._view[self._start : self._end]
            self._start, self._end = 0, left_bytes

    def _submit(self, parsed: list[Parsed]) -> None:
        """Make requests of a batch and hand them to the array, all at once."""
        batch: list[Request] = []
        replies = self._replies
        replies.requests += len(parsed)
        buffered_before = replies.buffered_bytes
        take = self._volume.pool.take
        for command, flags, cookie, offset, length, payload, error in parsed:
            if error or (command <= _WRITE and not length):
                self._answer_at_once(command, cookie, length, payload, error)
                continue
            if command > _WRITE:
                batch += self._without_data(command, flags, cookie, offset, length)
                continue
            try:
                buffer = take(length)
            except (MemoryError, Refused):
                self._answer_at_once(command, cookie, length, payload, NbdError.ENOMEM)
                continue
            replies.buffered_bytes += length
            if command == _READ:
                batch.append(Request(_KIND_READ, offset, length, buffer, replies, cookie))
                continue
            request = Request(_KIND_WRITE, offset, length, buffer, replies, cookie, bool(flags & _FUA))
            here = self._end - payload
            if here < length:
                buffer.view[:here] = self._view[payload : self._end]
                self._large, self._large_filled_bytes = (request, buffer), here
            else:
                buffer.view[:length] = self._view[payload : payload + length]
                batch.append(request)
        self._budget.room_bytes -= replies.buffered_bytes - buffered_before
        if batch:
            replies.in_flight += len(batch)
            self._volume.submit(batch)

    def _answer_at_once(self, command: int, cookie: int, length: int, payload: int, error: int) -> None:
        """What the array never sees: refused, or of no bytes.

        A refused payload is skipped first: clients are not prepared for an answer while they still send.
        """
        if not error:
            self._replies.nothing(command == _READ, cookie)
            return
        if command == _WRITE and payload + length > self._end:
            self._skip_bytes = payload + length - self._end
            self._skip_cookie, self._skip_error = cookie, error
            return
        text = "no memory" if error == NbdError.ENOMEM else "the flags, offset or length are not allowed here"
        self._replies.refuse(command == _READ, cookie, error, text)

    def _without_data(self, command: int, flags: int, cookie: int, offset: int, length: int) -> list[Request]:
        """What DISC, FLUSH, TRIM and WRITE_ZEROES give the array to do."""
        replies = self._replies
        if command == _DISC:
            replies.requests -= 1
            self.finish("the client disconnected")
            return []
        if not length and command != _FLUSH:
            replies.nothing(False, cookie)
            return []
        fua, no_hole = bool(flags & _FUA), bool(flags & _NO_HOLE)
        whole = Request(_KINDS[command], offset, length, None, replies, cookie, fua, no_hole)
        if length <= MAXIMUM_BLOCK_BYTES:
            return [whole]
        pieces = _pieces(whole)
        replies.in_flight -= len(pieces) - 1  # only the whole is completed there
        return pieces


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
    """A request without data may be 4 GiB long; an array sees MAXIMUM_BLOCK_BYTES at most."""
    end = whole.offset_bytes + whole.length_bytes
    offsets = range(whole.offset_bytes, end, MAXIMUM_BLOCK_BYTES)
    owner: Owner = _Pieces(whole, len(offsets))
    return [
        Request(
            whole.kind,
            offset,
            min(MAXIMUM_BLOCK_BYTES, end - offset),
            None,
            owner,
            whole.cookie,
            whole.fua,
            whole.no_hole,
        )
        for offset in offsets
    ]
