"""Our own three nodes for the benchmark of locks: on `local`, and on real corosync in network namespaces.

The namespaces, and a corosync in each, are made by the kit of the system tests (`tests/system/corosync_kit.py`), which
therefore is put on the path here. Sockets of a lockd are files, so the one client process is beside all nodes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from clustermd.cluster.channel import Channel
from clustermd.cluster.messages import LVB_BYTES, Message, MessageType
from clustermd.cluster.slot_lock import OwnSlot
from clustermd.dlm.lockspace import Slot
from clustermd.dlm.modes import Mode
from clustermd.dlm.session import SessionLockspace
from clustermd.lockd.api import KeptLock, OpenLockspace, connect_lockspace
from clustermd.lockd.client import LockdConnection, connect
from clustermd.rundir import RunDir
from clustermd.testing.local_cluster import LocalCluster
from clustermd.trace import Trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "system"))
from corosync_kit import CorosyncCluster, Options
from netns_kit import refused

NODES = 3
PATIENCE_S = 60.0
CONF = 'engine = "corosync"\nfence = "none"\n'

namespaces_refused = refused


@dataclass(frozen=True)
class Nodes:
    """Three nodes: their run directories, and the corosync below if that is the engine."""

    rundirs: list[RunDir]
    corosync: CorosyncCluster | None = None


@contextmanager
def local_nodes() -> Iterator[Nodes]:
    """Three nodes of one machine. Their lockds start when they are needed."""
    with LocalCluster() as cluster:
        yield Nodes([cluster.node(f"node{number}").rundir for number in range(1, NODES + 1)])


@contextmanager
def corosync_nodes(transport: str) -> Iterator[Nodes]:
    """Three machines with corosync (`knet` with AES, or `udpu`) and a lockd each."""
    cluster = CorosyncCluster(NODES, Options(transport=transport))
    lockds: list[subprocess.Popen[bytes]] = []
    try:
        cluster.start()
        conf = cluster.base / "clustermd.conf"
        conf.write_text(CONF)
        rundirs = []
        for node in cluster.nodes:
            rundir = RunDir(Path(node.environment["CLUSTERMD_RUN"]), node.name)
            with (rundir.make() / "lockd.log").open("wb") as log:
                words = (sys.executable, "-P", "-m", "clustermd.lockd")
                environment = node.environment | {"CLUSTERMD_CONF": str(conf)}
                lockds.append(node.popen(*words, env=environment, stdout=log, stderr=log))
            rundirs.append(rundir)
        yield Nodes(rundirs, cluster)
    finally:
        for lockd in lockds:
            lockd.kill()
            lockd.wait()
        cluster.close()


class Deaf:
    """LockspaceEvents of somebody whom nothing of it concerns; a lost session ends the run by its calls."""

    def recover_prep(self) -> None: ...

    def recover_slot(self, slot: Slot) -> None: ...

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None: ...

    def suspended(self, reason: str) -> None: ...

    def resumed(self) -> None: ...

    def lost(self, reason: str) -> None: ...


async def session(rundir: RunDir, start: bool) -> LockdConnection:
    """A session of that node's lockd, once it is in its group."""
    async with asyncio.timeout(PATIENCE_S):
        while not start and not rundir.lockd_socket.exists():
            await asyncio.sleep(0.02)  # a socket's file gives no event
        return await connect(rundir, "benchmark", start=start)


class Locks:
    """A client of the first node, in a lockspace that all three nodes are in."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.sessions: list[LockdConnection] = []
        self._space: SessionLockspace

    async def open(self) -> None:
        start = self._nodes.corosync is None
        self.sessions = [await session(rundir, start) for rundir in self._nodes.rundirs]
        spaces = [await one.session.join("locks", Deaf(), max_slots=NODES) for one in self.sessions]
        self._space = spaces[0]

    async def pair(self, number: int) -> None:
        """Acquire and release lock `number`."""
        lock = await self._space.lock(f"lock-{number}", Mode.EX)
        await lock.unlock()

    async def close(self) -> None:
        for one in self.sessions:
            await one.close()


class Kept:
    """Locks that stay with their program between their uses, since nobody else wants them (`lockd.kept`)."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._open = AsyncExitStack()
        self._locks: dict[int, KeptLock] = {}
        self._space: OpenLockspace

    async def open(self) -> None:
        spaces = [
            await self._open.enter_async_context(connect_lockspace("kept", rundir=rundir))
            for rundir in self._nodes.rundirs
        ]
        self._space = spaces[0]

    async def pair(self, number: int) -> None:
        """Use lock `number`."""
        if number not in self._locks:
            self._locks[number] = self._space.keep(f"lock-{number}")
        async with self._locks[number].use():
            pass

    async def close(self) -> None:
        await self._open.aclose()


class Broadcasts:
    """A md-cluster channel on three nodes, over the sessions of `locks`; the first node sends.

    A member does nothing with a message, so what is measured is token, message and ack, and the answers.
    """

    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self._channels: list[Channel] = []
        self.processed = 0

    async def open(self) -> None:
        for one in self._locks.sessions:
            space = await one.session.join("array", Deaf(), lvb_bytes=LVB_BYTES, max_slots=NODES)
            channel = Channel(space, Trace(), self._process)
            await channel.open(_nothing)
            channel.start(await OwnSlot.claim(space, channel.slot))
            self._channels.append(channel)

    async def pair(self, number: int) -> None:
        """One broadcast."""
        before = self.processed
        channel = self._channels[0]
        await channel.send(Message(MessageType.RESYNCING, channel.slot, 0, 1024))
        if self.processed - before != NODES - 1:
            raise RuntimeError(f"{self.processed - before} nodes have processed a message, not {NODES - 1}")

    async def _process(self, _: Message) -> int:
        self.processed += 1
        return 0

    async def close(self) -> None:
        for channel in self._channels:
            await channel.stop()


async def _nothing() -> None: ...


@contextmanager
def nodes_of(engine: str) -> Iterator[Nodes]:
    """Three nodes: "local", or corosync by its transport."""
    with ExitStack() as stack:
        made = local_nodes() if engine == "local" else corosync_nodes(engine)
        yield stack.enter_context(made)
