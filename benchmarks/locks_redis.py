"""Redlock: the lock recipe of Redis, on three independent servers of one machine.

SET NX PX of a random token is said to all servers at once; the lock is had when more than half have said OK. It is
released by the recipe's script, which deletes only one's own token (redis.io, "Distributed Locks with Redis").
Servers keep nothing (memory), or write each command to the disk before they answer (`appendfsync always`).
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from locks_servers import PATIENCE_S, SERVERS, free_ports, running

from clustermd.testing.waiting import wait_until

LOCK_MS = 600_000
RELEASE = b"if redis.call('get',KEYS[1]) == ARGV[1] then return redis.call('del',KEYS[1]) else return 0 end"


class Connection(asyncio.Protocol):
    """One connection of RESP, the Redis protocol. Answers come in the order of the commands."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while self._buffer:
            line, end, rest = self._buffer.partition(b"\r\n")
            if not end:
                return
            if line[:1] == b"$" and line != b"$-1":
                size = int(line[1:])
                if len(rest) < size + 2:
                    return
                line, rest = rest[:size], rest[size + 2 :]
            self._buffer = rest
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_result(line)

    def command(self, *words: bytes) -> asyncio.Future[bytes]:
        """Send a command; its answer, without the sign of a simple string."""
        assert self._transport is not None
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self._transport.write(b"".join(parts))
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Redlock:
    """A client of three independent servers."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._connections: list[Connection] = []
        self._script = b""

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        for port in self._ports:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
            self._connections.append(connection)
            self._script = await connection.command(b"SCRIPT", b"LOAD", RELEASE)

    async def pair(self, number: int) -> None:
        """Acquire and release lock `number`."""
        key, token, most = b"lock-%d" % number, secrets.token_bytes(20), b"%d" % LOCK_MS
        await self._majority(b"+OK", b"SET", key, token, b"NX", b"PX", most)
        await self._majority(b":1", b"EVALSHA", self._script, b"1", key, token)

    async def _majority(self, wanted: bytes, *words: bytes) -> None:
        """Say it to all; go on when more than half have given the wanted answer."""
        answers = [connection.command(*words) for connection in self._connections]
        majority, good, bad = len(answers) // 2 + 1, 0, 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def heard(answer: asyncio.Future[bytes]) -> None:
            nonlocal good, bad
            if answer.result() == wanted:
                good += 1
                if good == majority:
                    done.set_result(None)
            else:
                bad += 1
                if bad == majority:
                    done.set_exception(RuntimeError(f"Redis answered {answer.result()!r}, not {wanted!r}"))

        for answer in answers:
            answer.add_done_callback(heard)
        await done

    async def close(self) -> None:
        for connection in self._connections:
            connection.close()


@contextmanager
def redis_servers(directory: Path, *, durable: bool) -> Iterator[list[int]]:
    """Three servers with their data below `directory`; their ports."""
    kind = "aof" if durable else "memory"
    with ExitStack() as stack:
        ports = free_ports(SERVERS)
        for port in ports:
            own = directory / f"redis-{kind}-{port}"
            own.mkdir()
            command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(own)]
            command += ["--save", "", "--appendonly", "yes" if durable else "no", "--appendfsync", "always"]
            stack.enter_context(running(command, directory / f"redis-{kind}-{port}.log"))
        for port in ports:
            wait_until(lambda port=port: listens(port), f"redis-server at port {port}", PATIENCE_S)
        yield ports


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
