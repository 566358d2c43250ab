"""One seed is one run: the same bytes in every process, and again from its lists of decisions.

The two processes differ in the hash seed and in what they did before, so a walk over a set, an object's address or
something left behind by the run before shows as a difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clustermd.testing.simulator.kept import PLANNING, Kept, load, replay, save
from clustermd.testing.simulator.run import run_seed
from clustermd.testing.simulator.story import trace_lines

PROGRAM = "from clustermd.cli.main import run; run()"
SEEDS = (3, 14, 15, 92)
PLANNED = tuple(f"decisions {name}:" for name in PLANNING)


def trace_of_a_process(seed: int, hash_seed: int) -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "simulate", "--seed", str(seed), "--trace"],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_the_same_bytes_in_every_process(seed: int) -> None:
    one, two = (trace_of_a_process(seed, hash_seed).splitlines() for hash_seed in (1, 4711))
    for place, (first, second) in enumerate(zip(one, two, strict=False)):
        assert first == second, f"line {place + 1} of seed {seed} differs"
    assert len(one) == len(two) > 100


def test_a_seed_gives_the_same_run_after_others() -> None:
    alone = trace_of_a_process(SEEDS[0], 0).decode().splitlines()
    run_seed(SEEDS[1])
    assert list(trace_lines(run_seed(SEEDS[0], keep_events=True))) == alone


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_is_replayed_from_its_file(seed: int, tmp_path: Path) -> None:
    outcome = run_seed(seed, keep_events=True)
    path = tmp_path / "run.json"
    save(path, Kept.of(outcome, "to be played again"))
    again = list(trace_lines(replay(load(path), keep_events=True)))
    assert again == [line for line in trace_lines(outcome) if not line.startswith(PLANNED)]


def test_other_seeds_are_other_runs() -> None:
    assert len({tuple(trace_lines(run_seed(seed, keep_events=True))) for seed in SEEDS}) == len(SEEDS)
