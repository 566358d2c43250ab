"""The sending half of an NBD connection: completions in, as few system calls as possible out.

Theory
    Answered requests come one by one, within the array's `submit` or in its sweep of completions. Their
    replies are collected as a list of byte strings, a read's data being the very buffer the array filled, and
    one `sendmsg` carries the whole list at the end of the event. There are two groups: the one being
    collected and the one the kernel is taking. A group is freed as a whole, when its last byte was taken:
    only then do its buffers go back to the pool and its requests count as finished. That is the
    back-pressure: the receiving half reads nothing while its connection, or all of them together, are at
    their bound, and looks again when any group was freed.

    After `close` replies are thrown away, and their buffers go back all the same.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from clustermd.array.request import Kind, Request
from clustermd.device.member_device import Buffer
from clustermd.export.nbd_protocol import (
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    data_chunk,
    empty_chunk,
    error_chunk,
    nbd_error,
    simple_reply,
)

VECTORS_MAX = 1024  # IOV_MAX of Linux

_KIND_READ = Kind.READ
_pack_reply = SIMPLE_REPLY.pack


class Budget:
    """What all connections of a server may buffer together, and who waits for others to give back."""

    __slots__ = ("_loop", "_waiting", "room_bytes")

    def __init__(self, limit_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        self.room_bytes = limit_bytes
        self._loop = loop
        self._waiting: list[Callable[[], None]] = []

    def wait(self, again: Callable[[], None]) -> None:
        """Call `again()` once, soon after the next time anybody gives back."""
        self._waiting.append(again)

    def give_back(self, length_bytes: int) -> None:
        self.room_bytes += length_bytes
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for again in waiting:
                self._loop.call_soon(again)


class Replies:
    """Owner of a connection's requests. `after()` is called after each `flush`, sent or not."""

    __slots__ = (
        "_after",
        "_blocked",
        "_budget",
        "_flush_due",
        "_loop",
        "_open",
        "_out",
        "_out_buffers",
        "_out_bytes",
        "_out_requests",
        "_sending",
        "_sending_buffers",
        "_sending_bytes",
        "_sending_requests",
        "_socket",
        "buffered_bytes",
        "error",
        "in_flight",
        "requests",
        "structured",
    )

    def __init__(
        self,
        client: socket.socket,
        loop: asyncio.AbstractEventLoop,
        budget: Budget,
        after: Callable[[], None],
    ) -> None:
        self.in_flight = 0  # requests the array has
        self.requests = 0  # requests from their arrival to the end of their reply
        self.buffered_bytes = 0  # of their buffers
        self.structured = False
        self.error: OSError | None = None  # why nothing more can be sent
        self._socket = client
        self._loop = loop
        self._budget = budget
        self._after = after
        self._open = True
        self._blocked = False  # waiting until the socket takes more
        self._flush_due = False
        self._out: list[bytes | memoryview] = []
        self._out_buffers: list[Buffer] = []
        self._out_requests = 0
        self._out_bytes = 0
        self._sending: list[bytes | memoryview] = []
        self._sending_buffers: list[Buffer] = []
        self._sending_requests = 0
        self._sending_bytes = 0

    @property
    def idle(self) -> bool:
        """Nothing is in flight and every reply was taken by the kernel, or thrown away."""
        return not (self.in_flight or self._out or self._sending)

    def completed(self, request: Request) -> None:
        """The array has answered `request`. See `Owner`."""
        self.in_flight -= 1
        self._out_requests += 1
        buffer = request.buffer
        error = request.error
        reply: bytes | memoryview
        if buffer is None:
            reply = simple_reply(request.cookie, nbd_error(error) if error else 0)
        else:
            length = request.length_bytes
            self._out_bytes += length
            if request.kind != _KIND_READ:
                buffer.release()
                reply = _pack_reply(SIMPLE_REPLY_MAGIC, nbd_error(error) if error else 0, request.cookie)
            elif error:
                buffer.release()
                reply = self._read_error(request.cookie, nbd_error(error), "the array could not read this")
            else:
                if self.structured:
                    self._out.append(data_chunk(request.cookie, request.offset_bytes, length))
                else:
                    self._out.append(_pack_reply(SIMPLE_REPLY_MAGIC, 0, request.cookie))
                self._out_buffers.append(buffer)
                reply = buffer.view[:length]
        self._out.append(reply)
        if not self._flush_due:
            self.schedule_flush()

    def refuse(self, read: bool, cookie: int, error: int, text: str) -> None:
        """Answer a request the array never saw with a NbdError."""
        self._out_requests += 1
        self._out.append(self._read_error(cookie, error, text) if read else simple_reply(cookie, error))

    def nothing(self, read: bool, cookie: int) -> None:
        """Answer a request of no bytes."""
        self._out_requests += 1
        self._out.append(empty_chunk(cookie) if read and self.structured else simple_reply(cookie, 0))

    def say(self, words: bytes) -> None:
        """Send words of the negotiation."""
        self._out.append(words)

    def _read_error(self, cookie: int, error: int, text: str) -> bytes:
        return error_chunk(cookie, error, text) if self.structured else simple_reply(cookie, error)

    def hold_flush(self) -> None:
        """The caller will call `flush` itself, at the end of what it is doing."""
        self._flush_due = True

    def schedule_flush(self) -> None:
        """Flush at the end of this turn of the loop: once for all that completes in one sweep."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what was collected, as far as the socket takes it."""
        self._flush_due = False
        if not self._blocked:
            self._send()
        self._after()

    def close(self) -> None:
        """Send nothing more. The socket is the caller's to close, after this."""
        self._open = False
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._socket)
        self._send()

    def _send(self) -> None:
        while True:
            if not self._sending:
                if not self._out:
                    return
                self._next_group()
            if not self._open:
                self._free_group()
                continue
            try:
                self._took(self._socket.sendmsg(self._sending[:VECTORS_MAX]))
            except (BlockingIOError, InterruptedError):
                self._blocked = True
                self._loop.add_writer(self._socket, self._writable)
                return
            except OSError as error:
                self.error = error
                self._open = False

    def _writable(self) -> None:
        self._blocked = False
        self._loop.remove_writer(self._socket)
        self.flush()

    def _next_group(self) -> None:
        self._sending, self._out = self._out, []
        self._sending_buffers, self._out_buffers = self._out_buffers, []
        self._sending_requests, self._out_requests = self._out_requests, 0
        self._sending_bytes, self._out_bytes = self._out_bytes, 0

    def _took(self, count: int) -> None:
        """The kernel took `count` bytes of the group: forget them, and the group when it is done."""
        done = 0
        for piece in self._sending:
            length = len(piece)
            if count < length:
                if count:
                    self._sending[done] = memoryview(piece)[count:]
                break
            count -= length
            done += 1
        if done < len(self._sending):
            del self._sending[:done]
        else:
            self._free_group()

    def _free_group(self) -> None:
        self._sending = []
        for buffer in self._sending_buffers:
            buffer.release()
        self._sending_buffers = []
        requests, self._sending_requests = self._sending_requests, 0
        buffered_bytes, self._sending_bytes = self._sending_bytes, 0
        self.give_back(requests, buffered_bytes)

    def give_back(self, requests: int, buffered_bytes: int) -> None:
        """So many requests are over, and so many bytes of buffers are in the pool again."""
        self.requests -= requests
        self.buffered_bytes -= buffered_bytes
        self._budget.give_back(buffered_bytes)
