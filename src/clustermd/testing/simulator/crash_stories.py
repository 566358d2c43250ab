"""Stories of crashes: who dies at which step of appendix D, what of its requests lands, and when it comes back.

A `Story` names a scenario, a number of nodes and its kills, each by a node, a point and the how many-eth time that node
passes it; `play_story` plays it. The same story is the same run, so what broke once can be kept. While it is played all
steps that some node comes to are noted (`Passed`): these are the places where another story may have somebody die.

What is in flight at a death lands as the story says, not as drawn. A kill with `flight` comes a moment after its point,
when what went out there is on its way: so each combination of a step that is "on some members" happens on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from clustermd.testing.simulator.boxes import Box, Io
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.faults import start
from clustermd.testing.simulator.machine import Machine
from clustermd.testing.simulator.run import Outcome, Run
from clustermd.testing.simulator.scenarios import SCENARIOS
from clustermd.testing.trace.points import STEPS, Reached, Step

FLIGHT_S = 0.00005
"""Less than any request takes: a moment after a point, what went out there is on its way."""

LANDINGS = ("none", "first", "others", "all", "torn", "late torn")
"""What lands of what is in flight: by box, or the same fate for each request. Where several requests go out to one box
there is one more, "rest": all but the first of them."""

SEED = 1


def _any(fields: Any) -> bool:
    return True


MORE_STEPS = (
    Step(
        "6e",
        ("resync.copied",),
        "during the recovery of a member",
        since=("resync.right", _any),
        until=("resync.begin", "recovery.record"),
    ),
    Step(
        "6f",
        ("metadata.write",),
        "between recovery_offset = Max and the final superblock",
        since=("recovery.record", _any),
        until=("metadata.acknowledged",),
    ),
    Step("J1", ("join.member",), "a joiner has its slot's number and no lock"),
    Step("J2", ("join.armed",), "a joiner hears messages and answers none"),
    Step("J3", ("join.slot",), "a joiner owns its slot's lock, its bitmap is not loaded"),
    Step("J4", ("slot.stable",), "a joiner's own bitmap is loaded and valid on all members"),
    Step("J5", ("join.gathered",), "a joiner has looked at all slots and serves nobody yet"),
    Step("J6", ("cluster.lost",), "a survivor has heard of a death"),
)
"""What appendix D says of filling a member, and the steps of a join, which it does not number."""

FLIGHTS = (
    Step("1b", ("bitmap.flush",), "the bit of a write is on its way", lambda f: f["writes"] > 0),
    Step("1d", ("write.issue",), "the data of a write is on its way"),
    Step(
        "2b",
        ("bitmap.flush",),
        "a page with cleared bits is on its way",
        since=("sweep.cleared", lambda f: f["count"] > 0),
        until=("sweep.done",),
    ),
    Step("3c", ("metadata.write",), "the superblocks are on their way"),
    Step(
        "4c",
        ("bitmap.flush",),
        "the own page with a dead node's bits is on its way",
        since=("takeover.merged", _any),
        until=("takeover.own_stable",),
    ),
    Step("4d", ("takeover.own_stable",), "the source's cleared page is on its way"),
    Step("5c", ("resync.write",), "a copy is on its way"),
)
"""Where requests go out that make a step "on some members": the moment after is that step."""


@dataclass(frozen=True, slots=True)
class Kill:
    """When `node` passes `point` for the `nth` time, `victims` die: there, or with `flight` a moment later."""

    step: str
    node: str
    point: str
    nth: int
    victims: tuple[int, ...]
    lands: str = "none"
    flight: bool = False
    down_s: float = 1.5
    detect_s: float = 0.05

    def __str__(self) -> str:
        when = "a moment after" if self.flight else "at"
        who = " and ".join(f"node{number}" for number in self.victims)
        return (
            f"{who} dies at step {self.step}, {when} {self.node}'s {self.point} number {self.nth};"
            f" of what is in flight lands: {self.lands}; back after {self.down_s} s"
        )


@dataclass(frozen=True, slots=True)
class Story:
    """A scenario, a number of nodes, and who dies where, one after the other."""

    scenario: str
    nodes: int
    kills: tuple[Kill, ...] = ()

    def __str__(self) -> str:
        return "; then ".join((f"{self.scenario}, {self.nodes} nodes", *map(str, self.kills)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Story:
        """Raises TypeError for unknown or missing values."""
        kills = tuple(Kill(**{**kill, "victims": tuple(kill["victims"])}) for kill in values.get("kills", ()))
        return cls(values["scenario"], values["nodes"], kills)


@dataclass(frozen=True, slots=True)
class Passed:
    """A step that was passed: by whom, at which point, the how many-eth time, and after how many kills."""

    step: str
    node: str
    point: str
    nth: int
    flight: bool
    victims: tuple[tuple[int, ...], ...]
    kills: int
    time_s: float


@dataclass(slots=True)
class Told:
    """What came of a story. `fired` are the kills that happened."""

    story: Story
    outcome: Outcome
    passed: list[Passed]
    fired: list[Kill]


Died = Callable[[Run, Kill], None]


class _Teller:
    """Listens to a run, notes the steps, and kills."""

    def __init__(self, run: Run, story: Story, died: Died) -> None:
        self.run = run
        self.died = died
        self.passed: list[Passed] = []
        self.fired: list[Kill] = []
        self._left = list(story.kills)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._steps = Reached((*STEPS, *MORE_STEPS))
        self._flights = Reached(FLIGHTS)
        self._sender = 0
        self._heard = run.cluster.listener
        run.cluster.listener = self._point

    def _point(self, machine: Machine, name: str, fields: dict[str, Any]) -> None:
        self._heard(machine, name, fields)
        if not self.run.cluster.restarts:
            return  # the stops at the end are not a part of it: nobody would start again
        node = machine.name
        nth = self._counts[node, name] = self._counts[node, name] + 1
        if name == "send.written":
            self._sender = machine.number
        for step in self._steps.see(node, name, fields):
            self._note(step, machine, name, nth, False)
        for step in self._flights.see(node, name, fields):
            self._note(step, machine, name, nth, True)
        kill = self._left[0] if self._left else None
        if kill is not None and (kill.node, kill.point, kill.nth) == (node, name, nth):
            del self._left[0]
            self.fired.append(kill)
            if kill.flight:
                self.run.later(FLIGHT_S, self._die, kill)
            else:
                self._die(kill)

    def _note(self, step: Step, machine: Machine, name: str, nth: int, flight: bool) -> None:
        mine = machine.number
        victims: tuple[tuple[int, ...], ...] = ((mine,),)
        if step.victim == "sender":
            victims = ((self._sender,), (mine,), (self._sender, mine))
        self.passed.append(
            Passed(step.id, machine.name, name, nth, flight, victims, len(self.fired), self.run.loop.time())
        )

    def _die(self, kill: Kill) -> None:
        run = self.run
        first = run.cluster.boxes[0]
        seen: set[Box] = set()

        def landing(io: Io) -> str:
            match kill.lands:
                case "first":
                    return "whole" if io.box is first else "none"
                case "others":
                    return "none" if io.box is first else "whole"
                case "rest":
                    again = io.box in seen
                    seen.add(io.box)
                    return "whole" if again else "none"
                case "all":
                    return "whole"
                case other:
                    return other

        for number in kill.victims:
            machine = run.cluster.machines[number]
            array = machine.array
            if array is not None and array.process.alive:
                array.submitter.landing = landing
            run.faults[f"crash at {kill.step}"] += 1
            run.cluster.kill(machine, kill.detect_s)
            self._steps.gone(machine.name)
            self._flights.gone(machine.name)
            run.later(kill.down_s, start, run, machine)
        self.died(run, kill)


def play_story(story: Story, *, keep_events: bool = False, died: Died = lambda run, kill: None) -> Told:
    """Play one story to its end. The same story gives the same run. `died` may look at the disks after each kill."""
    scenario = SCENARIOS[story.scenario]
    run = Run(scenario.plan(story.nodes), Dice(SEED), keep_events=keep_events)
    scenario.prepare(run)
    teller = _Teller(run, story, died)
    outcome = run.play()
    return Told(story, outcome, teller.passed, teller.fired)
