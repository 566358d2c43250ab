"""Many seeds, on as many processors as one likes, and what they add up to.

`campaign(seeds)` yields a report for each run as it ends; closing the generator stops everything. `Summary` adds
reports up: runs, virtual hours, operations, faults by kind, trace points, the crash points of appendix D that were
reached, violations by rule. A report is small; a run that broke something is played again from its seed by
whoever wants its events.

Workers are processes of their own (spawned, so nothing of the caller is in them), at a low priority.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from clustermd.testing.simulator import atlas
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.machine import ArrayProcess, Machine
from clustermd.testing.simulator.run import Outcome, Run
from clustermd.testing.trace.events import Layer, Violation
from clustermd.testing.trace.points import STEPS, Reached
from clustermd.testing.trace.verdict import to_wire

OPERATIONS = 250
FAULTS = 10
NICENESS = 10
KILLED_AT = "kill-at "
"""Before the point's name: how a run counts a `kill-at` that met its point; by its bare name, those that were set."""
BATCH = 4
"""Seeds that a worker plays before it reports: few enough for a steady progress bar."""

STEP_NAMES = frozenset(
    name
    for step in STEPS
    for name in (*step.points, *step.until, *((step.since[0],) if step.since is not None else ()))
)
"""Points that say something of a step of appendix D; most points do not."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one seed came to. `steps` are those of appendix D; `peak_rss_bytes` is of its worker process so far."""

    seed: int
    violation: Violation | None
    virtual_s: float
    cpu_s: float
    callbacks: int
    acknowledged: int
    checked_sectors: int
    operations: Counter[str]
    faults: Counter[str]
    points: Counter[str]
    steps: Counter[str]
    peak_rss_bytes: int


class Reaching:
    """Listens to a run for the steps of appendix D that its nodes come to."""

    def __init__(self, run: Run) -> None:
        self.reached = Reached()
        self._inner = run.cluster.listener
        self._gone = run.cluster.on_gone
        run.cluster.listener = self._point
        run.cluster.on_gone = self._ended

    def _point(self, machine: Machine, name: str, fields: dict[str, Any]) -> None:
        if name in STEP_NAMES:
            self.reached.see(machine.name, name, fields)
        self._inner(machine, name, fields)

    def _ended(self, array: ArrayProcess) -> None:
        self.reached.gone(array.machine.name)
        self._gone(array)


def peak_rss_bytes() -> int:
    """The most memory this program ever had. Not by getrusage(2), which also counts what its parent had at the fork."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def play_seed(seed: int, operations: int = OPERATIONS, faults: int = FAULTS) -> Report:
    """Play one seed and sum it up. An error of the simulator itself is a violation too: nothing was proved."""
    began_s = time.process_time()
    dice = Dice(seed)
    plan = atlas.draw_plan(seed, dice, operations, faults)
    run = Run(plan, dice)
    reaching = Reaching(run)
    outcome: Outcome | None = None
    violation: Violation | None
    try:
        outcome = run.play()
        violation = outcome.violation
    except Exception:
        words = " ".join(traceback.format_exc(limit=-3).split())
        violation = Violation("simulator-error", "-", Layer.DEVICE, words, "", run.loop.time())
    report = Report(
        seed=seed,
        violation=violation,
        virtual_s=run.loop.time(),
        cpu_s=time.process_time() - began_s,
        callbacks=run.loop.callbacks,
        acknowledged=run.model.acknowledged,
        checked_sectors=run.model.checked_sectors,
        operations=Counter(run.clients.counts),
        faults=run.faults,
        points=run.points,
        steps=reaching.reached.counts,
        peak_rss_bytes=peak_rss_bytes(),
    )
    del run, reaching, outcome
    gc.collect()  # a run is one web of cycles; they must not pile up
    return report


def _play_batch(seeds: list[int], operations: int, faults: int, starter: int) -> list[Report]:
    reports = []
    for seed in seeds:
        if os.getppid() != starter:
            os._exit(1)  # whoever wanted this was killed
        reports.append(play_seed(seed, operations, faults))
    return reports


def workers(jobs: int) -> ProcessPoolExecutor:
    """`jobs` processes of their own at a low priority. Shut it down with `cancel_futures` to stop before the end."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_worker)


def _begin_worker() -> None:
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a key press is for who started us
    gc.freeze()  # what is imported stays: a collection looks at the last run only


