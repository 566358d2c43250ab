"""What the systematic mode came to: how often somebody died at each step of appendix D, and what broke.

A mode that goes through all places must show that it came to them: a step at which nobody died, and a death that did
not come about, make a report as bad as a broken rule does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from clustermd.testing.simulator.crash_stories import MORE_STEPS, Story, Told
from clustermd.testing.trace.events import Violation
from clustermd.testing.trace.points import STEPS
from clustermd.testing.trace.verdict import to_wire

PENDING = {
    "6a": "add disk: after NEWDISK was acknowledged by some",
    "6b": "add disk: after no-new-dev EX",
    "6c": "add disk: before the superblock is written",
    "6d": "add disk: after the superblock is written",
    "8": "grow: between local resize, METADATA_UPDATED, size check, CHANGE_CAPACITY",
}
"""Steps of operations that do not exist yet, and those operations."""

NOT_ALONE = frozenset(("3f", "4b", "4c", "4d", "4e", "4g", "7a", "7b", "J6"))
"""A sole node has nobody to tell, and comes back to its own slot."""

RECOVERY = tuple(step.id for step in (*STEPS, *MORE_STEPS) if step.id[0] in "345J")
"""Where a second machine dies."""


@dataclass(slots=True)
class Report:
    """How often somebody died at each step, with how many nodes, and what broke."""

    nodes: tuple[int, ...]
    runs: int = 0
    virtual_s: float = 0.0
    firsts: Counter[tuple[int, str]] = field(default_factory=Counter)  # (nodes, step)
    pairs: Counter[tuple[int, str, str]] = field(default_factory=Counter)  # (nodes, first step, second step)
    seconds: Counter[tuple[int, str]] = field(default_factory=Counter)
    all_died: int = 0
    not_fired: list[Story] = field(default_factory=list)
    violations: list[tuple[Story, Violation]] = field(default_factory=list)

    def missing(self) -> list[str]:
        """Steps of appendix D at which nobody died, with the number of nodes."""
        found = []
        for nodes in self.nodes:
            for step in (*STEPS, *MORE_STEPS):
                if nodes == 1 and step.id in NOT_ALONE:
                    continue
                if not self.firsts[nodes, step.id]:
                    found.append(f"{step.id} with {nodes} nodes")
                if nodes > 1 and step.id in RECOVERY and not self.seconds[nodes, step.id]:
                    found.append(f"{step.id} with {nodes} nodes, as the second death")
        return found

    @property
    def good(self) -> bool:
        return not self.violations and not self.not_fired and not self.missing()

    def add(self, told: Told) -> None:
        self.runs += 1
        outcome, story = told.outcome, told.story
        self.virtual_s += outcome.virtual_s
        if outcome.violation is not None:
            self.violations.append((story, outcome.violation))
        if len(told.fired) < len(story.kills):
            self.not_fired.append(story)
        fired = [kill.step for kill in told.fired]
        if len(fired) == 1:
            self.firsts[story.nodes, fired[0]] += 1
        elif len(fired) > 1:
            self.seconds[story.nodes, fired[1]] += 1
            self.pairs[story.nodes, fired[0], fired[1]] += 1
        self.all_died += sum(len(kill.victims) == story.nodes > 1 for kill in told.fired)

    def text(self) -> str:
        """The table for people."""
        counted = ", ".join(map(str, self.nodes))
        head = f"deaths there with {counted} node{'s' if self.nodes != (1,) else ''}"
        width = max(len(head), 5 * len(self.nodes))
        lines = [f"{'step':5} {head:>{width}} {'second deaths':>14}  what the step is"]
        for step in (*STEPS, *MORE_STEPS):
            counts = [
                "-" if nodes == 1 and step.id in NOT_ALONE else str(self.firsts[nodes, step.id])
                for nodes in self.nodes
            ]
            second = sum(self.seconds[nodes, step.id] for nodes in self.nodes) or ""
            lines.append(f"{step.id:5} {'  '.join(counts):>{width}} {second:>14}  {step.sentence}")
        lines += [f"{name:5} {'no such operation':>{width}} {'':>14}  {why}" for name, why in PENDING.items()]
        lines += [
            f"{self.runs} runs, {self.virtual_s / 3600:.1f} virtual hours, {len(self.pairs)} kinds of pairs of deaths,"
            f" {self.all_died} times all nodes died"
        ]
        lines += [f"nobody died at {what}" for what in self.missing()]
        lines += [f"a death did not come about: {story}" for story in self.not_fired]
        lines += [f"BROKEN {violation}\n    in: {story}" for story, violation in self.violations]
        if not self.violations:
            lines.append("violations: none")
        return "\n".join(lines) + "\n"

    def to_wire(self) -> dict[str, Any]:
        """For programs. A story is what `Story.from_json` takes."""
        steps = {
            step.id: {
                "first": {str(nodes): self.firsts[nodes, step.id] for nodes in self.nodes},
                "second": {str(nodes): self.seconds[nodes, step.id] for nodes in self.nodes},
            }
            for step in (*STEPS, *MORE_STEPS)
        }
        return {
            "runs": self.runs,
            "virtual_s": round(self.virtual_s, 3),
            "steps": steps,
            "kinds_of_pairs": len(self.pairs),
            "times_all_died": self.all_died,
            "missing": self.missing(),
            "not_fired": [story.to_json() for story in self.not_fired],
            "violations": [
                {**to_wire(violation), "story": story.to_json(), "words": str(story)}
                for story, violation in self.violations
            ],
        }
