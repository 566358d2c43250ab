"""`clustermd simulate`: play simulated clusters through crashes, partitions and torn writes, and judge every step.

Each seed is one cluster with its clients and its faults. A run that breaks a rule is told with its seed, the rule, the
layer whose bug that is, and a time table of what led there; it can be made small and kept in a file.
Exit status 0 means that every rule held in every run, 1 that one did not.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clustermd.cli.command import UsageError
from clustermd.cli.output import say, show, show_json
from clustermd.errors import BadBytes

if TYPE_CHECKING:
    from clustermd.testing.simulator.campaign import Summary
    from clustermd.testing.simulator.kept import Kept
    from clustermd.testing.simulator.run import Outcome

BROKEN = 1
UNREADABLE = 2
INTERRUPTED = 130
_DRAWN = 3
_MINUTES = 1.0
_FRESH_SEEDS = 1 << 40
_BAR = 30
_LINE_EVERY_S = 10.0
_HELP = """\
Usage: clustermd simulate [--seeds A..B | --minutes M] [--jobs J] [--shrink] [--keep DIR] [--json]
       clustermd simulate --seed N [--trace | --shrink] [--keep DIR] [--json]
       clustermd simulate --replay FILE [--trace | --shrink] [--keep DIR] [--json]

Plays simulated clusters: the real code of lock manager, cluster and array on virtual time, with clients on all
nodes and faults of all kinds, every step judged. The same seed gives the same run, to the last event.

  --seeds A..B   these seeds
  --minutes M    fresh seeds for so long (default: 1 minute)
  --seed N       one seed
  --replay FILE  one run that was kept
  --jobs J       processes to use (default: one a processor)
  --trace        every event of the run, one a line
  --shrink       make a failing run small: fewer nodes, faults, operations (one run for each broken rule)
  --keep DIR     write failing runs to DIR, to be replayed
  --json         one JSON object

