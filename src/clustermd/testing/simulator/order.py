"""The simulated process group of nodes on one machine: one durable order, views, and proofs of ends (as `local`).

Messages wait to be ordered, and reach each member after a delay of its own, in order. So a member may die or be paused
between any two messages. What is ordered survives whoever ordered it, and is stable when delivered. While what orders
is gone (`freeze`) nobody may act. A member that is gone without goodbye is lost, and told of as lost again in each view
in which somebody joins, until `fence` says that it has ended and its I/O has drained.

Where nodes are machines that meet by corosync, the group is the real one over a model of corosync (`totem`, `agreed`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from clustermd.group.process_group import Busy, GroupEvents, Left, Member, View, Witness
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop

DELAYS_S = (0.00005, 0.0001, 0.0001, 0.0002, 0.0003, 0.0006, 0.002)
MAX_PAYLOAD_BYTES = 60_000
BUSY_AT = 200


Entry = Callable[["Port"], None]
"""Something a member will be told."""


class Port:
    """One member's end of the group (a `ProcessGroup`). `slow_s` delays all that it hears."""

    def __init__(self, group: SimGroup, me: Member, process: Process) -> None:
        self.me = me
        self.max_payload = MAX_PAYLOAD_BYTES
        self.group = group
        self.process = process
        self.events: GroupEvents | None = None
        self.component: Component | None = None
        self.inbox: deque[Entry] = deque()
        self.outgoing: deque[bytes] = deque()
        self.slow_s = 0.0
        self.unfenced: set[Member] = set()  # whom it was told are lost, and not that they are proved dead
        self._delivering = False
        self._accepting = False

    # --- ProcessGroup ---------------------------------------------------------------------------------

    def multicast(self, payload: bytes) -> None:
        assert len(payload) <= self.max_payload
        if not self.process.alive:
            return
        if len(self.outgoing) >= BUSY_AT:
            raise Busy("many messages wait to be ordered")
        self.outgoing.append(payload)
        self.accept_soon()

    async def register_witness(self, witness: Witness) -> None: ...

    async def withdraw_witness(self, key: str) -> None: ...

    async def leave(self) -> None:
        self.group.leave(self)

    def set_slow(self, slow_s: float) -> None:
        """All that it hears is late."""
        self.slow_s = slow_s

    # --- the way in and out ---------------------------------------------------------------------------

    def accept_soon(self) -> None:
        component = self.component
        if not self._accepting and self.outgoing and component is not None and not self.group.frozen:
            self._accepting = True
            self.group.later(self._accept)

    def _accept(self) -> None:
        self._accepting = False
        component = self.component
        if component is None or self.group.frozen or not self.outgoing or not self.process.alive:
            return
        for _ in range(1 + self.group.draw.below(len(self.outgoing))):
            component.order(self.me, self.outgoing.popleft())
        self.accept_soon()

    def deliver_soon(self) -> None:
        if not self._delivering and self.inbox:
            self._delivering = True
            # the process's own doing: a paused one hears nothing until it goes on
            self.group.loop.call_later(
                self.group.delay_s() + self.slow_s, self._deliver, context=self.process.context.copy()
            )

    def _deliver(self) -> None:
        self._delivering = False
        for _ in range(1 + self.group.draw.below(len(self.inbox)) if self.inbox else 0):
            if not self.inbox or not self.process.alive:
                return
            self.inbox.popleft()(self)
        self.deliver_soon()

    def tell(self, entry: Entry) -> None:
        self.inbox.append(entry)
        self.deliver_soon()


@dataclass(eq=False)
class Component:
    """The members. `log` holds the messages of this ring: (sender, payload), index from 1."""

    group: SimGroup
    ring: tuple[int, int]
    ports: list[Port]
    quorate: bool
    log: list[tuple[Member, bytes]] = field(default_factory=list)

    def order(self, sender: Member, payload: bytes) -> None:
        self.log.append((sender, payload))
        index = len(self.log)
        for port in self.ports:
            port.tell(self.entry(index))

    def entry(self, index: int) -> Entry:
        sender, payload = self.log[index - 1]

        def deliver(port: Port) -> None:
            assert port.events is not None
            port.events.on_message(index, sender, payload)
            port.events.on_stable(index)

        return deliver


