"""Bugs of our own that simulated runs found stay fixed, and each kept run still shows its bug when that is put back.

A kept run is played twice: as the code stands it breaks no rule, and with the flaw of the same name
(`clustermd.testing.simulator.flaws_found`) it breaks the one in its file. So a kept run that tells its story no longer,
since the code or the kit has changed too much, is found out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from clustermd.testing.simulator.flaws import put_back
from clustermd.testing.simulator.flaws_found import FLAWS
from clustermd.testing.simulator.kept import load, replay

pytestmark = pytest.mark.filterwarnings(
    # a run that ends at its first violation leaves tasks in the middle of whatever they did
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "flaws.md"
KEPT = sorted(flaw.name for flaw in FLAWS if (HERE / "kept" / f"{flaw.name}.json").exists())


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_run_breaks_its_rule_with_the_bug_and_none_without(name: str) -> None:
    kept = load(HERE / "kept" / f"{name}.json")
    with put_back(name):
        wrong = replay(kept).violation
    assert wrong is not None, f"{name} is back, and its kept run breaks nothing"
    assert wrong.rule == kept.rule, f"{name} is back, and its kept run breaks another rule: {wrong}"
    right = replay(kept).violation
    assert right is None, f"{kept.sentence}\nIt is so again, or something else is wrong: {right}"
