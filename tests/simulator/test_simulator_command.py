"""`clustermd simulate`: what a person types and reads, and what a program gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from clustermd.array.bitmap import Bitmap
from clustermd.cli.command import UsageError
from clustermd.cli.simulate import run
from clustermd.testing.simulator.campaign import Summary, campaign, play_seed
from clustermd.testing.simulator.crash_report import Report
from clustermd.testing.simulator.crash_stories import Told
from clustermd.testing.simulator.kept import load, replay
from clustermd.testing.trace.events import Layer, Violation
from clustermd.testing.trace.points import STEPS


@pytest.fixture
def data_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data goes out before its bit is on a disk: every run with a write breaks a rule."""
    right = Bitmap.start_write

    def wrong(self: Bitmap, chunks: Sequence[int]) -> bool:
        right(self, chunks)
        return True

    monkeypatch.setattr(Bitmap, "start_write", wrong)


@pytest.mark.parametrize(
    "words",
    [
        ["--sneeds", "1..2"],
        ["--seeds", "1-2"],
        ["--seeds", "9..2"],
        ["--seeds"],
        ["--seed", "one"],
        ["--minutes", "0"],
        ["--jobs", "0", "--seeds", "1..2"],
        ["--seed", "1", "--seeds", "1..2"],
        ["--trace", "--seeds", "1..2"],
        ["--crash-points", "--seed", "1"],
        ["--crash-points", "--shrink"],
        ["--crash-points", "--nodes", "0,1"],
        ["--nodes", "2"],
    ],
)
def test_what_cannot_be_understood_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        run(words)


def test_a_good_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--seed", "1"]) == 0
    assert "every rule holds" in capsys.readouterr().out


def test_some_seeds_for_a_person_and_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--seeds=1..6", "--jobs=2"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("seeds 1..6, 2 processes\n")
    assert "6 runs" in page and "violations: none" in page and "of 30 passed" in page
    assert run(["--seeds", "1..6", "--jobs", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["simulation"]
    assert told["runs"] == 6 and told["violations"] == [] and told["peak_rss_bytes"] > 1 << 20
    assert list(told["crash_points"]) == [step.id for step in STEPS]
    assert told["acknowledged_writes"] == sum(play_seed(seed).acknowledged for seed in range(1, 7))


def test_fresh_seeds_end_with_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--minutes", "0.02", "--jobs", "1"]) == 0
    assert "for 0.02 minutes" in capsys.readouterr().out


def test_crash_points_for_a_person_and_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--crash-points", "--nodes=1", "--depth=0"]
    assert run([*words, "--jobs=2"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("a death at every crash point, with 1 nodes, depth 0, 2 processes\n")
    assert all(f"\n{step.id} " in page for step in STEPS) and page.endswith("violations: none\n")
    assert run([*words, "--jobs=1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["crash_points"]
    assert told["violations"] == told["missing"] == told["not_fired"] == []
    assert told["steps"]["1b"] == {"first": {"1": 3}, "second": {"1": 0}}
    assert f"\n{told['runs']} runs, " in page, "as many with one process as with two"


def test_a_crash_point_that_breaks_a_rule_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_good(self: Report, told: Told) -> None:
        right(self, told)
        if told.story.kills:
            self.violations.append((told.story, Violation("a-rule", "I0", Layer.ARRAY, "broken", "", 0.0)))

    right = Report.add
    monkeypatch.setattr(Report, "add", none_good)
    assert run(["--crash-points", "--nodes=1", "--depth=0", "--jobs=1"]) == 1
    page = capsys.readouterr().out
    assert "\nBROKEN a-rule" in page and "\n    in: death, 1 nodes; then node1 dies at step 1a" in page


@pytest.mark.usefixtures("data_first")
def test_a_failing_seed_is_told_made_small_and_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["--seed", "1", "--shrink", "--keep", str(tmp_path)]) == 1
    page = capsys.readouterr().out
    assert "data-before-bit (I1) is broken on node" in page and "at fault: the array" in page
    assert "node1  " in page and "write.issue" in page, "the time table"
    assert "play it again: clustermd simulate --seed 1\n" in page
    (path,) = tmp_path.glob("*.json")
    kept = load(path)
    assert kept.rule == "data-before-bit" and len(kept.plan.work) == 1
    assert run(["--replay", str(path)]) == 1
    assert f"--replay {path}" in capsys.readouterr().out
    assert run(["--replay", str(path), "--trace"]) == 1
    assert "verdict: data-before-bit" in capsys.readouterr().out.splitlines()[-1]
    assert run(["--replay", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["simulation"]["violation"]["rule"] == "data-before-bit"


def test_a_kept_run_that_is_well_again_is_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bitmap, "start_write", lambda self, chunks: True)
        assert run(["--seed", "1", "--keep", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    assert run(["--replay", str(path)]) == 0
    assert replay(load(path)).violation is None


def test_what_is_no_kept_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"format": 7}')
    assert run(["--replay", str(path)]) == 2
    assert run(["--replay", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "is no kept run" in said and "No such file" in said


@pytest.mark.usefixtures("data_first")
def test_a_summary_has_the_seeds_of_each_rule() -> None:
    summary = Summary()
    for report in campaign(range(1, 4), jobs=0):
        summary.add(report)
    assert summary.by_rule() == {"data-before-bit": [1, 2, 3]}
    assert "BROKEN data-before-bit (I1, array layer), 3 seeds: 1 2 3" in summary.text()
    assert [one["seed"] for one in summary.to_wire()["violations"]] == [1, 2, 3]


def test_a_campaign_stops_when_nobody_wants_more() -> None:
    reports = campaign(iter(range(1, 10**9)), jobs=1)
    assert next(reports).seed == 1
    reports.close()


def test_an_error_of_the_simulator_is_no_good_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from clustermd.testing.simulator.run import Run

    def broken(self: Run) -> None:
        raise RuntimeError("a bug of the simulator")

    monkeypatch.setattr(Run, "_mend", broken)
    violation = play_seed(1).violation
    assert violation is not None and violation.rule == "simulator-error"
    assert "a bug of the simulator" in violation.message
