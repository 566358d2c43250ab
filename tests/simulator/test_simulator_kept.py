"""Runs that once broke a rule break none any more. Each file in `kept/` says what was wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustermd.testing.simulator.kept import load, replay, to_text
from clustermd.testing.simulator.story import story
from clustermd.testing.trace.verdict import verdict

FILES = sorted((Path(__file__).parent / "kept").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_run_breaks_no_rule_any_more(path: Path) -> None:
    kept = load(path)
    outcome = replay(kept, keep_events=True)
    if outcome.violation is not None:
        table = verdict(outcome.violation, outcome.events)
        pytest.fail(f"{path.name}: {kept.sentence}\n{story(kept)}\n{table}", pytrace=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kept_run_says_what_was_wrong(path: Path) -> None:
    kept = load(path)
    assert kept.rule and kept.spec and kept.layer
    assert len(kept.sentence) > 20
    assert path.read_text() == to_text(kept), "rewrite it with kept.save"
