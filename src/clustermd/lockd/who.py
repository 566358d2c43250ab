"""Who holds a lock, who waits for whom, and which waits go round in a circle: read from a lockd's status.

The status (`lockd.daemon.Lockd.status`) has all queues of all lockspaces. A request waits for every other lock of its
resource whose granted mode does not go together with the wanted one; when there is none it waits for its turn: a
queued conversion for the conversions before it, a queued request for all conversions and the requests before it (dlm.md
1.4). Processes wait, not locks: a circle is one of processes, each of which waits for the next.

A circle that lasts is a deadlock, unless one of its processes goes on by itself: an array process gives `token` back
while another of its tasks waits for an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clustermd.dlm.modes import Mode, compatible

_QUEUES = ("granted", "converting", "waiting")


@dataclass(frozen=True, slots=True)
class Wait:
    """A request that waits: where, whose, for which locks. `ahead` means that these are only before it in the queue.

    `lock` and `blockers` are locks as the status has them, with "node", "name", "label", "pid", "mode", "held_s" ...
    """

    lockspace: str
    resource: str
    lock: dict[str, Any]
    blockers: tuple[dict[str, Any], ...]
    ahead: bool

    @property
    def waits_s(self) -> float:
        return float(self.lock.get("waits_s", 0.0))

    def for_whom(self) -> str:
        """ "node1 array md0 (pid 11) in EX for 3.2 s, ..." """
        if self.ahead:
            return "its turn behind " + ", ".join(who(lock) for lock in self.blockers)
        return ", ".join(holder(lock) for lock in self.blockers)


def who(owner: dict[str, Any]) -> str:
    """A process for people: its node, what it calls itself, its number there."""
    name = owner.get("name") or f"node {owner['node']}"
    label = f" {owner['label']}" if owner.get("label") else ""
    pid = f" (pid {owner['pid']})" if owner.get("pid") else ""
    return f"{name}{label}{pid}{' ZOMBIE' if owner.get('zombie') else ''}"


def holder(lock: dict[str, Any]) -> str:
    """A process with the mode that it holds, and since when."""
    return f"{who(lock)} in {lock['mode']}{age(lock)}"


def age(lock: dict[str, Any]) -> str:
    """ " for 3.2 s", or nothing where it is not known."""
    if lock.get("held_s") is None:
        return ""
    return f" for {'at least ' if lock.get('age_at_least') else ''}{seconds(lock['held_s'])}"


def seconds(value: float) -> str:
    """ "3.2 s", "12 min", "5 h": as exact as a person needs it."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"


def holders(replica: dict[str, Any], lockspace: str, resource: str, mode: Mode) -> list[dict[str, Any]]:
    """The locks of a resource that exclude `mode` now; empty when it is free or nobody knows it."""
    found = replica["lockspaces"].get(lockspace, {}).get("resources", {}).get(resource)
    if found is None:
        return []
    held = found["granted"] + found["converting"]
    return [lock for lock in held if not compatible(Mode[lock["mode"]], mode)]


def waits(replica: dict[str, Any]) -> list[Wait]:
    """Every request that waits, the longest wait first."""
    found = [wait for name, space in replica["lockspaces"].items() for wait in _waits_of(name, space)]
    return sorted(found, key=lambda wait: (-wait.waits_s, wait.lockspace, wait.resource, wait.lock["id"]))


def _waits_of(lockspace: str, space: dict[str, Any]) -> Iterator[Wait]:
    for name, resource in space["resources"].items():
        held = resource["granted"] + resource["converting"]
        for queue in ("converting", "waiting"):
            for place, lock in enumerate(resource[queue]):
                wanted = Mode[lock["wants"]]
                blockers = [
                    other
                    for other in held
                    if other["id"] != lock["id"] and not compatible(Mode[other["mode"]], wanted)
                ]
                before = resource[queue][:place] + (resource["converting"] if queue == "waiting" else [])
                yield Wait(lockspace, name, lock, tuple(blockers or before), ahead=not blockers)


def circles(found: list[Wait]) -> list[list[Wait]]:
    """Waits in which each one's process is waited for by the one before, and the first one's by the last.

    One circle is told for each group of processes that wait for each other, the shortest through the longest wait.
    """
    edges: dict[Process, list[tuple[Process, Wait]]] = {}
    for wait in found:
        for lock in wait.blockers:
            if process(lock) != process(wait.lock):
                edges.setdefault(process(wait.lock), []).append((process(lock), wait))
    told: set[Process] = set()
    rings = []
    for start in edges:
        ring = [] if start in told else _shortest_way_back(edges, start)
        if ring and not told & {process(wait.lock) for wait in ring}:
            told |= _reached(edges, start)
            rings.append(ring)
    return rings


Process = tuple[int, int, int]


def process(lock: dict[str, Any]) -> Process:
    """The process of a lock, as the lock manager knows it: node, incarnation of its lockd, session."""
    return lock["node"], lock.get("incarnation", 0), lock.get("session", 0)


def _shortest_way_back(edges: dict[Process, list[tuple[Process, Wait]]], start: Process) -> list[Wait]:
    """The waits from `start` through others back to it, or none."""
    came: dict[Process, tuple[Process, Wait]] = {}
    queue = [start]
    for here in queue:
        for there, wait in edges.get(here, ()):
            if there == start:
                way = [wait]
                while here != start:
                    here, wait = came[here]
                    way.append(wait)
                return way[::-1]
            if there not in came:
                came[there] = (here, wait)
                queue.append(there)
    return []


def _reached(edges: dict[Process, list[tuple[Process, Wait]]], start: Process) -> set[Process]:
    reached, queue = {start}, [start]
    for here in queue:
        for there, _ in edges.get(here, ()):
            if there not in reached:
                reached.add(there)
                queue.append(there)
    return reached


def stuck_rank(resource: dict[str, Any]) -> tuple[int, float]:
    """For sorting: what is waited for longest first, then what the dead still hold, then the quiet rest."""
    longest = max(
        (lock.get("waits_s", 0.0) for lock in resource["converting"] + resource["waiting"]), default=-1.0
    )
    if longest >= 0:
        return 0, -longest
    return (1 if any(lock.get("zombie") for queue in _QUEUES for lock in resource[queue]) else 2), 0.0
