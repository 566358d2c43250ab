"""A run that is kept: its plan and its decisions as lists, in a file that people can read, change and replay.

A bare seed means another run as soon as somebody draws one number more. What is kept is what was drawn: the
plan (nodes, operations, faults, with their times) and every decision, stream by stream. It is replayed without the
seed; where a list ends the decision is 0, the dull one (`dice`). So a kept run still tells its story after the code has
changed, and a shrunk one is mostly zeroes.

The file is JSON, one step of the plan a line. A stream of decisions is text, `3 0x17 1`: a three, seventeen
zeroes, a one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from clustermd.errors import BadBytes
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.plan import Plan
from clustermd.testing.simulator.run import Outcome, Run

FORMAT = 1
PLANNING = ("plan", "group", "votes", "work", "atlas")
"""Streams that the plan was drawn from: it stands in the file itself."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A run as lists. `rule` is what it broke when it was kept, `sentence` says what was wrong then."""

    plan: Plan
    decisions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    rule: str = ""
    spec: str = ""
    layer: str = ""
    sentence: str = ""

    @classmethod
    def of(cls, outcome: Outcome, sentence: str = "") -> Kept:
        """What came of a run, to be played again."""
        broken = outcome.violation
        decisions = {name: drawn for name, drawn in outcome.decisions.items() if name not in PLANNING}
        if broken is None:
            return cls(outcome.plan, trimmed(decisions), sentence=sentence)
        return cls(
            outcome.plan,
            trimmed(decisions),
            broken.rule,
            broken.spec,
            broken.layer.value,
            sentence or broken.message,
        )


def replay(kept: Kept, *, keep_events: bool = False) -> Outcome:
    """Play it again."""
    return Run(kept.plan, Dice(kept.plan.seed, kept.decisions), keep_events=keep_events).play()


def trimmed(decisions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The same decisions without the zeroes at the end of each stream, and without empty streams."""
    kept = {}
    for name, drawn in decisions.items():
        end = len(drawn)
        while end and not drawn[end - 1]:
            end -= 1
        if end:
            kept[name] = tuple(drawn[:end])
    return kept


# --- the file ---------------------------------------------------------------------------------------------------


def load(path: Path) -> Kept:
    """Raises OSError, BadBytes ("bad-kept-run")."""
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} is not {FORMAT}")
        return Kept(
            Plan.from_json(values["plan"]),
            {name: from_text(text) for name, text in values["decisions"].items()},
            values["rule"],
            values["spec"],
            values["layer"],
            values["sentence"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadBytes("bad-kept-run", f"{path} is no kept run: {error}", path=str(path)) from error


def save(path: Path, kept: Kept) -> None:
    """Raises OSError."""
    path.write_text(to_text(kept))


def to_text(kept: Kept) -> str:
    """What the file says."""
    plan = kept.plan.to_json()
    steps = {name: plan.pop(name) for name in ("faults", "work")}
    head = {
        "format": FORMAT,
        "rule": kept.rule,
        "spec": kept.spec,
        "layer": kept.layer,
        "sentence": kept.sentence,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    lines += ['"plan": {']
    lines += [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in plan.items()]
    lines += [f" {json.dumps(name)}: {_rows(values)}," for name, values in steps.items()]
    lines[-1] = lines[-1].removesuffix(",")
    lines += ["},", '"decisions": {']
    lines += [
        f" {json.dumps(name)}: {json.dumps(as_text(drawn))},"
        for name, drawn in sorted(trimmed(kept.decisions).items())
    ]
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join(["{", *lines, "}", "}"]) + "\n"


def _rows(values: Iterable[dict[str, Any]]) -> str:
    rows = ",\n".join("  " + json.dumps(value) for value in values)
    return f"[\n{rows}\n ]" if rows else "[]"


def as_text(drawn: Sequence[int]) -> str:
    """Decisions as words: a number, or `number x times`."""
    words = []
    for value, group in groupby(drawn):
        count = len(list(group))
        words += [f"{value}x{count}"] if count > 2 else [str(value)] * count
    return " ".join(words)


def from_text(text: str) -> tuple[int, ...]:
    """The other way. Raises ValueError."""
    drawn: list[int] = []
    for word in text.split():
        value, _, count = word.partition("x")
        drawn += [int(value)] * (int(count) if count else 1)
    return tuple(drawn)
