"""One run: a plan played to its end over one seed's decisions, judged after every step.

    start      all nodes start and serve
    play       clients and faults, by the plan's times
    mend       every fault is taken back: partitions heal, what is stuck goes on
    survivors  in every other run, those that live come to rest alone: nobody who joins does their work
    settle     machines start, and all must come to rest in bounded virtual time: requests answered, copies equal, bits
               clear, nodes and disks of one opinion
    stop       all arrays stop in order; nothing may be left: locks, windows, buffers, tasks
    look       every sector of every member that counts is compared with the model

What does not hold ends the run with a `Violation`. Whatever stands still for longer than its bound is one too.
"""

from __future__ import annotations

import contextvars
import gc
import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustermd.testing.simulator import atlas
from clustermd.testing.simulator.boxes import Box, Path
from clustermd.testing.simulator.cluster import SimCluster
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.disk_watch import DiskWatch
from clustermd.testing.simulator.loop import PROCESS, SimLoop, Spinning
from clustermd.testing.simulator.machine import ArrayProcess, Machine
from clustermd.testing.simulator.model import Model, ModelBroken, Write
from clustermd.testing.simulator.plan import Plan
from clustermd.testing.simulator.workload import Clients
from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.judge import Judge

START_BOUND_S = 60.0
SETTLE_BOUND_S = 240.0
STOP_BOUND_S = 120.0


class Broken(Exception):
    """Ends a run at its first violation."""


