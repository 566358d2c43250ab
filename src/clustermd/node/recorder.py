"""The `trace` of an array: every point it passes, one JSON object a line, for `clustermd trace`.

It is switched on per array, from its start on, so that it is complete: `CLUSTERMD_TRACE=md0,md1` in the environment of
the command that starts the arrays, or `CLUSTERMD_TRACE=1` for all. A line has `at_s` (the boot-time clock, which all
processes of a machine share), `point`, and the point's fields. Each process begins with a line `trace.begin` that names
node, array, process and boot. Lines are added at the end, so the trace of a killed process stays; a kill loses nothing,
but may leave the last line half written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clustermd.trace import Trace

VARIABLE = "CLUSTERMD_TRACE"
BEGIN = "trace.begin"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def wanted(environment: Mapping[str, str], array: str) -> bool:
    """Whether the trace of `array` is switched on: by 1, all, or its name in a list with commas."""
    names = environment.get(VARIABLE, "").replace(",", " ").split()
    return "1" in names or "all" in names or array in names


def record(trace: Trace, path: Path, node: str, array: str) -> None:
    """Add all points from now on to the file at `path`, which is made private to the user. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        os.write(fd, b"\n")  # a killed process left half a line

    def point(name: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"at_s": now_s(), "point": name, **fields}, default=str, separators=(",", ":"))
        os.write(fd, line.encode() + b"\n")  # before anything that comes of it

    point(BEGIN, {"node": node, "array": array, "pid": os.getpid(), "boot": this_boot()})
    trace.listen(point)


def now_s() -> float:
    """The time of the points recorded now."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def this_boot() -> str:
    """The boot of this machine, as the points recorded now name it. Raises OSError."""
    return _BOOT_ID.read_text(encoding="ascii").strip()
