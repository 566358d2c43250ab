"""Making a failing run small: fewer nodes, faults, operations and decisions, while the same rule still breaks.

Each trial is a whole run of a smaller plan, or of the same plan with duller decisions. What a trial drew, up to where
it broke, is where the next one begins; so what comes after the violation goes away by itself. The order:

    faults      subsets of the faults (ddmin: halves, quarters ... single ones)
    work        subsets of the operations
    cluster     fewer nodes and members, no discards, no storage fence
    streams     a whole stream of decisions becomes dull: loop, latency, order, pipes, fate ...
    pieces      then halves, quarters ... of what is left of each
    once more   faults and work, now that there is less

A smaller plan draws its decisions in another order, so a fault or node that is not needed may look needed. Where it
matters a trial that does not break the rule is made again with some fresh decisions.

A smaller plan must be survivable (`atlas`), else the rule breaks for a reason that is not ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from clustermd.testing.simulator import atlas
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.kept import Kept, trimmed
from clustermd.testing.simulator.plan import Plan, Step
from clustermd.testing.simulator.run import Outcome, Run
from clustermd.testing.trace.events import Violation

T = TypeVar("T")

STREAMS = ("loop", "latency", "pipes", "order", "fate", "cluster", "stop")
FRESH = 2
"""How often a trial with fewer faults or nodes is made again with fresh decisions."""
SMALLEST_PIECE = 16
"""Decisions: pieces of a stream that are smaller are left as they are."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest run found, what comes of it, and how many runs it took."""

    kept: Kept
    outcome: Outcome
    runs: int


class NotBroken(Exception):
    """The run to be shrunk breaks nothing."""


def same_rule(first: Violation) -> Callable[[Violation], bool]:
    """Whether another violation is of the same rule; of an unexpected error also the same kind."""
    if first.rule != "unexpected-error":
        return lambda other: other.rule == first.rule
    kind = _error_kind(first.message)
    return lambda other: other.rule == first.rule and _error_kind(other.message) == kind


def _error_kind(message: str) -> str:
    last = message.strip().splitlines()[-1]
    return last.partition(":")[0].partition("(")[0]


def shrink(
    kept: Kept,
    *,
    most_runs: int = 400,
    most_s: float = 300.0,
    told: Callable[[str], None] = lambda line: None,
    alike: Callable[[Violation], bool] | None = None,
) -> Shrunk:
    """The smallest run that breaks the same rule, within `most_runs` runs and `most_s` seconds.

    `told` hears of progress. Raises NotBroken.
    """
    search = _Search(most_runs, most_s, told)
    first = search.play(kept.plan, Dice(kept.plan.seed, kept.decisions))
    if first is None or first.violation is None:
        raise NotBroken("the run to be shrunk breaks nothing")
    search.begin(first, alike or same_rule(first.violation))
    search.faults()
    search.work()
    search.cluster()
    search.streams()
    search.pieces()
    search.faults()
    search.work()
    assert search.best is not None
    return Shrunk(Kept.of(search.best, kept.sentence), search.best, search.runs)


