"""A bare NBD client for tests: says exactly the bytes a test wants, and reads what comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from clustermd.export import nbd_handshake as handshake
from clustermd.export import nbd_protocol as protocol
from clustermd.export.nbd_handshake import Option, Reply

ANSWER_S = 20.0


@dataclass
class Answer:
    """One reply: `error` of the wire, a read's data, whether it was a chunk, and an error's text."""

    cookie: int
    error: int
    data: bytes = b""
    structured: bool = False
    text: str = ""


def request_bytes(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 0, payload: bytes = b""
) -> bytes:
    return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return handshake.OPTION.pack(handshake.OPTION_MAGIC, option, len(data)) + data


def hello_bytes(structured: bool = False, name: bytes = b"") -> bytes:
    """All a client says until an export is open."""
    asked = option_bytes(Option.STRUCTURED_REPLY) if structured else b""
    go = len(name).to_bytes(4, "big") + name + b"\0\0"
    return b"\0\0\0\3" + asked + option_bytes(Option.GO, go)


@dataclass
class Client:
    """Connect with `Client.connect`. `lengths` says how long the data of each awaited READ is."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    structured: bool
    size_bytes: int = 0
    flags: int = 0
    lengths: dict[int, int] = field(default_factory=dict)

    @classmethod
    async def connect(cls, path: str, structured: bool = False) -> Client:
        reader, writer = await asyncio.open_unix_connection(path)
        client = cls(reader, writer, structured)
        writer.write(hello_bytes(structured))
        await client.read_hello()
        return client

    async def read_hello(self) -> None:
        await self.exactly(18)
        while True:
            _, option, reply, length = handshake.OPTION_REPLY.unpack(await self.exactly(20))
            data = await self.exactly(length)
            if reply == Reply.INFO and data[:2] == b"\0\0":
                self.size_bytes = int.from_bytes(data[2:10], "big")
                self.flags = int.from_bytes(data[10:12], "big")
            if option == Option.GO and reply == Reply.ACK:
                return

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(ANSWER_S):
            return await self.reader.readexactly(count)

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        cookie: int = 0,
        payload: bytes = b"",
    ) -> None:
        if command == protocol.Command.READ:
            self.lengths[cookie] = length
        self.writer.write(request_bytes(command, offset, length, flags, cookie, payload))

    async def answer(self) -> Answer:
        magic = int.from_bytes(await self.exactly(4), "big")
        if magic == protocol.SIMPLE_REPLY_MAGIC:
            rest = await self.exactly(12)
            error, cookie = int.from_bytes(rest[:4], "big"), int.from_bytes(rest[4:], "big")
            length = self.lengths.pop(cookie, None)
            assert not (self.structured and length is not None), "a READ answered without a chunk"
            return Answer(cookie, error, b"" if error or not length else await self.exactly(length))
        assert magic == protocol.STRUCTURED_REPLY_MAGIC, hex(magic)
        rest = await self.exactly(16)
        flags, kind = int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big")
        cookie, length = int.from_bytes(rest[4:12], "big"), int.from_bytes(rest[12:], "big")
        assert flags == protocol.CHUNK_DONE
        body = await self.exactly(length)
        wanted = self.lengths.pop(cookie)
        if kind == protocol.ChunkType.OFFSET_DATA:
            assert len(body) == 8 + wanted and wanted
            return Answer(cookie, 0, body[8:], True)
        if kind == protocol.ChunkType.NONE:
            assert not body and not wanted
            return Answer(cookie, 0, b"", True)
        assert kind == protocol.ChunkType.ERROR
        assert int.from_bytes(body[4:6], "big") == len(body) - 6
        return Answer(cookie, int.from_bytes(body[:4], "big"), b"", True, body[6:].decode())

    async def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        cookie: int = 1,
        payload: bytes = b"",
    ) -> Answer:
        self.send(command, offset, length, flags, cookie, payload)
        answer = await self.answer()
        assert answer.cookie == cookie
        return answer

    async def ended(self) -> bytes:
        """Everything up to the end of the stream, which may have come while we still sent."""
        async with asyncio.timeout(ANSWER_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass  # the server was first
