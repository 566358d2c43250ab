"""A process group in memory for tests of what stands on one: the order is a list, a test decides who reads how far.

`MemoryGroup` is the order of the whole cluster; `Port` is what one member sees of it (a `ProcessGroup`).
Nothing happens by itself: a test delivers events one at a time, to whichever member it likes, so members may have read
different prefixes. `lose` ends a member at any point, `break_sequencer` cuts every member off where it is:
what not all have read is lost to the others, undelivered messages are lost for good, and a view that is
not quorate tells everybody. `view` begins the next one. `cut` separates a member that lives on: it hears the last of
its own messages, which nobody else will ever hear, and then that it has no quorum; `heal` brings it back.

`stable` groups keep every message for good (`local`). In others a message is stable once all members have read it, and
`tell_stable` says so; before that it can be lost with its readers, as over CPG (dlm.md 5.2).
"""

from __future__ import annotations

from collections.abc import Callable

from clustermd.group.process_group import Busy, GroupEvents, Left, Member, View, Witness
from clustermd.testing.locks.rules import LockRuleBroken

ROUNDS_MAX = 20_000
"""Rounds of everybody's next message until nothing moves: far more than any test needs."""

Event = Callable[[GroupEvents], None]


class Port:
    """One member's end. `read` is how many events of the current order it has been told, from `since` on.

    `alone` is None for a member, else what a separated one hears before it hears nothing.
    """

    def __init__(self, group: MemoryGroup, me: Member, max_payload: int) -> None:
        self.me = me
        self.max_payload = max_payload
        self.group = group
        self.events: GroupEvents | None = None
        self.read = self.since = len(group.order)
        self.limit = 1 << 30
        self.sent: list[bytes] = []
        self.alone: list[Event] | None = None

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
        self.indexes: dict[int, int] = {}
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

    def lose(self, member: Member, reason: Left = Left.LOST, *, quorate: bool = True) -> None:
        """A member ends; what it sent and nobody ordered is gone."""
        port = self.ports.pop(member)
        self.read_by_the_lost = max(self.read_by_the_lost, port.read)
        self.view(left={member: reason}, quorate=quorate)

    def fence(self, member: Member) -> None:
        self.unproved.discard(member)
        self.fences[len(self.order)] = member
        self.order.append(lambda events: events.on_fenced(member, "the test says so"))

    def cut(self, member: Member, own: int = 0, *, quorate: bool = True) -> int:
        """Separate a member that lives on. It may have heard `own` more of its messages that nobody else ever hears.

        In a group whose messages are not stable at once, those that only it has read are lost to the others as well.
        Returns the number of messages that the others lost.
        """
        port = self.ports.pop(member)
        lost = 0
        port.alone = []
        if not self.stable:
            known = max((other.read for other in self.ports.values()), default=0)
            lost = self._forget_after(known) if self.ports and port.read == len(self.order) else 0
            index = self.index + lost
            for number, payload in enumerate(port.sent[:own], index + 1):
                port.alone.append(_message(number, member, payload))
            del port.sent[:own]
        else:
            self.read_by_the_lost = max(self.read_by_the_lost, port.read)
        ring = (self.ring[0], self.ring[1] + 1)
        left = tuple((other, Left.LOST) for other in sorted(self.ports))
        view = View(ring, (member,), (), left, False)
        port.alone.append(lambda events: events.on_view(view))
        self.view(left={member: Left.LOST}, quorate=quorate)
        return lost

    def _forget_after(self, known: int) -> int:
        """Take the last messages back that stand after place `known`, as far as nothing but messages does."""
        place = len(self.order)
        while place > known and place - 1 in self.indexes:
            place -= 1
            del self.indexes[place]
        lost = len(self.order) - place
        del self.order[place:]
        self.index -= lost
        return lost

    def heal(self, port: Port, *, quorate: bool = True) -> None:
        """A separated member meets the others again; they know it as lost, and it knows nothing since then."""
        port.alone = None
        port.read = port.since = len(self.order)
        self.ports[port.me] = port
        self.unproved.discard(port.me)
        self.view(quorate=quorate)

    def break_sequencer(self) -> None:
        """Everybody stays where it is, and what is not delivered never will be, except proofs of ends.

        What a lost member was told was stable: some survivor is told before the order is gone.
        """
        # one that was told from the beginning: a newcomer knows nothing of what came before it
        ahead = max(self.ports.values(), key=lambda port: (-port.since, port.read, port.me))
        while self.stable and ahead.read < self.read_by_the_lost:
            self.deliver(ahead.me)
        self.read_by_the_lost = 0
        told = min(port.read for port in self.ports.values())
        self.fence_again = [member for place, member in self.fences.items() if place >= told]
        self.unproved |= set(self.fence_again)
        self.fences = {}
        self.order = []
        self.indexes = {}
        self.ring = (self.ring[0] + 1, 0)
        view = View(self.ring, self.members, (), (), False)
        for port in self.ports.values():
            port.read = port.since = 0
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
        self.indexes[len(self.order)] = self.index
        self.order.append(_message(self.index, member, payload, stable=self.stable))
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

    def deliver_alone(self, port: Port) -> bool:
        """Tell a separated member the next it hears. Returns False if there is nothing."""
        if not port.alone:
            return False
        assert port.events is not None
        port.alone.pop(0)(port.events)
        return True

    def stable_index(self) -> int:
        """The last message that all members have read."""
        read = min((port.read for port in self.ports.values()), default=0)
        return max((index for place, index in self.indexes.items() if place < read), default=0)

    def tell_stable(self, member: Member) -> None:
        """Tell `member` what is stable, of what it has read."""
        events = self.ports[member].events
        assert events is not None
        if index := self.stable_index():
            events.on_stable(index)

    def settle(self) -> None:
        """Order and deliver until nothing moves. Raises LockRuleBroken if that does not end."""
        for _ in range(ROUNDS_MAX):
            moved = False
            for member in sorted(self.ports):
                moved |= self.accept(member)
            for member in sorted(self.ports):
                while member in self.ports and self.deliver(member):
                    moved = True
            if not moved:
                return
        raise LockRuleBroken("never-quiet", f"messages go on after {ROUNDS_MAX} rounds")


def _message(index: int, sender: Member, payload: bytes, *, stable: bool = False) -> Event:
    def event(events: GroupEvents) -> None:
        events.on_message(index, sender, payload)
        if stable:
            events.on_stable(index)

    return event


def newcomer_reads_from_here(group: MemoryGroup, port: Port) -> None:
    """A new port hears nothing of what was ordered before it."""
    port.read = port.since = len(group.order)
