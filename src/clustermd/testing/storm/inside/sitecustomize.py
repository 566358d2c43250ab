"""Python started with this directory in PYTHONPATH has daemons that stop at any named point, over slow disks.

A crash at a moment drawn by dice seldom meets the few instants that matter. So the processes of a storm look, at
each point of their trace, for the file `$CLUSTERMD_RUN/stop_at`. When it names this node and this point the process
takes the file away (only one process can) and stops itself there, in the middle of the step, as a SIGSTOP that came
just then would. What becomes of it is up to the storm: it dies there, or goes on after others have died.

With `$CLUSTERMD_STORM_SLOW_MS` and the threads submitter, disks take their time: requests of one batch reach them in
any order, up to so many milliseconds late, and a write of several blocks in two pieces. So a node that dies or
stands still leaves writes on one disk and not on the other, in parts, and bitmaps behind their data's wish.

On SIGUSR2 a process writes what each of its tasks waits for to `$CLUSTERMD_RUN/tasks.<pid>`: for findings.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from types import FrameType
from typing import Any

from clustermd import trace

_ROOT = os.environ.get("CLUSTERMD_RUN", "")
_NODE = os.environ.get("CLUSTERMD_NODE", "")
_STOP_AT = os.path.join(_ROOT, "stop_at")
_SLOW_MS = os.environ.get("CLUSTERMD_STORM_SLOW_MS", "")
_LATE_SHARE = 0.3
_BLOCK_BYTES = 4096
_seen: dict[int, int] = {}


def _look(name: str, _fields: dict[str, Any]) -> None:
    """A trace listener: stop here if that is wanted. Costs one failed open(2) while nothing is."""
    try:
        with open(_STOP_AT, encoding="utf-8") as file:
            wanted = json.load(file)
    except (OSError, ValueError):
        return
    if wanted["point"] != name or wanted["node"] not in ("", _NODE):
        return
    _seen[wanted["number"]] = _seen.get(wanted["number"], 0) + 1
    if _seen[wanted["number"]] <= wanted["skip"]:
        return
    try:
        os.rename(_STOP_AT, f"{_STOP_AT}.{os.getpid()}")
    except FileNotFoundError:
        return  # another process was there first
    os.kill(os.getpid(), signal.SIGSTOP)


def _tell(_number: int, _frame: FrameType | None) -> None:
    with open(os.path.join(_ROOT, f"tasks.{os.getpid()}"), "w", encoding="utf-8") as file:
        file.write(f"{' '.join(sys.orig_argv)} of {_NODE}\n")
        for task in asyncio.all_tasks():
            file.write("\n    ".join([task.get_name(), *_places(task.get_coro())]) + "\n")


def _places(waiting: Any) -> list[str]:
    """Where a coroutine is, and whatever it awaits, outermost first."""
    places: list[str] = []
    while waiting is not None:
        frame = _first(waiting, "cr_frame", "gi_frame", "ag_frame")
        if frame is None:
            return [*places, repr(waiting)]
        places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
        waiting = _first(waiting, "cr_await", "gi_yieldfrom", "ag_await")
    return places


def _first(thing: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(thing, name, None)) is not None), None)


class _Stoppable(trace.Trace):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.listen(_look)


def _slow_disks(most_s: float) -> None:
    from clustermd.device import threads
    from clustermd.device.member_device import Op

    at_once = threads._perform

    def wait() -> None:
        if random.random() < _LATE_SHARE:
            time.sleep(random.uniform(0, most_s))

    def perform(request: threads._Request) -> int:
        device, op, offset, length, buffer, within, target, tag, fua = request
        wait()
        if op is not Op.WRITE or length <= _BLOCK_BYTES:
            return at_once(request)
        first = _BLOCK_BYTES * random.randrange(1, -(-length // _BLOCK_BYTES))
        result = at_once((device, op, offset, first, buffer, within, target, tag, fua))
        if result != first:
            return result
        wait()
        rest = at_once((device, op, offset + first, length - first, buffer, within + first, target, tag, fua))
        return rest if rest < 0 else first + rest

    threads._perform = perform


if any(word in ("clustermd.node", "clustermd.lockd") for word in sys.orig_argv):
    trace.Trace = _Stoppable  # type: ignore[misc]
    signal.signal(signal.SIGUSR2, _tell)
    if _SLOW_MS:
        _slow_disks(float(_SLOW_MS) / 1000)
