"""Simulated machines: a lock daemon and an array process each, wired as the real ones are, from production code.

A `Machine` is a node. Its `Lockd` is the shell around a `Replica` (what `lockd/daemon.py` does with sockets); its
`ArrayProcess` puts an `Array` together as `node/run_array.py` does. Each is a process: it can be killed or paused
alone, or with its machine. A session of an array process ends when either end is gone; the lock daemon says that a dead
array process has ended only when its last request has landed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clustermd.array.array import Array
from clustermd.array.assemble import load_members
from clustermd.array.request import Request
from clustermd.cluster.cluster import Cluster
from clustermd.dlm.lockspace import Lockspace, LockspaceEvents
from clustermd.dlm.replica import Replica
from clustermd.dlm.session import Session
from clustermd.errors import ClusterLost, Refused
from clustermd.group.agreed.hello import Key
from clustermd.group.process_group import Member
from clustermd.testing.simulator.agreed import AgreedPort
from clustermd.testing.simulator.boxes import Path
from clustermd.testing.simulator.loop import Process
from clustermd.testing.simulator.order import Port
from clustermd.testing.simulator.pipe import Pipe
from clustermd.testing.simulator.submitter import SimSubmitter
from clustermd.trace import Trace

if TYPE_CHECKING:
    from clustermd.testing.simulator.cluster import SimCluster

LOCKSPACE = "array"
POLL_S = 0.05
GOODBYE = ["goodbye"]


class Attached:
    """A session at its lock daemon: the way back to the array process, and the witness of its I/O."""

    def __init__(self, number: int, array: ArrayProcess, back: Pipe) -> None:
        self.number = number
        self.array = array
        self.back = back
        self.lost = False
        self.ended = False
        self.released = False  # its process had nothing in flight and said so

    def drained(self) -> bool:
        """Whether nothing that its process did in this session can land any more."""
        array = self.array
        return self.released or array.excluded or (not array.process.alive and not array.submitter.in_flight)


class Lockd:
    """One incarnation of a lock daemon. Implements `ReplicaShell`."""

    def __init__(self, machine: Machine, incarnation: int) -> None:
        self.machine = machine
        cluster = self.cluster = machine.cluster
        self.process = Process(f"{machine.name}.lockd")
        self.trace = Trace()
        self.trace.listen(lambda name, fields: cluster.point(machine, self.process, name, fields))
        self.port: Port | AgreedPort
        if cluster.group is not None:
            self.port = cluster.group.port(machine.number, incarnation, self.process)
        else:
            me = Member(machine.number, incarnation, machine.name)
            self.port = AgreedPort(cluster, me, self.process, self.trace, self.must_restart)
        self.boot = machine.boots
        self.replica = Replica(self, self.trace)
        self.replica.attach(self.port)
        self.port.events = self.replica
        self.sessions: dict[int, Attached] = {}
        self.witnesses: list[Attached] = []
        self.suspended_by = ""
        self.proving = False
        self.declared_dead = False
        self.leaving = False
        self.wanted_again = False  # while it was leaving
        self.followed = False  # the next one there knows that its processes' requests have landed
        machine.lockds.append(self)

    # --- ReplicaShell

    def to_session(self, session: int, frame: list[Any]) -> None:
        attached = self.sessions.get(session)
        if attached is not None and not attached.lost:
            attached.back.send(("frame", frame))

    def suspended(self, reason: str) -> None:
        self.suspended_by = reason
        for attached in self.sessions.values():
            attached.back.send(("suspended", reason))

    def resumed(self) -> None:
        self.suspended_by = ""
        for attached in self.sessions.values():
            attached.back.send(("resumed", ""))

    def must_restart(self, reason: str) -> None:
        self.cluster.lockd_over(self, reason)

    # --- sessions

    def attach(self, array: ArrayProcess, back: Pipe) -> Attached:
        number = self.replica.open_session("array md0", array.serial)
        attached = self.sessions[number] = Attached(number, array, back)
        self.witnesses.append(attached)
        return attached

    def frame(self, attached: Attached, frame: list[Any]) -> None:
        if attached.lost or attached.ended:
            return
        if frame == GOODBYE:
            self._end(attached, "it said goodbye", clean=True)
            attached.back.send(("bye", ""))
        else:
            self.replica.session_frame(attached.number, frame)

    def session_lost(self, attached: Attached) -> None:
        """Its socket ended: it keeps its locks until its I/O has drained."""
        if attached.lost or attached.ended:
            return
        attached.lost = True
        self.replica.session_lost(attached.number)
        self._end_when_drained(attached)

    def _end_when_drained(self, attached: Attached) -> None:
        if attached.ended:
            return
        if not attached.drained():
            self.cluster.loop.call_later(
                POLL_S, self._end_when_drained, attached, context=self.process.context.copy()
            )
            return
        self._end(attached, "its last request has landed", clean=False)

    def _end(self, attached: Attached, proof: str, clean: bool) -> None:
        attached.ended = True
        self.sessions.pop(attached.number, None)
        self.replica.session_end(attached.number, proof, clean)
        if not clean or not self.cluster.plan.durable:
            self.cluster.on_ended(attached.array)


class SimLink:
    """A `cluster.Link`: a session of this machine's lock daemon."""

    def __init__(self, array: ArrayProcess, lockd: Lockd) -> None:
        cluster = array.machine.cluster
        self._array = array
        self._lockd = lockd
        self._closing = False
        self._over = asyncio.Event()
        if isinstance(lockd.port, AgreedPort):
            array.submitter.gate.lease = lockd.port.lease
            array.outlawed = False
        self.session = Session(self._send, array.trace)
        self._back = Pipe(cluster.loop, cluster.pipes, array.process, self._receive, self._lost)
        self._attached = lockd.process.context.copy().run(lockd.attach, array, self._back)
        self._there = Pipe(
            cluster.loop,
            cluster.pipes,
            lockd.process,
            lambda frame: lockd.frame(self._attached, frame),
            lambda: lockd.session_lost(self._attached),
        )
        array.links.append(self)
        array.submitter.life_over = False
        if lockd.suspended_by:
            self._back.send(("suspended", lockd.suspended_by))

    def _send(self, frame: list[Any]) -> None:
        if self._array.process.alive and not self._closing:
            self._there.send(frame)

    def _receive(self, item: tuple[str, Any]) -> None:
        word, what = item
        if word == "frame":
            self.session.on_frame(what)
        elif word == "bye":
            self._over.set()
        elif word == "suspended":
            self.session.on_suspended(what)
        else:
            self.session.on_resumed()

    def _lost(self) -> None:
        self._over.set()
        self.session.on_lost("the lock daemon is gone")

    async def join(self, name: str, events: LockspaceEvents, max_slots: int) -> Lockspace:
        return await self.session.join(name, events, max_slots=max_slots)

    async def close(self) -> None:
        await self._array.submitter.drained()
        self._attached.released = True
        if not self._closing:
            self._there.send(GOODBYE)
            self._closing = True
        await self._over.wait()
        self._array.life_ended()
        self.session.on_lost("closed")

    @property
    def over(self) -> bool:
        """Whether its lock daemon knows, or is dead and knew, that nothing of this session can land any more."""
        return self._attached.released or self._attached.ended

    def lockd_died(self) -> None:
        self._back.end()

    def array_died(self) -> None:
        self._there.end()

    def let_go(self) -> None:
        """Nobody answers a dead process: what it waits for comes to nothing."""
        self._over.set()
        self.session.on_lost("this process is dead")


