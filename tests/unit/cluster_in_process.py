"""A whole cluster in this process: real arrays and lock replicas over an order in memory. No daemons.

Each node has its own submitter and descriptors on the same image files, a replica of the lock manager, and a
session of it. `kill` makes a node vanish as a dead machine would: nothing more of it is submitted, its member of the
group is lost, and `fence` says when that is certain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from array_kit import Client, abandon, tasks_of, until
from faulty_submitter import Fault, FaultySubmitter

from clustermd.array.array import Array
from clustermd.array.assemble import load_members
from clustermd.clock import SystemClock
from clustermd.cluster.cluster import Cluster
from clustermd.device.direct import open_member
from clustermd.device.submitter import make_submitter
from clustermd.dlm.lockspace import Lockspace, LockspaceEvents
from clustermd.dlm.replica import Replica
from clustermd.dlm.session import Session
from clustermd.testing.locks.order import MemoryGroup, Port, newcomer_reads_from_here
from clustermd.trace import Trace


class Crashed(asyncio.CancelledError):
    """Raised out of a trace point: the task that passed it goes no further."""


class NodeLink:
    """A Link over a session of the node's replica."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._number = node.replica.open_session("array md0", 1)
        self.session = Session(self._send, node.trace)
        node.sessions[self._number] = self.session

    def _send(self, frame: list[Any]) -> None:
        if not self._node.alive:
            return
        self._node.replica.session_frame(self._number, frame)
        self._node.cluster.pump_soon()

    async def join(self, name: str, events: LockspaceEvents, max_slots: int) -> Lockspace:
        return await self.session.join(name, events, max_slots=max_slots)

    async def close(self) -> None:
        if self._node.alive:
            self._node.replica.session_end(self._number, "closed", True)
            self._node.cluster.pump_soon()
        self.session.on_lost("closed")


class Node:
    """One node. `events` are the trace points it passed, as (name, fields)."""

    def __init__(self, cluster: InProcessCluster, number: int, incarnation: int) -> None:
        self.cluster = cluster
        self.number = number
        self.alive = True
        self.port: Port = cluster.group.port(number, incarnation)
        self.trace = Trace()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.trace.listen(lambda name, fields: self.events.append((name, fields)))
        self.replica = Replica(self, self.trace)
        self.replica.attach(self.port)
        self.port.events = self.replica
        self.sessions: dict[int, Session] = {}
        self.array: Array
        self.client: Client

    def to_session(self, session: int, frame: list[Any]) -> None:
        if self.alive and session in self.sessions:
            self.sessions[session].on_frame(frame)

    def suspended(self, reason: str) -> None:
        for session in self.sessions.values():
            session.on_suspended(reason)

    def resumed(self) -> None:
        for session in self.sessions.values():
            session.on_resumed()

    def must_restart(self, reason: str) -> None:
        for session in self.sessions.values():
            session.on_lost(reason)

    async def connect(self) -> NodeLink:
        return NodeLink(self)

    async def assemble(
        self,
        paths: list[Path],
        *,
        faults: list[Fault] | None = None,
        tick_s: float = 1.0,
        excludes: bool = False,
        **options: Any,
    ) -> None:
        submitter: Any = make_submitter(pool_bytes=64 << 20)
        if self.cluster.faulty:
            submitter = FaultySubmitter(submitter, faults)
        assembly = await load_members(
            [str(path) for path in paths],
            lambda path: open_member(path, clustered=True, exclusive=False),
            submitter,
        )
        coordinator = Cluster("lockspace", self.connect, self.trace, excludes=excludes)
        self.array = Array("md0", assembly, coordinator, submitter, SystemClock(), self.trace, **options)
        self.array.state.tick_s = tick_s
        self.client = Client(self.array)
        await self.array.start()

    @property
    def disks(self) -> FaultySubmitter:
        """The faulty submitter, in a cluster that has them."""
        submitter = self.array.state.submitter
        assert isinstance(submitter, FaultySubmitter)
        return submitter

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def at(self, point: str, act: Callable[[dict[str, Any]], None], times: int = 1) -> None:
        """Call `act(fields)` from within trace point `point`, the first `times` times."""
        left = times

        def listener(name: str, fields: dict[str, Any]) -> None:
            nonlocal left
            if name == point and left > 0 and self.alive:
                left -= 1
                act(fields)

        self.trace.listen(listener)

    def die_at(self, point: str) -> asyncio.Event:
        """Crash in the next trace point of that name; the event says that it happened. `bury` it after that."""
        dead = asyncio.Event()

        def die(_: dict[str, Any]) -> None:
            self.cluster.crash(self.number)
            dead.set()
            raise Crashed(point)

        self.at(point, die)
        return dead

    def die(self) -> None:
        """Nothing is sent or received any more. What waits for an answer is let go, so that its task can end."""
        self.alive = False
        for session in self.sessions.values():
            session.on_lost("the node is dead")

    def lose_session(self) -> int:
        """The lock session is gone; `end_session` of the result tells all that nothing is in flight any more."""
        number = max(self.sessions)
        self.replica.session_lost(number)
        self.sessions.pop(number).on_lost("the test says so")
        self.cluster.pump_soon()
        return number

    def end_session(self, number: int) -> None:
        self.replica.session_end(number, "drained", False)
        self.cluster.pump_soon()


