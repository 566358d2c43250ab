"""Simulated clusters by the hundred: no run may break a rule.

The fixed seeds are the same for everybody; the fresh ones are other ones each time, and a failure says which. They
stand in ranges, so that they spread over the processors. More of them: `clustermd simulate --minutes 60`.
"""

from __future__ import annotations

import random

import pytest

from clustermd.testing.simulator.campaign import OPERATIONS, Summary, campaign
from clustermd.testing.simulator.run import run_seed
from clustermd.testing.trace.verdict import verdict

RANGE = 40
FIXED = 19
FRESH = 1
MOST_RSS_BYTES = 200 << 20


def play(first: int, count: int = RANGE) -> Summary:
    summary = Summary()
    for report in campaign(range(first, first + count), jobs=0):
        summary.add(report)
    for seed, violation in summary.broken.items():
        again = run_seed(seed, keep_events=True)
        table = verdict(violation, again.events)
        pytest.fail(f"seed {seed}\n{table}\nclustermd simulate --seed {seed} --shrink", pytrace=False)
    return summary


@pytest.mark.parametrize("place", range(FIXED))
def test_fixed_seeds_break_no_rule(place: int) -> None:
    summary = play(1 + place * RANGE)
    assert summary.runs == RANGE
    assert summary.acknowledged > RANGE * OPERATIONS // 8
    assert summary.faults.total() > RANGE * 5


@pytest.mark.parametrize("place", range(FRESH))
def test_fresh_seeds_break_no_rule(place: int) -> None:
    play(random.SystemRandom().randrange(1 << 40))


def test_a_few_runs_come_to_most_crash_points_in_little_memory() -> None:
    """What is imported, and one run, in a process of its own."""
    summary = Summary()
    for report in campaign(range(1, 33), jobs=1):
        summary.add(report)
    assert len(summary.not_reached()) <= 2, summary.text()
    assert summary.peak_rss_bytes < MOST_RSS_BYTES
    assert "violations: none" in summary.text()
