"""Where every decision of a run comes from: small numbers in named streams, drawn from a seed or read from a list.

A decision is `below(stream, n)`: a number from 0 to n - 1. In a seeded run each stream is a generator of its own, so
that one more draw in one place does not change all others. Every draw is recorded. A recorded run is replayed from its
lists, without the seed; where a list ends, the decision is 0, and 0 is always the dull choice (first come first served,
shortest delay, no fault). So a run can be shrunk by cutting its lists, and a kept one still means something
after the code has changed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence


class Dice:
    """Decisions of one run. `recorded` replays; None draws from `seed`."""

    def __init__(self, seed: int, recorded: Mapping[str, Sequence[int]] | None = None) -> None:
        self.seed = seed
        self.record: dict[str, list[int]] = {}
        self._recorded = recorded
        self._streams: dict[str, random.Random] = {}

    def stream(self, name: str) -> Stream:
        """The stream `name`, for whoever draws from it often."""
        drawn = self.record.setdefault(name, [])
        if self._recorded is not None:
            return Stream(drawn, None, self._recorded.get(name, ()))
        generator = self._streams.get(name)
        if generator is None:
            generator = self._streams[name] = random.Random(f"{self.seed}/{name}")
        return Stream(drawn, generator, ())


class Stream:
    """One stream of decisions."""

    __slots__ = ("_drawn", "_random", "_recorded")

    def __init__(self, drawn: list[int], generator: random.Random | None, recorded: Sequence[int]) -> None:
        self._drawn = drawn
        self._random = generator.random if generator is not None else None
        self._recorded = recorded

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        drawn = self._drawn
        if self._random is not None:
            value = int(self._random() * count)
        else:
            place = len(drawn)
            value = self._recorded[place] % count if place < len(self._recorded) else 0
        drawn.append(value)
        return value

    def one_in(self, count: int) -> bool:
        """True once in `count` draws; never where a list has ended."""
        return self.below(count) == count - 1

    def shuffled(self, items: Sequence[int]) -> list[int]:
        """The items in another order; the same one where a list has ended."""
        left = list(items)
        return [left.pop(self.below(len(left)) if len(left) > 1 else 0) for _ in range(len(left))]
