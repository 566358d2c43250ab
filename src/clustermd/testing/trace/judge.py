"""The judge: sees a trace event by event and says what is broken, by whom.

    judge = Judge()
    for event in events:
        for violation in judge.see(event):
            print(violation)

Events go to the rules that asked for their name, so an event that no rule wants costs one look in a table. Of the
rules that an event breaks all are told; the layer of the first violation of a run is where to look, as what comes
after may only follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from clustermd.testing.trace import array_rules, cluster_rules, fence_rules, group_rules, window_rules
from clustermd.testing.trace.events import Event, Rule, Violation
from clustermd.testing.trace.lives import Lives
from clustermd.testing.trace.lock_rules import IncompatibleGrant, StaleValueBlock, TakenForDeadEarly

MOST_VIOLATIONS = 1000
"""A trace that breaks more rules than that is not judged on: the first ones say enough."""


def all_rules(lives: Lives) -> list[Rule]:
    """Every rule, over the same lives. `lives` itself is not among them."""
    makers: tuple[Callable[[Lives], Rule], ...] = (
        IncompatibleGrant,
        StaleValueBlock,
        TakenForDeadEarly,
        *group_rules.RULES,
        *fence_rules.RULES,
        *cluster_rules.RULES,
        *window_rules.RULES,
        *array_rules.RULES,
    )
    return [make(lives) for make in makers]


class Judge:
    """Judges one trace. `rules` are over `lives` of their own (default: all rules)."""

    def __init__(self, rules: Sequence[Rule] | None = None, lives: Lives | None = None) -> None:
        self.lives = lives if lives is not None else Lives()
        self.rules: list[Rule] = list(rules) if rules is not None else all_rules(self.lives)
        self.violations: list[Violation] = []
        self._table: dict[str, list[Callable[[Event], Iterable[Violation]]]] = {}
        everyone: list[Rule] = [self.lives, *self.rules]
        for rule in everyone:
            for name in rule.names:
                self._table.setdefault(name, []).append(rule.see)

    def see(self, event: Event) -> list[Violation]:
        """What `event` shows to be broken, usually nothing."""
        found: list[Violation] = []
        lives = self.lives
        if lives.suspects and event.node in lives.suspects:
            found += lives.confirm(event)
        for see in self._table.get(event.name, ()):
            found += see(event)
        if found:
            self.violations += found[: MOST_VIOLATIONS - len(self.violations)]
        return found


def judge_all(events: Iterable[Event]) -> Judge:
    """The judge of a whole trace, which has seen all of it."""
    judge = Judge()
    for event in events:
        judge.see(event)
    return judge