Exit status: 0 every rule held, 1 one was broken, 2 not understood.
"""


@dataclass(slots=True)
class _Options:
    seeds: tuple[int, int] | None = None
    minutes: float | None = None
    seed: int | None = None
    replay: Path | None = None
    jobs: int | None = None
    keep: Path | None = None
    trace: bool = False
    shrink: bool = False
    json: bool = False


def run(words: Sequence[str]) -> int:
    """The verb. The exit status."""
    if "-h" in words or "--help" in words:
        show(_HELP)
        return 0
    options = _parse(words)
    if options.replay is not None or options.seed is not None:
        return _one(options)
    return _many(options)


# --- the command line ---------------------------------------------------------------------------------------------


def _parse(words: Sequence[str]) -> _Options:
    options = _Options()
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--trace", "--shrink", "--json") and not equals:
            setattr(options, name[2:], True)
            continue
        if name not in ("--seeds", "--minutes", "--seed", "--replay", "--jobs", "--keep"):
            raise UsageError(f"simulate takes no {word!r}", usage=True)
        if not equals:
            if not left:
                raise UsageError(f"{name} needs a value", usage=True)
            value = left.pop(0)
        setattr(options, name[2:], _value(name, value))
    if sum(what is not None for what in (options.seeds, options.minutes, options.seed, options.replay)) > 1:
        raise UsageError("--seeds, --minutes, --seed and --replay exclude one another")
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
    if not text.isdecimal() or (name == "--jobs" and int(text) == 0):
        raise UsageError(f"{name} takes a whole number, and not {text!r}")
    return int(text)


# --- many seeds ---------------------------------------------------------------------------------------------------


def _many(options: _Options) -> int:
    from clustermd.testing.simulator.campaign import Summary, campaign

    jobs = options.jobs or len(os.sched_getaffinity(0))
    end_s: float | None = None
    seeds: Iterable[int]
    if options.seeds is not None:
        first, last = options.seeds
        seeds, total = range(first, last + 1), last - first + 1
        what = f"seeds {first}..{last}"
    else:
        minutes = options.minutes or _MINUTES
        first = random.SystemRandom().randrange(_FRESH_SEEDS)
        end_s, total = time.monotonic() + minutes * 60, 0
        seeds = _seeds_until(first, end_s)
        what = f"seeds from {first} on for {minutes:g} minutes"
    summary = Summary()
    progress = _Progress(summary, total, end_s)
    if not options.json:
        show(f"{what}, {jobs} processes\n")
    reports = campaign(seeds, jobs=jobs)
    interrupted = False
    try:
        for report in reports:
            summary.add(report)
            if report.violation is not None and not options.json:
                progress.line(f"seed {report.seed}: {report.violation}")
            if not options.json:
                progress.show()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        reports.close()
        progress.clear()
    if interrupted:
        say("interrupted; this is what was played until then")
    results = [] if interrupted else _look_closer(summary, options)
    if options.json:
        show_json(simulation=summary.to_wire(), seeds=what, interrupted=interrupted, closer=results)
    else:
        show("\n" + summary.text())
    if summary.broken:
        return BROKEN
    return INTERRUPTED if interrupted else 0


def _seeds_until(first: int, end_s: float) -> Iterator[int]:
    seed = first
    while time.monotonic() < end_s:
        yield seed
        seed += 1


def _look_closer(summary: Summary, options: _Options) -> list[dict[str, Any]]:
    """Play the first seed of each broken rule again, with its events."""
    from clustermd.testing.simulator.run import run_seed

    results = []
    for place, seeds in enumerate(summary.by_rule().values()):
        wanted = options.shrink or options.keep is not None or (place < _DRAWN and not options.json)
        if wanted and summary.broken[seeds[0]].rule != "simulator-error":
            outcome = run_seed(seeds[0], keep_events=True)
            results.append(_told(outcome, f"--seed {seeds[0]}", f"seed-{seeds[0]}", options))
    return results


class _Progress:
    """A bar on a terminal, a line now and then elsewhere. On standard error."""

    def __init__(self, summary: Summary, total: int, end_s: float | None) -> None:
        self._summary = summary
        self._total = total
        self._begin_s = time.monotonic()
        self._end_s = end_s
        self._tty = sys.stderr.isatty()
        self._line_s = self._begin_s
        self._shown = False

    def show(self) -> None:
        now_s = time.monotonic()
        if not self._tty and now_s - self._line_s < _LINE_EVERY_S:
            return
        self._line_s = now_s
        runs = self._summary.runs
        if self._end_s is None:
            part = runs / self._total
            text = f"{runs}/{self._total} runs"
        else:
            part = min(1.0, (now_s - self._begin_s) / (self._end_s - self._begin_s))
            text = f"{runs} runs, {max(0.0, self._end_s - now_s):.0f} s left"
        text += f", {runs / (now_s - self._begin_s) * 60:.0f} a minute, {len(self._summary.broken)} broken"
        if self._tty:
            done = int(part * _BAR)
            sys.stderr.write(f"\r\x1b[K[{'#' * done}{' ' * (_BAR - done)}] {text}")
            self._shown = True
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def line(self, text: str) -> None:
        self.clear()
        show(text + "\n")

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


# --- one run --------------------------------------------------------------------------------------------------------


def _one(options: _Options) -> int:
    from clustermd.testing.simulator.kept import load, replay
    from clustermd.testing.simulator.run import run_seed
    from clustermd.testing.simulator.story import trace_lines

    if options.replay is not None:
        try:
            kept = load(options.replay)
        except (BadBytes, OSError) as error:
            say(error.message if isinstance(error, BadBytes) else f"{error.filename}: {error.strerror}")
            return UNREADABLE
        outcome = replay(kept, keep_events=True)
        again, name = f"--replay {options.replay}", options.replay.stem
    else:
        assert options.seed is not None
        outcome = run_seed(options.seed, keep_events=True)
        again, name = f"--seed {options.seed}", f"seed-{options.seed}"
    if options.trace:
        for line in trace_lines(outcome):
            show(line + "\n")
        return BROKEN if outcome.violation is not None else 0
    if outcome.violation is not None:
        result = _told(outcome, again, name, options)
    else:
        result = {"again": again, "virtual_s": outcome.virtual_s, "violation": None}
        if not options.json:
            show(_good(outcome))
    if options.json:
        show_json(simulation=result)
    return BROKEN if outcome.violation is not None else 0


def _good(outcome: Outcome) -> str:
    from clustermd.testing.simulator.campaign import counts

    plan = outcome.plan
    return (
        f"{plan.nodes} nodes, {plan.members} members, {outcome.virtual_s:.1f} virtual seconds\n"
        f"operations: {counts(outcome.operations)}\n"
        f"faults: {counts(outcome.faults)}\n"
        f"{outcome.acknowledged} acknowledged writes, {outcome.checked_sectors} sectors compared, "
        f"{outcome.points.total()} events: every rule holds\n"
    )


def _told(outcome: Outcome, again: str, name: str, options: _Options) -> dict[str, Any]:
    """Tell of a run that broke a rule; shrink and keep it if that is wanted. The same for programs."""
    from clustermd.testing.simulator.kept import Kept, save
    from clustermd.testing.simulator.story import story
    from clustermd.testing.trace.verdict import to_wire, verdict

    violation = outcome.violation
    assert violation is not None
    kept = Kept.of(outcome)
    result: dict[str, Any] = {"again": again, "violation": to_wire(violation)}
    width = max(80, min(160, shutil.get_terminal_size((118, 40)).columns - 2))
    if options.shrink:
        kept, outcome, result["shrink_runs"] = _shrunk(kept, options)
        assert outcome.violation is not None
        violation = outcome.violation
    if not options.json:
        show("\n" + verdict(violation, outcome.events, width))
        if options.shrink:
            show("\nthe smallest run found that breaks it:\n" + story(kept))
        show(f"\nplay it again: clustermd simulate {again}\n")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        path = options.keep / f"{violation.rule}-{name}.json"
        save(path, kept)
        result["kept"] = str(path)
        if not options.json:
            show(f"kept: clustermd simulate --replay {path}\n")
    if options.shrink:
        result["story"] = story(kept)
    return result


def _shrunk(kept: Kept, options: _Options) -> tuple[Kept, Outcome, int]:
    from clustermd.testing.simulator.kept import replay
    from clustermd.testing.simulator.shrink import shrink

    tty = sys.stderr.isatty() and not options.json

    def told(line: str) -> None:
        if tty:
            sys.stderr.write(f"\r\x1b[Kshrinking, {line}")
            sys.stderr.flush()

    small = shrink(kept, told=told)
    if tty:
        sys.stderr.write("\r\x1b[K")
    return small.kept, replay(small.kept, keep_events=True), small.runs
