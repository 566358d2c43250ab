"""What corosync itself takes for what a pair needs: the floor under any lock manager of this kind on it.

To acquire is one message to the group, delivered here and acknowledged by one more node, so that a majority has it
and it cannot be lost (dlm.md 6.2); to release is one message, delivered here. There is nothing else in it: no lockd, no
client's socket, no state. All three members are connections of this one process, which therefore is woken less
than three lockds are. It is the last node before the sender that acknowledges, the quickest way.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from corosync_kit import CorosyncCluster

from clustermd.group.corosync.cpg import Cpg

GROUP = b"benchmark"


class Floor:
    """Members of one group on all nodes of a corosync cluster. `pair` is as the systems of `locks` have it."""

    def __init__(self, cluster: CorosyncCluster) -> None:
        self._cluster = cluster
        self._members: list[Cpg] = []
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next = 0
        self._missing: dict[bytes, int] = defaultdict(int)
        self._done: dict[bytes, asyncio.Future[None]] = {}

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        for node in self._cluster.nodes:
            deliver = [self._at_sender, self._elsewhere, self._at_last][node.number - 1]
            with node.inside():
                member = Cpg(GROUP, deliver, self._changed, lambda ring, nodes: None)
            self._members.append(member)
            loop.add_reader(member.fileno(), member.dispatch)
            while not member.join():
                await asyncio.sleep(0.01)  # corosync says only "try again"
        await self._joined

    async def pair(self, number: int) -> None:
        """A message and its acknowledgement, then a message."""
        await self._say(b"M", 2)
        await self._say(b"m", 1)

    async def _say(self, kind: bytes, deliveries: int) -> None:
        self._next += 1
        number = self._next.to_bytes(8, "big")
        self._missing[number] = deliveries
        done = self._done[number] = asyncio.get_running_loop().create_future()
        while not self._members[0].send(kind + number + bytes(55)):
            await asyncio.sleep(0.001)  # corosync's queue is full
        await done

    def _at_sender(self, node: int, pid: int, payload: bytes) -> None:
        number = payload[1:9]
        self._missing[number] -= 1
        if not self._missing[number]:
            del self._missing[number]
            self._done.pop(number).set_result(None)

    def _elsewhere(self, node: int, pid: int, payload: bytes) -> None: ...

    def _at_last(self, node: int, pid: int, payload: bytes) -> None:
        if payload[:1] == b"M":
            self._members[-1].send(b"A" + payload[1:9])

    def _changed(self, members: object, left: object, joined: object) -> None:
        if (
            isinstance(members, tuple)
            and len(members) == len(self._cluster.nodes)
            and not self._joined.done()
        ):
            self._joined.set_result(None)

    async def close(self) -> None:
        for member in self._members:
            asyncio.get_running_loop().remove_reader(member.fileno())
            member.close()
