"""Runs as text: the story of a plan for people, and the whole trace of a run, line by line.

The trace is also what says that two runs are the same: it holds every event with its time and its fields, what came of
the run, and a digest of every stream of decisions. Nothing in it depends on where an object lies in memory or in which
order a set is walked.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clustermd.testing.simulator import atlas
from clustermd.testing.simulator.kept import Kept
from clustermd.testing.simulator.plan import Step
from clustermd.testing.simulator.run import Outcome
from clustermd.testing.trace.events import Event

LIMIT = "Limit:"


def story(kept: Kept) -> str:
    """What happens in a run: its cluster, its faults and operations in the order of their times, its decisions."""
    plan = kept.plan
    lines = [
        f"{plan.nodes} nodes, {plan.members} members, {plan.slots} slots, "
        f"{'an order that survives its sequencer' if plan.durable else 'an agreed order, as of corosync'}"
        + (f", storage fencing after {plan.fence_after_s:g} s" if plan.storage_fence else "")
    ]
    faults = {id(step) for step in plan.faults}
    for step in sorted((*plan.faults, *plan.work), key=lambda step: step.at_s):
        lines.append(f"{'!' if id(step) in faults else ' '} at {step.at_s:9.4f} s  {step_text(step)}")
    used = list(dict.fromkeys(step.what for step in plan.faults if step.what in atlas.KINDS))
    lines += [f"  {kind}: {meaning_and_limit(atlas.KINDS[kind].do)[0]}" for kind in used]
    drawn = [f"{name} {len(values)}" for name, values in sorted(kept.decisions.items()) if values]
    lines.append(f"decisions that are not the dull ones: {', '.join(drawn) or 'none'}")
    return "\n".join(lines) + "\n"


def step_text(step: Step) -> str:
    """`kill node 2, down 3 s, detect 0.05 s`."""
    return f"{step.what} " + ", ".join(_argument(name, value) for name, value in step.args.items())


def _argument(name: str, value: Any) -> str:
    label = name.removesuffix("_s").replace("_", " ")
    if name.endswith("_s"):
        return f"{label} {value:g} s"
    return f"{label} {value_text(value)}"


def meaning_and_limit(do: Callable[..., Any]) -> tuple[str, str]:
    """What a fault of the atlas is, and what keeps a run with it survivable; from its docstring."""
    meaning, _, limit = " ".join((inspect.getdoc(do) or "").split()).partition(LIMIT)
    return meaning.strip(), limit.strip()


def atlas_rows() -> list[str]:
    """The atlas as rows of a Markdown table."""
    rows = ["| fault | what happens | what keeps the run survivable |", "|---|---|---|"]
    for name, kind in atlas.KINDS.items():
        meaning, limit = meaning_and_limit(kind.do)
        rows.append(f"| `{name}` | {meaning} | {limit or 'no limit of its own'} |")
    return rows


# --- traces -----------------------------------------------------------------------------------------------------


def trace_lines(outcome: Outcome) -> Iterator[str]:
    """Every event of a run that kept them, and what came of it."""
    for event in outcome.events:
        yield event_line(event)
    yield f"end at {outcome.virtual_s:.6f} s, {outcome.callbacks} callbacks, {outcome.acknowledged} writes acknowledged"
    for name, drawn in sorted(outcome.decisions.items()):
        digest = hashlib.sha256(repr(drawn).encode()).hexdigest()[:16]
        yield f"decisions {name}: {len(drawn)}, {digest}"
    yield f"verdict: {outcome.violation if outcome.violation is not None else 'nothing is broken'}"


def event_line(event: Event) -> str:
    """`17 0.003200 node1 write.issue lo=8 hi=16`."""
    fields = "".join(f" {name}={value_text(value)}" for name, value in event.fields.items())
    return f"{event.number} {event.time_s:.6f} {event.node} {event.name}{fields}"


def value_text(value: Any) -> str:
    """A value of a trace point as words that are the same in every process."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex() or "-"
    if isinstance(value, (set, frozenset)):
        return "{" + " ".join(sorted(value_text(item) for item in value)) + "}"
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{value_text(key)}:{value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(value_text(item) for item in value) + "]"
    return str(value)
