"""The one order of a local group, as a value: who is a member, and the next place for everything.

The order is a sequence of events, each with its place (1, 2, 3 ... without gaps):

    ["view", place, [life, number], members, joined, left]      a membership
    ["message", place, index, node, incarnation, seq, payload]  bytes of a member
    ["fenced", place, member, proof]                            an end that is proved

Members travel as [node, incarnation, name], those who left as [member, "left" | "lost"]. The same bytes go to
the order's log and to every member. `Order` makes events and replays them, so that a sequencer which reads
its predecessor's log goes on exactly where that one stopped: the same members, the same lost
ones to be proved dead, and for each member the last message number, by which a message that is sent
again after a sequencer's death is recognised (exactly once). A ring is (life, number); a new
sequencer is a new life, so a ring is never used twice. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clustermd.errors import BadBytes
from clustermd.group.process_group import Left, Member, View

Event = list[Any]


def member_to_wire(member: Member) -> list[Any]:
    return [member.node, member.incarnation, member.name]


def member_from_wire(wire: list[Any]) -> Member:
    node, incarnation, name = wire
    return Member(int(node), int(incarnation), str(name))


def view_from_event(event: Event) -> View:
    """The View that a "view" event tells."""
    _, _, ring, members, joined, left = event
    return View(
        ring=(ring[0], ring[1]),
        members=tuple(member_from_wire(wire) for wire in members),
        joined=tuple(member_from_wire(wire) for wire in joined),
        left=tuple((member_from_wire(wire), Left(reason)) for wire, reason in left),
        quorate=True,
    )


class Order:
    """Makes the next event, or replays a known one; the state is the same after both."""

    def __init__(self) -> None:
        self.place = 0
        self.index = 0
        self.ring = (0, 0)
        self.members: dict[int, Member] = {}
        self.lost: dict[int, Member] = {}
        self.seqs: dict[int, int] = {}
        self._new_life = True

    def base(self) -> Event:
        """The whole state, as the first record of a log."""
        return [
            "base",
            self.place,
            self.index,
            list(self.ring),
            [member_to_wire(member) for member in self.members.values()],
            [member_to_wire(member) for member in self.lost.values()],
            [[incarnation, seq] for incarnation, seq in self.seqs.items()],
        ]

    @classmethod
    def from_base(cls, base: Event) -> Order:
        """The state that `base` tells. Raises BadBytes."""
        order = cls()
        try:
            word, order.place, order.index, ring, members, lost, seqs = base
            order.ring = (int(ring[0]), int(ring[1]))
            order.members = {member.incarnation: member for member in map(member_from_wire, members)}
            order.lost = {member.incarnation: member for member in map(member_from_wire, lost)}
            order.seqs = {int(incarnation): int(seq) for incarnation, seq in seqs}
        except (ValueError, TypeError, IndexError) as error:
            raise BadBytes("bad-order-log", f"the order's log starts with no base record: {error}") from None
        if word != "base":
            raise BadBytes(
                "bad-order-log", f"the order's log starts with {word!r} where a base record belongs"
            )
        return order

    def join(self, member: Member) -> Event:
        """A view with `member`. It repeats who is lost and not proved dead: a newcomer must wait for that too."""
        return self.view(joined=[member], left=[(lost, Left.LOST) for lost in self.lost.values()])

    def view(self, joined: Iterable[Member] = (), left: Iterable[tuple[Member, Left]] = ()) -> Event:
        """The next membership; its ring begins a new life if it is this sequencer's first."""
        joined, left = list(joined), list(left)
        gone = {member.incarnation for member, _ in left}
        members = sorted([m for m in self.members.values() if m.incarnation not in gone] + joined)
        life, number = self.ring
        ring = [life + 1, 1] if self._new_life else [life, number + 1]
        event: Event = [
            "view",
            self.place + 1,
            ring,
            [member_to_wire(member) for member in members],
            [member_to_wire(member) for member in joined],
            [[member_to_wire(member), reason.value] for member, reason in left],
        ]
        self.apply(event)
        self._new_life = False
        return event

    def message(self, incarnation: int, seq: int, payload: bytes) -> Event | None:
        """A message of a member; None when it was ordered before (sent again). Raises BadBytes for a gap."""
        last = self.seqs[incarnation]
        if seq <= last:
            return None
        if seq != last + 1:
            raise BadBytes("bad-frame", f"a member's message {seq} came after its message {last}")
        member = self.members[incarnation]
        event: Event = ["message", self.place + 1, self.index + 1, member.node, incarnation, seq, payload]
        self.apply(event)
        return event

    def fenced(self, incarnation: int, proof: str) -> Event:
        """The proved end of a lost member."""
        event: Event = ["fenced", self.place + 1, member_to_wire(self.lost[incarnation]), proof]
        self.apply(event)
        return event

    def apply(self, event: Event) -> None:
        """Take over an event that is the next one. Raises BadBytes when it is not."""
        if event[1] != self.place + 1:
            raise BadBytes("bad-order-log", f"place {event[1]} follows place {self.place} in the order")
        match event:
            case ["message", place, index, _, incarnation, seq, _]:
                self.index = index
                self.seqs[incarnation] = seq
            case ["view", place, ring, _, joined, left]:
                self.ring = (ring[0], ring[1])
                for wire, reason in left:
                    member = member_from_wire(wire)
                    self.members.pop(member.incarnation, None)
                    self.seqs.pop(member.incarnation, None)
                    if reason == Left.LOST.value:
                        self.lost[member.incarnation] = member
                for wire in joined:
                    member = member_from_wire(wire)
                    self.members[member.incarnation] = member
                    self.seqs[member.incarnation] = 0
            case ["fenced", place, wire, _]:
                self.lost.pop(member_from_wire(wire).incarnation, None)
            case _:
                raise BadBytes("bad-order-log", f"{event[0]!r} is no event of the order")
        self.place = place
