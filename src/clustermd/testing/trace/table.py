"""Drawing events as a time table: time runs down, one column a node.

          0.000 s  node1                          node2
      41  0.000    sends RESYNCING #7 0-512
      44  0.001                                   receives RESYNCING #7 0-512
    > 52  0.003                                   write.issue 8-16 chunks 0

The number is the event's in the whole trace, `>` marks the events that a violation names. Long texts are broken inside
their column, so a table is never wider than `width`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from clustermd.testing.trace.events import Event, Violation

WIDTH = 118
LAST_OF_EACH = 6
MOST_ROWS = 48
_NARROWEST = 18
_SHOWN_ITEMS = 8
_LONGEST = 72
_QUIET = ("space", "block", "boot", "pages")
"""Fields that say nothing to a reader of a table."""


def words(event: Event) -> str:
    """An event in a few words."""
    fields = dict(event.fields)
    name = event.name
    lo, hi = fields.pop("lo", None), fields.pop("hi", None)
    low, high = fields.pop("low", None), fields.pop("high", None)
    first: list[str] = []
    if name.startswith("lock.") and "resource" in fields:
        first = [str(fields.pop("resource")), _mode(name, fields)]
        fields.pop("lock", None)
        if fields.get("valid") is not False:
            fields.pop("valid", None)
    elif name.startswith(("send.", "recv.")):
        sequence = fields.pop("sequence", None)
        first = [str(fields.pop("type", "")), "" if sequence is None else f"#{sequence}"]
        if high:
            first.append(f"{low}-{high}")
        elif "RESYNCING" in first:
            first.append("finished" if high == 0 else "")
    if lo is not None:
        first.append(f"{lo}-{hi}")
    rest = [
        f"{key.replace('_', ' ')} {_value(value)}"
        for key, value in fields.items()
        if key not in _QUIET and value is not None
    ]
    return " ".join(part for part in (name, *first, *rest) if part)


def _mode(name: str, fields: dict[str, Any]) -> str:
    mode, had = str(fields.pop("mode", "")), fields.pop("had", None)
    if had in (None, "IV", mode):
        return mode
    return f"{had} -> {'freed' if mode == 'IV' else mode}"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        shown = " ".join(str(item) for item in value[:_SHOWN_ITEMS])
        return f"{shown} ... ({len(value)})" if len(value) > _SHOWN_ITEMS else shown or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}:{item}" for key, item in list(value.items())[:_SHOWN_ITEMS])
    return (
        textwrap.shorten(str(value), _LONGEST, placeholder=" ...")
        if isinstance(value, str)
        else str(value)[:_LONGEST]
    )


def table(events: Sequence[Event], marked: Iterable[int] = (), width: int = WIDTH) -> str:
    """The table. `marked` are numbers of events that get a mark; times are relative to the first event."""
    if not events:
        return "(no events)\n"
    nodes = sorted({event.node for event in events})
    begin_s = events[0].time_s
    number_width = len(str(max(event.number for event in events)))
    times = [f"{event.time_s - begin_s:.6f}" for event in events]
    time_width = max(map(len, times))
    left = 2 + number_width + 2 + time_width + 2
    column = max(_NARROWEST, (width - left) // len(nodes) - 2)
    marks = set(marked)
    head = " " * left + "  ".join(node[:column].ljust(column) for node in nodes)
    lines = [head.rstrip(), " " * left + "  ".join("-" * column for _ in nodes)]
    for event, moment in zip(events, times, strict=True):
        place = nodes.index(event.node) * (column + 2)
        mark = ">" if event.number in marks else " "
        start = f"{mark} {event.number:>{number_width}}  {moment:>{time_width}}  "
        for text in textwrap.wrap(words(event), column, subsequent_indent="  ") or [""]:
            lines.append((start + " " * place + text).rstrip())
            start = " " * left
    return "\n".join(lines) + "\n"


def cut(
    events: Sequence[Event], violation: Violation, last: int = LAST_OF_EACH, most: int = MOST_ROWS
) -> list[Event]:
    """The events that matter to `violation`: about the same lock, message, sectors, chunks or slot, and the last few of
    each node before it. `events` are in order, numbered as in the violation; they may begin later than 0."""
    if not events or not violation.events:
        return []
    first_number = events[0].number
    end = min(len(events), violation.events[-1] - first_number + 1)
    named = {number for number in violation.events if first_number <= number < first_number + end}
    about = [_about(events[number - first_number]) for number in sorted(named)]
    chosen: dict[int, Event] = {number: events[number - first_number] for number in named}
    seen: dict[str, int] = {}
    for event in reversed(events[:end]):
        if len(chosen) >= most:
            break
        if event.name.startswith(("dlm.", "group.")):
            continue
        seen[event.node] = seen.get(event.node, 0) + 1
        if seen[event.node] <= last or any(_shares(event, thing) for thing in about):
            chosen[event.number] = event
    return [chosen[number] for number in sorted(chosen)]


def _about(event: Event) -> dict[str, Any]:
    fields = event.fields
    return {
        key: fields[key]
        for key in ("resource", "sequence", "lo", "hi", "chunks", "slot", "events", "number")
        if key in fields
    }


def _shares(event: Event, about: dict[str, Any]) -> bool:
    fields = event.fields
    if "lo" in about and "lo" in fields:
        return bool(fields["lo"] < about["hi"] and fields["hi"] > about["lo"])
    if "lo" in about and fields.get("high"):
        return bool(fields["low"] < about["hi"] and fields["high"] > about["lo"])
    if "chunks" in about and "chunks" in fields:
        return not set(about["chunks"]).isdisjoint(fields["chunks"])
    return any(
        key in about and fields.get(key) == about[key]
        for key in ("resource", "sequence", "slot", "events", "number")
    )


def interesting(events: Iterable[Event]) -> Iterator[Event]:
    """Without the steps of the lock daemons, which every node repeats."""
    return (event for event in events if not event.name.startswith(("dlm.", "group.")))