class InProcessCluster:
    """The group and its nodes."""

    def __init__(self, *, faulty: bool = False) -> None:
        self.faulty = faulty
        self.group = MemoryGroup()
        self.nodes: dict[int, Node] = {}
        self._incarnation = 100
        self._pumping = False

    def pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        self.group.settle()

    def add(self, number: int) -> Node:
        self._incarnation += 1
        node = Node(self, number, self._incarnation)
        newcomer_reads_from_here(self.group, node.port)
        self.nodes[number] = node
        self.group.view()
        self.pump_soon()
        return node

    async def kill(self, number: int, *, fence: bool = True) -> Node:
        """The node submits nothing more, and the group loses it; what it has in flight lands first."""
        node = self.crash(number)
        await self.bury(node, fence=fence)
        return node

    def crash(self, number: int) -> Node:
        """The node does nothing any more; nobody knows yet. Requests that a fault keeps stuck stay in flight."""
        node = self.nodes.pop(number)
        node.die()
        node.array.state.gate.shut("killed by the test")
        for task in tasks_of(node.array):
            if task is not asyncio.current_task():
                task.cancel()
        return node

    async def bury(self, node: Node, *, fence: bool = True) -> None:
        """The group loses a crashed node once what it had in flight has landed."""
        await node.array.state.submitter.drained()
        self.group.lose(node.port.me)
        if fence:
            self.group.fence(node.port.me)
        self.pump_soon()

    def fence(self, node: Node) -> None:
        self.group.fence(node.port.me)
        self.pump_soon()


@asynccontextmanager
async def cluster_of(
    count: int, paths: list[Path], *, faulty: bool = False, **options: Any
) -> AsyncIterator[InProcessCluster]:
    """`count` nodes, numbered from 1, with the array assembled on each; stopped in the end.

    `faulty`: each node's disks are a `FaultySubmitter` (`Node.disks`). After a failure nodes are abandoned.
    """
    cluster = InProcessCluster(faulty=faulty)
    try:
        for number in range(1, count + 1):
            await asyncio.wait_for(cluster.add(number).assemble(paths, **options), 20)
        yield cluster
        for node in list(cluster.nodes.values()):
            if hasattr(node, "array"):
                await asyncio.wait_for(node.array.stop(), 20)
    except BaseException:
        for node in list(cluster.nodes.values()):
            node.die()
            if hasattr(node, "array"):
                await abandon(node.array)
        raise


async def settled(cluster: InProcessCluster, limit_s: float = 20) -> None:
    """Wait until no node copies anything, and none takes the copies for different any more."""
    for node in cluster.nodes.values():
        await asyncio.wait_for(node.array.idle(), limit_s)
        await until(lambda: node.array.state.settled, limit_s)  # noqa: B023


def faulty_members(node: Node) -> list[bool]:
    return [member.faulty for member in node.array.members()]
