"""Storms over replicas: clients, joins, deaths, partitions and sequencer deaths at any point between two deliveries.

Replicas agree after every entry, clients never hold what excludes each other, and when all is quiet no operation has
been lost; the rules are those of `clustermd.testing.locks`. Steps that once broke a rule are kept beside this as lists.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.testing.locks.storm import replay, run

KEPT = sorted((Path(__file__).parents[1] / "simulator" / "locks").glob("*.json"))
OFTEN = ("lose", "fence", "start", "break", "cut", "heal", "no quorum", "lost", "ended", "recovered", "leave")


def test_storms_of_known_seeds() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        outcome = run(seed, 800)
        assert outcome.failure is None, outcome.report()
        seen += outcome.seen
    assert min(seen[word] for word in OFTEN) > 10, seen


@given(st.integers(0, 1 << 40), st.integers(50, 400))
@settings(max_examples=40, deadline=None)
def test_storms_of_new_seeds(seed: int, steps: int) -> None:
    outcome = run(seed, steps)
    assert outcome.failure is None, outcome.report()


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_what_once_broke_a_rule(path: Path) -> None:
    kept = json.loads(path.read_text())
    outcome = replay(kept["steps"])
    assert outcome.failure is None, f"{kept['was']}: {outcome.report()}"
