"""What clients do: writers on all nodes, readers, flushes, discards, overlapping writes on one node.

Regions of the array have an owner, as a cluster filesystem gives it: only the owner's node writes there, everybody may
read. When a node dies its regions go to others once it is fenced and all know; a region can also be handed over while
both live, when the former owner's writes in it are answered.

The kinds of operations are the table `KINDS`: a later feature adds its operation with one line.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clustermd.array.request import Kind, Request
from clustermd.array.state import EXCLUDED, ArrayState
from clustermd.device.member_device import Buffer
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.model import Model, ModelBroken, Read, Write, content
from clustermd.testing.simulator.plan import Plan, Step

if TYPE_CHECKING:
    from clustermd.testing.simulator.cluster import SimCluster
    from clustermd.testing.simulator.machine import ArrayProcess, Machine

REGIONS = 16
SIZES = (1, 2, 8, 8, 8, 8, 16, 16, 32, 64, 160)
"""Sectors of one request, as often as they stand here."""
GAPS_S = (0.0, 0.0, 0.0002, 0.001, 0.003, 0.01, 0.03, 0.1)


class Op:
    """One request of a client, until it is answered or its process dies."""

    __slots__ = ("array", "covered", "exclusions", "read", "request", "started_calm", "step", "write")

    def __init__(self, array: ArrayProcess, step: Step) -> None:
        self.array = array
        self.step = step
        self.request: Request | None = None
        self.write: Write | None = None
        self.read: Read | None = None
        self.covered: list[Write] = []
        self.started_calm = False
        self.exclusions = -1  # how many lives of its array had ended so when it was sent, if one was serving


class Clients:
    """All clients of a run. `calm()` says whether every living node knows of every death."""

    def __init__(
        self,
        cluster: SimCluster,
        model: Model,
        calm: Callable[[], bool],
        broken: Callable[[Exception, str], None],
    ) -> None:
        self.cluster = cluster
        self.model = model
        self._calm = calm
        self._broken = broken
        self.pending: dict[int, Op] = {}
        self.counts: dict[str, int] = {}
        self.errors = 0
        self.skipped = 0
        self._cookie = 0
        self.owner = {region: 1 + region % cluster.plan.nodes for region in range(REGIONS)}
        self._orphans: dict[int, set[int]] = {}  # machine -> regions whose owner died there
        self._waiting: dict[int, list[Step]] = {}

    # --- doing ----------------------------------------------------------------------------------------

    def do(self, step: Step) -> None:
        """One step of the plan, on whichever node it falls to now."""
        KINDS[step.what](self, step)

    def _serving(self, number: int) -> ArrayProcess | None:
        machine = self.cluster.machines[number]
        array = machine.array
        if array is None or not machine.serving or array.process.paused:
            return None
        return array

    def _any_serving(self, pick: int) -> ArrayProcess | None:
        serving = [array for number in self.cluster.machines if (array := self._serving(number)) is not None]
        return serving[pick % len(serving)] if serving else None

    def _submit(self, op: Op, kind: Kind, lo: int, hi: int, buffer: Buffer | None, fua: bool = False) -> None:
        self._cookie += 1
        self.pending[self._cookie] = op
        self.counts[op.step.what] = self.counts.get(op.step.what, 0) + 1
        op.started_calm = self._calm()
        state = self._state_of(op)
        op.exclusions = -1 if state.excluded else state.exclusions
        op.request = Request(kind, lo * 512, (hi - lo) * 512, buffer, self, self._cookie, fua)
        op.array.submit([op.request])

    def write(self, step: Step) -> None:
        """`write`, `zero` and `trim`: by the region's owner."""
        args = step.args
        array = self._serving(self.owner[args["region"]])
        if array is None or args["region"] in self._waiting:
            self.skipped += 1
            return
        lo, hi = self._range(args)
        op = Op(array, step)
        zeroes = step.what != "write"
        op.write = self.model.issue(
            array.machine.name,
            lo,
            hi,
            fua=bool(args.get("fua")),
            zeroes=zeroes,
            perhaps=step.what == "trim",
        )
        if zeroes:
            kind = Kind.TRIM if step.what == "trim" else Kind.WRITE_ZEROES
            self._submit(op, kind, lo, hi, None, bool(args.get("fua")))
            return
        buffer = array.submitter.pool.take((hi - lo) * 512)
        buffer.view[: (hi - lo) * 512] = content(lo, hi, op.write.generation)
        self._submit(op, Kind.WRITE, lo, hi, buffer, bool(args.get("fua")))

    def use_everywhere(self) -> None:
        """Each region's owner writes a little, and every node that serves flushes, whether it owns any or not."""
        for region in range(REGIONS):
            self.write(Step(0.0, "write", {"region": region, "at": 0, "sectors": 8}))
        for turn in range(sum(machine.serving for machine in self.cluster.machines.values())):
            self.flush(Step(0.0, "flush", {"node": turn}))

    def read(self, step: Step) -> None:
        """By any node."""
        array = self._any_serving(step.args["node"])
        if array is None:
            self.skipped += 1
            return
        lo, hi = self._range(step.args)
        op = Op(array, step)
        op.read = self.model.read_issued(self._cookie + 1, lo, hi)
        self._submit(op, Kind.READ, lo, hi, array.submitter.pool.take((hi - lo) * 512))

    def flush(self, step: Step) -> None:
        array = self._any_serving(step.args["node"])
        if array is None:
            self.skipped += 1
            return
        op = Op(array, step)
        op.covered = self.model.flush_issued(array.machine.name)
        self._submit(op, Kind.FLUSH, 0, 0, None)

    def move(self, step: Step) -> None:
        """A region gets another owner when nothing of the present one is under way there."""
        region = step.args["region"]
        if any(op.write is not None and op.step.args["region"] == region for op in self.pending.values()):
            self.skipped += 1
            return
        owner = self.cluster.machines[self.owner[region]]
        array = self._any_serving(step.args["node"])
        if array is None or region in self._orphaned() or not owner.serving:
            self.skipped += 1
            return
        self.counts["move"] = self.counts.get("move", 0) + 1
        self.owner[region] = array.machine.number

    def _orphaned(self) -> set[int]:
        return set().union(*self._orphans.values()) if self._orphans else set()

    def _range(self, args: dict[str, Any]) -> tuple[int, int]:
        size = self.cluster.plan.array_sectors // REGIONS
        first = args["region"] * size
        lo = first + args["at"] % size
        return lo, min(lo + args["sectors"], first + size)

    # --- answers ----------------------------------------------------------------------------------------

    def completed(self, request: Request) -> None:
        """`request.Owner`: an answer arrived."""
        op = self.pending.get(request.cookie)
        if op is None or not op.array.process.alive:
            return
        del self.pending[request.cookie]
        if request.error and request.error != errno.ESHUTDOWN and not self._may_be_refused(op, request.error):
            self.errors += 1
            words = f"a {op.step.what} of {op.step.args} is answered with {errno.errorcode[request.error]}"
            self._broken(ModelBroken("needless-error", words), op.array.machine.name)
        try:
            if op.write is not None:
                self.model.answered(op.write, request.error)
            elif op.read is not None:
                assert request.buffer is not None
                if request.error:
                    self.model.read_dropped(request.cookie)
                else:
                    data = request.buffer.view[: request.length_bytes]
                    pin = op.started_calm and not self._faults_are_news()
                    self.model.read_answered(request.cookie, data, pin, self._undecided())
            else:
                self.model.flush_answered(op.array.machine.name, op.covered, request.error)
        except Exception as error:
            self._broken(error, op.array.machine.name)
        if request.buffer is not None:
            request.buffer.release()

    def _faults_are_news(self) -> bool:
        """Whether some node has failed a member that others may still read."""
        arrays = [machine.array for machine in self.cluster.machines.values() if machine.array is not None]
        return any(array.array is not None and array.array.state.unpublished for array in arrays)

    def _undecided(self) -> bool:
        """Whether some node has chunks to copy, or cannot know that there are none."""
        for machine in self.cluster.machines.values():
            array = machine.array
            if array is None or array.array is None or not machine.serving:
                continue
            state = array.array.state
            if not state.settled or (state.bitmap is not None and state.bitmap.unreconciled):
                return True
        return False

    def _state_of(self, op: Op) -> ArrayState:
        assert op.array.array is not None
        return op.array.array.state

    def _may_be_refused(self, op: Op, error: int) -> bool:
        if error == EXCLUDED and not self.cluster.plan.durable:
            return op.exclusions != self._state_of(op).exclusions
        return op.step.what in ("trim", "zero") and error == errno.EOPNOTSUPP

    def writes_of(self, array: ArrayProcess) -> list[Write]:
        """What is not answered yet."""
        return [op.write for op in self.pending.values() if op.array is array and op.write is not None]

    def process_gone(self, array: ArrayProcess) -> list[Write]:
        """Nobody will answer what this process had. Returns its writes, which may still land."""
        writes = []
        for cookie, op in list(self.pending.items()):
            if op.array is not array:
                continue
            del self.pending[cookie]
            if op.write is not None:
                writes.append(op.write)
            elif op.read is not None:
                self.model.read_dropped(cookie)
            else:
                self.model.flush_answered(array.machine.name, op.covered, 1)
        return writes

    # --- deaths -----------------------------------------------------------------------------------------

    def orphaned(self, machine: Machine) -> None:
        """The filesystem on that node is gone with its array process: nobody writes there until all know."""
        mine = {region for region, owner in self.owner.items() if owner == machine.number}
        self._orphans[machine.number] = mine
        for region in mine:
            self._waiting[region] = []

    def _member(self, machine: Machine) -> bool:
        """Whether a filesystem would give it something to do: not between two lives, where that counts."""
        return self.cluster.plan.durable or (machine.array is not None and machine.array.broken_s < 0)

    def recovered(self, number: int) -> None:
        """Everybody knows of the death: others take the regions over, in turn."""
        machines = self.cluster.machines
        living = [other for other, machine in machines.items() if machine.serving and self._member(machine)]
        for place, region in enumerate(sorted(self._orphans.pop(number, ()))):
            self._waiting.pop(region, None)
            if living:
                self.owner[region] = living[place % len(living)]


