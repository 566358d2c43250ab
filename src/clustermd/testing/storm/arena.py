"""Where a storm happens: a cluster under load, and the few things that can be done to it.

An arena keeps the books that a judge of a storm needs: which processes were killed or held on purpose (any other
that ends is a finding), which commands are still out, in which intervals clients could not be served because
the storm itself held everything, and what was done when, for people.

`kill(..., differ=True)` makes the crash as bad as it may be (`testing.crash_states`): everything else is held, the last
request of the dead lands, and what they had in flight is left old on one half and new on the others. That
is legal only under bits of the slot in which the dead array served, which its trace tells.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.errors import Refused
from clustermd.testing.crash_states import make_halves_differ
from clustermd.testing.disks import dirty_chunks, look, writers_of
from clustermd.testing.exerciser import Report
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster, Node, Process
from clustermd.testing.storm.instant import Ledger, faults_now
from clustermd.testing.waiting import wait_until
from clustermd.testing.write_log import knowledge_of_logs

MIB = 1 << 20
LAND_S = 20.0
FULL_SPEED_KIB_S = (1000, 200000)


class Finding(AssertionError):
    """Something that must not be, with what is known about it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a storm is made of. Drawn from the seed by `storm.plan_of`. Disks are slow only under threads."""

    seed: int
    members: int
    slots: int
    disk_mib: int
    rate: int
    depth: int
    hot_blocks: int
    chunk_kib: int
    side_by_side: bool
    unresponsive_s: float
    linger_s: float
    threads: bool
    slow_ms: int

    @property
    def load(self) -> tuple[str, ...]:
        """The options of each exerciser."""
        hot = str(self.hot_blocks)
        pace = ("--rate", str(self.rate), "--depth", str(self.depth), "--hot-blocks", hot)
        # Everybody's hot blocks are among the first ones when loads lie side by side, else the first node's.
        return (*pace, "--cross-read-percent", "10", "--cross-blocks", "0..2048")

    @property
    def environment(self) -> dict[str, str]:
        inside = str(Path(__file__).with_name("inside"))
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, [inside, os.environ.get("PYTHONPATH")])),
            "CLUSTERMD_TRACE": "1",
            "CLUSTERMD_UNRESPONSIVE_S": str(self.unresponsive_s),
            "CLUSTERMD_LINGER_S": str(self.linger_s),
            "CLUSTERMD_IO": "threads" if self.threads else "auto",
            "CLUSTERMD_STORM_SLOW_MS": str(self.slow_ms) if self.threads else "",
        }


@dataclass(slots=True)
class Command:
    """A command of a node that runs beside the storm. `bound_s`: it must have ended by then, faults or not."""

    node: Node
    words: tuple[str, ...]
    program: subprocess.Popen[bytes]
    output: Path
    begun_s: float
    bound_s: float | None = None

    @property
    def status(self) -> int | None:
        return self.program.poll()

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def __str__(self) -> str:
        return f"{self.node.name}: clustermd {' '.join(Path(word).name for word in self.words)}"


@dataclass(slots=True)
class _Later:
    due_s: float
    what: str
    action: Callable[[], None]


@dataclass(slots=True)
class Arena:
    """The state of a storm. `say` is told what happens; times are CLOCK_MONOTONIC."""

    plan: Plan
    cluster: LocalCluster
    say: Callable[[str], None]
    disks: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    loads: dict[str, Load] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    reports: list[tuple[Node, Report]] = field(default_factory=list)
    held_ns: list[tuple[int, int]] = field(default_factory=list)
    excused: set[int] = field(default_factory=set)
    known: dict[int, Process] = field(default_factory=dict)
    stopped: dict[int, Process] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    changes: int = 0
    _reporting: set[str] = field(default_factory=set)
    _leaving: set[str] = field(default_factory=set)
    _later: list[_Later] = field(default_factory=list)
    _count: int = 0

    # --- time

    def pass_time(self, seconds: float) -> None:
        """Let the storm go on for so long; what is due happens meanwhile."""
        end_s = time.monotonic() + seconds

        def over() -> bool:
            now_s = time.monotonic()
            for each in [each for each in self._later if each.due_s <= now_s]:
                self._later.remove(each)
                self.say(each.what)
                each.action()
            self.watch_commands()
            return now_s >= end_s

        wait_until(over, "time to pass", seconds + 120)

    def later(self, delay_s: float, what: str, action: Callable[[], None]) -> None:
        self._later.append(_Later(time.monotonic() + delay_s, what, action))

    def calm(self) -> None:
        """No more faults: what was to happen does not, but whoever is held may go on."""
        self._later.clear()
        self._stop_at.unlink(missing_ok=True)
        self.stopped_at_point()
        self.let_go()
        for node in self.nodes:
            self.limit_speed(node, *FULL_SPEED_KIB_S)

    # --- processes

    def processes(self, node: Node | None = None, role: str | None = None) -> list[Process]:
        """Who runs; everybody seen is remembered, so that an end nobody asked for is noticed."""
        found = self.cluster.processes(None if node is None else node.name, role)
        self.known.update((process.pid, process) for process in found)
        return found

    def array(self, node: Node) -> Process | None:
        return next(iter(self.processes(node, "array")), None)

    def unasked_ends(self) -> list[Process]:
        """Processes that ended although nobody killed, stopped or held them for long."""
        return [
            process
            for pid, process in self.known.items()
            if pid not in self.excused and not process.alive and not self._ended_by_itself(process)
        ]

    def _ended_by_itself(self, process: Process) -> bool:
        """Whether its log says that it was not needed, or that it never served."""
        root = self.cluster.run_directory
        if process.role == "array":
            lines = _lines_with(self.cluster.node(process.node).files().log, f" {process.pid} ")
            return not any("is started with" in line for line in lines)
        log = root / "sequencer.log" if process.role == "sequencer" else root / process.node / "lockd.log"
        lines = _lines_with(log, f"[{process.pid}]")
        return not lines or lines[-1].endswith("] ended")

    def hold(self, processes: Sequence[Process], seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`. Held for long, they may be killed by those who wait for them."""
        for process in processes:
            if seconds > self.plan.unresponsive_s / 2:
                self.excused.add(process.pid)
            process.send(signal.SIGSTOP)
            self.stopped[process.pid] = process
        self.later(seconds, f"SIGCONT {names(processes)}", lambda: self.let_go(processes))

    def let_go(self, processes: Sequence[Process] | None = None) -> None:
        for process in list(self.stopped.values()) if processes is None else processes:
            if self.stopped.pop(process.pid, None) is not None:
                process.send(signal.SIGCONT)

    @property
    def _stop_at(self) -> Path:
        return self.cluster.run_directory / "stop_at"

    def stop_at(self, point: str, node: Node | None, skip: int) -> None:
        """The first process (of `node`) to pass `point`, after `skip` times, stops there (`inside`)."""
        self._count += 1
        wanted = {
            "point": point,
            "node": "" if node is None else node.name,
            "skip": skip,
            "number": self._count,
        }
        new = self._stop_at.with_name("stop_at.new")
        new.write_text(json.dumps(wanted))
        new.rename(self._stop_at)

    def stopped_at_point(self) -> Process | None:
        """Who has stopped at the point. It counts as held then, and nobody else will stop."""
        for claim in self.cluster.run_directory.glob("stop_at.[0-9]*"):
            process = self.known.get(int(claim.suffix[1:]))
            if process is None:
                self.processes()
                process = self.known.get(int(claim.suffix[1:]))
            claim.unlink()
            if process is not None:
                self._await_still([process])
                self.stopped[process.pid] = process
                return process
        return None

    def _await_still(self, processes: Sequence[Process]) -> None:
        still = f"{names(processes)} to stand still"
        wait_until(lambda: all(process.still for process in processes), still, LAND_S)

    def forget_point(self) -> None:
        """Nobody came by."""
        self._stop_at.unlink(missing_ok=True)

    @contextmanager
    def everything_held(self, but: Collection[int]) -> Iterator[None]:
        """Nobody moves, except processes in `but`."""
        since_ns = time.monotonic_ns()
        held = [p for p in self.processes() if p.pid not in self.stopped and p.pid not in but]
        for process in held:
            process.send(signal.SIGSTOP)
        self._await_still(held)
        try:
            yield
        finally:
            for process in held:
                process.send(signal.SIGCONT)
            self.held_ns.append((since_ns, time.monotonic_ns()))

    # --- ends

    def kill(self, victims: Sequence[Process], differ: bool = False) -> None:
        """SIGKILL to all at once. `differ`: leave the halves different where this crash may do so."""
        self.excused.update(victim.pid for victim in victims)
        arrays = [
            node for node in self.nodes if any(v.role == "array" and v.node == node.name for v in victims)
        ]
        if not differ or not arrays:
            self._kill(victims)
            return
        with self.everything_held({victim.pid for victim in victims}):
            self._kill(victims)
            numbers = self._numbers()
            dead = {numbers[node.name] for node in arrays if node.name in numbers}
            wait_until(
                lambda: not any(writers_of(disk) & dead for disk in self.disks),
                "last requests to land",
                LAND_S,
            )
            self._check_instant()
            for node in arrays:
                self._make_differ(node)

    def look_closely(self) -> None:
        """Hold everybody and look at the disks (`instant`)."""
        with self.everything_held(()):
            self._check_instant()

    def _check_instant(self) -> None:
        if wrong := faults_now(list(self.ledgers.values()), self.disks):
            raise Finding("at this instant: " + "; ".join(wrong))

    def _kill(self, victims: Sequence[Process]) -> None:
        for victim in victims:
            victim.send(signal.SIGKILL)
        wait_until(
            lambda: not any(victim.alive for victim in victims), f"the end of {names(victims)}", LAND_S
        )

    def _numbers(self) -> dict[str, int]:
        lines = (self.cluster.run_directory / "nodes").read_text().splitlines()
        return {name: int(number) for number, name in map(str.split, lines)}

    def _make_differ(self, node: Node) -> None:
        load = self.loads[node.name]
        self.end_load(node)
        slot = served_slot(node)
        if slot is None:
            return
        disk = look(self.disks[0])
        dirty = dirty_chunks(self.disks, slot)
        known = knowledge_of_logs([load.log])
        changes = make_halves_differ(known, self.disks, disk.data_offset_bytes, dirty, disk.chunk_bytes)
        self.changes += len(changes)
        self.say(
            f"  {node.name}: slot {slot} has {len(dirty)} dirty chunks; {len(changes)} blocks were changed"
        )

    # --- commands

    def command(self, node: Node, *words: str, bound_s: float | None = None) -> Command:
        """Start a command of a node and go on. It is looked at by `watch_commands`."""
        self._count += 1
        output = self.cluster.directory / f"command{self._count}.out"
        program = self.cluster.start(
            [str(Path(sys.executable).with_name("clustermd")), *words], node.environment, output.name
        )
        command = Command(node, words, program, output, time.monotonic(), bound_s)
        self.commands.append(command)
        return command

    def assemble(self, node: Node) -> Command:
        if self.array(node) is None:
            # A trace that is there afterwards is of the new process.
            node.files().trace.unlink(missing_ok=True)
        self._count += 1
        turn = self._count % len(self.disks)  # the order on the command line means nothing
        return self.command(node, "-A", "md0", *self.disks[turn:], *self.disks[:turn])

    def watch_commands(self) -> None:
        """Forget those that have ended. Raises Finding for one that overstays its bound."""
        for command in list(self.commands):
            took_s = time.monotonic() - command.begun_s
            if command.status is not None:
                self.commands.remove(command)
                if command.status and command.words[0] in ("-A", "-S"):
                    self.say(f"  {command} ended with {command.status}: {command.text().strip()}")
                if "Traceback" in command.text():
                    raise Finding(f"{command} ended with a traceback:\n{command.text()}")
            elif command.bound_s is not None and took_s > command.bound_s:
                raise Finding(f"{command} has not ended after {took_s:.1f} s and has said:\n{command.text()}")

    def limit_speed(self, node: Node, least_kib_s: int, most_kib_s: int) -> None:
        """Set how fast copies of a node may be."""
        for name, number in (("speed_limit_min", least_kib_s), ("speed_limit_max", most_kib_s)):
            path = node.rundir.node_dir / name
            if path.parent.exists():
                path.write_text(f"{number}\n")

    # --- load

    def start_load(self, node: Node) -> None:
        """Have a client on that node, if it has none that goes on."""
        load = self.loads[node.name]
        if not load.running or node.name in self._leaving:
            self.end_load(node)
            stripe = ["--stripe", f"4/{load.number - 1}/{len(self.nodes)}"] if self.plan.side_by_side else []
            load.launch(*self.plan.load, *stripe)
            self._reporting.add(node.name)

    def ask_load_to_stop(self, node: Node) -> None:
        if self.loads[node.name].running:
            self.loads[node.name].ask_to_stop()
            self._leaving.add(node.name)

    def end_load(self, node: Node) -> None:
        """Take the report of a load whose server died, if it ever was connected."""
        if node.name in self._reporting:
            self.take_report(node)

    def take_report(self, node: Node) -> None:
        """Wait for the end of a load and keep its report. Raises Finding for an error it saw."""
        load = self.loads[node.name]
        asked = node.name in self._leaving
        self._reporting.discard(node.name)
        self._leaving.discard(node.name)
        if asked:
            wait_until(lambda: not load.running, f"the end of the client of {node.name}", LAND_S)
            if not load.report_path.exists():
                return  # it was asked to stop before it had begun
        report = load.report()
        self.reports.append((node, report))
        wrong = [error for error in report.errors if not error.endswith(f"error {SHUT_DOWN}")]
        if wrong:
            raise Finding(f"the client of {node.name} saw: {'; '.join(wrong[:10])}")
        if report.ended == "stuck":
            raise Finding(f"the client of {node.name} waits for {report.in_flight_at_end} answers for ever")

    def serves(self, node: Node) -> bool:
        """Whether the array of a node runs and does not hold I/O."""
        try:
            return not node.status().held
        except Refused:
            return False


SHUT_DOWN = 108
"""ESHUTDOWN: what a forced stop answers to requests that it kept and will never do."""


def _lines_with(log: Path, text: str) -> list[str]:
    if not log.exists():
        return []
    return [line for line in log.read_text(errors="replace").splitlines() if text in line]


def names(processes: Sequence[Process]) -> str:
    """Processes, for people."""
    return ", ".join(
        f"{process.role}{' of ' + process.node if process.node else ''}" for process in processes
    )


def served_slot(node: Node) -> int | None:
    """The slot in which an array process served at its end, None if it served in none."""
    slot: int | None = None
    try:
        lines = node.files().trace.read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        if "array.serving" in line or "array.lost" in line or "join.member" in line:
            point = json.loads(line)
            slot = point["slot"] if point["point"] == "array.serving" else None
    return slot


def sockets_left(root: Path) -> list[str]:
    """Sockets below a run directory."""
    return [str(path) for path in root.rglob("*") if path.is_socket()]