def campaign(
    seeds: Iterable[int], *, jobs: int = 1, operations: int = OPERATIONS, faults: int = FAULTS
) -> Generator[Report, None, None]:
    """A report for each seed, in the order in which they end. `jobs` 0 plays in this process.

    Close the generator to stop: no new seed is begun, those that are played end first.
    """
    if jobs == 0:
        for seed in seeds:
            yield play_seed(seed, operations, faults)
        return
    left = iter(seeds)
    pool = workers(jobs)
    running: set[Future[list[Report]]] = set()
    try:
        while True:
            while len(running) < 2 * jobs and (batch := list(islice(left, BATCH))):
                running.add(pool.submit(_play_batch, batch, operations, faults, os.getpid()))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(slots=True)
class Summary:
    """What all runs add up to."""

    runs: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    callbacks: int = 0
    acknowledged: int = 0
    checked_sectors: int = 0
    peak_rss_bytes: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    broken: dict[int, Violation] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        self.runs += 1
        self.virtual_s += report.virtual_s
        self.cpu_s += report.cpu_s
        self.callbacks += report.callbacks
        self.acknowledged += report.acknowledged
        self.checked_sectors += report.checked_sectors
        self.peak_rss_bytes = max(self.peak_rss_bytes, report.peak_rss_bytes)
        self.operations.update(report.operations)
        self.faults.update(report.faults)
        self.points.update(report.points)
        self.steps.update(report.steps)
        if report.violation is not None:
            self.broken[report.seed] = report.violation

    def by_rule(self) -> dict[str, list[int]]:
        """Broken rules, each with its seeds."""
        rules: dict[str, list[int]] = {}
        for seed in sorted(self.broken):
            rules.setdefault(self.broken[seed].rule, []).append(seed)
        return rules

    def not_reached(self) -> list[str]:
        """Steps of appendix D that no run came to."""
        return [step.id for step in STEPS if not self.steps[step.id]]

    @property
    def runs_per_cpu_minute(self) -> float:
        return self.runs / self.cpu_s * 60 if self.cpu_s else 0.0

    def text(self) -> str:
        """For people."""
        missing = self.not_reached()
        met = sum(count for name, count in self.faults.items() if name.startswith(KILLED_AT))
        good = self.runs - len(self.broken)
        lines = [
            f"{self.runs} runs, {good} good; {self.virtual_s / 3600:.2f} virtual hours",
            f"clients: {self.operations.total()} operations ({counts(self.operations)}); "
            f"{self.acknowledged} writes acknowledged; {self.checked_sectors} sectors compared with the model",
            f"faults: {counts(self.faults)}"
            + (f"; {met} of the kill-at met their point" if self.faults["kill-at"] else ""),
            f"crash points of appendix D (md-cluster specification): {len(STEPS) - len(missing)} of {len(STEPS)} passed"
            + (f", never {', '.join(missing)}" if missing else ""),
            f"trace: {self.points.total()} events of {len(self.points)} kinds, all judged",
            f"cost: {self.runs_per_cpu_minute:.0f} runs a minute and processor, "
            f"at most {self.peak_rss_bytes >> 20} MiB a process",
        ]
        for rule, seeds in self.by_rule().items():
            shown = " ".join(map(str, seeds[:20])) + (" ..." if len(seeds) > 20 else "")
            violation = self.broken[seeds[0]]
            where = f"{violation.spec}, {violation.layer.value} layer"
            counted = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
            lines.append(f"BROKEN {rule} ({where}), {counted}: {shown}")
        if not self.broken:
            lines.append("violations: none")
        return "\n".join(lines) + "\n"

    def to_wire(self) -> dict[str, Any]:
        """For programs."""
        return {
            "runs": self.runs,
            "virtual_s": round(self.virtual_s, 3),
            "cpu_s": round(self.cpu_s, 3),
            "callbacks": self.callbacks,
            "acknowledged_writes": self.acknowledged,
            "checked_sectors": self.checked_sectors,
            "peak_rss_bytes": self.peak_rss_bytes,
            "operations": dict(self.operations),
            "faults": dict(self.faults),
            "points": dict(self.points),
            "crash_points": {step.id: self.steps[step.id] for step in STEPS},
            "violations": [{"seed": seed, **to_wire(self.broken[seed])} for seed in sorted(self.broken)],
        }


def counts(counter: Counter[str]) -> str:
    """`kill 31, stop 20`, the most frequent first; kinds with a place (`kill-at x`) together."""
    together: Counter[str] = Counter()
    for name, count in counter.items():
        if " " not in name:
            together[name] += count
    return ", ".join(f"{name} {count}" for name, count in together.most_common()) or "none"
