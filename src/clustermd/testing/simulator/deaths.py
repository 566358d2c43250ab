"""Who died, and who knows of it: until all who live do, the writes of the dead may still land.

A death has three moments: the array process ends (or the boxes begin to refuse it while it lives on, excluded); it is
*proved*, nothing of it can land any more; and every living node has *heard* of it, or joined after it was all over.
Only then are its writes closed for the model, and only then do others write where it wrote: before that a survivor may
still read the first usable member as it likes (md-cluster spec 9.1), and a cluster filesystem has not replayed yet.

Where nodes are machines (agreed manner), the end of a life is a death, though its process lives on: the others may go
on without it, and so may the filesystem. Its clients are answered with errors, its regions go to whoever lives when all
know; and once it is proved that nothing of that life can land any more, nothing that it was asked may ever land.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clustermd.testing.simulator.cluster import SimCluster
from clustermd.testing.simulator.machine import ArrayProcess, SimLink
from clustermd.testing.simulator.model import Model, Write
from clustermd.testing.simulator.workload import Clients

Tell = Callable[[str, str, dict[str, Any]], None]
"""an event of the trace: node, name, fields"""

HEARD = frozenset(("cluster.lost", "join.member", "join.gathered", "array.lost", "leave.unlocking"))
"""Trace points at which an array process hears of deaths, its own among them, or cannot have missed one; and the one
from which on its own death need not be heard of, for all that it had in flight has landed and it is leaving."""


@dataclass(slots=True, eq=False)
class Death:
    """An array process that died. `proved_s` is when its end was proved, below 0 before that.

    `slot` is below 0 if it was leaving, with nothing in flight. Requests that were kept at its gate may be unanswered.
    """

    array: ArrayProcess
    writes: list[Write]
    slot: int
    since_s: float
    proved_s: float = -1.0
    links: tuple[SimLink, ...] = ()  # of a process that lives on: over when nothing of that life can land

    def known_to(self, other: ArrayProcess) -> bool:
        """Whether `other` has heard of it or need not hear, or joined after it was all over."""
        if self.slot < 0 or other.joined_s > self.proved_s:
            return True
        return any(at_s >= self.since_s and slot == self.slot for at_s, slot in other.heard)


class Deaths:
    """The deaths of a run. `open` are those that somebody does not know of yet."""

    def __init__(self, cluster: SimCluster, model: Model, clients: Clients, tell: Tell) -> None:
        self.open: list[Death] = []
        self._cluster = cluster
        self._model = model
        self._clients = clients
        self._tell = tell
        cluster.on_started = lambda array: self._settle()
        cluster.on_gone = self._gone
        cluster.on_ended = self._ended
        cluster.on_excluded = self._excluded

    def heard(self, array: ArrayProcess, name: str, fields: dict[str, Any]) -> None:
        """`array` passed one of the points `HEARD`."""
        if name == "array.lost":
            self._life_lost(array)
            return
        if name == "leave.unlocking":
            array.last_slot = -1
        elif name == "join.member":
            array.last_slot = fields["slot"]
            array.broken_s = array.ended_s = -1.0
        elif name == "join.gathered":
            array.joined_s = self._cluster.loop.time()
        else:
            array.heard.append((self._cluster.loop.time(), fields["slot"]))
        if self.open:
            self._settle()

    def _gone(self, array: ArrayProcess) -> None:
        """An array process has ended, by death or in order."""
        array.serving = False
        writes = self._clients.process_gone(array)
        if not array.killed:
            self._model.close(writes)  # it let everything land before it ended
        elif not array.excluded or writes:
            self._tell(array.machine.name, "process.died", {})
            if array.last_slot >= 0 or writes:
                self._clients.orphaned(array.machine)
                death = self._died(array, writes)
                landed = all(link.over for link in array.links) and not array.submitter.in_flight
                if death.proved_s < 0 and landed:
                    death.proved_s = self._cluster.loop.time()
        self._settle()

    def _excluded(self, array: ArrayProcess) -> None:
        """The boxes refuse a process that lives on: for all others it is dead, and its clients' writes are in doubt."""
        self._tell(array.machine.name, "process.died", {})
        array.serving = False
        if array.broken_s < 0:
            array.broken_s = self._cluster.loop.time()
        writes = self._clients.process_gone(array)
        if array.last_slot >= 0 or writes:
            self._clients.orphaned(array.machine)
            self._died(array, writes)

    def _died(self, array: ArrayProcess, writes: list[Write]) -> Death:
        """The death of a process. Between two lives nothing has been left since the last one, whatever it began of the
        next: that is over and proved."""
        death = Death(array, writes, array.last_slot, array.broken_s, proved_s=array.ended_s)
        self.open.append(death)
        return death

    def _life_lost(self, array: ArrayProcess) -> None:
        """A membership ended, and the others may go on as if its process were dead."""
        links = tuple(array.links)
        if self._cluster.plan.durable or links == array.lost_links:
            return
        array.lost_links = links
        if array.broken_s < 0:
            array.broken_s = self._cluster.loop.time()
        self._clients.orphaned(array.machine)
        writes = self._clients.writes_of(array)
        self.open.append(Death(array, writes, array.last_slot, array.broken_s, links=links))

    def _ended(self, array: ArrayProcess) -> None:
        """Nothing of that array process, or of a former life of it, can land any more."""
        if array.outlawed:
            self._life_lost(array)  # before it heard of it itself
        over = array.excluded or (not array.process.alive and not array.submitter.in_flight)
        if over:
            self._tell(array.machine.name, "process.drained", {})
        # a life that goes on has not ended, whatever is told of a former one
        if array.broken_s >= 0 and (
            over or not array.submitter.in_flight or all(link.over for link in array.links)
        ):
            array.life_ended()
        for death in self.open:
            if death.array is not array or death.proved_s >= 0:
                continue
            left = bool(death.links) and all(link.over for link in death.links)
            if over or left or not array.submitter.in_flight:
                death.proved_s = self._cluster.loop.time()
                if death.links:
                    self._model.bar(death.writes)
        self._settle()

    def _settle(self) -> None:
        """Close the deaths that everybody knows of."""
        living = [
            machine.array
            for machine in self._cluster.machines.values()
            if machine.array is not None and machine.serving and machine.array.broken_s < 0
        ]
        for death in list(self.open):
            if death.proved_s >= 0 and all(death.known_to(array) for array in living):
                self.open.remove(death)
                self._model.close(death.writes)
                self._clients.recovered(death.array.machine.number)
