"""Seeded storms over replicas of the lock manager: thousands a minute, each judged after every step.

A storm is a list of plain *steps* (`steps`): what clients ask, who reads how far, who dies, is cut off, fenced.
`run` draws them from one seed and records them; `replay` takes them from a list, so a kept storm means the same after
the drawing has changed. `shrink` takes steps out while the same rule breaks.

The same seed gives the same trace on every machine: `Outcome.digest` is over every line of it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from clustermd.dlm.modes import SpaceFlag
from clustermd.testing.locks.arena import Storm
from clustermd.testing.locks.rules import RULES, LockRuleBroken
from clustermd.testing.locks.steps import NODES_MAX, Step
from clustermd.testing.trace.events import Layer

STEPS = 120
LINES_KEPT = 40


@dataclass(frozen=True, slots=True)
class Failure:
    """What broke: the rule, where it is written, whose bug it is, at which step, and the last lines of the trace."""

    rule: str
    spec: str
    layer: Layer
    text: str
    step: int
    lines: tuple[str, ...]


@dataclass(slots=True)
class Outcome:
    """One storm: its steps, what happened how often, a digest of every line of its trace, and what broke."""

    seed: int | None
    steps: list[Step]
    seen: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    failure: Failure | None = None

    def report(self) -> str:
        """The failure for people; an empty string if there is none."""
        if self.failure is None:
            return ""
        failure = self.failure
        head = f"seed {self.seed}, step {failure.step} of {len(self.steps)}: {failure.rule} ({failure.spec})"
        last = [f"  {step}" for step in self.steps[max(0, failure.step - 9) : failure.step + 1]]
        return "\n".join(
            [
                head,
                f"layer: {failure.layer.value}",
                failure.text,
                "trace:",
                *(f"  {line}" for line in failure.lines),
                "last steps:",
                *last,
            ]
        )


def run(seed: int, steps: int = STEPS) -> Outcome:
    """Draw a storm of so many steps from `seed`, and let it pass."""
    draw = random.Random(seed)
    begin: Step = ["begin", draw.randint(2, NODES_MAX), draw.choice((1024, 1 << 16)), draw.random() < 0.5]
    begin.append(draw.choice((0, int(SpaceFlag.DEADLOCKS))))
    outcome = Outcome(seed, [begin])
    _pass(outcome, lambda storm: storm.draw(draw) if len(outcome.steps) <= steps else None)
    return outcome


def replay(steps: Sequence[Step]) -> Outcome:
    """Let recorded steps happen again."""
    left = deque(steps)
    outcome = Outcome(None, [left.popleft()])
    _pass(outcome, lambda _: left.popleft() if left else None)
    return outcome


def shrink(steps: Sequence[Step], rule: str, *, replays: int = 3000) -> list[Step]:
    """Fewer steps with which the same rule breaks: ever smaller pieces are taken out while it does."""
    best = list(steps)
    failure = replay(best).failure
    if failure is not None:
        best = best[: failure.step + 1]
    piece = max(1, len(best) // 2)
    while replays > 0:
        removed = False
        place = len(best) - piece
        while place > 0 and replays > 0:
            candidate = best[:place] + best[place + piece :]
            replays -= 1
            failure = replay(candidate).failure
            if failure is not None and failure.rule == rule:
                best, removed = candidate, True
            place -= piece
        if piece == 1 and not removed:
            break
        piece = max(1, piece // 2)
    return best


def _pass(outcome: Outcome, next_step: Callable[[Storm], Step | None]) -> None:
    """Steps from `next_step` until it has none, then the end of the storm."""
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    digest = blake2b(digest_size=16)

    def listen(line: str) -> None:
        lines.append(line)
        digest.update(line.encode())
        digest.update(b"\n")

    number = 0
    try:
        storm = Storm(outcome.steps[0], listen)
        while (step := next_step(storm)) is not None:
            number = len(outcome.steps)
            outcome.steps.append(step)
            listen(f"-- {step!r}")
            if storm.do(step):
                outcome.seen[step[0] if step[0] != "send" else step[3]] += 1
        number = len(outcome.steps)
        storm.end()
    except LockRuleBroken as broken:
        outcome.failure = Failure(
            broken.rule, broken.spec, Layer.LOCK_MANAGER, broken.text, number, tuple(lines)
        )
    except Exception as error:  # whatever the lock manager raises is a finding, and the storm must be told
        text = f"{type(error).__name__}: {error}"
        outcome.failure = Failure(
            "exception", RULES["exception"], Layer.LOCK_MANAGER, text, number, tuple(lines)
        )
    outcome.digest = digest.hexdigest()
