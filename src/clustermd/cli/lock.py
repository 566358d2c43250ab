"""`clustermd lock NAME -- COMMAND`: a command that runs while this node has a lock of the cluster.

Three processes: this one has the session with this node's lockd and waits for the lock; the guard (`cli.lock_guard`) is
the command's parent and outlives this one until the command is gone; the command. The lock lives in a lockspace that is
there as long as anybody uses it, and goes on to the next only when the witness file, which this process and
the guard have open, is unlocked or closed by both: at the command's end, or when all of it is dead.

A lost session (lockd died, the node was cut off) leaves `unresponsive_s` to stop the command; whoever has not by then
is killed by whoever proves the end of this node's processes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

from clustermd.cli.lock_guard import Guard, descendants, end_descendants, start_guard
from clustermd.cli.lock_words import CLUSTER_S, GRACE_S, HELP, LOST, NOT_GRANTED, Options, parse
from clustermd.cli.output import show
from clustermd.conf import Conf
from clustermd.errors import LockRefused, Refused
from clustermd.group.liveness import Bounds
from clustermd.lockd.api import HeldLock, OpenLockspace, connect_lockspace
from clustermd.lockd.lease_watch import grace_s
from clustermd.lockd.who import Wait, holder, waits
from clustermd.lockd.witness_file import WitnessFile
from clustermd.rundir import RunDir

_SAY_S = 1.0
_STATUS_S = 5.0
_PASSED_ON = frozenset((signal.SIGTERM, signal.SIGHUP))
_TO_ALL = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
_WORD_BYTES = 64


def run(words: Sequence[str]) -> int:
    """The verb. The exit status."""
    if words[:1] in (["-h"], ["--help"]):
        show(HELP)
        return 0
    options = parse(words)
    try:
        rundir = RunDir.from_environment()
        conf = Conf.load()
        bounds = Bounds.from_environment(conf)
        grace = grace_s(conf, min(GRACE_S, bounds.unresponsive_s / 2))
        proof = WitnessFile(rundir)
    except Refused as refusal:
        return _refused(options, refusal)
    try:
        guard = start_guard(options.command, proof.bury)
        try:
            return asyncio.run(_Holder(options, rundir, proof, guard, grace).live())
        finally:
            guard.link.close()
    finally:
        proof.close()


def _refused(options: Options, refusal: Refused) -> int:
    error = {"code": refusal.code, "message": refusal.message, "data": refusal.data}
    options.tell("refused", refusal.message, error=error)
    return NOT_GRANTED


class _Holder:
    """The process that has the session: it waits, says for whom, lets the command run, and sees to its end."""

    def __init__(
        self, options: Options, rundir: RunDir, proof: WitnessFile, guard: Guard, grace_s: float
    ) -> None:
        self._options = options
        self._rundir = rundir
        self._proof = proof
        self._guard = guard
        self._grace_s = grace_s
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._told: object = None
        # what is ignored from the start stays so: nohup(1), and a shell's background without job control
        signals = (*_PASSED_ON, signal.SIGINT)
        self._heeded = {number for number in signals if signal.getsignal(number) is not signal.SIG_IGN}

    async def live(self) -> int:
        loop = asyncio.get_running_loop()
        for number in _TO_ALL:
            signal.signal(number, signal.SIG_IGN)
        task = loop.create_task(self._hold())
        ended_by: list[int] = []

        def stop(number: int) -> None:
            ended_by.append(number)
            task.cancel()

        for number in self._heeded:
            loop.add_signal_handler(number, stop, number)
        loop.add_reader(self._guard.link, self._heard)
        try:
            return await task
        except asyncio.CancelledError:
            if not ended_by:
                raise
            return 128 + ended_by[0]
        except Refused as refusal:
            return _refused(self._options, refusal)
        finally:
            loop.remove_reader(self._guard.link)

    async def _hold(self) -> int:
        options = self._options
        loop = asyncio.get_running_loop()
        until_s = None if options.timeout_s is None else loop.time() + options.timeout_s
        async with connect_lockspace(
            options.lockspace,
            label=options.label,
            rundir=self._rundir,
            timeout_s=CLUSTER_S if options.nonblock else options.timeout_s,
            witness=self._proof,
            on_lost=lambda reason: self._events.put_nowait(("lost", reason)),
            on_waiting=lambda reason: self._say(reason, reason),
        ) as space:
            lock = await self._granted(space, until_s)
            status = await self._command(space)
            if not space.lost:
                self._proof.release()
                await lock.unlock()
            return status

    # --- waiting for the lock

    async def _granted(self, space: OpenLockspace, until_s: float | None) -> HeldLock:
        loop = asyncio.get_running_loop()
        options = self._options
        left_s = None if until_s is None else max(0.0, until_s - loop.time())
        task = loop.create_task(
            space.lock(options.name, options.mode, noqueue=options.nonblock, timeout_s=left_s)
        )
        try:
            while not (await asyncio.wait((task,), timeout=_SAY_S))[0]:
                await self._say_for_whom(space)
        except asyncio.CancelledError:
            # the request goes with the session; nobody has to wait until the cluster has heard of that
            task.cancel()
            raise
        try:
            return task.result()
        except LockRefused as refusal:
            if refusal.code not in ("would-block", "timed-out"):
                raise
            raise LockRefused(refusal.code, self._not_granted(refusal), **refusal.data) from None

    def _not_granted(self, refusal: LockRefused) -> str:
        options = self._options
        within = f" within {options.timeout_s:g} s" if options.timeout_s is not None else ""
        holding = ", ".join(holder(lock) for lock in refusal.data.get("holders", ()))
        why = f"it is held by {holding}" if holding else "others wanted it before, and nobody has it just now"
        return f"{options.name} was not granted in {options.mode.name}{within}: {why}"

    async def _say_for_whom(self, space: OpenLockspace) -> None:
        options = self._options
        waiting = f"waiting for {options.name} in {options.mode.name}"
        if space.stands_still:
            self._say(space.stands_still, f"{waiting}: the cluster stands still: {space.stands_still}")
            return
        connection = space.connection
        try:
            async with asyncio.timeout(_STATUS_S):
                state = await connection.status()
        except (TimeoutError, Refused):
            self._say("silence", f"{waiting}: this node's lockd does not answer")
            return
        me = (connection.node, connection.incarnation, connection.number)
        for wait in waits(state["replica"]):
            lock = wait.lock
            if (lock["node"], lock["incarnation"], lock["session"]) == me:
                self._say(_whom(wait), f"{waiting}: {wait.for_whom()}", waits_for=list(wait.blockers))

    def _say(self, what: object, message: str, **data: Any) -> None:
        """Once, and when it changes."""
        if what != self._told:
            self._told = what
            self._options.tell("waiting", message, **data)

    # --- the command

    async def _command(self, space: OpenLockspace) -> int:
        """Run it, and wait for its end. The exit status."""
        options, guard, loop = self._options, self._guard, asyncio.get_running_loop()
        if space.lost:
            options.tell("lost", f"{options.name} was lost before the command began: {space.lost}")
            return LOST
        ours = descendants() - {guard.pid}
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in self._heeded & _PASSED_ON:
            loop.add_signal_handler(number, guard.say, "signal", int(number))
        guard.say("run")
        lost = False
        while True:
            match await self._events.get():
                case ("lost", reason):
                    lost = True
                    message = f"{options.name} is lost: {reason}. The command is told to end (SIGTERM)"
                    options.tell("lost", f"{message}, and killed in {self._grace_s:g} s", reason=reason)
                    guard.say("signal", int(signal.SIGTERM))
                    loop.call_later(self._grace_s, guard.say, "end")
                case ("status", int(status)) if lost:
                    guard.say("end")  # what it started may still be at work
                case ("status", int(status)):
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
                case ("gone", _):
                    return LOST
                case ("guard-gone", _):
                    await asyncio.to_thread(end_descendants, ours)
                    if lost:
                        return LOST
                    options.tell("killed", "the command's guard was killed, and so was the command")
                    return 128 + signal.SIGKILL

    def _heard(self) -> None:
        try:
            word = self._guard.link.recv(_WORD_BYTES).split()
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:
            word = []
        match word:
            case [b"status", number]:
                self._events.put_nowait(("status", int(number)))
            case [b"gone"]:
                self._events.put_nowait(("gone", None))
            case _:
                asyncio.get_running_loop().remove_reader(self._guard.link)
                self._events.put_nowait(("guard-gone", None))


def _whom(wait: Wait) -> object:
    """What must change for a wait to be said again."""
    return wait.ahead, tuple((lock["id"], lock["mode"]) for lock in wait.blockers)
