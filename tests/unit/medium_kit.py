"""A medium with agreed order in memory, and members of an agreed group on it. Nothing happens until `run`.

    ring = Ring(3)
    one, two, three = ring.start(1, 2, 3)
    ring.run()
    ring.split((1, 2), (3,))

What corosync does by itself (rings, quorum, changes of membership) a test says here; `ring.run()` delivers until
nothing is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from clustermd.group.agreed.change import Configured
from clustermd.group.agreed.fencing import Victim
from clustermd.group.agreed.group import AgreedGroup
from clustermd.group.agreed.hello import Life
from clustermd.group.process_group import Member, View
from clustermd.trace import Trace

Heard = tuple[Any, ...]


class HandClock:
    """All clocks of one test."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def monotonic_s(self) -> float:
        return self.at_s

    def boottime_s(self) -> float:
        return self.at_s

    def now_s(self) -> float:
        return self.at_s


class Node:
    """A member: what it heard, in order, and what it was told to fence."""

    def __init__(self, ring: Ring, number: int, incarnation: int, boot: str, **options: Any) -> None:
        self.ring = ring
        self.number = number
        self.pid = 100 * number + incarnation
        self.side: frozenset[int] = frozenset()
        self.heard: list[Heard] = []
        self.fencing: list[Victim] = []
        self.cancelled: list[int] = []
        self.evicted: list[int] = []
        self.leases: list[float] = []
        self.expelled = ""
        self.has_state = True
        self.installed = True
        self.awaited = 1 << 62
        self.full = False
        config = options.pop("config", "the same")
        self.group = AgreedGroup(
            Life(Member(number, incarnation, f"node{number}"), boot),
            self.pid,
            ring.configured,
            config,
            self,
            self,
            ring.clock,
            Trace(),
            startup_s=options.pop("startup_s", 30.0),
            unresponsive_s=options.pop("unresponsive_s", 10.0),
            on_lease=self.leases.append,
            on_expelled=self._expel,
            **options,
        )

    def _expel(self, reason: str) -> None:
        self.expelled = reason

    # Medium
    def send(self, data: bytes) -> bool:
        if self.full:
            return False
        self.ring.under_way.append((self, data))
        return True

    def evict(self, node: int) -> None:
        self.evicted.append(node)

    # FenceShell
    def begin(self, victim: Victim) -> None:
        self.fencing.append(victim)

    def cancel(self, node: int) -> None:
        self.cancelled.append(node)

    # StatefulEvents
    def on_view(self, view: View) -> None:
        self.heard.append(("view", view))

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        self.heard.append(("message", index, sender.node, payload))

    def on_stable(self, index: int) -> None:
        self.heard.append(("stable", index))

    def on_fenced(self, member: Member, proof: str, index: int = 0) -> None:
        self.heard.append(("fenced", member.node, member.incarnation, proof))

    # for tests
    @property
    def view(self) -> View:
        return [heard[1] for heard in self.heard if heard[0] == "view"][-1]

    def of(self, kind: str) -> list[Heard]:
        return [heard[1:] for heard in self.heard if heard[0] == kind]

    @property
    def stable(self) -> int:
        told = self.of("stable")
        return max((index for (index,) in told), default=0)


class Ring:
    """All nodes, with one vote each unless `votes` says otherwise; quorum is a majority of nodes unless a test does."""

    def __init__(self, count: int, votes: Sequence[int] = ()) -> None:
        self.clock = HandClock()
        self.configured = [
            Configured(number, f"node{number}", own) for number, own in enumerate(votes or [1] * count, 1)
        ]
        self.nodes: list[Node] = []
        self.under_way: list[tuple[Node, bytes]] = []
        self.sequence = 4
        self.quorate = lambda side: len(side) > count // 2
        self.machines: dict[int, set[int]] = {}

    def start(self, *numbers: int, incarnation: int = 1, boot: str = "boot", **options: Any) -> list[Node]:
        """New lock daemons on these nodes, all in one ring with whoever is there."""
        new = [Node(self, number, incarnation, boot, **options) for number in numbers]
        self.nodes += new
        self.form([node.number for node in self.nodes], joined=new)
        for node in new:
            node.group.join(node)
        return new

    def form(self, numbers: Iterable[int], gone: Iterable[int] = (), joined: Iterable[Node] = ()) -> None:
        """One new ring of these nodes; the others are somewhere else."""
        self.sequence += 4
        side = frozenset(numbers)
        ring = (self.sequence, min(side))
        members = [node for node in self.nodes if node.number in side]
        for node in members:
            node.side = side
        for node in members:
            peers = tuple((other.number, other.pid) for other in members)
            came = [other.number for other in members if other.number not in set(gone)]
            node.group.on_change(peers, gone, came)
            node.group.on_ring(ring, side)
            node.group.on_quorum(self.quorate(side), ring)

    def split(self, *sides: tuple[int, ...]) -> None:
        """The ring breaks; what is under way is lost."""
        self.under_way.clear()
        everybody = {node.number for node in self.nodes}
        sequence = self.sequence
        for side in sides:
            self.sequence = sequence
            self.form(side, gone=everybody - set(side))

    def lose(self, *dead: Node) -> None:
        """Machines end; the others form a ring."""
        self.nodes = [node for node in self.nodes if node not in dead]
        self.under_way = [(node, data) for node, data in self.under_way if node not in dead]
        self.form([node.number for node in self.nodes], gone=[node.number for node in dead])

    def end(self, node: Node) -> None:
        """A lock daemon ends on a machine that lives: no new ring."""
        self.nodes.remove(node)
        members = [other for other in self.nodes if other.side == node.side]
        for other in members:
            other.group.on_change(tuple((each.number, each.pid) for each in members), (), ())

    def run(self) -> None:
        """Deliver all that is under way, to all who are in one ring with the sender."""
        while self.under_way:
            while self.under_way:
                sender, data = self.under_way.pop(0)
                for node in self.nodes:
                    if node.side == sender.side and not node.expelled:
                        node.group.on_message((sender.number, sender.pid), data)
            for node in self.nodes:
                if not node.expelled:
                    node.group.swept()

    def tick(self, seconds: float, step_s: float = 0.25) -> None:
        """Time passes, with everything delivered as it comes."""
        end_s = self.clock.at_s + seconds
        while self.clock.at_s < end_s:
            self.clock.at_s += step_s
            for node in self.nodes:
                node.group.tick()
            self.run()
