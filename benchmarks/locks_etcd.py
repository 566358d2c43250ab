"""etcd's lock recipe on three servers of one machine.

A key that must not exist is put under a lease in one transaction, and deleted: the uncontended way of etcd's own lock
recipe (its client's concurrency.Mutex). The client speaks gRPC with the leader, the shortest way. Servers write
to the disk before they answer, as etcd always does. The few messages are encoded here as etcd's rpc.proto has
them: what a library would do in generated code.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc.aio
from locks_servers import PATIENCE_S, SERVERS, free_ports, running

from clustermd.testing.waiting import wait_until

LEASE_S = 600


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a number, or bytes (which strings and messages are, too)."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def numbers(message: bytes) -> dict[int, int]:
    """The number fields of a protocol buffer's outermost level."""
    found: dict[int, int] = {}
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        tag = number()
        value = number()
        if tag & 7 == 0:
            found[tag >> 3] = value
        else:
            place += value
    return found


class Etcd:
    """A client of the server at `address`."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._txn = self._channel.unary_unary("/etcdserverpb.KV/Txn")
        self._delete = self._channel.unary_unary("/etcdserverpb.KV/DeleteRange")
        self._grant = self._channel.unary_unary("/etcdserverpb.Lease/LeaseGrant")
        self._lease = 0

    async def open(self) -> None:
        self._lease = numbers(await self._grant(field(1, LEASE_S)))[2]

    async def pair(self, number: int) -> None:
        """Acquire and release lock `number`."""
        key = b"lock-%d" % number
        absent = field(1, 0) + field(2, 1) + field(3, key) + field(5, 0)  # created in revision 0: never
        put = field(1, key) + field(2, b"1") + field(3, self._lease)
        answer = await self._txn(field(1, absent) + field(2, field(2, put)))
        if numbers(answer).get(2) != 1:
            raise RuntimeError(f"etcd: {key!r} is held by another")
        await self._delete(field(1, key))

    async def close(self) -> None:
        await self._channel.close()


@contextmanager
def etcd_servers(directory: Path) -> Iterator[str]:
    """Three servers with their data below `directory`; the address of the leader."""
    with ExitStack() as stack:
        ports = free_ports(2 * SERVERS)
        clients, peers = ports[:SERVERS], ports[SERVERS:]
        names = [f"etcd{number}" for number in range(1, SERVERS + 1)]
        cluster = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, peers, strict=True))
        for name, client, peer in zip(names, clients, peers, strict=True):
            command = ["etcd", f"--name={name}", f"--data-dir={directory / name}"]
            command += [f"--listen-client-urls=http://127.0.0.1:{client}"]
            command += [f"--advertise-client-urls=http://127.0.0.1:{client}"]
            command += [f"--listen-peer-urls=http://127.0.0.1:{peer}"]
            command += [f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}"]
            command += [f"--initial-cluster={cluster}", "--initial-cluster-state=new", "--log-level=error"]
            stack.enter_context(running(command, directory / f"{name}.log"))
        port = wait_until(lambda: leader(clients), "etcd's leader", PATIENCE_S)
        yield f"127.0.0.1:{port}"


def leader(ports: Sequence[int]) -> int:
    """The port of the server that says it leads; 0 while nobody does."""
    for port in ports:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v3/maintenance/status", b"{}")
        try:
            with urllib.request.urlopen(request, timeout=1) as answer:
                status = json.load(answer)
        except (urllib.error.URLError, OSError):
            return 0
        if status.get("leader") == status["header"]["member_id"]:
            return port
    return 0
