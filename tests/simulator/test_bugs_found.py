"""Bugs of our own that simulated runs found stay fixed, and each kept run still shows its bug when that is put back.

A kept run is played twice: as the code stands it breaks no rule, and with the flaw of the same name
(`clustermd.testing.simulator.flaws_found`) it breaks the one in its file. So a kept run that tells its story no longer,
since the code or the kit has changed too much, is found out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clustermd.array.sweep import Sweep
from clustermd.errors import Refused
from clustermd.testing.locks import storm
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.flaws import patched, put_back
from clustermd.testing.simulator.flaws_found import FLAWS
from clustermd.testing.simulator.kept import load, replay
from clustermd.testing.simulator.plan import Plan, Step
from clustermd.testing.simulator.run import Run

pytestmark = pytest.mark.filterwarnings(
    # a run that ends at its first violation leaves tasks in the middle of whatever they did
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)

HERE = Path(__file__).parent
BUGS = {flaw.name for flaw in FLAWS}
DOCS = HERE.parents[1] / "docs" / "flaws.md"
STORM = HERE / "locks" / "blocking-callback-nobody-asked-for.json"
KEPT = sorted(path.stem for path in (HERE / "kept").glob("*.json") if path.stem in BUGS)
ELSEWHERE = {
    "blocking-callback-nobody-asked-for",  # below, a storm over lock replicas
    "sweep-ends-silently",  # below
    # tests/unit/test_cluster_bugs_found.py
    "leaver-takes-over",
    "loss-that-nobody-hears-of",
    "lost-value-block-is-no-window",
    "one-node-blocks-all",
    "right-asked-for-too-early",
    "settled-before-the-joiner-copied",
    "window-of-a-former-owner",
    "window-outlives-its-life",
    # tests/unit/test_dlm_bugs_found.py
    "own-word-lost-with-quorum",
}


def test_every_bug_has_its_test_and_its_line_in_the_documentation() -> None:
    assert set(KEPT) | ELSEWHERE == BUGS
    text = DOCS.read_text()
    assert not [name for name in BUGS if f"`{name}`" not in text]


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_run_breaks_its_rule_with_the_bug_and_none_without(name: str) -> None:
    kept = load(HERE / "kept" / f"{name}.json")
    with put_back(name):
        wrong = replay(kept).violation
    assert wrong is not None, f"{name} is back, and its kept run breaks nothing"
    assert wrong.rule == kept.rule, f"{name} is back, and its kept run breaks another rule: {wrong}"
    right = replay(kept).violation
    assert right is None, f"{kept.sentence}\nIt is so again, or something else is wrong: {right}"


def test_the_storm_shows_a_callback_nobody_asked_for() -> None:
    steps = json.loads(STORM.read_text())["steps"]
    with put_back(STORM.stem):
        wrong = storm.replay(steps).failure
    assert wrong is not None
    assert storm.replay(steps).failure is None


def test_a_sweep_that_was_refused_is_not_the_last_one() -> None:
    """The first sweep of each node is refused; all bits must be clear in the end."""
    refused: set[int] = set()
    once = Sweep.once

    async def first_refused(self: Sweep) -> int:
        if id(self) not in refused:
            refused.add(id(self))
            raise Refused("superblock-unwritable", "the story says so")
        return await once(self)

    work = tuple(Step(at_s / 10, "write", {"region": at_s, "at": 0, "sectors": 8}) for at_s in range(4))
    plan = Plan(nodes=2, slots=2, array_sectors=1024, work=work)
    with patched(((Sweep, "once", first_refused),)):
        assert Run(plan, Dice(0)).play().violation is None
        refused.clear()
        with put_back("sweep-ends-silently"):
            wrong = Run(plan, Dice(0)).play().violation
    assert wrong is not None and wrong.rule == "hang", wrong
    assert "bits left" in wrong.message