@dataclass(slots=True)
class Outcome:
    """What came of a run. `violation` is None for a good one; `decisions` are all that were drawn."""

    plan: Plan
    violation: Violation | None
    virtual_s: float
    callbacks: int
    faults: Counter[str]
    operations: Counter[str]
    points: Counter[str]
    acknowledged: int
    checked_sectors: int
    decisions: dict[str, list[int]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Death:
    """An array process that died: its writes may land until its end is proved and every living node knows of it."""

    array: ArrayProcess
    writes: list[Write]
    slot: int
    since_s: float
    proved_s: float = -1.0

    def known_to(self, other: ArrayProcess) -> bool:
        """Whether `other` has heard of it, or joined after it was all over."""
        if other.joined_s > self.proved_s:
            return True
        return any(at_s >= self.since_s and slot == self.slot for at_s, slot in other.heard)


class Run:
    """See the module. Faults call its methods."""

    def __init__(self, plan: Plan, dice: Dice, *, keep_events: bool = False) -> None:
        self.plan = plan
        self.dice = dice
        self.keep_events = keep_events
        self.violation: Violation | None = None
        self.events: list[Event] = []
        self.points: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._number = 0
        self.loop = SimLoop(dice.stream("loop"), self._task_failed)  # type: ignore[abstract]
        self.watch = DiskWatch(self._disk_rule)
        self.cluster = SimCluster(plan, dice, self.loop, self.watch, self._point)
        self.cluster.on_started = lambda array: self._settle_deaths()
        self.cluster.on_gone = self._gone
        self.cluster.on_ended = self._ended
        self.cluster.on_excluded = self._excluded
        self.model = Model(plan.array_sectors)
        self.clients = Clients(self.cluster, self.model, self._calm, self._client_failed)
        self.watch.begin(self.cluster.boxes, plan.chunk_bytes, plan.slots)
        self._deaths: list[Death] = []
        self._deadly: list[tuple[str, list[int], float, float]] = []
        self._playing = False
        self._starting = True
        self._log = _LogWatch(self)
        self.judge = Judge()

    # --- reporting --------------------------------------------------------------------------------------

    def broken(self, rule: str, spec: str, layer: Layer, message: str, node: str) -> None:
        """The first one counts; the run ends at the next step."""
        if self.violation is None:
            self.violation = Violation(rule, spec, layer, message, node, self.loop.time(), (self._number,))

    def _disk_rule(self, rule: str, spec: str, layer: Layer, message: str, node: str) -> None:
        self.broken(rule, spec, layer, message, node)

    def _client_failed(self, error: Exception, node: str) -> None:
        if isinstance(error, ModelBroken):
            self.broken(error.rule, "9.1", Layer.ARRAY, error.message, node)
        else:
            self.broken("simulator-error", "-", Layer.ARRAY, repr(error), node)

    def _task_failed(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.broken("unexpected-error", "-", Layer.ARRAY, f"{context.get('message')}: {error!r}", "")

    # --- points -----------------------------------------------------------------------------------------

    def _point(self, machine: Machine, name: str, fields: dict[str, Any]) -> None:
        self.tell(machine.name, name, fields)
        array = machine.array
        if array is not None and name in ("cluster.lost", "join.member", "join.gathered"):
            if name == "join.member":
                array.last_slot = fields["slot"]
                array.broken_s = array.ended_s = -1.0
            elif name == "join.gathered":
                array.joined_s = self.loop.time()
            else:
                array.heard.append((self.loop.time(), fields["slot"]))
            if self._deaths:
                self._settle_deaths()
        if self._deadly and self._playing:
            self._perhaps_die(machine, name)

    def tell(self, node: str, name: str, fields: dict[str, Any]) -> None:
        """An event of the trace: kept if wanted, and judged."""
        self._number += 1
        self.points[name] += 1
        event = Event(self._number, self.loop.time(), node, name, fields)
        if self.keep_events:
            self.events.append(event)
        for violation in self.judge.see(event):
            if self.violation is None:
                self.violation = violation

    def _perhaps_die(self, machine: Machine, name: str) -> None:
        for entry in self._deadly:
            point, skip, down_s, detect_s = entry
            if point != name:
                continue
            if skip[0]:
                skip[0] -= 1
                continue
            self._deadly.remove(entry)
            self.faults["kill-at " + name] += 1
            self.kill(machine, detect_s)
            self.later(down_s, self.start, machine)
            return

    # --- deaths -----------------------------------------------------------------------------------------

    def _gone(self, array: ArrayProcess) -> None:
        """An array process has ended, by death or in order."""
        array.serving = False
        writes = self.clients.process_gone(array)
        if not array.killed:
            self.model.close(writes)  # it let everything land before it ended
        elif not array.excluded or writes:
            self.tell(array.machine.name, "process.died", {})
            if array.last_slot >= 0 or writes:
                self.clients.orphaned(array.machine)
                death = Death(array, writes, array.last_slot, array.broken_s)
                if all(link.over for link in array.links) and not array.submitter.in_flight:
                    # it died between two lives
                    death.proved_s = array.ended_s if array.ended_s >= 0 else self.loop.time()
                self._deaths.append(death)
        self._settle_deaths()

    def _excluded(self, array: ArrayProcess) -> None:
        """The boxes refuse a process that lives on: for all others it is dead, and its clients' writes are in doubt."""
        self.tell(array.machine.name, "process.died", {})
        array.serving = False
        if array.broken_s < 0:
            array.broken_s = self.loop.time()
        self.clients.orphaned(array.machine)
        self._deaths.append(Death(array, self.clients.process_gone(array), array.last_slot, array.broken_s))

    def _ended(self, array: ArrayProcess) -> None:
        """Nothing of that array process, or of a former life of it, can land any more."""
        array.ended_s = self.loop.time()
        over = array.excluded or (not array.process.alive and not array.submitter.in_flight)
        if over:
            self.tell(array.machine.name, "process.drained", {})
        for death in self._deaths:
            if death.array is array and death.proved_s < 0 and (over or not array.submitter.in_flight):
                death.proved_s = self.loop.time()
        self._settle_deaths()

    def _settle_deaths(self) -> None:
        living = [
            machine.array
            for machine in self.cluster.machines.values()
            if machine.array is not None and machine.serving and machine.array.broken_s < 0
        ]
        for death in list(self._deaths):
            if death.proved_s >= 0 and all(death.known_to(array) for array in living):
                self._deaths.remove(death)
                self.model.close(death.writes)
                self.clients.recovered(death.array.machine.number)

    def _calm(self) -> bool:
        return not self._deaths

    # --- what faults do ------------------------------------------------------------------------------------

    def later(self, delay_s: float, what: Callable[..., Any], *args: Any) -> None:
        self.loop.later(delay_s, what, *args)

    def kill(self, machine: Machine, detect_s: float) -> None:
        self.cluster.kill(machine, detect_s)

    def _may_start(self, machine: Machine) -> bool:
        array = machine.array
        return self.cluster.restarts and (self._starting or (array is not None and array.process.alive))

    def start(self, machine: Machine) -> None:
        if not machine.paused and self._may_start(machine):
            self.cluster.start(machine)

    def start_array(self, machine: Machine) -> None:
        if machine.up and not machine.paused and self._may_start(machine):
            self.cluster.start_array(machine)

    def start_lockd(self, machine: Machine) -> None:
        if not machine.paused and self._may_start(machine):
            self.cluster.start_lockd(machine)

    def die_at(self, point: str, skip: int, down_s: float, detect_s: float) -> None:
        self._deadly.append((point, [skip], down_s, detect_s))

    def stop_and_start(self, machine: Machine, down_s: float, leave: bool) -> None:
        def then() -> None:
            if leave and self._playing:
                self.cluster.leave(machine)
            self.later(down_s, self.start, machine)

        self.cluster.stop_array(machine, then)

    def pause(self, machine: Machine, for_s: float, detect_s: float) -> None:
        self.cluster.pause(machine)
        lockd = machine.lockd
        self.later(detect_s, self._miss, machine, lockd)
        self.later(for_s, self._resume, machine, lockd)

    def _miss(self, machine: Machine, lockd: Any) -> None:
        """The group gives a paused machine up."""
        if machine.paused and machine.lockd is lockd:
            if self.plan.durable:
                # its sequencer kills what owes it an answer
                self.kill(machine, 0.001)
                self.later(1.0, self.start, machine)
            else:
                self.cluster.cut_off({machine.number})

    def _resume(self, machine: Machine, lockd: Any) -> None:
        if machine.paused and machine.lockd is lockd:
            self.cluster.resume(machine)
        if not self.plan.durable:
            self.later(0.3, self.cluster.heal, {machine.number})

    def freeze(self, for_s: float) -> None:
        if not self.cluster.group.frozen:
            self.cluster.group.freeze()
            self.later(for_s, self.cluster.thaw)

    def partition(self, cut_off: list[int], for_s: float) -> None:
        self.cluster.cut_off(set(cut_off))
        self.later(for_s, self.cluster.heal, set(cut_off))

    def well(self, path: Path) -> None:
        path.troubles.clear()
        self.release(path)

    def release(self, path: Path) -> None:
        for machine in self.cluster.machines.values():
            if machine.array is not None and path in machine.array.paths:
                machine.array.submitter.release(path)

    def box_lost(self, box: Box) -> None:
        """A box without power: what was on its way there fails."""
        self.watch.read_again()
        for machine in self.cluster.machines.values():
            if machine.array is not None and machine.array.process.alive:
                for path in machine.array.paths:
                    if path.box is box:
                        machine.array.submitter.release(path)

    def blackout(self, down_s: float) -> None:
        for machine in self.cluster.machines.values():
            self.cluster.kill(machine, 0.01)
            if machine.array is not None:
                machine.array.submitter.cut_off()
        for box in self.cluster.boxes:
            box.lose_power()
        self.model.power_lost()
        self.watch.read_again()
        for machine in self.cluster.machines.values():
            self.later(down_s, self.start, machine)

    # --- the run ------------------------------------------------------------------------------------------

    def play(self) -> Outcome:
        """The whole run."""
        gc_was = gc.isenabled()
        gc.disable()
        self._log.begin()
        try:
            try:
                self._all_phases()
            except Broken:
                pass
            except Spinning as error:
                self.broken("spinning", "-", Layer.ARRAY, str(error), "")
            except ModelBroken as error:
                self.broken(error.rule, "9.1", Layer.ARRAY, error.message, "")
        finally:
            self.cluster.close()
            self.loop.close()
            self._log.end()
            if gc_was:
                gc.enable()
        return Outcome(
            plan=self.plan,
            violation=self.violation,
            virtual_s=self.loop.time(),
            callbacks=self.loop.callbacks,
            faults=self.faults,
            operations=Counter(self.clients.counts),
            points=self.points,
            acknowledged=self.model.acknowledged,
            checked_sectors=self.model.checked_sectors,
            decisions=self.dice.record,
            events=self.events,
        )

    def _until(self, done: Callable[[], bool], bound_s: float, what: str) -> None:
        end_s = self.loop.time() + bound_s
        if not self.loop.run(lambda: self.violation is not None or done(), end_s) and self.violation is None:
            self.broken("hang", "I24", *self._who_waits(what))
        if self.violation is not None:
            raise Broken

    def _all_phases(self) -> None:
        machines = list(self.cluster.machines.values())
        for machine in machines:
            self.cluster.start(machine)
        self._until(lambda: all(machine.serving for machine in machines), START_BOUND_S, "the first start")
        self._play_steps()
        self._mend()
        self._rest_of_survivors()
        for machine in machines:
            self.start(machine)
        self._until(self._at_rest, SETTLE_BOUND_S, "coming to rest")
        self._check_rest()
        self._stop_all()
        self._look()

    def _play_steps(self) -> None:
        begin_s = self.loop.time()
        end_s = begin_s
        for step in self.plan.work:
            self.loop.call_at(begin_s + step.at_s, self.clients.do, step, context=contextvars.Context())
            end_s = max(end_s, begin_s + step.at_s)
        for step in self.plan.faults:
            self.loop.call_at(
                begin_s + step.at_s, self._fault, step.what, step.args, context=contextvars.Context()
            )
            end_s = max(end_s, begin_s + step.at_s)
        self._playing = True
        over = [False]
        self.loop.call_at(end_s + 0.5, over.__setitem__, 0, True, context=contextvars.Context())
        self._until(lambda: over[0], end_s - begin_s + 10, "the play")
        self._playing = False

    def _fault(self, what: str, args: dict[str, Any]) -> None:
        self.faults[what] += 1
        atlas.KINDS[what].do(self, args)

    def _mend(self) -> None:
        cluster = self.cluster
        self._deadly.clear()
        cluster.thaw()
        for machine in cluster.machines.values():
            if machine.paused:
                cluster.resume(machine)
        cluster.heal(set(cluster.machines))
        for machine in cluster.machines.values():
            machine.lost_paths.clear()
            if machine.lockd is not None:
                machine.lockd.port.slow_s = 0.0
            array = machine.array
            if array is not None:
                array.submitter.pause_s = 0.0
                for path in array.paths:
                    path.lost_path = False
                    path.troubles.clear()
                    array.submitter.release(path)

    def _rest_of_survivors(self) -> None:
        """What a death or a stop leaves is the business of those that stay, whether anybody comes back or not."""
        machines = self.cluster.machines.values()
        alive = [
            machine
            for machine in machines
            if machine.array is not None and machine.array.process.alive and not machine.array.excluded
        ]
        self._starting = False
        for machine in alive:
            self.cluster.start_lockd(machine)
        quorate = self.plan.durable or len(alive) >= self.cluster.group.majority
        if alive and quorate and self.dice.stream("mend").below(2):
            self._until(lambda: self._at_rest(alone=True), SETTLE_BOUND_S, "the survivors' coming to rest")
            self._check_rest()
        self._starting = True

    # --- rest ---------------------------------------------------------------------------------------------

    def _at_rest(self, *, alone: bool = False) -> bool:
        if self.clients.pending or self._deaths:
            return False
        for machine in self.cluster.machines.values():
            array = machine.array
            if alone and (array is None or not array.process.alive):
                continue
            if array is None or array.array is None or not machine.serving:
                return False
            state = array.array.state
            if state.held or not state.settled or state.unpublished or state.parked:
                return False
            bitmap = state.bitmap
            if bitmap is None or bitmap.unreconciled or state.windows.any or array.submitter.in_flight:
                return False
            if not state.degraded and not bitmap.all_clean:
                return False
            if array.array.resync.status() is not None or tuple(array.array.coordinator.takeovers()):
                return False
        return True

    def _check_rest(self) -> None:
        if self.watch.differing:
            self.broken(
                "members-differ",
                "9.1",
                Layer.ARRAY,
                f"at rest, chunks {sorted(self.watch.differing)} differ",
                "",
            )
        for place in self.watch.in_sync:
            self.model.check_disk(f"box{place} at rest", self.watch.data_of(place))
        self._check_nodes()
        if self.violation is not None:
            raise Broken

    def _check_nodes(self) -> None:
        """What all nodes hold true stands on the disks, and no bit waits for an owner."""
        owned = set()
        good = sorted(self.cluster.boxes[place].name for place in self.watch.in_sync)
        for machine in self.cluster.machines.values():
            if machine.array is None or machine.array.array is None or not machine.serving:
                continue
            state = machine.array.array.state
            owned.add(state.slot)
            counted = sorted(member.path for member in state.in_sync)
            if counted != good:
                words = f"{machine.name} counts {counted} as in sync, the superblocks {good}"
                self.broken("roles-differ", "I11", Layer.CLUSTER, words, machine.name)
        left = sorted(set(self.watch.bits_left()) - owned)
        if left and owned:
            words = f"slots {left} have bits, and nobody who lives owns them"
            self.broken("bits-of-nobody", "I19", Layer.CLUSTER, words, "")

    def _stop_all(self) -> None:
        self.cluster.restarts = False
        left = [machine for machine in self.cluster.machines.values() if machine.serving]
        draw = self.dice.stream("stop")
        while left:
            machine = left.pop(draw.below(len(left)))
            array = machine.array
            assert array is not None
            over: list[bool] = []
            self.cluster.stop_array(machine, lambda over=over: over.append(True))  # type: ignore[misc]
            self._until(lambda over=over: bool(over), STOP_BOUND_S, f"the stop of {machine.name}")  # type: ignore[misc]
            self._check_left(machine, array)
        self._until(self._no_locks, STOP_BOUND_S, "the end of the lockspace")

    def _no_locks(self) -> bool:
        return not any(
            machine.lockd.replica._machine.engine.spaces
            for machine in self.cluster.machines.values()
            if machine.lockd is not None and machine.lockd.process.alive
        )

    def _check_left(self, machine: Machine, array: ArrayProcess) -> None:
        tasks = [
            task.get_name() for task in array.process.tasks if not task.done() and task.get_name() != "stop"
        ]
        if tasks:
            self.broken("tasks-left", "leak", Layer.ARRAY, f"after its stop {tasks} go on", machine.name)
        if array.submitter.memory.out:
            self.broken(
                "buffers-left",
                "leak",
                Layer.ARRAY,
                f"after its stop {array.submitter.memory.out} buffers were never given back",
                machine.name,
            )

    def _look(self) -> None:
        for place in self.watch.in_sync:
            self.model.check_disk(f"box{place} after the stop", self.watch.data_of(place))
        if self.watch.differing:
            self.broken("members-differ", "9.1", Layer.ARRAY, "after the stop members differ", "")
        left = self.watch.bits_left()
        if left and len(self.watch.in_sync) == self.plan.raid_disks:
            self.broken(
                "bits-left", "I19", Layer.ARRAY, f"after all stops slots {sorted(left)} have bits", ""
            )

    def _who_waits(self, what: str) -> tuple[Layer, str, str]:
        """Words for whatever stands still, and whose fault it most likely is."""
        said = []
        layer = Layer.ARRAY
        for machine in self.cluster.machines.values():
            array = machine.array
            lockd = machine.lockd
            words = []
            if lockd is None or not lockd.process.alive:
                words.append("no lockd")
            elif not lockd.replica.installed:
                words.append(f"lockd {lockd.replica._phase.value}")
                layer = Layer.LOCK_MANAGER
            if array is None or not array.process.alive:
                words.append("no array process")
            elif not array.serving:
                words.append("not serving" + (f" ({array.why})" if array.why else ""))
                if array.array is not None:
                    words.append(f"held: {array.array.state.held}")
            elif array.array is not None:
                state = array.array.state
                words += [
                    text
                    for wrong, text in (
                        (state.held, f"held: {state.held}"),
                        (not state.settled, "not settled"),
                        (state.unpublished, "faults unpublished"),
                        (state.parked, f"{len(state.parked)} requests parked"),
                        (state.windows.any, f"windows {state.windows.all()}"),
                        (array.submitter.in_flight, f"{array.submitter.in_flight} requests in flight"),
                        (state.bitmap is None, "no bitmap"),
                        (
                            state.bitmap is not None and state.bitmap.unreconciled,
                            f"{len(state.bitmap.unreconciled) if state.bitmap else 0} chunks to copy",
                        ),
                        (
                            state.bitmap is not None and not state.degraded and not state.bitmap.all_clean,
                            "bits left",
                        ),
                        (tuple(array.array.coordinator.takeovers()), "takeovers outstanding"),
                        (array.array.resync.status(), f"resync {array.array.resync.status()}"),
                    )
                    if wrong
                ]
            said.append(f"{machine.name}: {', '.join(words) or 'at rest'}")
        if self.clients.pending:
            said.append(f"{len(self.clients.pending)} requests unanswered")
        if self._deaths:
            said.append(
                f"deaths that not all know of: {[death.array.machine.name for death in self._deaths]}"
            )
        return layer, f"{what} is not over after its bound; " + "; ".join(said), ""


class _LogWatch(logging.Handler):
    """Errors that production code catches, logs and outlives are found here."""

    def __init__(self, run: Run) -> None:
        super().__init__(logging.ERROR)
        self._run = run
        self._logger = logging.getLogger("clustermd")

    def begin(self) -> None:
        self._was = self._logger.propagate, self._logger.level
        self._logger.propagate = False
        self._logger.setLevel(logging.ERROR)
        self._logger.addHandler(self)

    def end(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate, level = self._was
        self._logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get()
        if process is not None and not process.alive:
            return  # it unwinds
        if record.exc_info and record.exc_info[0] is not None:
            where = traceback.format_exception(*record.exc_info)[-4:]
            self._run.broken(
                "unexpected-error", "-", Layer.ARRAY, f"{record.getMessage()}: {''.join(where)}", record.name
            )


def run_seed(seed: int, *, operations: int = 250, faults: int = 10, keep_events: bool = False) -> Outcome:
    """The run of a seed."""
    dice = Dice(seed)
    plan = atlas.draw_plan(seed, dice, operations, faults)
    return Run(plan, dice, keep_events=keep_events).play()
