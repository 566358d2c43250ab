"""However a byte stream is cut, and whatever it holds, the NBD server does the same and never hangs."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from memory_volume import CountingVolume
from nbd_client import Answer, Client, hello_bytes, option_bytes, request_bytes

from clustermd.errors import BadBytes
from clustermd.export.nbd_connection import Connection
from clustermd.export.nbd_handshake import Handshake, Option
from clustermd.export.nbd_protocol import Command, CommandFlag, Export, NbdError
from clustermd.export.nbd_replies import Budget

KIB = 1 << 10
SIZE = 512 * KIB


@dataclass(frozen=True)
class Asked:
    """One request of a generated stream, with its place in it as its cookie."""

    command: int
    offset: int
    length: int
    flags: int

    def bytes(self, cookie: int) -> bytes:
        payload = bytes([cookie % 251 + 1]) * self.length if self.command == Command.WRITE else b""
        return request_bytes(self.command, self.offset, self.length, self.flags, cookie, payload)


sectors = st.integers(0, SIZE // 512 + 4).map(lambda sector: sector * 512)
lengths = st.one_of(
    st.integers(0, 16).map(lambda count: count * 512),
    st.sampled_from([64 * KIB, 64 * KIB + 512, 200 * KIB, 300 * KIB]),
    st.integers(0, 70_000),
)
requests = st.builds(
    Asked,
    st.sampled_from([Command.READ, Command.WRITE, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, 99]),
    sectors,
    lengths,
    st.sampled_from([0, 0, 0, CommandFlag.FUA, CommandFlag.NO_HOLE, CommandFlag.DF, 1 << 9]),
) | st.just(Asked(Command.FLUSH, 0, 0, 0))
cut_lists = st.lists(st.integers(1, 100_000), max_size=12) | st.lists(st.integers(1, 60), max_size=40)


def model(stream: list[Asked], structured: bool) -> tuple[dict[int, tuple[int, bytes]], bytes]:
    """What each request must be answered with, and what the volume holds in the end; written from the text
    of the protocol, not from the server."""
    data = bytearray(SIZE)
    answers: dict[int, tuple[int, bytes]] = {}
    for cookie, asked in enumerate(stream):
        end = asked.offset + asked.length
        flags_allowed = CommandFlag.FUA
        if asked.command == Command.WRITE_ZEROES:
            flags_allowed |= CommandFlag.NO_HOLE
        if asked.command == Command.READ and structured:
            flags_allowed |= CommandFlag.DF
        error = 0
        if asked.command == 99 or asked.flags & ~flags_allowed or asked.offset % 512 or asked.length % 512:
            error = NbdError.EINVAL
        elif end > SIZE:
            writes = asked.command in (Command.WRITE, Command.WRITE_ZEROES)
            error = NbdError.ENOSPC if writes else NbdError.EINVAL
        elif asked.command == Command.WRITE:
            data[asked.offset : end] = bytes([cookie % 251 + 1]) * asked.length
        elif asked.command in (Command.TRIM, Command.WRITE_ZEROES):
            data[asked.offset : end] = bytes(asked.length)
        read = asked.command == Command.READ and not error
        answers[cookie] = (error, bytes(data[asked.offset : end]) if read else b"")
    return answers, bytes(data)


async def connect(volume: CountingVolume, structured: bool) -> tuple[Client, asyncio.Event]:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ended = asyncio.Event()
    Connection(theirs, volume, loop, Budget(64 << 20, loop), lambda _: ended.set())
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    return Client(reader, writer, structured), ended


async def send_cut(client: Client, stream: bytes, cuts: list[int]) -> None:
    """Send it piece by piece; the server may look after each."""
    at = 0
    for cut in cuts:
        client.writer.write(stream[at : at + cut])
        at += cut
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    client.writer.write(stream[at:])


async def converse(stream: list[Asked], structured: bool, cuts: list[int]) -> tuple[list[Answer], bytes]:
    volume = CountingVolume(SIZE)
    client, ended = await connect(volume, structured)
    said = hello_bytes(structured) + b"".join(asked.bytes(cookie) for cookie, asked in enumerate(stream))
    client.lengths = {
        cookie: asked.length for cookie, asked in enumerate(stream) if asked.command == Command.READ
    }
    sender = asyncio.create_task(send_cut(client, said + request_bytes(Command.DISC), cuts))
    await client.read_hello()
    answers = [await client.answer() for _ in stream]
    await sender
    assert await client.ended() == b""
    await client.close()
    async with asyncio.timeout(10):
        await ended.wait()
    assert volume.memory_pool.out == 0
    return answers, bytes(volume.data)


@settings(max_examples=120, deadline=None)
@given(st.lists(requests, max_size=12), st.booleans(), cut_lists)
def test_a_stream_cut_anywhere_is_answered_as_the_protocol_says(
    stream: list[Asked], structured: bool, cuts: list[int]
) -> None:
    answers, data = asyncio.run(converse(stream, structured, cuts))
    expected, expected_data = model(stream, structured)
    assert {answer.cookie: (answer.error, answer.data) for answer in answers} == expected
    assert data == expected_data


@settings(max_examples=120, deadline=None)
@given(
    st.lists(requests, max_size=3),
    st.binary(min_size=0, max_size=400),
    st.booleans(),
    cut_lists,
    st.integers(0, 100),
)
@example([], b"\0\0\0\4\0", False, [4], 0)
def test_garbage_ends_the_connection_and_loses_no_buffer(
    stream: list[Asked], garbage: bytes, in_transmission: bool, cuts: list[int], lost_bytes: int
) -> None:
    async def converse() -> None:
        volume = CountingVolume(SIZE)
        client, ended = await connect(volume, False)
        good = b"".join(asked.bytes(cookie) for cookie, asked in enumerate(stream))
        said = (hello_bytes() + good[: max(0, len(good) - lost_bytes)] if in_transmission else b"") + garbage
        await send_cut(client, said, cuts)
        client.writer.write_eof()
        await client.ended()
        await client.close()
        async with asyncio.timeout(10):
            await ended.wait()
        assert volume.memory_pool.out == 0

    asyncio.run(converse())


options = st.builds(
    option_bytes,
    st.sampled_from(
        [int(option) for option in Option if option not in (Option.EXPORT_NAME, Option.ABORT)] + [5, 99]
    ),
    st.sampled_from(
        [b"", b"\0\0\0\0\0\0", b"\0\0\0\3md0\0\1\0\3", b"\0\0\0\3md9\0\0", b"\xff" * 8, bytes(20_000)]
    ),
)


def negotiate(stream: bytes, cuts: list[int]) -> tuple[bytes, str, int]:
    """What is said, how it ends, and how much of the stream is used, when it arrives in these pieces."""
    state = Handshake(Export("md0", SIZE, False), "")
    said = b""
    at = have = 0
    for cut in [*cuts, len(stream)]:
        have = min(len(stream), have + cut)
        while not state.over:
            try:
                following, reply = state.feed(stream, at, have)
            except BadBytes as error:
                return said, error.code, at
            assert at <= following <= have
            said += reply
            if following == at:
                break
            at = following
    return said, state.phase.value, at


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 4), st.lists(options, max_size=6), st.binary(max_size=64), cut_lists)
def test_a_negotiation_cut_anywhere_goes_the_same_way(
    flags: int, words: list[bytes], garbage: bytes, cuts: list[int]
) -> None:
    stream = flags.to_bytes(4, "big") + b"".join(words) + garbage
    assert negotiate(stream, cuts) == negotiate(stream, [])
