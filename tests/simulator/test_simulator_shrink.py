"""Shrinking: a failing run becomes a small one that breaks the same rule, and is kept as such.

The failing runs are made by a flaw put into production code: data is sent before its bit is on a disk, and a joiner
that does not merge what a dead node has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from clustermd.array.bitmap import Bitmap
from clustermd.cluster.life import Life
from clustermd.testing.simulator.kept import Kept, as_text, from_text, load, replay, save, trimmed
from clustermd.testing.simulator.plan import Plan, Step
from clustermd.testing.simulator.run import Outcome, run_seed
from clustermd.testing.simulator.shrink import (
    NotBroken,
    Shrunk,
    _survivable,
    _with_members,
    _with_nodes,
    ddmin,
    shrink,
)
from clustermd.testing.simulator.story import story

Flaw = Callable[[pytest.MonkeyPatch], None]


def data_first(patch: pytest.MonkeyPatch) -> None:
    right = Bitmap.start_write

    def wrong(self: Bitmap, chunks: Sequence[int]) -> bool:
        right(self, chunks)
        return True

    patch.setattr(Bitmap, "start_write", wrong)


def gathers_nothing(patch: pytest.MonkeyPatch) -> None:
    async def wrong(self: Life, slot: int) -> None:
        return None

    patch.setattr(Life, "_gather", wrong)


def first_failure() -> Outcome:
    for seed in range(1, 60):
        outcome = run_seed(seed)
        if outcome.violation is not None:
            return outcome
    pytest.fail("the flaw is in, and no run noticed")


def small(**bounds: float) -> tuple[Outcome, Shrunk, list[str]]:
    failed = first_failure()
    told: list[str] = []
    return failed, shrink(Kept.of(failed), told=told.append, **bounds), told  # type: ignore[arg-type]


def test_what_does_not_matter_goes_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data_first(monkeypatch)
    failed, found, told = small()
    plan = found.kept.plan
    assert failed.violation is not None and found.outcome.violation is not None
    assert found.outcome.violation.rule == failed.violation.rule == "data-before-bit"
    assert (plan.nodes, plan.members, plan.faults, len(plan.work)) == (2, 2, (), 1)
    assert not found.kept.decisions
    assert "write region" in story(found.kept) and told
    path = tmp_path / "small.json"
    save(path, found.kept)
    again = replay(load(path))
    assert again.violation is not None and again.violation.rule == "data-before-bit"
    monkeypatch.undo()
    assert replay(load(path)).violation is None


def test_what_matters_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a death there is nothing to gather, so some fault stays."""
    gathers_nothing(monkeypatch)
    failed, found, _ = small(most_runs=150)
    assert failed.violation is not None
    assert found.kept.rule == failed.violation.rule
    assert len(found.kept.plan.work) < len(failed.plan.work) // 4
    assert len(found.kept.plan.faults) <= len(failed.plan.faults)
    assert replay(found.kept).violation is not None
    monkeypatch.undo()
    assert replay(found.kept).violation is None


def test_the_bound_of_runs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data_first(monkeypatch)
    _, found, _ = small(most_runs=3)
    assert found.runs == 3
    assert replay(found.kept).violation is not None


def test_a_good_run_cannot_be_shrunk() -> None:
    with pytest.raises(NotBroken):
        shrink(Kept.of(run_seed(1)))


@pytest.mark.parametrize("needed", [set(), {3}, {0, 7}, {1, 2, 6}])
def test_ddmin_leaves_what_is_needed(needed: set[int]) -> None:
    assert set(ddmin(range(8), lambda items: needed <= set(items))) == needed


def test_all_copies_are_never_lost_by_shrinking() -> None:
    """With three members two may be victims; with two members both would be."""
    lost = tuple(Step(1.0, "box-power", {"box": box}) for box in (0, 1))
    plan = Plan(members=3, raid_disks=3, faults=lost)
    assert _survivable(plan) and not _survivable(_with_members(plan, 2))
    cut = Step(1.0, "partition", {"cut_off": [1, 3], "for_s": 1.0})
    kill = Step(1.0, "kill", {"node": 3, "down_s": 1.0, "detect_s": 0.1})
    fewer = _with_nodes(replace(plan, faults=(cut, kill)), 2)
    assert [step.args.get("cut_off") for step in fewer.faults] == [[1]]


@pytest.mark.parametrize("drawn", [(), (3,), (0, 0, 0, 5), (1, 1, 2, 2, 2, 2), (300, 0, 0, 0, 7, 7)])
def test_decisions_as_text(drawn: tuple[int, ...]) -> None:
    assert from_text(as_text(drawn)) == drawn


def test_zeroes_at_the_end_need_not_be_kept() -> None:
    assert trimmed({"loop": [1, 0, 0], "pipes": [0, 0], "order": []}) == {"loop": (1,)}
