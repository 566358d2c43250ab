"""Lock sessions over real replicas in one process: every daemon is a replica, the order is in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from clustermd.dlm.lockspace import Slot
from clustermd.dlm.replica import Replica
from clustermd.dlm.session import Session, SessionLockspace
from clustermd.testing.locks.order import MemoryGroup
from clustermd.trace import Trace

T = TypeVar("T")
SPACE = "0a0b0c0d-0000-1111-2222-333344445555"


class Heard:
    """A lockspace's user: remembers every event in order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def recover_prep(self) -> None:
        self.log.append(("prep",))

    def recover_slot(self, slot: Slot) -> None:
        self.log.append(("slot", slot.slot, slot.name))

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        self.log.append(("done", [slot.slot for slot in slots], our_slot))

    def suspended(self, reason: str) -> None:
        self.log.append(("suspended",))

    def resumed(self) -> None:
        self.log.append(("resumed",))

    def lost(self, reason: str) -> None:
        self.log.append(("lost", reason))


class Daemon:
    """A replica with sessions instead of sockets."""

    def __init__(self, group: MemoryGroup, node: int) -> None:
        port = group.port(node, node)
        self.member = port.me
        self.replica = Replica(self, Trace())
        self.replica.attach(port)
        port.events = self.replica
        self.sessions: dict[int, Session] = {}
        self.frames: list[list[Any]] = []

    def session(self) -> Session:
        number = self.replica.open_session("test", 1)

        def send(frame: list[Any]) -> None:
            self.frames.append(frame)
            self.replica.session_frame(number, frame)

        session = self.sessions[number] = Session(send)
        return session

    def to_session(self, session: int, frame: list[Any]) -> None:
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


class World:
    def __init__(self, size: int = 2) -> None:
        self.group = MemoryGroup()
        self.daemons = [Daemon(self.group, node) for node in range(1, size + 1)]
        self.group.view()
        self.group.settle()

    async def turn(self, times: int = 10) -> None:
        """Let tasks run and the group deliver."""
        for _ in range(times):
            await asyncio.sleep(0)
            self.group.settle()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`, which must come to its end."""
        task = asyncio.ensure_future(work)
        await self.turn()
        assert task.done(), "it waits for something"
        return task.result()

    async def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """`work`, which must be waiting for something."""
        task = asyncio.ensure_future(work)
        await self.turn()
        assert not task.done()
        return task

    async def join(
        self, daemon: int, max_slots: int = 4, *, deadlocks: bool = False
    ) -> tuple[SessionLockspace, Heard]:
        heard = Heard()
        session = self.daemons[daemon].session()
        space = await self.run(session.join(SPACE, heard, max_slots=max_slots, deadlocks=deadlocks))
        return space, heard


class StoppedClock:
    """The loop's time, which passes only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        loop = asyncio.get_running_loop()
        loop.time = lambda: self.now_s  # type: ignore[method-assign]
