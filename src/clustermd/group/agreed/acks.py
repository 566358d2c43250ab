"""What this node was told in one view, what it has said that it had, and when it has to say more. Pure.

Each message carries what its sender has had; who sends nothing says it by itself. As few do so at once as a
majority needs (`Stability.answers_at_once`), and only where somebody's right waits for it; the rest is said at leisure.
"""

from __future__ import annotations

from collections.abc import Mapping

from clustermd.group.agreed.hello import Key
from clustermd.group.agreed.stability import Stability

Word = tuple[int, bool]
"""(index, keeps): up to which message a member has been told, and whether it keeps that in a state."""


class Acks:
    """Of one view, at the member `me`: `votes` and `majority` are as in `Stability`."""

    def __init__(self, me: Key, votes: Mapping[Key, int], majority: int) -> None:
        self.stability = Stability(votes, majority)
        self.index = 0
        """Of the last message that this node was told."""
        self._me = me
        self._said: Word = (0, False)
        self._owed = 0  # to be said at once
        self._leisure = 0  # to be said some time
        self._covered = 0  # up to here it goes without saying: all others count it so
        self._settled = 0  # everybody has had a tick's time to say it
        self._at_once: dict[Key, bool] = {}

    def next(self) -> int:
        """The number of the message that is about to be told."""
        self.index += 1
        return self.index

    def told(self, sender: Key, awaited: int) -> None:
        """Message `index`, of `sender`, was told; somebody's right waits for messages up to `awaited`."""
        mine = sender == self._me
        if mine and self._covered == self.index - 1:
            self._covered = self.index  # all others count it so (`Stability.sent`)
        else:
            self._leisure = self.index
            if awaited >= self.index and (mine or self._answers_at_once(sender)):
                self._owed = self.index
        self.stability.sent(sender, self.index)

    def _answers_at_once(self, sender: Key) -> bool:
        at_once = self._at_once.get(sender)
        if at_once is None:
            at_once = self._at_once[sender] = self.stability.answers_at_once(sender, self._me)
        return at_once

    def heard(self, sender: Key, word: Word) -> None:
        """`sender` said so, in the order."""
        index, keeps = word
        if sender == self._me:
            self._covered = max(self._covered, index)
        self.stability.told(sender, index, keeps)

    def say(self, keeps: bool) -> Word:
        """The word that goes out now; `keeps` is as in `Word`."""
        self._said = (self.index, keeps)
        return self._said

    def swept(self, keeps: bool) -> None:
        """All that the medium has for now is told: this node has it, whether it says so or not."""
        self.stability.told(self._me, self.index, keeps)

    def due(self, keeps: bool) -> bool:
        """Whether this node has to say a word by itself."""
        return self._owed > self._said[0] or (keeps and not self._said[1])

    def hurry(self) -> bool:
        """What had leisure is due now. False if there was nothing."""
        if self._leisure <= self._said[0]:
            return False
        self._owed = self._leisure
        return True

    def settle(self) -> None:
        """Whoever has not said by the next tick that it had what is told by now, owes it."""
        self._settled = self.index

    def debtors(self) -> set[int]:
        """Nodes that owe a word."""
        return {node for node, _ in self.stability.behind(self._settled)}
