"""corosync as its clients see it: rings, one group of processes, agreed delivery, quorum on a stream of its own.

Only the medium is modelled here; what is made of it is `group.agreed`, the production code. A `Daemon` is the corosync
of one node, a `Connection` one process's way to it. A `Ring` holds the messages that were ordered in it; each daemon
has what reached it and tells its clients what it has without a gap. Drawn from the run's decisions, as corosync was
seen to do (dlm.md 5.2):

- Who sends a message has it before anybody else, and alone for ever if it is cut off then.
- Daemons that go from one ring to the next together are told the same before the change: all that one of them had, up
  to the first gap, then only what they sent themselves. A side of one node tells itself whatever it says.
- What was waiting to be sent in a change is delivered in the next ring, before or after the change is told, or never.
- Both sides of a cut have the same ring sequence. A ring is told before or after the change of membership, quorum is
  told when it pleases. One change comes as one or two. Who comes from the other side comes as NODEUP.
- With last_man_standing a ring that has had quorum for a while expects no more votes than it has. Who comes from a
  ring that expects more brings that along, and a new daemon expects all.
- A process that ends is an ordered PROCDOWN, without a new ring. The clean stop of a daemon is one, too.
- A daemon that stood still finds itself alone first. While a ring is being made nothing can be sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from clustermd.group.agreed.hello import Peer
from clustermd.group.corosync.cpg import Reason
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop

DELAYS_S = (0.00005, 0.0001, 0.0001, 0.0002, 0.0003, 0.0006, 0.002)
AGAIN_S = (0.005, 0.02, 0.1)
"""After which a message that did not arrive is sent again."""
DETECT_S = (0.4, 1.0, 2.0)
MEET_S = (0.01, 0.1, 0.6)
SYNC_S = (0.0005, 0.005, 0.1)
QUORUM_S = (0.002, 0.001, 0.0, 0.05, 0.4)
LAST_MAN_STANDING_S = 0.7
"""The window of last_man_standing: short, as runs are."""
QUEUE = 64
ENDS_S = 0.01

Ring_ = tuple[int, int]
"""A ring as clients are told it: (sequence, lowest node)."""


@dataclass(slots=True, eq=False)
class Item:
    """Something ordered: a "message", a process that "join"s or is "gone", the end of a ring's "sync", or a "kill"."""

    kind: str
    origin: Daemon
    peer: Peer = (0, 0)
    data: bytes = b""
    reason: Reason = Reason.UNDEFINED
    had: set[Daemon] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Ring:
    """One ring. `present` says whose processes each daemon brings, `twice` that the change is told as two."""

    id: Ring_
    daemons: tuple[Daemon, ...]
    present: dict[Daemon, tuple[Peer, ...]]
    twice: bool
    log: list[Item] = field(default_factory=list)
    stopped: bool = False
    synchronized: bool = False

    @property
    def nodes(self) -> frozenset[int]:
        return frozenset(daemon.node for daemon in self.daemons)


class Daemon:
    """The corosync of one node, from its start to its end."""

    def __init__(self, node: int, expected: int) -> None:
        self.node = node
        self.expected = expected  # votes
        self.alive = True
        self.paused = False
        self.stopping = False
        self.ring = Ring((0, node), (self,), {}, False)
        self.at = 0
        self.queue: deque[Item] = deque()
        self.members: dict[Peer, None] = {}
        self.clients: dict[Peer, Connection] = {}
        self.syncing = True
        self.together = frozenset((self,))  # with whom it came all the way since a ring worked
        self.seen_all = False
        self.turn = False

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused


class Client:
    """Who is told. Called in the context of its process, one event after the other; `swept` after each batch."""

    def on_confchg(
        self,
        members: tuple[Peer, ...],
        left: tuple[tuple[Peer, Reason], ...],
        joined: tuple[tuple[Peer, Reason], ...],
    ) -> None: ...

    def on_ring(self, ring: Ring_, nodes: frozenset[int]) -> None: ...

    def on_deliver(self, peer: Peer, data: bytes) -> None: ...

    def on_quorum(self, quorate: bool, ring: Ring_) -> None: ...

    def swept(self) -> None: ...

    def flush(self) -> None: ...

    def lost(self) -> None:
        """The daemon is gone."""


