"""The process between `clustermd lock` and its command: nothing of the command outlives the lock.

A lock must not be free while what it guards goes on. `clustermd lock` may be killed at any moment, by a person or by
this node's lockd when it stands still. So the command is not its child but that of a *guard*, a copy forked before
anything was opened but the witness file (`lockd.witness_file`), which both have open. The guard outlives `clustermd
lock` until the command and all that descends from it has been killed and is gone; only then the file is closed, which
is what lets the lock go on to others. Nor does the command outlive the guard: the kernel kills it then
(PR_SET_PDEATHSIG, prctl(2)), and `clustermd lock`, to which the orphans come (PR_SET_CHILD_SUBREAPER), kills the rest.

The command has neither the lock's connection nor the witness file: they are closed by its execve(2), so what it leaves
running in the background when it ends in peace does not keep the lock.

They talk over a socket pair, a word a message. To the guard: "run", "signal N", "end" (kill everything). From it:
"status N" (the command's wait status), "gone" (everything is).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clustermd.cli.output import PROGRAM

CANNOT_RUN = 126
NOT_FOUND = 127
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_WORD_BYTES = 64
_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
"""A terminal sends these to the command as well; who holds the lock waits for what the command makes of them."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Guard:
    """The guard as `clustermd lock` sees it. `link` has the words; its end means that the guard is gone."""

    pid: int
    link: socket.socket

    def say(self, *words: object) -> None:
        """Nothing happens when it is gone."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.link.send(" ".join(map(str, words)).encode())


def start_guard(command: Sequence[str], bury: Callable[[], None]) -> Guard:
    """Fork the guard of `command`, which it runs when told. To be called before any thread or event loop exists.

    The guard calls `bury()` when it has outlived this process, and everything is gone.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = {number: signal.getsignal(number) for number in (*_TERMINAL, signal.SIGTERM, signal.SIGHUP)}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            ours.close()
            status = _guard(theirs, command, before, bury)
        except BaseException as error:
            print(f"{PROGRAM}: the guard of the command failed: {error!r}", file=sys.stderr, flush=True)
            end_descendants()
        finally:
            os._exit(status)
    theirs.close()
    ours.setblocking(False)
    return Guard(pid, ours)


def end_descendants(spare: frozenset[int] = frozenset()) -> None:
    """SIGKILL to every process that descends from this one, but those in `spare`; returns when all are gone.

    Orphans come to this process, so killing its children until it has none reaches all. One that may not be
    killed (it has become another user) is waited for.
    """
    while pids := children() - spare:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def descendants() -> frozenset[int]:
    """All processes that descend from this one now."""
    found = new = children()
    while new:
        new = frozenset(child for pid in new for child in children(pid)) - found
        found |= new
    return found


def children(parent: int | None = None) -> frozenset[int]:
    """The children of a process (default: this one), those that came to it included: proc(5), stat, field 4."""
    wanted = parent or os.getpid()
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    stat = file.read()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat[stat.rindex(b")") + 2 :].split()[1]) == wanted:
                found.add(int(name))
    return frozenset(found)


def _guard(
    link: socket.socket,
    command: Sequence[str],
    before: Mapping[signal.Signals, object],
    bury: Callable[[], None],
) -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    if link.recv(_WORD_BYTES) != b"run":
        return 0
    pid = _start(command, before)
    pidfd = os.pidfd_open(pid)
    while True:
        readable, _, _ = select.select([link.fileno(), pidfd], [], [])
        if pidfd in readable:
            _, status = os.waitpid(pid, 0)
            return _told(link, status)
        match _word(link).split():
            case [b"signal", text]:
                # the child is not awaited yet, so the number is still its own
                os.kill(pid, int(text))
            case [b"end"]:
                end_descendants()
                with contextlib.suppress(OSError):
                    link.send(b"gone")
                return 0
            case _:
                end_descendants()
                bury()
                return 0


def _told(link: socket.socket, status: int) -> int:
    """The command has ended in peace, and what it left in the background may go on, unless the lock was lost."""
    with contextlib.suppress(OSError):
        link.send(b"status %d" % status)
    if _word(link) == b"end":
        end_descendants()
        with contextlib.suppress(OSError):
            link.send(b"gone")
    return 0


def _word(link: socket.socket) -> bytes:
    """The next word; empty when `clustermd lock` is gone."""
    try:
        return link.recv(_WORD_BYTES)
    except ConnectionResetError:
        return b""


def _start(command: Sequence[str], before: Mapping[signal.Signals, object]) -> int:
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = CANNOT_RUN
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(128 + signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
        if before[signal.SIGTSTP] is not signal.SIG_IGN:
            # a shell could not bring it back: the process that it knows does not stop
            signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them
        os.execvp(command[0], list(command))
    except OSError as error:
        if error.errno == errno.ENOENT:
            status = NOT_FOUND
        print(f"{PROGRAM}: cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
