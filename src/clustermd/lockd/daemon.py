"""lockd: this node's member of the group, its replica of the lock manager, and its witness.

One process per node and run directory, alone by a file lock. It joins the group, feeds the order to the
replica, and serves sessions on a unix socket: array processes, `clustermd lock`, tools. It welcomes them
after its replica's first install (dlm.md 6.6), tells them when the group is frozen or back, and proves the
end of those that die (`lockd.sessions`). A session that answers no ping for `unresponsive_s` is killed and
then proved dead the same way; from one second on it is shown in the status.

It ends when it had no session for `linger_s`, on SIGTERM (its sessions are lost then, and proved), and at
once when its replica or the group says that this life is over: the sessions see their sockets end, and the
next one who needs a lockd starts a new life. On corosync a node is needed by the others: if it was a member, its new
life begins by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from typing import Any

from clustermd.clock import Clock, SystemClock, SystemRandom
from clustermd.conf import Conf
from clustermd.device.lease import LeaseFile
from clustermd.dlm.replica import Replica
from clustermd.errors import Refused
from clustermd.group.daemon import run_daemon
from clustermd.group.frames import Frame, FrameLink, bad_frame, encode, serve_links, stop_serving
from clustermd.group.liveness import Bounds, PeerWatch
from clustermd.group.local import LocalGroup
from clustermd.group.node_group import NodeGroup
from clustermd.group.process import kill, start_time
from clustermd.group.process_group import Member, View, Witness
from clustermd.group.start import begin_successor
from clustermd.group.tasks import Tasks
from clustermd.lockd.fence_actor import FenceActor
from clustermd.lockd.node_lease import NodeLease
from clustermd.lockd.protocol import LOCKD_MODULE, PROTOCOL
from clustermd.lockd.realtime import ask_for_realtime
from clustermd.lockd.sessions import SessionState
from clustermd.lockd.waits import Waits
from clustermd.rundir import RunDir
from clustermd.trace import Trace

OVER = 71  # this life ended by the group's word
log = logging.getLogger("clustermd.lockd")


class Lockd:
    """The process's state: hears the group, is the shell of the replica, serves sessions."""

    def __init__(self, rundir: RunDir, conf: Conf, bounds: Bounds, clock: Clock, trace: Trace) -> None:
        self._rundir = rundir
        self._bounds = bounds
        self._clock = clock
        self._conf = conf
        self._fence_actor: FenceActor | None = None
        self._lease: NodeLease | None = None
        self._group = self._make_group(conf, trace)
        # on corosync the others wait for this node at every start, and nothing starts it by itself for them
        self._linger_s = math.inf if conf.clustered else bounds.linger_s
        self._replica = Replica(self, trace, lambda call: asyncio.get_running_loop().call_soon(call))
        self._links: dict[FrameLink, SessionState | None] = {}
        self._sessions: dict[int, SessionState] = {}
        self._arriving: dict[FrameLink, str] = {}
        self._suspended = "this node has not joined the group yet"
        self._was_member = False
        self._tasks = Tasks()
        self._waits = Waits()
        self._idle_s = 0.0

    def _make_group(self, conf: Conf, trace: Trace) -> NodeGroup:
        if not conf.clustered:
            return LocalGroup(
                self._rundir, self._bounds, self._clock, SystemRandom(), trace, self.must_restart
            )
        # on one machine none of this is wanted
        from clustermd.group.corosync.group import CorosyncGroup

        clock = self._clock
        lease = self._lease = NodeLease(
            LeaseFile.make(self._rundir.make() / "lease", lambda: int(clock.boottime_s() * 1e9)),
            by_device=conf.fence == "device",
        )
        actor = self._fence_actor = FenceActor(self._clock, lambda: group)
        group = CorosyncGroup(
            self._rundir,
            conf,
            self._bounds,
            self._clock,
            SystemRandom(),
            trace,
            actor,
            lease.by_group,
            self.must_restart,
        )
        return group

    async def run(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Serve until nobody needs this node, or `stop` is set."""
        await self._group.connect()
        if self._fence_actor is not None:
            await self._prepare_fencing(self._fence_actor)
        self._replica.attach(self._group)
        server = await serve_links(self._rundir.lockd_socket, self._made, self._frame, self._lost)
        self._group.join(self)
        log.info("node %d, incarnation %016x", self._group.me.node, self._group.me.incarnation)
        ready()
        await self._tick_until(lambda: stop.is_set() or self._idle_s >= self._linger_s, stop)
        stop_serving(server, self._rundir.lockd_socket)
        for link in list(self._links):
            link.fail("this node's lockd was told to end")
        await self._tick_until(lambda: not self._sessions, None)
        await self._group.leave()

    async def _prepare_fencing(self, actor: FenceActor) -> None:
        """Make the policy of the configuration, and begin this node's own part of it."""
        from clustermd.lockd.fencing.device import DeviceFencer
        from clustermd.lockd.fencing.make import make_fencer

        fencer = actor.fencer = await make_fencer(self._conf, self._group.me, self._clock)
        lease = self._lease
        if isinstance(fencer, DeviceFencer) and lease is not None:
            watch = fencer.watch(self._end_node, lease.by_watch)
            await watch.claim()
            self._tasks.spawn(watch.run())

    def _end_node(self, reason: str) -> None:
        """The fence device says so: whatever writes here ends now, and so does this life."""
        from clustermd.lockd.fencing.self_fence import self_fence

        self_fence(
            ((state.pid, state.pid_started) for state in self._sessions.values()), self._conf.self_fence
        )
        self.must_restart(reason)

    # --- StatefulEvents

    @property
    def has_state(self) -> bool:
        """As `StatefulEvents.has_state`."""
        return self._replica.has_state

    @property
    def installed(self) -> bool:
        """As `StatefulEvents.installed`."""
        return self._replica.installed

    @property
    def awaited(self) -> int:
        """As `StatefulEvents.awaited`."""
        return self._replica.awaited

    def on_view(self, view: View) -> None:
        log.info(
            "view %s: %s%s",
            view.ring,
            [member.name for member in view.members],
            "" if view.quorate else ", frozen",
        )
        self._was_member |= view.quorate
        self._replica.on_view(view)
        self._welcome()

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        self._replica.on_message(index, sender, payload)
        if self._arriving:
            self._welcome()

    def on_stable(self, index: int) -> None:
        self._replica.on_stable(index)

    def on_fenced(self, member: Member, proof: str, index: int = 0) -> None:
        log.info("fenced %s (%016x): %s", member.name, member.incarnation, proof)
        self._replica.on_fenced(member, proof, index)
        self._welcome()

    # --- ReplicaShell

    def to_session(self, session: int, frame: list[Any]) -> None:
        state = self._sessions.get(session)
        if state is not None and state.lost_s is None:
            state.link.send("dlm", frame)

    def suspended(self, reason: str) -> None:
        self._suspended = reason
        for state in self._sessions.values():
            state.link.send("suspended", reason)

    def resumed(self) -> None:
        self._suspended = ""
        for state in self._sessions.values():
            state.link.send("resumed")
        self._welcome()

    def must_restart(self, reason: str) -> None:
        log.error("this life ends, with all its sessions: %s", reason)
        # nothing leaves any more at the end of this turn; who comes learns so whether a new life helps
        for link in self._links:
            link.send_bytes(encode(["over", reason]))
        if self._conf.clustered and self._was_member:
            begin_successor(LOCKD_MODULE)
        logging.shutdown()
        os._exit(OVER)

    # --- links

    def _made(self, link: FrameLink) -> None:
        self._links[link] = None
        self._idle_s = 0.0

    def _frame(self, link: FrameLink, frame: Frame) -> None:
        state = self._links[link]
        if state is None:
            self._stranger(link, frame)
            return
        state.watch.heard()
        match frame:
            case ["dlm", list(inner)]:
                self._replica.session_frame(state.number, inner)
            case ["pong", int()]:
                pass
            case ["ping", int(number)]:
                link.send("pong", number)
            case ["witness", list(wire)]:
                self._tasks.spawn(self._register(state, wire))
            case ["goodbye"]:
                self._tasks.spawn(self._goodbye(state))
            case ["status"]:
                self._tasks.spawn(self._tell_status(link))
            case _:
                raise bad_frame(f"a session says {frame[0]!r} in a way its lockd does not know")

    def _stranger(self, link: FrameLink, frame: Frame) -> None:
        match frame:
            case ["hello", {"version": version, "label": str(label)}] if link not in self._arriving:
                if version != PROTOCOL:
                    raise bad_frame(f"a session speaks version {version!r}, its lockd {PROTOCOL}")
                self._arriving[link] = label
                if not self._replica.installed:
                    link.send("waiting", self._waits_for())
                self._welcome()
            case ["status"]:
                self._tasks.spawn(self._tell_status(link))
            case ["fence-ack", str(name)]:
                self._vouch(link, name)
            case ["ping", int(number)]:
                link.send("pong", number)
            case _:
                raise bad_frame(f"a session says {frame[0]!r} before its welcome")

    def _waits_for(self) -> str:
        return (
            self._group.frozen
            or self._group.unproved
            or "the lock manager's state is on its way to this node"
        )

    def _vouch(self, link: FrameLink, name: str) -> None:
        words = f"an operator on {self._group.me.name} vouches that it is off"
        try:
            self._group.vouch(name, words)
        except Refused as error:
            link.send("refused", error.code, error.message, error.data)
        else:
            log.warning("%s: %s", name, words)
            link.send("fence-acked", f"{name}: {words}")

    def _welcome(self) -> None:
        if not self._replica.installed:
            return
        arriving, self._arriving = self._arriving, {}
        for link, label in arriving.items():
            started = start_time(link.peer_pid) or 0
            watch = PeerWatch(self._bounds)
            state = SessionState(link, link.peer_pid, started, label, watch, self._clock.monotonic_s())
            state.number = self._replica.open_session(label, link.peer_pid)
            self._links[link] = self._sessions[state.number] = state
            me = self._group.me
            link.send(
                "welcome",
                {
                    "node": me.node,
                    "name": me.name,
                    "incarnation": f"{me.incarnation:016x}",
                    "session": state.number,
                    "suspended": self._suspended,
                },
            )

    def _lost(self, link: FrameLink, reason: str) -> None:
        state = self._links.pop(link)
        self._arriving.pop(link, None)
        if state is None or state.ended:
            return
        log.info("lost session %d (%s, process %d): %s", state.number, state.label, state.pid, reason)
        state.lost_s = self._clock.monotonic_s()
        self._replica.session_lost(state.number)
        self._tasks.spawn(self._end(state))

    # --- a session's witnesses and end

    async def _register(self, state: SessionState, wire: list[Any]) -> None:
        async with state.settling:
            if state.lost_s is not None or state.ended:
                return
            try:
                witness = self._own_witness(state, wire)
                before = state.witnesses.get(witness.key)
                state.witnesses[witness.key] = witness
                try:
                    await self._group.register_witness(witness)
                except Refused:
                    if before is None:
                        del state.witnesses[witness.key]
                    else:
                        state.witnesses[witness.key] = before
                    raise
            except Refused as error:
                state.link.send("refused", error.code, error.message, error.data)
            else:
                state.link.send("witness-ok")

    def _own_witness(self, state: SessionState, wire: list[Any]) -> Witness:
        try:
            said = Witness.from_wire(wire)
        except (ValueError, TypeError) as error:
            raise bad_frame(f"a witness cannot be read ({error})") from None
        if (said.pid, said.pid_started) != (state.pid, state.pid_started):
            raise Refused(
                "not-your-witness",
                f"a witness of process {said.pid} cannot be registered by process {state.pid}: "
                "each does it for itself",
            )
        return Witness(state.key(said.key), said.pid, said.pid_started, said.offset, said.paths)

    async def _goodbye(self, state: SessionState) -> None:
        async with state.settling:
            held = await state.let_go(self._clock)
            if state.lost_s is not None or state.ended:
                return
            if held:
                state.link.send(
                    "refused",
                    "witness-held",
                    f"a session says goodbye with disks in its hands ({'; '.join(held)}): close them first",
                    {},
                )
                return
            state.ended = True
            self._replica.session_end(state.number, "it said goodbye", clean=True)
            await self._forget(state)
            state.link.send("bye")
            state.link.close()
            self._links.pop(state.link, None)

    async def _end(self, state: SessionState) -> None:
        async with state.settling:
            proof = await state.proved(self._clock, self._bounds)
            log.info("proved the end of session %d: %s", state.number, proof)
            state.ended = True
            self._replica.session_end(state.number, proof, clean=False)
            await self._forget(state)

    async def _forget(self, state: SessionState) -> None:
        for key in list(state.witnesses):
            await self._group.withdraw_witness(key)
        del self._sessions[state.number]

    # --- time and people

    async def _tick_until(self, over: Callable[[], bool], stop: asyncio.Event | None) -> None:
        last_s = self._clock.monotonic_s()
        self._idle_s = 0.0
        number = 0
        while not over():
            try:
                await asyncio.wait_for((stop or asyncio.Event()).wait(), self._bounds.tick_s)
            except TimeoutError:
                pass
            now_s = self._clock.monotonic_s()
            elapsed_s, last_s = now_s - last_s, now_s
            number += 1
            if self._replica.installed:
                self._waits.look(self._replica.applied, self._replica.modes, now_s)
            for state in list(self._sessions.values()):
                if state.lost_s is not None or state.ended:
                    continue
                if state.watch.tick(elapsed_s):
                    log.error(
                        "session %d (%s) has not answered: process %d is killed",
                        state.number,
                        state.label,
                        state.pid,
                    )
                    kill(state.pid, state.pid_started)
                    state.link.fail(f"no answer for {state.watch.silent_s:.1f} s")
                else:
                    state.link.send("ping", number)
            self._idle_s = 0.0 if self._links or self._sessions else self._idle_s + elapsed_s

    async def _tell_status(self, link: FrameLink) -> None:
        link.send("status", await self.status())

    async def status(self) -> dict[str, Any]:
        """What `clustermd locks` shows: the whole cluster, as this node's replica knows it."""
        now_s = self._clock.monotonic_s()
        me = self._group.me
        replica = self._replica.status()
        self._waits.add_to(replica, now_s)
        return {
            "node": me.node,
            "name": me.name,
            "incarnation": f"{me.incarnation:016x}",
            "pid": os.getpid(),
            "installed": self._replica.installed,
            "suspended": self._suspended,
            "group": await self._group.status() | self._fencing(),
            "replica": replica,
            "sessions": [
                {
                    "session": state.number,
                    "label": state.label,
                    "pid": state.pid,
                    "age_s": round(now_s - state.begun_s, 1),
                    "silent_s": round(state.watch.silent_s, 1) if state.watch.shown else 0.0,
                    "lost_for_s": None if state.lost_s is None else round(now_s - state.lost_s, 1),
                    "waiting": list(state.waiting.values()),
                }
                for state in self._sessions.values()
            ],
        }

    def _fencing(self) -> dict[str, Any]:
        actor = self._fence_actor
        if actor is None:
            return {}
        return {"fencing_here": actor.status(), "unsafe": actor.fencer.unsafe}


async def _serve(stop: asyncio.Event, ready: Callable[[], None]) -> None:
    """One life, begun under the file lock: nothing of this node is touched while another lockd has it."""
    conf = Conf.load()
    bounds = Bounds.from_environment(conf)
    if conf.clustered:
        ask_for_realtime()
    await Lockd(RunDir.from_environment(), conf, bounds, SystemClock(), Trace()).run(stop, ready)


def main() -> None:
    """Entry point of the process."""
    run_daemon(RunDir.from_environment().make() / "lockd.lock", _serve)
