"""Rules of the group and of the replicated lock state, judged from what lock daemons did (dlm.md 6.9).

Entries of the lock history are named by their number and by the hash of everything up to them, so two nodes that name
the same have applied the same. What a replica takes for *stable* it shows to its clients; from then on it may never be
lost. These rules watch the lock daemons' points (`dlm.`, `group.`), which only a simulator records for a whole cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

from clustermd.dlm.wire import unpack
from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.lives import Lives, RuleOverLives

Place = tuple[int, bytes]
"""An entry of a history: its number, and the hash of all up to it."""


class ShownBeforeMajority(RuleOverLives):
    """What is shown is had by a majority of votes; where the view has none, by all of the view.

    Whoever asked for something has that too, though it has not been told of it yet, if it has what came before.
    """

    rule = "shown-before-majority"
    spec = "dlm I5"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("group.view", "dlm.apply", "dlm.loaded", "dlm.stable")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._applied: dict[Place, set[str]] = {}
        self._asked: dict[Place, tuple[str | None, Place | None]] = {}
        self._last: dict[str, Place] = {}
        self._views: dict[str, tuple[int, int]] = {}
        self._votes: dict[str, int] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        fields = event.fields
        if event.name == "group.view":
            if fields["quorate"]:
                self._views[event.node] = len(fields["members"]), fields["majority"]
                self._votes[event.node] = fields["votes"]
            return ()
        place = fields["applied"], fields["chain"]
        if event.name in ("dlm.apply", "dlm.loaded"):
            self._applied.setdefault(place, set()).add(event.node)
            before = self._last.get(event.node)
            self._last[event.node] = place
            if event.name == "dlm.apply" and before is not None and before[0] == place[0] - 1:
                self._asked[place] = _asker(fields["entry"]), before
            return ()
        if event.node not in self._views:
            return ()  # an order that is durable by itself
        members, majority = self._views[event.node]
        have = self._applied.get(place, set()) | self._on_the_way(place)
        most = max(self._votes.values())  # of somebody who is not known
        if len(have) >= members or sum(self._votes.get(node, most) for node in have) >= majority:
            return ()
        words = f"{event.node} shows entry {place[0]}, and of {members} members only {sorted(have)} have it"
        return (self.violation(event, words),)

    def _on_the_way(self, place: Place) -> set[str]:
        """Who sent the entry, and all before it that it has not been told of."""
        asker, at = self._asked.get(place, ("", None))
        while at is not None:
            if asker is None or asker in self._applied.get(at, ()):
                return {asker or "whoever said so"}
            before, at = self._asked.get(at, ("", None))
            if before not in (asker, None):
                break
        return set()


def _asker(entry: bytes) -> str | None:
    """Whose operations these are; None for what any member may have said."""
    fields = unpack(entry)
    return f"node{fields[1]}" if fields[0] == "ops" else None


class ShownHistoryForks(RuleOverLives):
    """All that was ever shown belongs to one history: whoever goes on knows it (I3, I6).

    A new history begins when nobody has a state any more. Who was proved dead before that belongs to the one before:
    fenced at the storage, its lock daemon may run on, and wake to the rest of what it had been sent. That has to be a
    part of its own history, of what was there when the new one began: it must not go on by itself.
    """

    rule = "shown-history-forks"
    spec = "dlm I6"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("dlm.apply", "dlm.loaded", "dlm.stable", "dlm.install", "group.fenced")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._before: dict[Place, Place] = {}
        self._made: dict[Place, int] = {}  # which history was the newest when anybody first applied it
        self._last: dict[str, Place] = {}
        self._shown: dict[int, tuple[Place, int, str]] = {}  # by history
        self._newest = 0
        self._began: tuple[tuple[int, int], ...] = ()
        self._member: dict[int, tuple[int, int]] = {}  # by node, its life in the last view that it installed
        self._proved: set[tuple[int, int]] = set()
        self._former: dict[str, int] = {}  # who belongs to a history that is not the newest

    def _installed(self, event: Event) -> None:
        members = tuple((node, incarnation) for node, incarnation in event.fields["members"])
        if event.fields["authority"] is None and members != self._began:
            self._began = members
            for node, life in self._member.items():
                if life in self._proved:
                    self._former.setdefault(f"node{node}", self._newest)
            self._newest += 1
        for life in members:
            if event.node == f"node{life[0]}":
                self._member[life[0]] = life
                self._former.pop(event.node, None)

    def _fenced(self, node: int, incarnation: int) -> None:
        if incarnation:
            self._proved.add((node, incarnation))
        elif node in self._member:
            # who is absent when a cluster begins: whatever life that was
            self._proved.add(self._member[node])

    def see(self, event: Event) -> Sequence[Violation]:
        fields = event.fields
        if event.name == "dlm.install":
            self._installed(event)
            return ()
        if event.name == "group.fenced":
            self._fenced(fields["node"], int(fields["incarnation"], 16))
            return ()
        place = fields["applied"], fields["chain"]
        if event.name == "dlm.loaded":
            self._last[event.node] = place
            return ()
        if event.name == "dlm.apply":
            self._made.setdefault(place, self._newest)
            before = self._last.get(event.node)
            if before is not None and before[0] == place[0] - 1:
                self._before[place] = before
            self._last[event.node] = place
            return ()
        former = self._former.get(event.node, self._newest)
        history = former if self._made.get(place) == former else self._newest
        shown, self._shown[history] = self._shown.get(history), (place, event.number, event.node)
        if shown is None:
            return ()
        longer, shorter = (place, shown[0]) if place[0] >= shown[0][0] else (shown[0], place)
        if longer is not place:
            self._shown[history] = shown
        while longer[0] > shorter[0] and longer in self._before:
            longer = self._before[longer]
        if longer[0] != shorter[0] or longer == shorter:
            return ()
        words = f"{event.node} shows another history up to entry {place[0]} than {shown[2]} up to entry {shown[0][0]}"
        return (self.violation(event, words, shown[1]),)


class AppliedOutsideView(RuleOverLives):
    """Nothing is applied without a quorate view, nor between two views."""

    rule = "applied-outside-view"
    spec = "dlm I4"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("group.view", "group.frozen", "dlm.apply")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._without: dict[str, int] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        if event.name == "group.view" and event.fields["quorate"]:
            self._without.pop(event.node, None)
        elif event.name != "dlm.apply":
            self._without[event.node] = event.number
        elif event.node in self._without:
            words = f"{event.node} applies entry {event.fields['applied']} while it is in no quorate view"
            return (self.violation(event, words, self._without[event.node]),)
        return ()


RULES = (ShownBeforeMajority, ShownHistoryForks, AppliedOutsideView)
