"""`python -m clustermd.testing.storm --seed N --minutes M`: storms of the seeds N, N+1, N+2 ...

Prints each seed before it begins and what was found. A storm draws its faults from its seed, but real processes do
not move in lockstep: run a seed again, several times if need be, to meet the same finding again.
Exit status: 0 nothing found, 1 something found.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from clustermd.testing.storm.arena import Finding
from clustermd.testing.storm.storm import run

_DIFFERENT_SEEDS = 10**9


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="clustermd.testing.storm",
        description="Faults, drawn from a seed, upon a real cluster under load.",
    )
    parser.add_argument("--seed", type=int, help="the first seed (default: one drawn now)")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with the next seeds for so long")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of faults in one storm")
    parser.add_argument("--base", default="/tmp", help="where the cluster's directory is made")
    parser.add_argument("--keep", type=Path, help="copy the files of a storm that found something below this")
    parser.add_argument("--go-on", action="store_true", help="go on with the next seed after a finding")
    parser.add_argument("--verbose", action="store_true", help="print each step")
    given = parser.parse_args()
    seed = random.randrange(_DIFFERENT_SEEDS) if given.seed is None else given.seed
    end_s = time.monotonic() + given.minutes * 60
    findings = 0
    while True:
        print(f"seed {seed} ...", flush=True)
        keep = given.keep / f"seed{seed}" if given.keep else None
        try:
            outcome = run(
                seed,
                given.rounds,
                lambda line: print(line, flush=True) if given.verbose else None,
                base=given.base,
                keep=keep,
            )
        except Finding as finding:
            findings += 1
            print(f"seed {seed} FOUND: {finding}", flush=True)
            if not given.go_on:
                return 1
        else:
            print(f"seed {seed}: {outcome}", flush=True)
        if time.monotonic() >= end_s:
            return 1 if findings else 0
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
