"""Daemons that start by themselves: whoever needs one connects, and starts it when nobody answers.

A daemon runs in a session of its own (a terminal's signals do not reach it), with its output in a log in
the run directory. It takes its file lock first; a second one sees the lock held and ends with `HELD`.
It tells its starter that it listens through a pipe, so nobody polls; an end before that closes the
pipe. Several starters at once, or one that meets a daemon just ending, simply try again: the lock
decides (design section 5).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import select
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from clustermd.clock import Clock
from clustermd.errors import Refused
from clustermd.rundir import RunDir

HELD = 75  # EX_TEMPFAIL: another daemon has the file lock
START_DEADLINE_S = 30.0
_READY_FD = 3
_READY_VARIABLE = "CLUSTERMD_READY_FD"
_AFTER_VARIABLE = "CLUSTERMD_AFTER_PID"
_LOG_TAIL_BYTES = 2000
_REASON = re.compile(r"\] ended: (.+)\Z")

T = TypeVar("T")


async def connect_or_start(
    attempt: Callable[[], Awaitable[T]],
    module: str,
    rundir: RunDir,
    log: Path,
    clock: Clock,
    *,
    start: bool = True,
    deadline_s: float = START_DEADLINE_S,
) -> T:
    """What `attempt` returns, after starting `module` as often as it takes.

    `attempt` raises FileNotFoundError, ConnectionRefusedError or ConnectionResetError when no daemon
    answers. Raises Refused ("not-running") when it may not be started, ("daemon-failed") with the end of
    its log when it ends by itself, or does not listen within `deadline_s`. One that was killed is started again.
    """
    end_s = clock.monotonic_s() + deadline_s
    while True:
        try:
            return await attempt()
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            if not start:
                raise Refused(
                    "not-running", f"no {module} answers in {rundir.root}, and none was to be started"
                ) from None
        left_s = end_s - clock.monotonic_s()
        said = log.stat().st_size if log.exists() else 0
        outcome = await start_daemon(module, rundir, log, left_s) if left_s > 0 else None
        if outcome is None:
            raise Refused(
                "daemon-failed",
                f"{module} did not listen within {deadline_s:g} s. The end of {log}:\n{log_tail(log)}",
            )
        if outcome == HELD:
            # a file lock gives no event: its holder listens soon, or is just ending
            await asyncio.sleep(0.02)
        elif outcome > 0:
            raise Refused("daemon-failed", f"{module} ended {_why(outcome, log, said)}")


async def start_daemon(module: str, rundir: RunDir, log: Path, deadline_s: float) -> int | None:
    """Start `python -m module` for `rundir`. 0: it listens; else its exit status; None: too late."""
    rundir.make(log.parent)
    environment = dict(os.environ)
    environment["CLUSTERMD_RUN"] = os.fspath(rundir.root)
    environment["CLUSTERMD_NODE"] = rundir.node
    environment[_READY_VARIABLE] = str(_READY_FD)
    reader, writer = os.pipe()
    try:
        pid = os.posix_spawn(  # noqa: ASYNC221 - returns as soon as the child has its memory
            sys.executable,
            [sys.executable, "-P", "-m", module],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, writer, _READY_FD),
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.fspath(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    exited = _reap(pid)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    os.set_blocking(reader, False)
    loop.add_reader(reader, told.set)
    try:
        await asyncio.wait_for(told.wait(), deadline_s)
        if os.read(reader, 1):
            return 0
        return await exited or 70
    except TimeoutError:
        return None
    finally:
        loop.remove_reader(reader)
        os.close(reader)


def begin_successor(module: str) -> None:
    """Start `python -m module` to come after this daemon, with its environment and log; then this one has to end."""
    environment = {**os.environ, _AFTER_VARIABLE: str(os.getpid())}
    os.posix_spawn(sys.executable, [sys.executable, "-P", "-m", module], environment, setsid=True)


def await_predecessor() -> None:
    """In a successor: wait for the end of the daemon before, which has the file lock until then."""
    pid = int(os.environ.pop(_AFTER_VARIABLE, "0"))
    try:
        descriptor = os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        return
    if descriptor >= 0:
        select.select([descriptor], [], [], START_DEADLINE_S)
        os.close(descriptor)


def _reap(pid: int) -> asyncio.Future[int]:
    """The exit status of a child, collected when it ends: a daemon may outlive us or we it."""
    loop = asyncio.get_running_loop()
    status: asyncio.Future[int] = loop.create_future()
    pidfd = os.pidfd_open(pid)

    def collect() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        _, raw = os.waitpid(pid, 0)
        if not status.done():
            status.set_result(os.waitstatus_to_exitcode(raw))

    loop.add_reader(pidfd, collect)
    return status


def _why(status: int, log: Path, said: int) -> str:
    """Why a daemon ended: the reason alone, if it gave one (`group.daemon`), else what it wrote after `said` bytes."""
    words = log_tail(log, said)
    reason = _REASON.search(words)
    return f"by itself: {reason[1]}" if reason else f"with status {status}. The end of {log}:\n{words}"


def log_tail(log: Path, start: int = 0) -> str:
    """The last lines of a log from byte `start` on, for an error a person reads."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "(empty)"
    except OSError as error:
        return f"(cannot be read: {error})"


def take_lock(path: Path) -> int | None:
    """The exclusive lock of a daemon, as a descriptor kept for life; None when another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def say_ready() -> None:
    """Tell whoever started this daemon that it listens."""
    text = os.environ.pop(_READY_VARIABLE, "")
    if text:
        descriptor = int(text)
        os.set_inheritable(descriptor, False)
        try:
            os.write(descriptor, b"r")
        except BrokenPipeError:
            pass  # the starter did not wait
        os.close(descriptor)