class ArrayProcess:
    """One process that runs the array on one machine."""

    def __init__(self, machine: Machine, serial: int) -> None:
        cluster = machine.cluster
        self.machine = machine
        self.serial = serial
        self.process = Process(f"{machine.name}.array")
        self.submitter = SimSubmitter(cluster.loop, self.process, cluster.dice, cluster.watcher)
        self.submitter.node = machine.name
        self.paths = [Path(box, cluster.plan.discard) for box in cluster.boxes]
        for path in self.paths:
            path.lost_path = path.path in machine.lost_paths
            path.fenced = machine.outlives_its_end
        self.trace = Trace()
        self.trace.listen(lambda name, fields: cluster.point(machine, self.process, name, fields))
        self.links: list[SimLink] = []
        self.array: Array | None = None
        self.serving = False
        self.stopping = False
        self.killed = False
        self.excluded = False  # the boxes refuse whatever it does
        self.outlawed = False  # it lives on after its lease, and others rely on that
        self.lost_links: tuple[SimLink, ...] = ()  # of the last life whose loss is known
        self.last_slot = -1
        self.joined_s = 0.0
        self.broken_s = -1.0  # when its present life ended, however it did; below zero while it lives
        self.ended_s = -1.0  # when that was first proved; below zero before
        self.heard: list[tuple[float, int]] = []  # when it heard of the loss of which slot
        self.why = ""
        cluster.loop.create_task(self._run(), name=f"{machine.name}.start", context=self.process.context)

    async def _connect(self) -> SimLink:
        while True:
            lockd = self.machine.lockd
            if (
                lockd is not None
                and lockd.process.alive
                and not lockd.process.paused
                and lockd.replica.installed
                and not lockd.leaving
            ):
                return SimLink(self, lockd)
            await asyncio.sleep(POLL_S)

    async def _run(self) -> None:
        cluster = self.machine.cluster
        plan = cluster.plan
        by_name = {path.path: path for path in self.paths if path.box.powered and not path.lost_path}
        try:
            assembly = await load_members(list(by_name), by_name.__getitem__, self.submitter)
            coordinator = Cluster(LOCKSPACE, self._connect, self.trace, excludes=not plan.durable)
            array = Array(
                "md0",
                assembly,
                coordinator,
                self.submitter,
                cluster.clock,
                self.trace,
                allow_degraded=True,
                device_timeout_s=plan.device_timeout_s,
                limits=lambda: plan.resync_kib_s,
            )
            self.array = self.submitter.array = array
            await array.start()
        except (Refused, ClusterLost, OSError) as error:
            self.why = str(error)
            if self.array is not None:
                await self.array.stop()
            cluster.array_not_started(self)
            return
        self.serving = True
        cluster.on_started(self)

    def life_ended(self) -> None:
        """Its present life is over, and nothing of it can land any more."""
        if self.broken_s < 0:
            self.broken_s = self.machine.cluster.loop.time()
        if self.ended_s < 0:
            self.ended_s = self.machine.cluster.loop.time()

    def submit(self, requests: list[Request]) -> None:
        """Client requests, as the export would hand them over."""
        assert self.array is not None
        self.process.context.copy().run(self.array.submit, requests)

    def let_go(self) -> None:
        """The process is dead: its tasks unwind, whatever they waited for."""
        for link in self.links:
            link.let_go()
        self.submitter.let_go()

    def cut_off(self) -> None:
        """Storage fencing: the boxes take nothing more of this process, nor what is on its way."""
        self.excluded = True
        for path in self.paths:
            path.fenced = True
        self.submitter.cut_off()

    def stop(self, done: Callable[[], None]) -> None:
        """A clean stop."""
        self.stopping = True
        self.serving = False

        async def stop() -> None:
            if self.array is not None:
                await self.array.stop()
            done()

        self.machine.cluster.loop.create_task(stop(), name="stop", context=self.process.context)


class Machine:
    """A node: its number, and what runs on it now."""

    def __init__(self, cluster: SimCluster, number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.name = f"node{number}"
        self.lockd: Lockd | None = None
        self.lockds: list[Lockd] = []
        self.array: ArrayProcess | None = None
        self.lost_paths: set[str] = set()
        self.paused = False
        self.powered = False
        self.refused = False  # the boxes take nothing from it
        self.fenced_off = False  # and who had them do so has found that nothing of it can land any more
        self.boots = 0
        self.fenced: dict[Key, str] = {}  # the ends that it proved, kept on its own disk

    @property
    def up(self) -> bool:
        return self.lockd is not None and self.lockd.process.alive

    @property
    def outlives_its_end(self) -> bool:
        """Whether the boxes refuse it, and its lock daemon is the one that was, or is about to be, declared dead."""
        return self.refused and (self.fenced_off or (self.lockd is not None and self.lockd.declared_dead))

    @property
    def serving(self) -> bool:
        array = self.array
        return array is not None and array.process.alive and array.serving

    def processes(self) -> list[Process]:
        return [
            owner.process for owner in (self.lockd, self.array) if owner is not None and owner.process.alive
        ]
