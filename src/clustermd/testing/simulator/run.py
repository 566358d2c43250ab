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
What faults do is `faults`, who knows of a death `deaths`, what must hold at rest `rest`.
"""

from __future__ import annotations

import contextvars
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustermd.testing.simulator import atlas, faults, rest
from clustermd.testing.simulator.cluster import SimCluster
from clustermd.testing.simulator.deaths import HEARD, Deaths
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.disk_watch import DiskWatch
from clustermd.testing.simulator.log_watch import LogWatch
from clustermd.testing.simulator.loop import SimLoop, Spinning
from clustermd.testing.simulator.machine import Machine
from clustermd.testing.simulator.model import Model, ModelBroken
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


class Run:
    """See the module. `faults` counts by kind; `restarting` is off while only those that live may go on."""

    def __init__(self, plan: Plan, dice: Dice, *, keep_events: bool = False) -> None:
        self.plan = plan
        self.dice = dice
        self.keep_events = keep_events
        self.violation: Violation | None = None
        self.events: list[Event] = []
        self.points: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.playing = False
        self.restarting = True
        self._number = 0
        self.loop = SimLoop(dice.stream("loop"), self._task_failed)  # type: ignore[abstract]
        self.watch = DiskWatch(self.broken)
        self.cluster = SimCluster(plan, dice, self.loop, self.watch, self._point)
        self.model = Model(plan.array_sectors)
        self.watch.too_late = self.model.landed
        self.clients = Clients(self.cluster, self.model, lambda: not self.deaths.open, self._client_failed)
        self.deaths = Deaths(self.cluster, self.model, self.clients, self.tell)
        self.cluster.on_wrong = self._wrong
        self.cluster.counts = self.faults
        self.ambush = faults.Ambush(self)
        self.watch.begin(self.cluster.boxes, plan.chunk_bytes, plan.slots)
        self._log = LogWatch(self._error_logged)
        self.judge = Judge()

    # --- reporting --------------------------------------------------------------------------------------

    def broken(self, rule: str, spec: str, layer: Layer, message: str, node: str) -> None:
        """The first one counts; the run ends at the next step."""
        if self.violation is None:
            self.violation = Violation(rule, spec, layer, message, node, self.loop.time(), (self._number,))

    def _client_failed(self, error: Exception, node: str) -> None:
        if isinstance(error, ModelBroken):
            self.broken(error.rule, "9.1", Layer.ARRAY, error.message, node)
        else:
            self.broken("simulator-error", "-", Layer.ARRAY, repr(error), node)

    def _wrong(self, rule: str, words: str) -> None:
        self.broken(rule, "dlm I29", Layer.LOCK_MANAGER, words, "")

    def _task_failed(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.broken("unexpected-error", "-", Layer.ARRAY, f"{context.get('message')}: {error!r}", "")

    def _error_logged(self, words: str, logger: str) -> None:
        self.broken("unexpected-error", "-", Layer.ARRAY, words, logger)

    def _point(self, machine: Machine, name: str, fields: dict[str, Any]) -> None:
        self.tell(machine.name, name, fields)
        if name in HEARD and machine.array is not None:
            self.deaths.heard(machine.array, name, fields)
        if name == "member.failed":
            self.model.member_failed()
        if self.ambush.waits and self.playing:
            self.ambush.passed(machine, name)

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

    # --- the run ------------------------------------------------------------------------------------------

    def later(self, delay_s: float, what: Callable[..., Any], *args: Any) -> None:
        self.loop.later(delay_s, what, *args)

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
            layer, words = rest.who_waits(self, what)
            self.broken("hang", "I24", layer, words, "")
        self._end_if_broken()

    def _end_if_broken(self) -> None:
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
        self._settle()
        while not self._stop_all():
            self._settle()
        rest.check_stopped(self)

    def _settle(self) -> None:
        self.cluster.restarts = True
        for machine in self.cluster.machines.values():
            faults.start(self, machine)
        if not all(box.powered for box in self.cluster.boxes):
            self.clients.use_everywhere()  # else nobody may notice, and who comes back is told that others use it
        self._until(lambda: rest.at_rest(self), SETTLE_BOUND_S, "coming to rest")
        self._check_rest()

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
        self.playing = True
        over = [False]
        self.loop.call_at(end_s + 0.5, over.__setitem__, 0, True, context=contextvars.Context())
        self._until(lambda: over[0], end_s - begin_s + 10, "the play")
        self.playing = False

    def _fault(self, what: str, args: dict[str, Any]) -> None:
        self.faults[what] += 1
        atlas.KINDS[what].do(self, args)

    def _mend(self) -> None:
        faults.take_back_all(self)

    def _rest_of_survivors(self) -> None:
        """What a death or a stop leaves is the business of those that stay, whether anybody comes back or not."""
        machines = self.cluster.machines.values()
        alive = [
            machine
            for machine in machines
            if machine.array is not None and machine.array.process.alive and not machine.array.excluded
        ]
        self.restarting = False
        for machine in alive if self.plan.durable else [each for each in machines if each.powered]:
            self.cluster.start_lockd(machine)
        quorate = self.cluster.goes_on_with(alive)
        if alive and quorate and self.dice.stream("mend").below(2):
            words = "the survivors' coming to rest"
            self._until(lambda: rest.at_rest(self, alone=True), SETTLE_BOUND_S, words)
            if any(machine.serving for machine in machines):
                self._check_rest()
        self.restarting = True

    def _check_rest(self) -> None:
        rest.check_rest(self)
        self._end_if_broken()

    def _stop_all(self) -> bool:
        """False: the others went on without a node that was stopping, so not all stopped in order."""
        self.cluster.restarts = False
        in_order = True
        left = [machine for machine in self.cluster.machines.values() if machine.serving]
        draw = self.dice.stream("stop")
        while left:
            machine = left.pop(draw.below(len(left)))
            array = machine.array
            assert array is not None
            over: list[bool] = []
            self.cluster.stop_array(machine, lambda over=over: over.append(True))  # type: ignore[misc]
            self._until(
                lambda over=over, array=array: bool(over) or array.killed,  # type: ignore[misc]
                STOP_BOUND_S,
                f"the stop of {machine.name}",
            )
            if array.killed:
                in_order = False
            else:
                rest.check_left(self, machine, array)
        self._until(lambda: rest.no_locks(self), STOP_BOUND_S, "the end of the lockspace")
        return in_order


def run_seed(seed: int, *, operations: int = 250, faults: int = 10, keep_events: bool = False) -> Outcome:
    """The run of a seed."""
    dice = Dice(seed)
    plan = atlas.draw_plan(seed, dice, operations, faults)
    return Run(plan, dice, keep_events=keep_events).play()
