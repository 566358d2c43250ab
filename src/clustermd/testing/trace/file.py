"""Traces that real nodes recorded: reading the files, and bringing several into one order.

A file is what `node.recorder` writes: lines of JSON, each array process begun by `trace.begin`. The last line of a
process may be cut short by a kill and is then left out; anything else that is not understood is refused with file and
line, because a judge of half a trace proves nothing. Several files are merged by their time stamps, which are of one
clock as long as the nodes ran on one machine since one boot; a file that spans several boots counts from the last on.

The arrays may go on meanwhile. One file is read before the other, so of what they record after the reading began the
causes may be missing: it is left out.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustermd.errors import BadBytes
from clustermd.node.recorder import BEGIN, now_s, this_boot
from clustermd.testing.trace.events import Event


@dataclass(frozen=True, slots=True)
class Recorded:
    """The events of several nodes in one order, numbered from 0. `cut` are lines that a kill left half written."""

    events: list[Event]
    nodes: tuple[str, ...]
    arrays: tuple[str, ...]
    cut: tuple[str, ...]


@dataclass(slots=True)
class _File:
    path: Path
    events: list[tuple[float, str, str, dict[str, Any]]]
    nodes: list[str]
    arrays: list[str]
    cut: list[str]
    boot: str = ""


def read_traces(paths: Sequence[Path]) -> Recorded:
    """Read and merge. Raises BadBytes ("bad-trace", "traces-differ"), OSError."""
    boot, until_s = this_boot(), now_s()
    files = [_read(path) for path in paths]
    for file in files:
        if file.boot == boot:
            file.events = [event for event in file.events if event[0] <= until_s]
    boots = {file.boot for file in files}
    if len(boots) > 1:
        raise BadBytes(
            "traces-differ",
            f"{' and '.join(str(path) for path in paths)} were recorded on different machines or before and after a "
            "boot, so their times cannot be compared: judge each alone",
        )
    merged = heapq.merge(*(file.events for file in files), key=lambda item: item[0])
    events = [
        Event(number, time_s, node, name, fields)
        for number, (time_s, node, name, fields) in enumerate(merged)
    ]
    nodes = dict.fromkeys(node for file in files for node in file.nodes)
    arrays = dict.fromkeys(array for file in files for array in file.arrays)
    return Recorded(
        events, tuple(sorted(nodes)), tuple(arrays), tuple(line for file in files for line in file.cut)
    )


def _read(path: Path) -> _File:
    file = _File(path, [], [], [], [])
    node = ""
    broken = ""
    last_s = 0.0
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
            time_s, name = float(fields.pop("at_s")), str(fields.pop("point"))
        except (ValueError, AttributeError, KeyError, TypeError):
            if broken:
                raise _bad(broken, "it is no trace point") from None
            broken = where
            continue
        if name == BEGIN:
            if broken:
                file.cut.append(broken)
                broken = ""
            node = str(fields.get("node", ""))
            boot = str(fields.get("boot", ""))
            if boot != file.boot:
                file.events.clear()
                file.boot = boot
            for names, value in ((file.nodes, node), (file.arrays, str(fields.get("array", "")))):
                if value not in names:
                    names.append(value)
        elif broken:
            raise _bad(broken, "it is no trace point")
        elif not node:
            raise _bad(where, f"the trace begins with {name} and not with {BEGIN}: it is of no node")
        if file.events and time_s < last_s:
            raise _bad(where, "its time is before that of the line above")
        last_s = time_s
        file.events.append((time_s, node, name, fields))
    if broken:
        file.cut.append(broken)
    if not file.events:
        raise BadBytes("bad-trace", f"{path} is no trace: it has no points", path=str(path))
    return file


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _bad(where: str, why: str) -> BadBytes:
    return BadBytes("bad-trace", f"{where} cannot be read: {why}")
