"""The NBD server in one process with its clients: back-pressure, ends, refusals, what the array is given."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that these files also run alone

from memory_volume import CountingVolume
from nbd_client import ANSWER_S, Client, hello_bytes, request_bytes

from clustermd.array.request import Kind, Request
from clustermd.errors import Refused
from clustermd.export import nbd, nbd_connection
from clustermd.export.nbd import NbdServer
from clustermd.export.nbd_protocol import Command, CommandFlag, NbdError
from clustermd.trace import Trace

MIB = 1 << 20


@pytest.fixture
def path() -> Iterator[str]:
    """A socket path short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="nbd") as directory:
        yield os.path.join(directory, "nbd.sock")


@asynccontextmanager
async def serving(volume: CountingVolume, path: str, trace: Trace | None = None) -> AsyncIterator[NbdServer]:
    """A server; in the end all buffers must be back."""
    server = NbdServer(volume, path, trace)
    await server.start()
    try:
        yield server
    finally:
        if volume.held:
            volume.release_held()
        await server.stop(force=True)
    assert volume.memory_pool.out == 0
    assert not server.clients()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


async def until(volume: CountingVolume, waiting: int) -> None:
    """Until the volume has so many requests that it does not answer."""
    async with asyncio.timeout(ANSWER_S):
        while volume.waiting < waiting:
            await asyncio.sleep(0)


