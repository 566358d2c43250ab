"""`clustermd simulate`: play simulated clusters through crashes, partitions and torn writes, and judge every step.

Each seed is one cluster with its clients and its faults. A run that breaks a rule is told with its seed, the rule, the
layer whose bug that is, and a time table of what led there; it can be made small and kept in a file.
Exit status 0 means that every rule held in every run, 1 that one did not.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clustermd.cli.output import say, show, show_json
from clustermd.cli.simulate_progress import Progress
from clustermd.cli.simulate_words import HELP, Options, parse
from clustermd.errors import BadBytes

if TYPE_CHECKING:
    from clustermd.testing.simulator.campaign import Summary
    from clustermd.testing.simulator.crash_report import Report
    from clustermd.testing.simulator.kept import Kept
    from clustermd.testing.simulator.run import Outcome

BROKEN = 1
UNREADABLE = 2
INTERRUPTED = 130
_DRAWN = 3
_MINUTES = 1.0
_FRESH_SEEDS = 1 << 40
_NODES = (1, 2, 3)


def run(words: Sequence[str]) -> int:
    """The verb. The exit status."""
    if "-h" in words or "--help" in words:
        show(HELP)
        return 0
    options = parse(words)
    if options.crash_points:
        return _crash_points(options)
    if options.replay is not None or options.seed is not None:
        return _one(options)
    return _many(options)


def _jobs(options: Options) -> int:
    return options.jobs or len(os.sched_getaffinity(0))


def _processes(jobs: int) -> str:
    return f"{jobs} process{'es' if jobs > 1 else ''}"


def _width() -> int:
    return max(80, min(160, shutil.get_terminal_size((118, 40)).columns - 2))


# --- every crash point --------------------------------------------------------------------------------------------


def _crash_points(options: Options) -> int:
    from clustermd.testing.simulator.crash_points import crash_points
    from clustermd.testing.simulator.crash_report import Report

    nodes = options.nodes or _NODES
    depth = 1 if options.depth is None else options.depth
    jobs = _jobs(options)
    progress = Progress()
    report = Report(nodes)
    told = 0

    def played(so_far: Report, known: int) -> None:
        nonlocal report, told
        report = so_far
        if options.json:
            return
        for story, violation in report.violations[told:]:
            progress.line(f"{violation}\n    in: {story}")
        told = len(report.violations)
        progress.show(report.runs, known, told)

    if not options.json:
        counted = ", ".join(map(str, nodes))
        show(f"a death at every crash point, with {counted} nodes, depth {depth}, {_processes(jobs)}\n")
    interrupted = False
    try:
        report = crash_points(nodes, depth=depth, jobs=jobs, progress=played)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.clear()
    if interrupted:
        say("interrupted; this is what was played until then")
    if options.json:
        wire = report.to_wire()
        show_json(crash_points=wire, depth=depth, nodes=list(nodes), interrupted=interrupted)
    else:
        _draw_stories(report)
        show("\n" + report.text())
    if report.violations or not (interrupted or report.good):
        return BROKEN
    return INTERRUPTED if interrupted else 0


def _draw_stories(report: Report) -> None:
    """Play the first stories that broke a rule again, each with the events that show it."""
    from clustermd.testing.simulator.crash_stories import play_story
    from clustermd.testing.trace.verdict import verdict

    for story, _ in report.violations[:_DRAWN]:
        outcome = play_story(story, keep_events=True).outcome
        if outcome.violation is not None:
            show(f"\n{story}\n{verdict(outcome.violation, outcome.events, _width())}")


# --- many seeds ---------------------------------------------------------------------------------------------------


def _many(options: Options) -> int:
    from clustermd.testing.simulator.campaign import Summary, campaign

    jobs = _jobs(options)
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
    progress = Progress(end_s)
    if not options.json:
        show(f"{what}, {_processes(jobs)}\n")
    reports = campaign(seeds, jobs=jobs)
    interrupted = False
    try:
        for report in reports:
            summary.add(report)
            if report.violation is not None and not options.json:
                progress.line(f"seed {report.seed}: {report.violation}")
            if not options.json:
                progress.show(summary.runs, total, len(summary.broken))
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


def _look_closer(summary: Summary, options: Options) -> list[dict[str, Any]]:
    """Play the first seed of each broken rule again, with its events."""
    from clustermd.testing.simulator.run import run_seed

    results = []
    for place, seeds in enumerate(summary.by_rule().values()):
        wanted = options.shrink or options.keep is not None or (place < _DRAWN and not options.json)
        if wanted and summary.broken[seeds[0]].rule != "simulator-error":
            outcome = run_seed(seeds[0], keep_events=True)
            results.append(_told(outcome, f"--seed {seeds[0]}", f"seed-{seeds[0]}", options))
    return results


# --- one run --------------------------------------------------------------------------------------------------------


def _one(options: Options) -> int:
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


def _told(outcome: Outcome, again: str, name: str, options: Options) -> dict[str, Any]:
    """Tell of a run that broke a rule; shrink and keep it if that is wanted. The same for programs."""
    from clustermd.testing.simulator.kept import Kept, save
    from clustermd.testing.simulator.story import story
    from clustermd.testing.trace.verdict import to_wire, verdict

    violation = outcome.violation
    assert violation is not None
    kept = Kept.of(outcome)
    result: dict[str, Any] = {"again": again, "violation": to_wire(violation)}
    if options.shrink:
        kept, outcome, result["shrink_runs"] = _shrunk(kept, options)
        assert outcome.violation is not None
        violation = outcome.violation
    if not options.json:
        show("\n" + verdict(violation, outcome.events, _width()))
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


def _shrunk(kept: Kept, options: Options) -> tuple[Kept, Outcome, int]:
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
