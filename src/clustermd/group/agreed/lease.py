"""How long this node may believe that a majority hears it. Pure.

Each member says a numbered beat some times within the lease's length T, and with it the last beat that it
heard of each other. What a majority of votes has heard, and said so, was heard by somebody in every later
view that may act; so until T after this beat was *sent*, survivors cannot have given this node up, if they wait
for T and the drift of clocks after they lost it (dlm.md 6.2, 6.8.32). Times are of the clock that goes on
while the process is stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from clustermd.group.agreed.stability import held_by

BEATS_PER_LEASE = 5


class Lease:
    """Of one view. `length_s` is T; `until_s` is when the lease ends, 0 before a majority has answered."""

    def __init__(self, me: int, votes: Mapping[int, int], majority: int, length_s: float) -> None:
        self._me = me
        self._votes = dict(votes)
        self._majority = majority
        self._length_s = length_s
        self._sent: dict[int, float] = {}
        self._heard_of_me: dict[int, int] = {me: 0}
        self.heard: dict[int, int] = {}
        self._answer_owed = False
        self.number = 0
        self.until_s = 0.0

    def due(self, now_s: float) -> bool:
        """Whether it is time for the next beat."""
        last_s = self._sent.get(self.number)
        return self._answer_owed or last_s is None or now_s - last_s >= self._length_s / BEATS_PER_LEASE

    def beat(self, now_s: float) -> tuple[int, list[tuple[int, int]]]:
        """(number, heard of others) of the next beat, sent at `now_s`."""
        self.number += 1
        self._answer_owed = False
        self._sent[self.number] = now_s
        self._heard_of_me[self._me] = self.number
        return self.number, sorted(self.heard.items())

    def on_beat(self, node: int, number: int, heard: Mapping[int, int]) -> bool:
        """A beat of another. Returns whether it made our lease longer."""
        if node == self._me or node not in self._votes:
            return False
        self._answer_owed = self._answer_owed or node not in self.heard
        self.heard[node] = number
        self._heard_of_me[node] = max(heard.get(self._me, 0), self._heard_of_me.get(node, 0))
        return self._renew()

    def alone(self) -> bool:
        """For a node that is the majority by itself: its own beat is enough."""
        return self._renew()

    def _renew(self) -> bool:
        number = held_by(
            self._majority, ((number, self._votes[node]) for node, number in self._heard_of_me.items())
        )
        if number not in self._sent:
            return False
        until_s = self._sent[number] + self._length_s
        for old in [old for old in self._sent if old < number]:
            del self._sent[old]
        if until_s <= self.until_s:
            return False
        self.until_s = until_s
        return True
