"""Who is a member of what when: the lives of the nodes of a trace, which the rules share.

A *life* is one membership of an array on a node: from the session of the lock manager (`session.begin`) to the moment
from which nothing relies on its rights any more. That is when the array has drained after a loss (`array.drained`),
when the life is given up in order (`life.over`), or when others learn that it is dead, fenced and purged
(`cluster.lost`). A life that has lost its session but has not drained still counts: what it sent may land, so its
locks must stay.

**What a trace can prove.** Events of one node are in the order in which they happened. Between nodes only time
stamps tell, of one clock, each taken when the point was passed. So a rule that compares nodes uses only moments that
are safe to compare: a right begins at the latest when its grant is shown to its owner, and ends at the earliest just
before the frame that gives it back is sent. What overlaps then did overlap.

The trace of a node that was killed just ends, and the trace does not say when. So an overlap with a life whose end is
not known is a *suspicion*: it becomes a violation when a later event of that very life shows that it was alive all the
time, and is dropped when its end is learnt. Whoever records a whole cluster (a simulator) knows more and may say it:
`process.died` when an array process is killed, `process.drained` when nothing of it can land any more. Then a life
counts until `process.drained` and nothing stays a suspicion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clustermd.testing.trace.events import Event, Layer, Violation

OTHER_PROCESSES = ("dlm.", "group.")
"""Points of the lock daemon: they say nothing about the life of the array process beside it."""


@dataclass(slots=True, eq=False)
class Life:
    """One membership. `over`: nothing relies on its rights. `dead`: it was killed, and that is all it will do."""

    node: str
    serial: int
    began: int  # the number of the event with which it did
    slot: int = -1
    nodes: int = 0
    joined: bool = False
    seated: int = 0  # the number of the event that shows it its slot
    loaded: bool = False
    gathered: bool = False
    armed: int = 0  # the number of the event from which on it must process every message
    deaf: bool = False  # it is leaving and processes nothing more
    serving: bool = False
    in_doubt: bool = False
    lost: bool = False
    dead: bool = False
    over: bool = False
    answered: int = 0  # the sequence number of the last message it processed
    seen_slots: set[int] = field(default_factory=set)
    told_to: set[Life] = field(default_factory=set)  # who has heard that it is dead
    holds: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (space, resource, lock) -> mode
    suspicions: list[Violation] = field(default_factory=list)

    def __str__(self) -> str:
        return self.node

    @property
    def member(self) -> bool:
        """Whether rules about members count for it now, as far as its own trace tells."""
        return not (self.lost or self.dead or self.over)


class Lives:
    """The lives of all nodes, by their own events. A Rule that finds nothing broken by itself."""

    rule = "lives"
    spec = "design 5"
    layer = Layer.CLUSTER
    names: tuple[str, ...] = (
        "trace.begin",
        "session.begin",
        "join.member",
        "join.armed",
        "join.slot",
        "join.gathered",
        "join.merged",
        "join.window",
        "slot.stable",
        "array.serving",
        "array.doubt",
        "array.trust",
        "array.lost",
        "array.drained",
        "lock.lost",
        "lock.left",
        "leave.deaf",
        "leave.done",
        "life.over",
        "cluster.lost",
        "process.died",
        "process.drained",
    )

    def __init__(self) -> None:
        self.of: dict[str, Life] = {}
        self.all: dict[Life, None] = {}  # those that are not over, in the order of their begin
        self.suspects: set[str] = set()
        self.meant: list[Life] = []  # whose death the last `cluster.lost` may tell of, oldest first
        self._serial = 0
        self._owners: dict[int, Life] = {}
        self._seats: dict[tuple[str, int], list[Life]] = {}  # by node and slot, but who left in order
        self._steps = {name: getattr(self, f"_{name.replace('.', '_')}") for name in self.names}

    def see(self, event: Event) -> Iterable[Violation]:
        found = self._steps[event.name](event, self.of.get(event.node))
        return found or ()

    # --- for the rules ------------------------------------------------------------------------------

    def others(self, life: Life | None) -> list[Life]:
        """Lives of other nodes on whose rights something may rely, in the order of their begin."""
        return [other for other in self.all if other is not life]

    def broken(self, violation: Violation, life: Life) -> Sequence[Violation]:
        """`violation` holds if `life` was not at its end when it was noticed. What is certain already is returned."""
        if life.dead:
            return (violation,)
        life.suspicions.append(violation)
        self.suspects.add(life.node)
        return ()

    def confirm(self, event: Event) -> Sequence[Violation]:
        """What an event of a suspect proves: it was alive."""
        if event.name.startswith(OTHER_PROCESSES):
            return ()
        self.suspects.discard(event.node)
        life = self.of[event.node]
        suspicions, life.suspicions = life.suspicions, []
        if event.name in ("trace.begin", "session.begin"):
            return ()  # of a new process: when the old one ended is not known
        return suspicions

    # --- the events ----------------------------------------------------------------------------------

    def _end(self, life: Life | None) -> None:
        if life is None:
            return
        life.over = True
        life.holds.clear()
        life.suspicions.clear()
        self.all.pop(life, None)

    def _trace_begin(self, event: Event, life: Life | None) -> None:
        if life is not None and not life.dead:
            self._end(life)
            del self.of[event.node]

    def _session_begin(self, event: Event, life: Life | None) -> None:
        self._trace_begin(event, life)
        self._serial += 1
        life = self.of[event.node] = Life(event.node, self._serial, event.number)
        self.all[life] = None

    def _join_member(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.joined = True
            life.slot = event.fields["slot"]
            life.nodes = event.fields.get("nodes", 0)
            life.seated = event.number
            self._seats.setdefault((life.node, life.slot), []).append(life)

    def _join_armed(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.armed = event.number + 1

    def _join_slot(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.slot = event.fields["slot"]
            self._owners[life.slot] = life

    def _join_merged(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.seen_slots.add(event.fields["slot"])

    _join_window = _join_merged

    def _join_gathered(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.gathered = True

    def _slot_stable(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.loaded = True

    def _array_serving(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.serving = True

    def _array_doubt(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.in_doubt = True

    def _array_trust(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.in_doubt = False

    def _array_lost(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.lost = True

    def _lock_lost(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.lost = True
            if event.fields.get("reason") == "closed":
                self._end(life)

    def _array_drained(self, event: Event, life: Life | None) -> None:
        if life is not None and life.lost:
            self._end(life)

    def _lock_left(self, event: Event, life: Life | None) -> None:
        if life is not None:
            space = event.fields["space"]
            for key in [key for key in life.holds if key[0] == space]:
                del life.holds[key]

    def _leave_deaf(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.deaf = True

    def _leave_done(self, event: Event, life: Life | None) -> None:
        if life is None:
            return
        seated = self._seats.get((life.node, life.slot), [])
        if life in seated:
            seated.remove(life)

    def _life_over(self, event: Event, life: Life | None) -> None:
        self._end(life)

    def _cluster_lost(self, event: Event, life: Life | None) -> None:
        slot, node = event.fields["slot"], event.fields["node"]
        self.meant = self._may_be_meant(self._seats.get((node, slot), []), life)
        if self.meant and life is not None:
            self.meant[0].told_to.add(life)
        owner = self._owners.get(slot)
        if owner is None or owner.node != node:
            return
        if any(other.dead and other.seated < owner.seated for other in self.meant):
            return  # perhaps it is the former owner's death; where deaths are recorded the present one's is, too
        self._end(owner)

    @staticmethod
    def _may_be_meant(seated: list[Life], hearer: Life | None) -> list[Life]:
        """Of the lives that one node had in one slot, those whose death `hearer` may hear of now.

        It hears of each at most once, in the order in which they had the slot. A member that hears everything late may
        hear of one when the next has come and died as well: a majority is enough for that. A slot goes to somebody only
        when it is settled who is told of its former owner, so who began after that is not told.
        """
        if hearer is None:
            return list(seated)
        first = max((place for place, life in enumerate(seated) if life.seated < hearer.began), default=0)
        return [life for life in seated[first:] if life is not hearer and hearer not in life.told_to]

    def _process_died(self, event: Event, life: Life | None) -> None:
        if life is not None:
            life.dead = True

    def _process_drained(self, event: Event, life: Life | None) -> None:
        for other in [other for other in self.all if other.node == event.node and other.dead]:
            self._end(other)


class RuleOverLives:
    """What the rules have in common: the lives, and how a violation is made."""

    rule = ""
    spec = ""
    layer = Layer.CLUSTER
    names: tuple[str, ...] = ()

    def __init__(self, lives: Lives) -> None:
        self.lives = lives

    def violation(self, event: Event, message: str, *before: int, layer: Layer | None = None) -> Violation:
        """`event` first shows what `message` says; `before` are the numbers of the events it contradicts."""
        return Violation(
            self.rule,
            self.spec,
            layer or self.layer,
            message,
            event.node,
            event.time_s,
            (*before, event.number),
        )


Fields = dict[str, Any]
