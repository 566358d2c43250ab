"""The words of `clustermd simulate`: which there are, what they mean, and which do not go together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustermd.cli.command import UsageError

_FLAGS = ("--crash-points", "--trace", "--shrink", "--json")
_VALUED = ("--seeds", "--minutes", "--seed", "--replay", "--jobs", "--keep", "--nodes", "--depth")
HELP = """\
Usage: clustermd simulate [--seeds A..B | --minutes M] [--jobs J] [--shrink] [--keep DIR] [--json]
       clustermd simulate --seed N [--trace | --shrink] [--keep DIR] [--json]
       clustermd simulate --replay FILE [--trace | --shrink] [--keep DIR] [--json]
       clustermd simulate --crash-points [--nodes N,N...] [--depth D] [--jobs J] [--json]

Plays simulated clusters: the real code of lock manager, cluster and array on virtual time, with clients on all
nodes and faults of all kinds, every step judged. The same seed gives the same run, to the last event.
With --crash-points nothing is drawn: a node dies at each step of the protocol in turn, then a second one in
the recovery from that.

  --seeds A..B   these seeds
  --minutes M    fresh seeds for so long (default: 1 minute)
  --seed N       one seed
  --replay FILE  one run that was kept
  --crash-points a death at every step of every scenario
  --nodes N,N... clusters of so many nodes for --crash-points (default: 1,2,3)
  --depth D      0: some hundred runs that reach every step; 1: every place, some thousand runs (default);
                 more: so many occurrences of each
  --jobs J       processes to use (default: one a processor)
  --trace        every event of the run, one a line
  --shrink       make a failing run small: fewer nodes, faults, operations (one run for each broken rule)
  --keep DIR     write failing runs to DIR, to be replayed
  --json         one JSON object

Exit status: 0 every rule held (and somebody died at every step), 1 one was broken, 2 not understood.
"""


@dataclass(slots=True)
class Options:
    """What was asked for. Of `seeds`, `minutes`, `seed`, `replay` and `crash_points` one at most."""

    seeds: tuple[int, int] | None = None
    minutes: float | None = None
    seed: int | None = None
    replay: Path | None = None
    crash_points: bool = False
    nodes: tuple[int, ...] | None = None
    depth: int | None = None
    jobs: int | None = None
    keep: Path | None = None
    trace: bool = False
    shrink: bool = False
    json: bool = False


def parse(words: Sequence[str]) -> Options:
    """Raises UsageError."""
    options = Options()
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name in _FLAGS and not equals:
            setattr(options, name[2:].replace("-", "_"), True)
            continue
        if name not in _VALUED:
            raise UsageError(f"simulate takes no {word!r}", usage=True)
        if not equals:
            if not left:
                raise UsageError(f"{name} needs a value", usage=True)
            value = left.pop(0)
        setattr(options, name[2:], _value(name, value))
    runs = (options.seeds, options.minutes, options.seed, options.replay, options.crash_points or None)
    if sum(what is not None for what in runs) > 1:
        raise UsageError("--seeds, --minutes, --seed, --replay and --crash-points exclude one another")
    if options.crash_points:
        if options.trace or options.shrink or options.keep is not None:
            raise UsageError("--trace, --shrink and --keep are for runs of seeds, not for --crash-points")
    elif options.nodes is not None or options.depth is not None:
        raise UsageError("--nodes and --depth are for --crash-points")
    if options.trace and options.seed is None and options.replay is None:
        raise UsageError("--trace is for one run: give it --seed or --replay")
    return options


def _value(name: str, text: str) -> Any:
    if name in ("--replay", "--keep"):
        return Path(text)
    if name == "--seeds":
        if (match := re.fullmatch(r"(\d+)\.\.(\d+)", text)) and int(match[1]) <= int(match[2]):
            return int(match[1]), int(match[2])
        raise UsageError(f"--seeds takes a first and a last seed, as 1..1000, and not {text!r}")
    if name == "--minutes":
        if re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) and float(text) > 0:
            return float(text)
        raise UsageError(f"--minutes takes a number above 0, and not {text!r}")
    if name == "--nodes":
        numbers = text.split(",")
        if all(number in ("1", "2", "3", "4") for number in numbers):
            return tuple(sorted({int(number) for number in numbers}))
        raise UsageError(f"--nodes takes numbers from 1 to 4, as 1,2,3, and not {text!r}")
    if not text.isdecimal() or (name == "--jobs" and int(text) == 0):
        raise UsageError(f"{name} takes a whole number, and not {text!r}")
    return int(text)
