"""A process's connection to its node's lockd, which it starts when none runs.

`connect` gives a `LockdConnection` with the lock manager's `session`. At its start, a process that does I/O
opens its disks, takes their witness locks, registers the witness, then writes; at its end it closes the
disks, then this connection. When the lockd dies, or its life is over, the session is lost with all its locks
(`Session.on_lost`): the process must shut its gate, drain and let go of its disks by itself within
`unresponsive_s`, else it is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from clustermd.clock import Clock, SystemClock
from clustermd.dlm.session import Session
from clustermd.errors import ClusterLost, DeviceRefused, Refused
from clustermd.group.frames import Frame, FrameLink, bad_frame, open_link
from clustermd.group.process_group import Witness
from clustermd.group.start import connect_or_start
from clustermd.lockd.protocol import LOCKD_MODULE, PROTOCOL
from clustermd.rundir import RunDir
from clustermd.trace import Trace


class LockdConnection:
    """A welcomed session. Made by `connect`.

    `node` is this node's number, `name` its name, `incarnation` the life of its lockd, `number` this
    session's; `lost` is why it ended, empty while it lives; `suspended` why the cluster stands still, if it does.
    """

    def __init__(
        self, trace: Trace | None = None, on_waiting: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.node = 0
        self.name = ""
        self.incarnation = 0
        self.number = 0
        self.lost = ""
        self.suspended = ""
        self.session = Session(self._send_dlm, trace)
        self._link: FrameLink | None = None
        self._welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting = ""
        self._on_waiting = on_waiting
        self._over = ""
        self._call = asyncio.Lock()
        self._answer: asyncio.Future[None] | None = None
        self._statuses: list[asyncio.Future[dict[str, Any]]] = []
        self._lost_listeners: list[Callable[[str], None]] = []

    async def register(self, witness: Witness) -> None:
        """Make durable what proves the end of this process's I/O; its locks must be held already.

        The same key again replaces what was registered. Raises DeviceRefused ("device-busy",
        "witness-not-held" ...), ClusterLost. Waits while the group is frozen.
        """
        await self._ask("witness", witness.to_wire())

    async def status(self) -> dict[str, Any]:
        """The cluster as this node's lockd knows it (`lockd.daemon.Lockd.status`). Raises ClusterLost."""
        link = self._alive()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._statuses.append(answer)
        link.send("status")
        return await answer

    async def close(self) -> None:
        """End the session cleanly; the locks it has go with it. The disks must be closed.

        Raises Refused ("witness-held") when they are not. Does nothing when the session is lost.
        """
        if self.lost:
            return
        try:
            await self._ask("goodbye")
        except ClusterLost:
            return
        self.lost = "closed"
        if self._link is not None:
            self._link.close()

    def abort(self, reason: str = "dropped") -> None:
        """Drop the connection without goodbye, as a death of this process would."""
        if self._link is not None:
            self._link.fail(reason)

    def on_lost(self, listener: Callable[[str], None]) -> None:
        """Call `listener(reason)` when the session is lost, after `Session.on_lost`."""
        self._lost_listeners.append(listener)

    # --- the link

    async def _open(self, rundir: RunDir, label: str) -> None:
        self._link = await open_link(rundir.lockd_socket, self._frame, self._ended)
        self._link.send("hello", {"version": PROTOCOL, "label": label})
        try:
            await self._welcomed
        except BaseException:
            self._link.close()
            raise

    def _frame(self, link: FrameLink, frame: Frame) -> None:
        match frame:
            case ["dlm", list(inner)]:
                self.session.on_frame(inner)
            case ["ping", int(number)]:
                link.send("pong", number)
            case ["pong", int()]:
                pass
            case ["suspended", str(reason)]:
                self.suspended = reason
                self.session.on_suspended(reason)
            case ["resumed"]:
                self.suspended = ""
                self.session.on_resumed()
            case ["status", dict(state)] if self._statuses:
                answer = self._statuses.pop(0)
                if not answer.done():
                    answer.set_result(state)
            case ["witness-ok"] | ["bye"]:
                self._answered(None)
            case ["refused", str(code), str(message), dict(data)]:
                kind = (
                    Refused if code in ("witness-held", "not-your-witness", "not-a-member") else DeviceRefused
                )
                self._answered(kind(code, message, **data))
            case ["waiting", str(reason)]:
                self._waiting = reason
                self._on_waiting(reason)
            case ["over", str(reason)]:
                self._over = reason
            case [
                "welcome",
                {
                    "node": int(node),
                    "name": str(name),
                    "incarnation": str(incarnation),
                    "session": int(number),
                    "suspended": str(suspended),
                },
            ] if not self._welcomed.done():
                self.node, self.name, self.number = node, name, number
                self.incarnation = int(incarnation, 16)
                self._welcomed.set_result(None)
                self.suspended = suspended
                if suspended:
                    self.session.on_suspended(suspended)
            case _:
                raise bad_frame(f"lockd says {frame[0]!r} in a way this process does not know")

    def _ended(self, link: FrameLink, reason: str) -> None:
        if not self._welcomed.done():
            self._welcomed.set_exception(ConnectionResetError(reason))
            return
        why = f"this node's lockd has ended: {self._over}" if self._over else ""
        self.lost = why or f"the connection to this node's lockd ended: {reason}"
        error = ClusterLost("lockd-lost", self.lost)
        self._answered(error)
        for answer in self._statuses:
            if not answer.done():
                answer.set_exception(error)
        self.session.on_lost(self.lost)
        for listener in self._lost_listeners:
            listener(self.lost)

    def _alive(self) -> FrameLink:
        if self.lost or self._link is None:
            raise ClusterLost("lockd-lost", self.lost or "not connected to this node's lockd")
        return self._link

    def _send_dlm(self, frame: list[Any]) -> None:
        self._alive().send("dlm", frame)

    async def _ask(self, *frame: Any) -> None:
        async with self._call:
            link = self._alive()
            self._answer = asyncio.get_running_loop().create_future()
            link.send(*frame)
            await self._answer

    def _answered(self, error: Refused | None) -> None:
        if self._answer is None or self._answer.done():
            return
        if error is None:
            self._answer.set_result(None)
        else:
            self._answer.set_exception(error)


