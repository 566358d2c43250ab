"""A lockspace: its resources, and who sits in which slot.

A slot (1 is the first) is what names a node's bitmap on the disks, so it is given away only when nobody
can still write there or owes the repair of it. A seat is in one of three states:

    member       a session that joined and lives
    zombie       the session is lost, but its I/O may be in flight: its locks and its slot stay
    recovering   proved dead, its locks are purged; the members were told (`told`) and take its bitmap over.
                 The slot comes free when one of them says `recovered`, or when the lockspace empties.

A joiner gets the lowest number that nobody holds. When living members hold all of the array's slots it is
refused; when zombies or unfinished takeovers hold some it waits, first come, first served (design section 6).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from clustermd.dlm.deadlock import Waits
from clustermd.dlm.effects import SessionKey
from clustermd.dlm.lock import Callbacks
from clustermd.dlm.orphans import Orphans
from clustermd.dlm.resource import Lock, Resource

MARKS_LIMIT = 1024


class SeatState(enum.StrEnum):
    MEMBER = "member"
    ZOMBIE = "zombie"
    RECOVERING = "recovering"


@dataclass(slots=True, eq=False)
class Seat:
    """One slot that is taken. `told_generation` is that of the recovery which announced a recovering one."""

    slot: int
    session: SessionKey
    name: str
    state: SeatState = SeatState.MEMBER
    told: list[SessionKey] = field(default_factory=list)
    told_generation: int = 0

    @property
    def node(self) -> int:
        return self.session[0]


@dataclass(slots=True, eq=False)
class Joiner:
    """A session that waits for a slot; `waits_for` is what it was last told it waits for."""

    session: SessionKey
    op: int
    max_slots: int
    waits_for: tuple[tuple[int, int, str, str], ...] = ()


class Space:
    """One lockspace. `marks` keeps the invalid marks of resources that have no locks now (dlm.md 2.4).

    `waits` is None where nobody looks for deadlocks over several resources (`dlm.deadlock`).
    """

    __slots__ = (
        "generation", "joiners", "lvb_bytes", "marks", "name", "orphans", "resources", "seats", "waits",
    )  # fmt: skip

    def __init__(self, name: str, lvb_bytes: int, waits: Waits | None = None) -> None:
        self.name = name
        self.lvb_bytes = lvb_bytes
        self.waits = waits
        self.orphans = Orphans()
        self.generation = 0
        self.seats: dict[int, Seat] = {}
        self.joiners: list[Joiner] = []
        self.resources: dict[bytes, Resource] = {}
        self.marks: dict[bytes, None] = {}

    @property
    def empty(self) -> bool:
        return not self.seats and not self.joiners and not self.orphans

    def in_state(self, *states: SeatState) -> list[Seat]:
        """The seats in those states, by slot."""
        return [self.seats[slot] for slot in sorted(self.seats) if self.seats[slot].state in states]

    def members(self) -> list[Seat]:
        return self.in_state(SeatState.MEMBER)

    def member(self, session: SessionKey) -> Seat | None:
        for seat in self.seats.values():
            if seat.session == session and seat.state is SeatState.MEMBER:
                return seat
        return None

    def joiner(self, session: SessionKey) -> Joiner | None:
        return next((joiner for joiner in self.joiners if joiner.session == session), None)

    def slots(self) -> tuple[tuple[int, int, str], ...]:
        """(slot, node, name) of all that are not proved dead: what recover_done lists."""
        return tuple(
            (seat.slot, seat.node, seat.name) for seat in self.in_state(SeatState.MEMBER, SeatState.ZOMBIE)
        )

    def holders(self, max_slots: int) -> tuple[tuple[int, int, str, str], ...]:
        """Whom a joiner waits for: (slot, node, name, state) of the slots that can come free."""
        return tuple(
            (seat.slot, seat.node, seat.name, seat.state.value)
            for seat in self.in_state(SeatState.ZOMBIE, SeatState.RECOVERING)
            if seat.slot <= max_slots
        )

    def free_slot(self, max_slots: int) -> int | None:
        return next((slot for slot in range(1, max_slots + 1) if slot not in self.seats), None)

    def resource(self, name: bytes, callbacks: Callbacks) -> Resource:
        """The resource of that name, made if it has no locks yet."""
        resource = self.resources.get(name)
        if resource is None:
            resource = self.resources[name] = Resource(name, callbacks, self.waits)
            if name in self.marks:
                del self.marks[name]
                resource.invalid = True
        return resource

    def forget_if_empty(self, resource: Resource) -> None:
        """A resource without locks loses its value; only the invalid mark is remembered, for a while."""
        if resource.empty and self.resources.get(resource.name) is resource:
            del self.resources[resource.name]
            if resource.invalid:
                self.marks[resource.name] = None
                if len(self.marks) > MARKS_LIMIT:
                    del self.marks[next(iter(self.marks))]

    def locks_by_resource(self, sessions: frozenset[SessionKey]) -> list[tuple[Resource, list[Lock]]]:
        """The locks of those sessions, resources in byte order of their names, locks in queue order."""
        found = []
        for name in sorted(self.resources):
            resource = self.resources[name]
            queues = (resource.granted, resource.converting, resource.waiting)
            locks = [lock for queue in queues for lock in queue if lock.session in sessions]
            if locks:
                found.append((resource, locks))
        return found