KINDS: dict[str, Callable[[Clients, Step], None]] = {
    "write": Clients.write,
    "zero": Clients.write,
    "trim": Clients.write,
    "read": Clients.read,
    "flush": Clients.flush,
    "move": Clients.move,
}

OFTEN = ("write",) * 12 + ("read",) * 8 + ("flush", "zero", "trim", "move")
"""How often each kind is drawn."""


def draw_work(plan: Plan, dice: Dice, count: int) -> tuple[Step, ...]:
    """`count` operations with their times."""
    draw = dice.stream("work")
    steps = []
    at_s = 0.0
    hot = draw.below(REGIONS)
    for _ in range(count):
        at_s += GAPS_S[draw.below(len(GAPS_S))] * (1 + draw.below(4))
        what = OFTEN[draw.below(len(OFTEN))]
        region = hot if draw.below(3) == 2 else draw.below(REGIONS)
        args: dict[str, Any] = {"region": region}
        if what != "move":
            args["at"] = draw.below(plan.array_sectors // REGIONS) // (8 if draw.below(2) else 1) * 8
            args["sectors"] = SIZES[draw.below(len(SIZES))]
        if what in ("read", "flush", "move"):
            args["node"] = draw.below(8)
        if what in ("write", "zero") and draw.one_in(6):
            args["fua"] = True
        steps.append(Step(round(at_s, 6), what, args))
    return tuple(steps)