def test_the_socket_is_private_and_goes_with_the_server(path: str) -> None:
    async def test() -> None:
        async with serving(CountingVolume(MIB), path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert not os.path.exists(path)

    run(test())


def test_a_socket_nobody_listens_on_is_replaced_and_a_live_one_is_not(path: str) -> None:
    async def test() -> None:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(path)
        dead.close()
        async with serving(CountingVolume(MIB), path):
            with pytest.raises(Refused) as caught:
                await NbdServer(CountingVolume(MIB), path).start()
            assert caught.value.code == "socket-in-use"
            client = await Client.connect(path)
            await client.close()

    run(test())


def test_a_file_or_a_long_path_is_refused(path: str) -> None:
    async def test() -> None:
        Path(path).write_text("precious")
        with pytest.raises(Refused) as caught:
            await NbdServer(CountingVolume(MIB), path).start()
        assert caught.value.code == "not-a-socket" and Path(path).read_text() == "precious"
        with pytest.raises(Refused) as caught:
            await NbdServer(CountingVolume(MIB), "/tmp/" + "x" * 103).start()
        assert caught.value.code == "socket-path-too-long"

    run(test())


def test_what_is_written_is_read_by_another_connection(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(128 * MIB)
        async with serving(volume, path):
            one, two = await Client.connect(path), await Client.connect(path, structured=True)
            for length in (512, 4096, 65536, 65536 + 512, 300 * 512, 5 * MIB, 32 * MIB):
                data = random.Random(length).randbytes(length)
                answer = await one.ask(Command.WRITE, 4096, length, CommandFlag.FUA, payload=data)
                assert answer.error == 0
                assert (await two.ask(Command.READ, 4096, length)).data == data
                assert (await one.ask(Command.FLUSH)).error == 0
            assert volume.fua_count == 7 and volume.count[Kind.FLUSH] == 7
            await one.close()
            await two.close()

    run(test())


def test_all_requests_that_arrive_together_reach_the_array_as_one_batch(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        async with serving(volume, path):
            client = await Client.connect(path)
            client.writer.write(
                b"".join(
                    request_bytes(Command.WRITE, 4096 * cookie, 4096, 0, cookie, bytes([cookie]) * 4096)
                    for cookie in range(32)
                )
            )
            answers = [await client.answer() for _ in range(32)]
            assert {answer.cookie for answer in answers} == set(range(32))
            assert volume.batches == [32]
            await client.close()

    run(test())


def test_replies_come_in_the_order_of_completion(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB, delay_s=0.001, shuffle=random.Random(3))
        async with serving(volume, path):
            client = await Client.connect(path)
            for cookie in range(64):
                client.send(Command.READ, 512 * cookie, 512, 0, cookie)
            answers = [(await client.answer()).cookie for _ in range(64)]
            assert sorted(answers) == list(range(64)) and answers != list(range(64))
            await client.close()

    run(test())


@pytest.mark.parametrize("structured", [False, True])
def test_errors_of_the_array_and_refusals_reach_the_client_and_the_stream_goes_on(
    path: str, structured: bool
) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        volume.fail = lambda request: errno.ENODEV if request.offset_bytes == 4096 else 0
        async with serving(volume, path):
            client = await Client.connect(path, structured)
            read = await client.ask(Command.READ, 4096, 512)
            assert (
                read.error == NbdError.EIO and read.structured == structured and bool(read.text) == structured
            )
            assert (await client.ask(Command.WRITE, 4096, 512, payload=bytes(512))).error == NbdError.EIO
            assert (await client.ask(Command.TRIM, 4096, 512)).error == NbdError.EIO
            assert (await client.ask(Command.READ, 1, 512)).error == NbdError.EINVAL
            for length in (1024, 100 * 1024, 33 * MIB):
                refused = await client.ask(Command.WRITE, MIB - 512, length, payload=b"x" * length)
                assert refused.error == (NbdError.EINVAL if length > 32 * MIB else NbdError.ENOSPC)
            assert (
                await client.ask(Command.WRITE_ZEROES, 0, 512, CommandFlag.FAST_ZERO)
            ).error == NbdError.ENOTSUP
            assert (await client.ask(99)).error == NbdError.EINVAL
            assert (await client.ask(Command.READ, 0, 512)).data == bytes(512)
            await client.close()

    run(test())


def test_a_refused_write_is_answered_only_after_its_payload(path: str) -> None:
    """libnbd takes an answer to what it is still sending for a broken server."""

    async def test() -> None:
        async with serving(CountingVolume(MIB), path):
            client = await Client.connect(path)
            client.send(Command.WRITE, MIB, 100 * 1024, 0, 1, payload=b"x" * (100 * 1024 - 1))
            other = await Client.connect(path)
            await other.ask(Command.FLUSH)
            await other.ask(Command.FLUSH)
            reply = asyncio.create_task(client.answer())
            await other.ask(Command.FLUSH)
            assert not reply.done()
            client.writer.write(b"x")
            assert (await reply).error == NbdError.ENOSPC
            assert (await client.ask(Command.READ, 0, 512)).error == 0
            await client.close()
            await other.close()

    run(test())


@pytest.mark.parametrize("structured", [False, True])
def test_requests_of_no_bytes_succeed_without_the_array(path: str, structured: bool) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        async with serving(volume, path):
            client = await Client.connect(path, structured)
            for command in (Command.READ, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
                assert (await client.ask(command, 4096, 0)).error == 0
            assert not volume.batches
            await client.close()

    run(test())


def test_a_long_trim_reaches_the_array_in_pieces_and_is_answered_once(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(100 * MIB, delay_s=0)
        volume.view[:] = b"x" * len(volume.view)
        async with serving(volume, path):
            client = await Client.connect(path)
            flags = CommandFlag.NO_HOLE | CommandFlag.FUA
            assert (await client.ask(Command.WRITE_ZEROES, 512, 100 * MIB - 1024, flags, 5)).error == 0
            assert volume.count[Kind.WRITE_ZEROES] == volume.fua_count == volume.no_hole_count == 4
            assert volume.largest_bytes == 32 * MIB
            assert volume.data.count(b"x") == 1024 and volume.data[:512].count(b"x") == 512
            volume.fail = lambda request: errno.EIO if request.offset_bytes == 32 * MIB else 0
            assert (await client.ask(Command.TRIM, 0, 100 * MIB)).error == NbdError.EIO
            assert (await client.ask(Command.READ, 0, 512)).error == 0
            await client.close()

    run(test())


def test_a_lack_of_memory_is_an_error_of_one_request(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(8 * MIB)
        volume.memory_pool.limit_bytes = MIB
        async with serving(volume, path):
            client = await Client.connect(path)
            assert (await client.ask(Command.READ, 0, 2 * MIB)).error == NbdError.ENOMEM
            payload = bytes(2 * MIB)
            assert (await client.ask(Command.WRITE, 0, 2 * MIB, payload=payload)).error == NbdError.ENOMEM
            assert (await client.ask(Command.WRITE, 0, MIB, payload=payload[:MIB])).error == 0
            await client.close()

    run(test())


def test_a_client_that_does_not_read_costs_bounded_memory_and_loses_nothing(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(64 * MIB)
        volume.view[:] = random.Random(1).randbytes(64 * MIB)
        async with serving(volume, path):
            client = await Client.connect(path)
            for cookie in range(300):
                client.send(Command.READ, (cookie % 64) * MIB, MIB, 0, cookie)
            other = await Client.connect(path)
            assert (await other.ask(Command.READ, 0, 512)).error == 0
            for _ in range(300):
                answer = await client.answer()
                start = answer.cookie % 64 * MIB
                assert answer.data == volume.view[start : start + MIB]
            assert volume.memory_pool.peak_bytes <= nbd_connection.BUFFERED_MAX_BYTES + 4096
            await client.close()
            await other.close()

    run(test())


def test_replies_nobody_reads_are_bounded_in_number(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        made: list[nbd_connection.Connection] = []

        def connection(*arguments: Any) -> nbd_connection.Connection:
            made.append(nbd_connection.Connection(*arguments))
            return made[-1]

        monkeypatch.setattr(nbd, "Connection", connection)
        volume = CountingVolume(MIB)
        async with serving(volume, path):
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.setblocking(False)
            client.sendall(hello_bytes())
            batch = b"".join(request_bytes(99, cookie=cookie) for cookie in range(100))
            sent = looks = 0
            # Until the server has stopped taking more: neither it nor the socket buffers are without bound.
            while looks < 50 and sent < 64 * MIB:
                try:
                    rest = batch[sent % len(batch) :]
                    sent += client.send(rest)
                    looks = 0
                except BlockingIOError:
                    looks += 1
                await asyncio.sleep(0)
            assert made[0]._replies.requests <= nbd_connection.REQUESTS_MAX
            assert len(batch) * 10 < sent < 64 * MIB
            client.close()

    run(test())


def test_connections_share_a_bound_and_take_turns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(nbd, "BUFFERED_MAX_BYTES", 40 * MIB)
        volume = CountingVolume(64 * MIB)
        volume.held = True
        async with serving(volume, path):
            clients = [await Client.connect(path) for _ in range(4)]
            for client in clients:
                client.send(Command.READ, 0, 20 * MIB)
                client.send(Command.READ, 0, 512, 0, 1)
            await until(volume, 2)
            volume.release_held()
            for client in clients:
                answers = [await client.answer(), await client.answer()]
                assert sorted(len(answer.data) for answer in answers) == [512, 20 * MIB]
            assert volume.memory_pool.peak_bytes <= 40 * MIB
            for client in clients:
                await client.close()

    run(test())


def test_disconnect_lets_what_is_in_flight_finish(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        volume.held = True
        async with serving(volume, path) as server:
            client = await Client.connect(path)
            client.send(Command.WRITE, 0, 4096, 0, 1, b"a" * 4096)
            client.send(Command.DISC)
            client.send(Command.WRITE, 4096, 4096, 0, 2, b"b" * 4096)
            await until(volume, 1)
            assert not server.clients()
            volume.release_held()
            assert (await client.answer()).cookie == 1
            assert await client.ended() == b""
            assert volume.data[:8192] == b"a" * 4096 + bytes(4096)
            await client.close()

    run(test())


@pytest.mark.parametrize("bad", [b"\0" * 28, request_bytes(Command.WRITE, 0, 2**32 - 512)])
def test_a_lost_stream_ends_the_connection_after_what_came_before_it(path: str, bad: bytes) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        reasons: list[str] = []
        trace = Trace()
        trace.listen(lambda name, fields: reasons.append(fields.get("reason", name)))
        async with serving(volume, path, trace):
            client = await Client.connect(path)
            client.send(Command.READ, 0, 512, 0, 9)
            client.writer.write(bad)
            assert (await client.answer()).cookie == 9
            assert await client.ended() == b""
            await client.close()
            assert "lost" in reasons[-1]
            another = await Client.connect(path)
            assert (await another.ask(Command.READ, 0, 512)).error == 0
            await another.close()

    run(test())


def test_a_client_that_vanishes_leaves_its_buffers_to_the_array_until_they_are_answered(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        volume.held = True
        async with serving(volume, path) as server:
            client = await Client.connect(path)
            for cookie in range(8):
                client.send(Command.READ, 0, 65536, 0, cookie)
                client.send(Command.WRITE, 0, 4096, 0, 100 + cookie, b"w" * 4096)
            await until(volume, 16)
            client.writer.transport.abort()
            async with asyncio.timeout(ANSWER_S):
                while server.clients():
                    await asyncio.sleep(0)
            assert volume.memory_pool.out == 16
            volume.release_held()
            assert volume.data[:4096] == b"w" * 4096

    run(test())


def test_a_client_that_vanishes_within_a_long_payload_wrote_nothing(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        async with serving(volume, path) as server:
            client = await Client.connect(path)
            client.writer.write(request_bytes(Command.WRITE, 0, MIB, payload=b"x" * (MIB // 2)))
            async with asyncio.timeout(ANSWER_S):
                while not volume.memory_pool.out:
                    await asyncio.sleep(0)
            await client.close()
            async with asyncio.timeout(ANSWER_S):
                while server.clients():
                    await asyncio.sleep(0)
            assert not volume.batches and not any(volume.data)

    run(test())


def test_stop_refuses_while_clients_are_connected_and_names_them(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        async with serving(volume, path) as server:
            client = await Client.connect(path)
            (info,) = server.clients()
            assert (info.pid, info.uid, info.gid) == (os.getpid(), os.getuid(), os.getgid())
            assert info.transmitting and info.in_flight == 0 and info.connected_s >= 0
            with pytest.raises(Refused) as caught:
                await server.stop()
            assert caught.value.code == "nbd-clients-connected"
            assert str(os.getpid()) in caught.value.message
            assert caught.value.data["clients"][0]["pid"] == os.getpid()
            assert (await client.ask(Command.READ, 0, 512)).error == 0
            client.send(Command.DISC)
            assert await client.ended() == b""
            await server.stop()
            await client.close()

    run(test())


def test_a_forced_stop_ends_requests_in_flight_before_it_disconnects(path: str) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        volume.held = True
        async with serving(volume, path) as server:
            client = await Client.connect(path)
            client.send(Command.WRITE, 0, 4096, 0, 3, b"q" * 4096)
            await until(volume, 1)
            stopping = asyncio.create_task(server.stop(force=True))
            await asyncio.sleep(0)
            assert not os.path.exists(path)
            volume.release_held()
            assert (await client.answer()).cookie == 3
            assert await client.ended() == b""
            await stopping
            assert volume.data[:4096] == b"q" * 4096
            await client.close()

    run(test())


def test_a_forced_stop_does_not_wait_for_a_client_that_reads_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr(nbd, "LAST_REPLIES_S", 0.05)
        volume = CountingVolume(64 * MIB)
        async with serving(volume, path) as server:
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.sendall(hello_bytes() + request_bytes(Command.READ, 0, 32 * MIB))
            async with asyncio.timeout(ANSWER_S):
                while not volume.batches:
                    await asyncio.sleep(0)
            assert volume.memory_pool.out == 1
            await server.stop(force=True)
            assert volume.memory_pool.out == 0
            client.close()

    run(test())


def test_an_excluded_node_ends_its_connections_with_their_answers_and_greets_nobody_before_it_is_back(
    path: str,
) -> None:
    async def test() -> None:
        volume = CountingVolume(MIB)
        volume.held = True
        async with serving(volume, path) as server:
            client = await Client.connect(path)
            idle = await Client.connect(path)
            client.send(Command.WRITE, 0, 4096, 0, 3, b"q" * 4096)
            await until(volume, 1)
            volume.fail = lambda request: errno.ENODEV
            server.exclude("others went on")
            client.send(Command.WRITE, 4096, 4096, 0, 4, b"r" * 4096)
            assert await idle.ended() == b"" and not server.clients()
            reader, writer = await asyncio.open_unix_connection(path)
            waiting = asyncio.ensure_future(reader.readexactly(18))
            volume.release_held()
            assert (answer := await client.answer()).cookie == 3
            assert answer.error == NbdError.EIO
            assert await client.ended() == b""
            assert len(volume.batches) == 1, "what came after the exclusion was taken"
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done() and not server.clients()
            volume.fail = lambda request: 0
            server.admit()
            assert (await asyncio.wait_for(waiting, ANSWER_S)).startswith(b"NBDMAGIC")
            again = await Client.connect(path)
            assert (await again.ask(Command.READ, 0, 4096)).data == bytes(4096)
            server.exclude("once more")
            assert await again.ended() == b""
            writer.close()
            for one in (client, idle, again):
                await one.close()

    run(test())


def test_an_excluded_node_stops_and_lets_those_go_who_wait_for_it(path: str) -> None:
    async def test() -> None:
        async with serving(CountingVolume(MIB), path) as server:
            server.exclude("others went on")
            reader, writer = await asyncio.open_unix_connection(path)
            await server.stop()
            async with asyncio.timeout(ANSWER_S):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            server.admit()  # the array comes back while its server is gone
            writer.close()

    run(test())


def test_more_clients_than_the_bound_are_turned_away(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(nbd, "CONNECTIONS_MAX", 2)
        async with serving(CountingVolume(MIB), path) as server:
            clients = [await Client.connect(path) for _ in range(2)]
            reader, writer = await asyncio.open_unix_connection(path)
            async with asyncio.timeout(ANSWER_S):
                assert await reader.read() == b""
            writer.close()
            assert len(server.clients()) == 2
            for client in clients:
                await client.close()

    run(test())


def test_a_request_belongs_to_the_array_until_it_is_answered(path: str) -> None:
    """The payload the array sees does not change while more arrives in the receive buffer."""

    async def test() -> None:
        volume = CountingVolume(MIB)
        volume.held = True
        seen: list[bytes] = []

        def fail(request: Request) -> int:
            if request.buffer is not None:
                seen.append(bytes(request.buffer.view[:4096]))
            return 0

        volume.fail = fail
        async with serving(volume, path):
            client = await Client.connect(path)
            for cookie in range(200):
                client.send(Command.WRITE, 4096, 4096, 0, cookie, bytes([cookie]) * 4096)
            await until(volume, 200)
            volume.release_held()
            for _ in range(200):
                await client.answer()
            assert seen == [bytes([cookie]) * 4096 for cookie in range(200)]
            await client.close()

    run(test())
