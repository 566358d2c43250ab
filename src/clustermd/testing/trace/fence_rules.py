"""Who fences whom: of one view only one node at a time (dlm.md 6.4, 6.9 I29).

Two that switch one machine off at the same time may switch it off again when it has just come back. Nodes of different
views do not know of each other, so nothing is asked of them. That nobody counts as fenced who may still act is a
simulator's to judge, which knows the truth (`fenced-alive`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.lives import Lives, RuleOverLives


class TwoFencers(RuleOverLives):
    """Of the members of one view only one at a time fences a node."""

    rule = "two-fencers"
    spec = "dlm I29"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("group.view", "group.fencing", "group.fencing_over")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._views: dict[str, Any] = {}
        self._at_work: dict[int, dict[str, tuple[int, Any]]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        if event.name == "group.view":
            self._views[event.node] = event.fields["ring"]
            return ()
        victim = event.fields["node"]
        others = self._at_work.setdefault(victim, {})
        if event.name == "group.fencing_over":
            others.pop(event.node, None)
            return ()
        found = []
        view = self._views.get(event.node)
        for other, (number, in_view) in others.items():
            # an attempt ends with its view, also when its maker died with it
            if other != event.node and in_view == view:
                words = f"{event.node} begins to fence node {victim} while {other} of the same view is at it"
                found.append(self.violation(event, words, number))
        others[event.node] = event.number, view
        return found


RULES = (TwoFencers,)
