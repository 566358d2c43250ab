"""Which messages cannot be lost with their senders any more. Pure.

Agreed order is not safe delivery: a node may have its own message before anybody else, and be cut off with
it (dlm.md 5.2). So a message is stable when members that keep it in a state have a majority of all votes:
every later view that may act then contains one of them (dlm.md 6.2, B).

Where those present have no majority though they are quorate (two_node, last_man_standing, auto_tie_breaker), votes
prove nothing: then a message is stable when all who are present have it, and nobody is lost whose end is
not proved (dlm.md 6.2, A).

Who sends a message has it, and what came before it as far as it has said so: it hears it before the next change, or
dies. That holds as well when it loses quorum before it hears it, for then it hears it with its next view (`View.late`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clustermd.group.agreed.hello import Key


class Stability:
    """Of one view: `votes` of its members, and the `majority` of all configured votes.

    `by_majority`: those present are one, so their votes prove something.
    """

    def __init__(self, votes: Mapping[Key, int], majority: int) -> None:
        self._votes = dict(votes)
        self._majority = majority
        self.by_majority = sum(self._votes.values()) >= majority
        self._told: dict[Key, tuple[int, bool]] = dict.fromkeys(votes, (0, False))
        self.stable = 0

    def told(self, member: Key, index: int, keeps: bool) -> None:
        """`member` has had messages up to `index`; `keeps`: they are in a state that it keeps."""
        before, kept = self._told.get(member, (0, False))
        if member in self._votes:
            self._told[member] = (max(before, index), kept or keeps)

    def sent(self, member: Key, index: int) -> None:
        """`member` sent message `index`. That it had all before it, it must have said.

        A node may send while messages of others are on their way to it, and never gets them if it is cut off then.
        """
        before, kept = self._told.get(member, (0, False))
        if member in self._votes and before == index - 1:
            self._told[member] = (index, kept)

    def answers_at_once(self, sender: Key, member: Key) -> bool:
        """Whether `member` should acknowledge a message of `sender` without delay: only as many do as a majority needs.

        These are the last before the sender: the right to send goes round by node number, so it comes to them when
        they have had the message for longest, and theirs is the word that needs no second round. The others' word is
        late, and counts where one of these is silent.
        """
        order = sorted(self._votes)
        if sender not in self._votes or not self.by_majority:
            return True
        start = order.index(sender)
        votes = self._votes[sender]
        for key in reversed(order[start + 1 :] + order[:start]):
            if votes >= self._majority:
                return False
            if key == member:
                return True
            votes += self._votes[key]
        return False

    def behind(self, index: int) -> set[Key]:
        """Members that have not said that they had messages up to `index`."""
        return {key for key, (told, _) in self._told.items() if told < index}

    def look(self, everybody_else_proved: bool) -> int | None:
        """The newly stable index, or None if there is none. See the module for the argument."""
        keeping = [(index, self._votes[key]) for key, (index, keeps) in self._told.items() if keeps]
        index = 0
        if self.by_majority:
            index = held_by(self._majority, keeping)
        elif everybody_else_proved and len(keeping) == len(self._votes):
            index = min(keeping)[0]
        if index <= self.stable:
            return None
        self.stable = index
        return index


def held_by(votes: int, held: Iterable[tuple[int, int]]) -> int:
    """The highest number that holders of `votes` together have reached, or 0. `held`: (number, own votes)."""
    for number, own in sorted(held, reverse=True):
        votes -= own
        if votes <= 0:
            return number
    return 0