class _Search:
    def __init__(self, most_runs: int, most_s: float, told: Callable[[str], None]) -> None:
        self.runs = 0
        self.best: Outcome | None = None
        self._most_runs = most_runs
        self._end_s = time.monotonic() + most_s
        self._told = told
        self._alike: Callable[[Violation], bool] = lambda violation: False
        self._plan = Plan()
        self._decisions: dict[str, tuple[int, ...]] = {}

    def begin(self, outcome: Outcome, alike: Callable[[Violation], bool]) -> None:
        self._alike = alike
        self._take(outcome)

    @property
    def over(self) -> bool:
        return self.runs >= self._most_runs or time.monotonic() >= self._end_s

    def play(self, plan: Plan, dice: Dice) -> Outcome | None:
        """None if the simulator itself fails on it."""
        self.runs += 1
        try:
            return Run(plan, dice).play()
        except Exception:
            return None

    def _take(self, outcome: Outcome) -> None:
        self.best = outcome
        self._plan = outcome.plan
        self._decisions = {name: tuple(drawn) for name, drawn in Kept.of(outcome).decisions.items()}

    def _works(self, plan: Plan, decisions: dict[str, tuple[int, ...]], fresh: int = 0) -> bool:
        """Whether this breaks the rule too; if so it is the best one from now on."""
        if not _survivable(plan):
            return False
        for attempt in range(1 + fresh):
            if self.over:
                return False
            dice = Dice(plan.seed, decisions) if not attempt else Dice(self.runs)
            outcome = self.play(plan, dice)
            if outcome is not None and outcome.violation is not None and self._alike(outcome.violation):
                self._take(outcome)
                self._tell()
                return True
        return False

    def _tell(self) -> None:
        plan = self._plan
        left = sum(sum(1 for value in drawn if value) for drawn in self._decisions.values())
        self._told(
            f"{self.runs} runs: {plan.nodes} nodes, {plan.members} members, {len(plan.faults)} faults, "
            f"{len(plan.work)} operations, {left} decisions"
        )

    # --- the plan ---------------------------------------------------------------------------------------

    def faults(self) -> None:
        ddmin(
            self._plan.faults,
            lambda faults: self._works(
                replace(self._plan, faults=tuple(faults)), self._decisions, fresh=FRESH
            ),
        )

    def work(self) -> None:
        ddmin(
            self._plan.work,
            lambda work: self._works(replace(self._plan, work=tuple(work)), self._decisions),
        )

    def cluster(self) -> None:
        while self._plan.nodes > 2 and self._works(
            _with_nodes(self._plan, self._plan.nodes - 1), self._decisions, FRESH
        ):
            pass
        if self._plan.members > 2:
            self._works(_with_members(self._plan, 2), self._decisions, FRESH)
        if self._plan.slots > self._plan.nodes:
            self._works(replace(self._plan, slots=self._plan.nodes), self._decisions)
        if self._plan.discard:
            self._works(replace(self._plan, discard=False), self._decisions)

    # --- the decisions ------------------------------------------------------------------------------------

    def streams(self) -> None:
        """A whole stream becomes dull."""
        names = [*STREAMS, *sorted(set(self._decisions) - set(STREAMS))]
        for name in names:
            if name in self._decisions:
                self._works(self._plan, {**self._decisions, name: ()})

    def pieces(self) -> None:
        """Pieces of streams become dull: halves first, then halves of those, each as long as something is in it."""
        size = max((len(drawn) for drawn in self._decisions.values()), default=0)
        while size > SMALLEST_PIECE and not self.over:
            size = -(-size // 2)
            for name in list(self._decisions):
                at = 0
                while at < len(drawn := self._decisions.get(name, ())) and not self.over:
                    if any(drawn[at : at + size]):
                        dull = (*drawn[:at], *([0] * size), *drawn[at + size :])
                        self._works(self._plan, trimmed({**self._decisions, name: dull}))
                    at += size


def ddmin(items: Sequence[T], works: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """The items without any piece that `works` can do without. `works` is not asked about all of them."""
    kept = list(items)
    if kept and works([]):
        return []
    size = len(kept)
    while size > 1:
        size = -(-size // 2)
        at = 0
        while at < len(kept):
            without = kept[:at] + kept[at + size :]
            if without and works(without):
                kept = without
            else:
                at += size
    return kept


# --- smaller clusters ---------------------------------------------------------------------------------------------


def _with_nodes(plan: Plan, nodes: int) -> Plan:
    """The same with fewer machines: what happens to the others does not happen."""
    faults = []
    for step in plan.faults:
        if step.args.get("node", 1) > nodes:
            continue
        cut_off = step.args.get("cut_off")
        if cut_off is not None:
            left = [number for number in cut_off if number <= nodes]
            if not left:
                continue
            step = Step(step.at_s, step.what, {**step.args, "cut_off": left})
        faults.append(step)
    return replace(plan, nodes=nodes, faults=tuple(faults))


def _with_members(plan: Plan, members: int) -> Plan:
    faults = tuple(step for step in plan.faults if step.args.get("box", 0) < members)
    return replace(plan, members=members, raid_disks=members, faults=faults)


def _survivable(plan: Plan) -> bool:
    """Whether some member is never a victim, as the atlas has it."""
    victims = {
        step.args["box"]
        for step in plan.faults
        if "box" in step.args and step.what in atlas.KINDS and atlas.KINDS[step.what].fails_member
    }
    return len(victims) < plan.members