class Connection:
    """One process's connection: it is in the group from the delivery of its own joining."""

    def __init__(self, totem: Totem, daemon: Daemon, peer: Peer, process: Process, client: Client) -> None:
        self.peer = peer
        self.process = process
        self.client = client
        self.slow_s = 0.0
        self.joined = False
        self.over = False
        self._totem = totem
        self._daemon = daemon
        self._inbox: deque[Callable[[], None]] = deque()
        self._delivering = False
        self._wakes = False
        self._quorum: deque[Callable[[], None]] = deque()

    def send(self, data: bytes) -> bool:
        """False: try again later."""
        daemon = self._daemon
        if daemon.syncing or daemon.paused or len(daemon.queue) >= QUEUE or self._totem.draw.one_in(40):
            if not daemon.syncing and not self._wakes:
                self._wakes = True
                self._totem.loop.later(0.001, self.writable)
            return False
        if daemon.alive:
            self._totem.say(daemon, Item("message", daemon, self.peer, data))
        return True

    def writable(self) -> None:
        """Perhaps it takes something now."""
        self._wakes = False
        self.put(self.client.flush)

    def leave(self) -> None:
        self._totem.say(self._daemon, Item("gone", self._daemon, self.peer, reason=Reason.LEAVE))

    def put(self, event: Callable[[], None]) -> None:
        """One more thing to tell, in its order."""
        self._inbox.append(event)
        self._soon()

    def put_quorum(self, delay_s: float, event: Callable[[], None]) -> None:
        """The other stream: in its own order, whatever the first one does."""
        self._quorum.append(event)
        self._totem.loop.call_later(delay_s, self._next_quorum, context=self.process.context.copy())

    def _next_quorum(self) -> None:
        if not self.over and self._quorum:
            self._quorum.popleft()()
            self.client.swept()

    def _soon(self) -> None:
        if not self._delivering and self._inbox:
            self._delivering = True
            self._totem.loop.call_later(
                self._totem.delay_s() + self.slow_s, self._deliver, context=self.process.context.copy()
            )

    def _deliver(self) -> None:
        self._delivering = False
        for _ in range(1 + self._totem.draw.below(len(self._inbox)) if self._inbox else 0):
            if self.over or not self.process.alive:
                self._inbox.clear()
                return
            self._inbox.popleft()()
        if not self.over:
            self.client.swept()
        self._soon()

    def daemon_ended(self) -> None:
        self.joined = False  # nothing more comes
        self._inbox.clear()
        self._quorum.clear()
        self.put(self._end)

    def _end(self) -> None:
        self.over = True
        self.client.lost()


