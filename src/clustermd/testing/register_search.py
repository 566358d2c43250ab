"""Is there any order of these operations that a register allows? The general search, for any writers.

Wing and Gong's question (1993), asked the way Lowe does (2017): walk through starts and ends in the order
of time and keep every state the register may be in: its value, and which of the open operations have taken effect.
Nothing takes effect before it must: at the end of an operation each state is extended by open writes, in every
order, until that operation has taken effect (at a fence: it has, or never does); a state already met is not
extended again (the memo). When no state is left, the operation that just ended cannot be explained.

Two things make it small. A read that finds its value takes effect at once, since that changes nothing. And an
unanswered write whose value nobody ever read may as well never have happened, so it is left out.

Writes of one node to one block take effect in the order of their generations: an unanswered one that a later one
of its node overtook never lands. An unanswered write whose node was fenced takes effect before that or never.

The number of states grows with the writes that overlap. Beyond a bound the search raises `TooConcurrent`
rather than run for ever or guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clustermd.testing.history_log import INITIAL, Value


class TooConcurrent(Exception):
    """So many writes overlap that the search was given up: nothing is known about this history."""


@dataclass(frozen=True, slots=True)
class Access:
    """A read or write of one register. `end_ns` None: a write that was not answered.

    `gone_ns`: when such a write can no longer take effect, None for never.
    """

    is_write: bool
    start_ns: int
    end_ns: int | None
    value: Value
    gone_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Stuck:
    """No order explains access number `at`, while those numbered `open_` had begun and not ended."""

    at: int
    open_: tuple[int, ...]


_State = tuple[Value, frozenset[int]]

_START, _END, _GONE = range(3)


def search(accesses: Sequence[Access], most_states: int) -> Stuck | None:
    """None when the register was atomic; else where every order fails. Raises TooConcurrent."""
    return _Search(accesses, most_states).run()


class _Search:
    def __init__(self, accesses: Sequence[Access], most_states: int) -> None:
        self.accesses = accesses
        self.most_states = most_states
        self.open: set[int] = set()
        self.states: set[_State] = {(INITIAL, frozenset())}

    def run(self) -> Stuck | None:
        read = {access.value for access in self.accesses if not access.is_write}
        events: list[tuple[int, int, int]] = []
        for number, access in enumerate(self.accesses):
            if access.is_write and access.end_ns is None and access.value not in read:
                continue
            # What starts in the very moment in which another ends overlaps it.
            events.append((access.start_ns, _START, number))
            if access.end_ns is not None:
                events.append((access.end_ns, _END, number))
            elif access.gone_ns is not None:
                events.append((max(access.start_ns, access.gone_ns), _GONE, number))
        for _, what, number in sorted(events):
            if what == _START:
                self.open.add(number)
                self.states = {self._with_reads(value, done) for value, done in self.states}
                continue
            if what == _END:
                found = self._ended(number)
                if not found:
                    return Stuck(number, tuple(sorted(self.open - {number})))
                self.states = found
            else:
                # Now or never: both go on.
                self.states |= self._ended(number)
            self.open.discard(number)
            self.states = {(value, done - {number}) for value, done in self.states}
        return None

    def _with_reads(self, value: Value, done: frozenset[int]) -> _State:
        """The same state with every open read of this value done."""
        accesses = self.accesses
        return value, done.union(
            n for n in self.open if not accesses[n].is_write and accesses[n].value == value
        )

    def _ended(self, target: int) -> set[_State]:
        """Every state in which `target` has taken effect, and nothing after it that need not have."""
        met = set(self.states)
        ahead = list(self.states)
        found: set[_State] = set()
        while ahead:
            state = ahead.pop()
            if target in state[1]:
                found.add(state)
                continue
            for following in self._steps(state[1]):
                if following not in met:
                    met.add(following)
                    ahead.append(following)
                    if len(met) > self.most_states:
                        writes = sum(self.accesses[number].is_write for number in self.open)
                        raise TooConcurrent(
                            f"{writes} writes overlap, which leaves more than {self.most_states} states to look at"
                        )
        return found

    def _steps(self, done: frozenset[int]) -> list[_State]:
        """The states after one more open write. Open older ones of its node are overtaken: done before it, or never."""
        waiting = [n for n in self.open if self.accesses[n].is_write and n not in done]
        found = []
        for number in waiting:
            mine = self.accesses[number].value
            older = (
                n
                for n in waiting
                if self.accesses[n].value.node == mine.node
                and self.accesses[n].value.generation < mine.generation
            )
            found.append(self._with_reads(mine, done.union(older, (number,))))
        return found