class SimGroup:
    """The group of a cluster."""

    def __init__(self, loop: SimLoop, dice: Dice) -> None:
        self.loop = loop
        self.draw = dice.stream("order")
        self.components: list[Component] = []
        self.joining: list[Port] = []
        self.lost: dict[Member, str] = {}  # lost members, with the proof once there is one
        self.on_lost: Callable[[], None] = lambda: None  # somebody may be lost whose end must be proved
        self.frozen = False
        self._proofs: dict[Member, str] = {}
        self.unproved: set[Member] = set()  # whoever was in a quorate view and may still act
        self._goodbyes: dict[Member, Left] = {}
        self._ring = 0

    def delay_s(self) -> float:
        return DELAYS_S[self.draw.below(len(DELAYS_S))]

    def later(self, what: Callable[[], None]) -> None:
        self.loop.later(self.delay_s(), what)

    # --- membership ---------------------------------------------------------------------------------------

    def ports(self) -> list[Port]:
        return sorted(
            (port for component in self.components for port in component.ports), key=lambda port: port.me
        )

    def port(self, node: int, incarnation: int, process: Process) -> Port:
        """A new member; it is told its first view when the group takes it."""
        port = Port(self, Member(node, incarnation, f"node{node}"), process)
        self.joining.append(port)
        return port

    def join(self, port: Port) -> None:
        if port in self.joining:
            self.reconfigure()

    def leave(self, port: Port) -> None:
        """A goodbye, perhaps of one that was never a member."""
        if port in self.joining:
            self.joining.remove(port)
        self._drop(port)
        self.unproved.discard(port.me)
        self.reconfigure(left={port.me: Left.LEFT})

    def lose(self, port: Port) -> None:
        """The group notices that a member is gone."""
        if port in self.joining:
            self.joining.remove(port)
        if port.component is None:
            return
        self._drop(port)
        self.lost.setdefault(port.me, "")
        self.reconfigure(left={port.me: Left.LOST})

    def _drop(self, port: Port) -> None:
        component = port.component
        if component is not None:
            component.ports.remove(port)
        port.component = None

    def fence(self, member: Member, proof: str) -> None:
        """The end of a lost member is proved: ordered, and said again where it may have been lost."""
        if member in self.lost and not self.lost[member]:
            self.lost[member] = self._proofs[member] = proof
            for component in self.components:
                self._say_fenced(component, member)

    def _say_fenced(self, component: Component, member: Member) -> None:
        """All of this view must hear it, else it is said again in the next one."""
        proof = self._proofs[member]
        if not component.quorate or self.frozen:
            return
        waiting = set(component.ports)

        def deliver(port: Port) -> None:
            assert port.events is not None
            port.events.on_fenced(member, proof)
            port.unfenced.discard(member)
            waiting.discard(port)
            if not waiting:
                self.lost.pop(member, None)
                self.unproved.discard(member)

        for port in component.ports:
            port.tell(deliver)

    # --- the sequencer --------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """What orders the messages is gone: nobody may act until `thaw`."""
        self.frozen = True
        self._ring += 1
        for component in self.components:
            component.quorate = False
            members = tuple(port.me for port in component.ports)
            for port in component.ports:
                port.tell(_view(View((self._ring, 0), members, (), (), False)))

    def thaw(self) -> None:
        """A successor begins with those that are still there."""
        if self.frozen:
            self.frozen = False
            self.reconfigure()

    def reconfigure(self, left: dict[Member, Left] | None = None) -> None:
        """A new view."""
        self._goodbyes |= left or {}
        if self.frozen:
            return
        left, self._goodbyes = self._goodbyes, {}
        before = {port: component for component in self.components for port in component.ports}
        arriving, self.joining = self.joining, []
        for port in arriving:
            port.inbox.clear()
        everybody = sorted([*before, *arriving], key=lambda port: port.me)
        quorate_before = {port for port, component in before.items() if component.quorate}
        components: list[Component] = []
        if everybody:
            self._ring += 1
            components.append(self._begin(everybody, left, quorate_before))
        self.components = components
        for component in components:
            # also what some of its members were cut off from when it was said
            behind = {
                member for port in component.ports for member in port.unfenced if member in self._proofs
            }
            for member in sorted(behind | {member for member, proof in self.lost.items() if proof}):
                self._say_fenced(component, member)
        for port in everybody:
            if self.draw.below(2):
                port.outgoing.clear()  # delivered in the next view or never
            port.accept_soon()
        self.on_lost()

    def _begin(self, ports: list[Port], left: dict[Member, Left], quorate_before: set[Port]) -> Component:
        members = tuple(port.me for port in ports)
        # whoever was ever a member and neither left nor is proved dead may act still
        for member in sorted(self.unproved):
            if member not in members:
                self.lost.setdefault(member, "")
        for member in members:
            self.lost.pop(member, None)
        self.unproved.update(members)
        component = Component(self, (self._ring, 1), ports, True)
        gone = dict(left) | {member: Left.LOST for member in self.lost if member not in members}
        joined = tuple(port.me for port in ports if port not in quorate_before)
        view = View(
            component.ring, members, joined, tuple(sorted(gone.items(), key=lambda item: item[0])), True
        )
        for port in ports:
            port.component = component
            port.unfenced.update(member for member, reason in gone.items() if reason is Left.LOST)
            port.tell(_view(view))
        return component


def _view(view: View) -> Entry:
    def deliver(port: Port) -> None:
        assert port.events is not None
        port.events.on_view(view)

    return deliver