async def lockd_status(rundir: RunDir, timeout_s: float = 5.0) -> dict[str, Any]:
    """What `LockdConnection.status` gives, without a session: also of a node that waits for its group.

    Starts nothing. Raises Refused ("not-running", "no-answer").
    """
    state: dict[str, Any] = await _ask_once(rundir, ["status"], "status", timeout_s)
    return state


async def vouch(rundir: RunDir, node: str, timeout_s: float = 5.0) -> str:
    """Tell this node's lockd that an operator vouches for the end of the lost `node`. What it answered.

    Starts nothing. Raises Refused as `NodeGroup.vouch` does, and ("not-running", "no-answer").
    """
    words: str = await _ask_once(rundir, ["fence-ack", node], "fence-acked", timeout_s)
    return words


async def _ask_once(rundir: RunDir, question: Frame, answered_by: str, timeout_s: float) -> Any:
    """One question to this node's lockd, without a session. What follows the word `answered_by` in its answer."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    who = f"the lockd of {rundir.node}"

    def heard(_: FrameLink, frame: Frame) -> None:
        if answer.done():
            return
        match frame:
            case [str(word), what] if word == answered_by:
                answer.set_result(what)
            case ["refused", str(code), str(message), dict(data)]:
                answer.set_exception(Refused(code, message, **data))

    def lost(_: FrameLink, reason: str) -> None:
        if not answer.done():
            answer.set_exception(Refused("no-answer", f"{who} did not answer: {reason}"))

    try:
        link = await open_link(rundir.lockd_socket, heard, lost)
    except (FileNotFoundError, ConnectionRefusedError):
        raise Refused("not-running", f"no lockd runs for {rundir.node} in {rundir.root}") from None
    try:
        link.send(*question)
        return await asyncio.wait_for(answer, timeout_s)
    except TimeoutError:
        raise Refused(
            "no-answer", f"{who} (process {link.peer_pid}) did not answer in {timeout_s:g} s"
        ) from None
    finally:
        link.close()


async def connect(
    rundir: RunDir,
    label: str,
    *,
    start: bool = True,
    timeout_s: float | None = None,
    clock: Clock | None = None,
    trace: Trace | None = None,
    on_waiting: Callable[[str], None] = lambda reason: None,
) -> LockdConnection:
    """A session of `rundir.node`'s lockd, shown to people as `label` ("array md0"), with points in `trace`.

    Starts the lockd (and that the sequencer) unless `start` is False. Waits for the node to join the group,
    without bound unless `timeout_s` is given; `on_waiting(reason)` hears at once for what. Raises Refused
    ("not-running", "daemon-failed", "group-not-ready" with what it waits for, "not-in-cluster" with why the cluster
    does not take this node).
    """
    waiting = over = ""

    async def attempt() -> LockdConnection:
        nonlocal waiting, over
        connection = LockdConnection(trace, on_waiting)
        try:
            await connection._open(rundir, label)
        except ConnectionResetError:
            before, over = over, connection._over or over
            if before and connection._over == before:
                # a life that the cluster gave up is followed by a new one; this one was given up for the same
                raise Refused(
                    "not-in-cluster", f"{rundir.node} cannot take part in its cluster: {over}"
                ) from None
            raise
        finally:
            waiting = connection._waiting
        return connection

    log = rundir.node_dir / "lockd.log"
    try:
        async with asyncio.timeout(timeout_s):
            return await connect_or_start(
                attempt, LOCKD_MODULE, rundir, log, clock or SystemClock(), start=start
            )
    except TimeoutError:
        raise Refused(
            "group-not-ready",
            f"{rundir.node} is not in its cluster after {timeout_s:g} s: "
            f"{waiting or 'its lockd does not answer'}",
        ) from None
