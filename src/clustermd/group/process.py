"""Processes by identity: a pid alone may name another process by now, pid and start time do not.

A process is (pid, clock ticks after boot at which it started: /proc/PID/stat field 22, proc(5)). It is
signalled and awaited through a pidfd (pidfd_open(2)) that was opened first and compared afterwards, so
a reused pid is never hit. A pidfd is readable when the last thread has ended; a zombie counts as ended.
SIGKILL through a pidfd also ends a stopped process.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal


def start_time(pid: int) -> int | None:
    """When `pid` started, in clock ticks after boot; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name in parentheses may hold anything, also ')': fields count from the last one
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def alive(pid: int, started: int) -> bool:
    """Whether that very process still runs (also: is stopped)."""
    pidfd = _open(pid, started)
    if pidfd is None:
        return False
    os.close(pidfd)
    return True


def kill(pid: int, started: int) -> bool:
    """SIGKILL to that very process; False when it has ended already."""
    pidfd = _open(pid, started)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


async def ended(pid: int, started: int) -> None:
    """Wait for the end of that very process."""
    pidfd = _open(pid, started)
    if pidfd is None:
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(pidfd, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def boot_id() -> str:
    """What this start of the machine is called (random(4)); processes do not outlive it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _open(pid: int, started: int) -> int | None:
    if pid <= 0:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        # EINVAL: a thread's id that took over the number; not our process either
        return None
    if start_time(pid) != started or select.select([pidfd], [], [], 0)[0]:
        os.close(pidfd)
        return None
    return pidfd
