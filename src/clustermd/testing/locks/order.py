"""A process group in memory for tests of what stands on one: the order is a list, a test decides who reads how far.

`MemoryGroup` is the order of the whole cluster; `Port` is what one member sees of it (a `ProcessGroup`).
Nothing happens by itself: a test delivers events one at a time, to whichever member it likes, so members may have read
different prefixes. `lose` ends a member at any point, `break_sequencer` cuts every member off where it is:
what not all have read is lost to the others, undelivered messages are lost for good, and a view that is
not quorate tells everybody. `view` begins the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clustermd.group.process_group import Busy, GroupEvents, Left, Member, View, Witness

Event = Callable[[GroupEvents], None]


class Port:
    """One member's end. `read` is how many events of the current order it has been told."""

    def __init__(self, group: MemoryGroup, me: Member, max_payload: int) -> None:
        self.me = me
        self.max_payload = max_payload
        self.group = group
        self.events: GroupEvents | None = None
        self.read = 0
        self.limit = 1 << 30
        self.sent: list[bytes] = []

    def multicast(self, payload: bytes) -> None:
        assert len(payload) <= self.max_payload
        if len(self.sent) >= self.limit:
            raise Busy("the test says so")
        self.sent.append(payload)

    async def register_witness(self, witness: Witness) -> None: ...

    async def withdraw_witness(self, key: str) -> None: ...

    async def leave(self) -> None: ...


class MemoryGroup:
    """The order. Members are added with `port` and become members of the next `view`."""

    def __init__(self, *, max_payload: int = 1 << 16, stable: bool = True) -> None:
        self.max_payload = max_payload
        self.stable = stable
        self.ports: dict[Member, Port] = {}
        self.members: tuple[Member, ...] = ()
        self.ring = (1, 0)
        self.order: list[Event] = []
        self.index = 0
        self.unproved: set[Member] = set()
        self.fences: dict[int, Member] = {}
        self.fence_again: list[Member] = []
        self.read_by_the_lost = 0

    def port(self, node: int, incarnation: int) -> Port:
        member = Member(node, incarnation, f"node{node}")
        port = self.ports[member] = Port(self, member, self.max_payload)
        return port

    # ---- what happens to the group

    def view(self, *, left: dict[Member, Left] | None = None, quorate: bool = True) -> None:
        """A new view of all ports, in the order after everything so far.

        Whoever was lost and is not fenced yet is told of as lost again: a member that joins must know.
        """
        left = dict(left or {})
        self.unproved |= {member for member, reason in left.items() if reason is Left.LOST}
        left |= dict.fromkeys(self.unproved, Left.LOST)
        before = set(self.members)
        self.members = tuple(sorted(member for member in self.ports if member not in left))
        self.ring = (self.ring[0], self.ring[1] + 1)
        view = View(
            ring=self.ring,
            members=self.members,
            joined=tuple(member for member in self.members if member not in before),
            left=tuple(sorted(left.items())),
            quorate=quorate,
        )
        self.order.append(lambda events: events.on_view(view))
        again, self.fence_again = self.fence_again, []
        for member in again:
            self.fence(member)

    def lose(self, member: Member, reason: Left = Left.LOST) -> None:
        """A member ends; what it sent and nobody ordered is gone."""
        port = self.ports.pop(member)
        self.read_by_the_lost = max(self.read_by_the_lost, port.read)
        self.view(left={member: reason})

    def fence(self, member: Member) -> None:
        self.unproved.discard(member)
        self.fences[len(self.order)] = member
        self.order.append(lambda events: events.on_fenced(member, "the test says so"))

    def break_sequencer(self) -> None:
        """Everybody stays where it is, and what is not delivered never will be, except proofs of ends.

        What a lost member was told was stable: some survivor is told before the order is gone.
        """
        ahead = max(self.ports, key=lambda member: (self.ports[member].read, member))
        while self.ports[ahead].read < self.read_by_the_lost:
            self.deliver(ahead)
        self.read_by_the_lost = 0
        told = min(port.read for port in self.ports.values())
        self.fence_again = [member for place, member in self.fences.items() if place >= told]
        self.unproved |= set(self.fence_again)
        self.fences = {}
        self.order = []
        self.ring = (self.ring[0] + 1, 0)
        view = View(self.ring, self.members, (), (), False)
        for port in self.ports.values():
            port.read = 0
            port.sent.clear()
            assert port.events is not None
            port.events.on_view(view)

    # ---- what a test lets happen

    def accept(self, member: Member) -> bool:
        """Order the next message that `member` sent. Returns False if there is none."""
        port = self.ports[member]
        if not port.sent:
            return False
        payload = port.sent.pop(0)
        self.index += 1
        index, stable = self.index, self.stable

        def event(events: GroupEvents) -> None:
            events.on_message(index, member, payload)
            if stable:
                events.on_stable(index)

        self.order.append(event)
        return True

    def deliver(self, member: Member) -> bool:
        """Tell `member` the next event it has not read. Returns False if there is none."""
        port = self.ports[member]
        if port.read >= len(self.order):
            return False
        event = self.order[port.read]
        port.read += 1
        assert port.events is not None
        event(port.events)
        return True

    def settle(self) -> None:
        """Order and deliver until nothing moves."""
        moved = True
        while moved:
            moved = False
            for member in sorted(self.ports):
                moved |= self.accept(member)
            for member in sorted(self.ports):
                while member in self.ports and self.deliver(member):
                    moved = True


def newcomer_reads_from_here(group: MemoryGroup, port: Port) -> None:
    """A new port hears nothing of what was ordered before it."""
    port.read = len(group.order)


Fields = dict[str, Any]
