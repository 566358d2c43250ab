"""A node ends itself: its array processes die at once, and with `self_fence = "reboot"` the machine too.

SIGKILL also ends a stopped process. What it had given to the kernel still lands; the one who fences waits for that
(D). A reboot goes through sysrq, which asks nothing and syncs nothing (proc(5)), and where that is refused
through the watchdog: once opened and left alone, it resets the machine after its own time (watchdog-api in
the kernel's documentation).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from clustermd.group.process import kill

SYSRQ = Path("/proc/sysrq-trigger")
WATCHDOG = Path("/dev/watchdog")
log = logging.getLogger("clustermd.lockd")


def self_fence(
    processes: Iterable[tuple[int, int]],
    mode: str,
    *,
    sysrq: Path = SYSRQ,
    watchdog: Path = WATCHDOG,
) -> int:
    """Kill `processes` (pid, start time as `group.process.start_time`); `mode` is "kill" or "reboot".

    How many still ran. Never raises: whatever fails is logged, and the rest is done.
    """
    killed = sum(kill(pid, started) for pid, started in processes)
    log.error("%d processes of this node are killed", killed)
    if mode == "reboot":
        _reboot(sysrq, watchdog)
    return killed


def _reboot(sysrq: Path, watchdog: Path) -> None:
    try:
        sysrq.write_text("b")
        return
    except OSError as error:
        log.error("%s does not reboot this machine: %s", sysrq, error.strerror)
    try:
        # never closed: a watchdog that nobody feeds is the point
        os.open(watchdog, os.O_WRONLY)
        log.error("%s is left to reset this machine", watchdog)
    except OSError as error:
        log.error(
            "%s cannot reset this machine: %s; its array processes are killed", watchdog, error.strerror
        )