class Totem:
    """All nodes' corosync. `votes`: of each node."""

    def __init__(
        self,
        loop: SimLoop,
        dice: Dice,
        votes: Mapping[int, int],
        *,
        two_node: bool,
        wait_for_all: bool,
        last_man_standing: bool = False,
    ) -> None:
        self.loop = loop
        self.draw = dice.stream("order")
        self._fate = dice.stream("totem")
        self._votes = dict(votes)
        self._two_node = two_node
        self._wait_for_all = wait_for_all or two_node
        self._last_man_standing = last_man_standing
        self.daemons: dict[int, Daemon] = {}
        self._sequences: dict[int, int] = {}
        self._cut: frozenset[int] = frozenset()

    def delay_s(self) -> float:
        return DELAYS_S[self.draw.below(len(DELAYS_S))]

    def _pick(self, values: tuple[float, ...]) -> float:
        return values[self._fate.below(len(values))]

    # --- nodes ------------------------------------------------------------------------------------------

    def up(self, node: int) -> bool:
        daemon = self.daemons.get(node)
        return daemon is not None and daemon.alive

    def start(self, node: int) -> None:
        """A new daemon: alone at first."""
        if self.up(node):
            return
        daemon = self.daemons[node] = self._new(node)
        self._form((daemon,))
        self._changed()

    def kill(self, node: int, detect_s: float | None = None) -> None:
        """It is gone at once; the others notice when its token does not come."""
        daemon = self.daemons.get(node)
        if daemon is None or not daemon.alive:
            return
        daemon.alive = False
        for connection in daemon.clients.values():
            self.loop.later(ENDS_S, connection.daemon_ended)
        daemon.clients.clear()
        self._changed(detect_s)

    def stop(self, node: int) -> None:
        """A clean end: its clients are gone by PROCDOWN first, then the ring is made anew at once."""
        daemon = self.daemons.get(node)
        if daemon is None or not daemon.runs:
            return
        daemon.stopping = True
        for peer, connection in daemon.clients.items():
            connection.daemon_ended()
            self.say(daemon, Item("gone", daemon, peer, reason=Reason.PROCDOWN))
        self.loop.later(self._pick(MEET_S), self._stop_now, daemon)

    def _stop_now(self, daemon: Daemon) -> None:
        if self.daemons.get(daemon.node) is daemon:
            self.kill(daemon.node, 0.03)

    def pause(self, node: int, detect_s: float | None = None) -> None:
        daemon = self.daemons.get(node)
        if daemon is not None and daemon.runs:
            daemon.paused = True
            self._changed(detect_s)

    def resume(self, node: int) -> None:
        """If the others went on it finds itself alone before it meets them."""
        daemon = self.daemons.get(node)
        if daemon is None or not daemon.alive or not daemon.paused:
            return
        daemon.paused = False
        if any(other.ring is not daemon.ring for other in daemon.ring.daemons):
            self._form((daemon,))
        self._changed()

    def cut(self, nodes: Iterable[int], detect_s: float | None = None) -> None:
        """These nodes and the others do not hear each other; nobody is cut off where it is empty."""
        self._cut = frozenset(nodes)
        self._changed(detect_s)

    def quorate_with(self, nodes: Iterable[int]) -> bool:
        """Whether these nodes alone would have quorum. A daemon that is being stopped counts as the new one that
        follows it, which has not seen anybody yet."""
        daemons = [self.daemons[node] for node in nodes if self.up(node)]
        return self._quorate(self._new(daemon.node) if daemon.stopping else daemon for daemon in daemons)

    # --- processes --------------------------------------------------------------------------------------

    def connect(self, node: int, pid: int, process: Process, client: Client) -> Connection:
        """A process joins the group. Its node's daemon must be up."""
        daemon = self.daemons[node]
        peer = (node, pid)
        connection = daemon.clients[peer] = Connection(self, daemon, peer, process, client)
        self.say(daemon, Item("join", daemon, peer, reason=Reason.JOIN))
        return connection

    def process_gone(self, connection: Connection, detect_s: float) -> None:
        """A process has ended; its daemon notices after `detect_s`."""
        connection.over = True
        self.loop.later(detect_s, self._noticed, connection)

    def _noticed(self, connection: Connection) -> None:
        daemon = connection._daemon
        if daemon.alive and connection.peer in daemon.clients:
            self.say(daemon, Item("gone", daemon, connection.peer, reason=Reason.PROCDOWN))

    def evict(self, daemon: Daemon, node: int) -> None:
        """`corosync_cfg_kill_node`: an ordered word that makes the daemon there end."""
        self.say(daemon, Item("kill", daemon, (node, 0)))

    # --- the order --------------------------------------------------------------------------------------

    def say(self, daemon: Daemon, item: Item) -> None:
        daemon.queue.append(item)
        self._turn_soon(daemon)

    def _turn_soon(self, daemon: Daemon) -> None:
        if not daemon.turn and daemon.queue:
            daemon.turn = True
            self.loop.later(self.delay_s(), self._turn, daemon)

    def _turn(self, daemon: Daemon) -> None:
        """The token is here."""
        daemon.turn = False
        ring = daemon.ring
        if not daemon.runs or not daemon.queue or not self._whole(ring):
            return
        self._order(daemon, 1 + self.draw.below(len(daemon.queue)))
        self._turn_soon(daemon)

    def _order(self, daemon: Daemon, count: int) -> None:
        items = []
        for _ in range(count):
            if daemon.syncing and daemon.queue[0].kind != "message":
                break  # only messages are under way while a ring is made
            items.append(daemon.queue.popleft())
        self._send(daemon, items)

    def _send(self, daemon: Daemon, items: list[Item]) -> None:
        if not items:
            return
        ring = daemon.ring
        for item in items:
            item.had.add(daemon)
        ring.log += items
        self._deliver(daemon)
        for other in ring.daemons:
            if other is not daemon:
                self.loop.later(self.delay_s(), self._arrive, ring, other, items)

    def _arrive(self, ring: Ring, daemon: Daemon, items: list[Item]) -> None:
        if daemon.ring is not ring or not daemon.runs:
            return
        if self.draw.one_in(24):
            self.loop.later(self._pick(AGAIN_S), self._arrive, ring, daemon, items)
            return
        for item in items:
            if self._hears(daemon, item.origin):
                item.had.add(daemon)
        self._deliver(daemon)

    def _deliver(self, daemon: Daemon) -> None:
        """Tell all that is there without a gap."""
        ring = daemon.ring
        while daemon.at < len(ring.log) and daemon in ring.log[daemon.at].had and daemon.ring is ring:
            item = ring.log[daemon.at]
            daemon.at += 1
            self._tell(daemon, item)

    def _tell(self, daemon: Daemon, item: Item) -> None:
        if item.kind == "message":
            if item.peer in daemon.members:  # else nobody here knows who that is
                for connection in self._listeners(daemon):
                    connection.put(_delivery(connection.client, item))
        elif item.kind == "join":
            daemon.members[item.peer] = None
            own = daemon.clients.get(item.peer)
            for connection in self._listeners(daemon, own):
                first = connection is own and self._fate.below(2)
                if first:
                    self._tell_ring(connection, daemon.ring)
                self._tell_change(daemon, connection, (), ((item.peer, item.reason),))
                if connection is own and not first:
                    self._tell_ring(connection, daemon.ring)
            if own is not None:
                self._tell_quorum(own, daemon.ring)
        elif item.kind == "gone":
            if item.peer in daemon.members:
                del daemon.members[item.peer]
                for connection in self._listeners(daemon):
                    self._tell_change(daemon, connection, ((item.peer, item.reason),), ())
            daemon.clients.pop(item.peer, None)
        elif item.kind == "sync":
            self._begin(daemon)
        elif item.peer[0] == daemon.node:
            self.loop.later(0.0, self.kill, daemon.node)

    def _listeners(self, daemon: Daemon, joining: Connection | None = None) -> list[Connection]:
        if joining is not None:
            joining.joined = True
        return [
            connection for connection in daemon.clients.values() if connection.joined and not connection.over
        ]

    def _tell_change(
        self,
        daemon: Daemon,
        connection: Connection,
        left: tuple[tuple[Peer, Reason], ...],
        joined: tuple[tuple[Peer, Reason], ...],
        members: tuple[Peer, ...] | None = None,
    ) -> None:
        now = tuple(sorted(daemon.members)) if members is None else members
        connection.put(lambda: connection.client.on_confchg(now, left, joined))

    def _tell_ring(self, connection: Connection, ring: Ring) -> None:
        connection.put(lambda: connection.client.on_ring(ring.id, ring.nodes))

    def _tell_quorum(self, connection: Connection, ring: Ring) -> None:
        quorate = self._quorate(ring.daemons)
        connection.put_quorum(self._pick(QUORUM_S), lambda: connection.client.on_quorum(quorate, ring.id))

    # --- rings ------------------------------------------------------------------------------------------

    def _hears(self, one: Daemon, other: Daemon) -> bool:
        return (one.node in self._cut) == (other.node in self._cut)

    def _whole(self, ring: Ring) -> bool:
        first = ring.daemons[0]
        return all(
            daemon.runs and daemon.ring is ring and self._hears(first, daemon) for daemon in ring.daemons
        )

    def _changed(self, detect_s: float | None = None) -> None:
        """Somebody came, went or is not heard any more: rings stop, or go on, and new ones are made after a while."""
        rings = {daemon.ring: None for daemon in self.daemons.values() if daemon.alive}
        for ring in rings:
            if self._whole(ring):
                if ring.stopped:
                    self._go_on(ring)
            elif not ring.stopped:
                ring.stopped = True
                self._last_words(ring)
        for component in self._components():
            old = {daemon.ring for daemon in component}
            if len(old) == 1 and next(iter(old)).daemons == component:
                continue
            broken = any(not self._whole(ring) for ring in old)
            if broken and detect_s is None:
                delay_s = self._pick(DETECT_S)
            else:
                delay_s = detect_s if broken and detect_s is not None else self._pick(MEET_S)
            self.loop.later(delay_s, self._reform, component)

    def _go_on(self, ring: Ring) -> None:
        """It was nothing: what was missed is sent again."""
        ring.stopped = False
        for daemon in ring.daemons:
            missing = [item for item in ring.log if daemon not in item.had]
            if missing:
                self.loop.later(self.delay_s(), self._arrive, ring, daemon, missing)
            self._turn_soon(daemon)
        self._synchronized(ring)

    def _last_words(self, ring: Ring) -> None:
        """Whoever has the token sends once more."""
        able = [daemon for daemon in ring.daemons if daemon.runs and daemon.ring is ring]
        if able:
            holder = able[self._fate.below(len(able))]
            self._order(holder, len(holder.queue))

    def _components(self) -> list[tuple[Daemon, ...]]:
        running = [daemon for _, daemon in sorted(self.daemons.items()) if daemon.runs]
        sides: dict[bool, list[Daemon]] = {}
        for daemon in running:
            sides.setdefault(daemon.node in self._cut, []).append(daemon)
        return [tuple(side) for side in sides.values()]

    def _reform(self, component: tuple[Daemon, ...]) -> None:
        old = {daemon.ring for daemon in component}
        if component not in self._components() or (len(old) == 1 and next(iter(old)).daemons == component):
            return
        self._form(component)

    def _form(self, component: tuple[Daemon, ...]) -> None:
        """A new ring of these daemons."""
        sides = {
            daemon: frozenset(other for other in component if other.ring is daemon.ring)
            for daemon in component
        }
        for side in dict.fromkeys(sides.values()):
            self._even_out(side)
        sequence = 4 + max(self._sequences.get(daemon.node, 0) for daemon in component)
        ring = Ring(
            (sequence, component[0].node),
            component,
            {
                daemon: tuple(peer for peer in daemon.members if peer[0] == daemon.node)
                for daemon in component
            },
            bool(self._fate.below(2)),
        )
        for daemon in component:
            self._sequences[daemon.node] = sequence
            daemon.together = sides[daemon] & daemon.together if daemon.syncing else sides[daemon]
            daemon.ring, daemon.at, daemon.syncing = ring, 0, True
            if self._fate.one_in(3):
                daemon.queue = deque(item for item in daemon.queue if item.kind != "message")
        if len(component) == len(self._votes) or any(daemon.seen_all for daemon in component):
            for daemon in component:
                daemon.seen_all = True
        for daemon in component:
            for connection in self._listeners(daemon):
                self._tell_quorum(connection, ring)
            self._turn_soon(daemon)
        self.loop.later(self._pick(SYNC_S), self._synchronized, ring)
        if self._last_man_standing:
            expected = max(daemon.expected for daemon in component)
            for daemon in component:
                daemon.expected = expected
            self.loop.later(LAST_MAN_STANDING_S, self._expect_less, ring)

    def _expect_less(self, ring: Ring) -> None:
        """The window of last_man_standing is over."""
        if self._whole(ring) and self._quorate(ring.daemons):
            for daemon in ring.daemons:
                daemon.expected = self._sum(ring.daemons)

    def _even_out(self, side: frozenset[Daemon]) -> None:
        """What one of those who go on together had, all have: up to a gap, then only what they said themselves."""
        daemons = sorted(side, key=lambda daemon: daemon.node)
        ring = daemons[0].ring
        whole = True
        for place, item in enumerate(ring.log):
            there = not item.had.isdisjoint(side)
            whole = whole and there
            if there and (whole or item.origin in side):
                for daemon in daemons:
                    if daemon.at <= place:
                        daemon.at = place + 1
                        self._tell(daemon, item)

    def _synchronized(self, ring: Ring) -> None:
        """The ring works: that is ordered, too, and the same for all."""
        first = ring.daemons[0]
        if self._whole(ring) and not ring.synchronized:
            ring.synchronized = True
            self._send(first, [Item("sync", first)])

    def _begin(self, daemon: Daemon) -> None:
        """The change is told."""
        ring = daemon.ring
        side = {other.node for other in daemon.together}
        left = tuple((peer, Reason.NODEDOWN) for peer in daemon.members if peer[0] not in side)
        joined = tuple(
            (peer, Reason.NODEUP)
            for other in ring.daemons
            if other not in daemon.together
            for peer in ring.present[other]
        )
        for peer, _ in left:
            del daemon.members[peer]
        between = tuple(sorted(daemon.members))
        daemon.members |= dict.fromkeys(peer for peer, _ in joined)
        daemon.syncing = False
        rebooted = any(peer[0] in ring.nodes for peer, _ in left)
        for connection in self._listeners(daemon):
            first = not rebooted and self._fate.one_in(3)
            if first:
                self._tell_ring(connection, ring)
            if left and joined and ring.twice:
                self._tell_change(daemon, connection, left, (), between)
                self._tell_change(daemon, connection, (), joined)
            elif left or joined:
                self._tell_change(daemon, connection, left, joined)
            if not first:
                self._tell_ring(connection, ring)
        for connection in daemon.clients.values():
            connection.writable()
        self._turn_soon(daemon)

    def _quorate(self, daemons: Iterable[Daemon]) -> bool:
        daemons = tuple(daemons)
        if self._wait_for_all and not any(daemon.seen_all for daemon in daemons):
            return len(daemons) == len(self._votes)
        quorum = max((daemon.expected for daemon in daemons), default=0) // 2 + 1
        return self._sum(daemons) >= quorum or (self._two_node and bool(daemons))

    def _sum(self, daemons: Iterable[Daemon]) -> int:
        return sum(self._votes[daemon.node] for daemon in daemons)

    def _new(self, node: int) -> Daemon:
        return Daemon(node, sum(self._votes.values()))


def _delivery(client: Client, item: Item) -> Callable[[], None]:
    return lambda: client.on_deliver(item.peer, item.data)
