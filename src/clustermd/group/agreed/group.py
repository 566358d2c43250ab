"""A `ProcessGroup` over a medium with agreed order. Pure: the medium's events go in, bytes come out.

The medium (corosync's CPG and quorum service; in the simulator, a model of both) tells: changes of membership
and messages, in one order for all who go through them together; and, not in that order, rings and quorum. Its order is
neither durable nor safe, it serves minorities too, and its membership is of processes, not of lives
(dlm.md 5.2). This class makes a group of it:

- A change of membership ends the view at once: nothing is delivered until the next one. Each member says `Hello`
  when it knows the ring and its quorum there; where the last hello of the change is delivered, the view
  begins for all (`change`). Messages carry the view in which they were sent, and count in no other.
- A process that is in the medium's group and says nothing holds nothing: it is left out after a while. One on
  the node of a member that says nothing is evicted, since that member may hold what others wait for.
- Messages are told at their delivery, and are stable by the votes that have them (`stability`).
- Who is gone without goodbye is lost until its end is proved (`fencing`); an end is told in the order.
- A node without quorum hears a view that is not quorate at once, whatever the order does. What the order still brings
  of the view that ended so comes with the next quorate view: others count on it, for they had it before the change.
- With a lease, members say beats (`lease`).

`expelled`: this life of the node is not a part of the group any more; its process must end and begin anew.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from clustermd.clock import Clock
from clustermd.errors import BadBytes, Refused
from clustermd.group.agreed.acks import Acks
from clustermd.group.agreed.change import Change, Configured, work_out
from clustermd.group.agreed.fencing import FenceShell, Fencing
from clustermd.group.agreed.hello import (
    ACK,
    CONTROL,
    OVERHEAD_BYTES,
    PAYLOAD,
    Hello,
    Key,
    Life,
    Peer,
    Tag,
    ack,
    control,
    read_ack,
    read_control,
    read_tag,
    tagged,
)
from clustermd.group.agreed.lease import Lease
from clustermd.group.process_group import Busy, GroupEvents, Left, Member, View, check_size, not_a_member
from clustermd.trace import Trace

MAX_PAYLOAD_BYTES = 60 << 10
WINDOW = 8
"""Own messages under way at most; what comes on top is batched by who sends it (dlm.md 6.5)."""
PROOFS_KEPT = 256
TICK_MOST_S = 1.0
"""What a tick counts at most: while this process itself was stopped nobody was silent."""
SHOWN_S = 1.0


class Medium(Protocol):
    """What carries bytes to all members of the medium's group, this one too, in one order."""

    def send(self, data: bytes) -> bool:
        """False: not now; `AgreedGroup.flush` is called when it may be possible again."""

    def evict(self, node: int) -> None:
        """Make the medium's daemon on `node` end: a process there does not do its part."""


class StatefulEvents(GroupEvents, Protocol):
    """Who hears the group says what it keeps, for messages are stable by that."""

    @property
    def has_state(self) -> bool:
        """Whether it kept what former views agreed on."""

    @property
    def installed(self) -> bool:
        """Whether all that it was told up to now is a part of its state."""

    @property
    def awaited(self) -> int:
        """The last message of this view that somebody's right waits to be stable: what comes after is in no hurry."""


class AgreedGroup:
    """See the module. `nodes` are the configured ones; `config` is what all must have alike, in words.

    `ended` are proofs of former lives of this node: (incarnation, words). `fenced` are those of other nodes' lives
    that this node proved, while it was no majority, before it was started; `on_proof(life, words)` is told each new
    such one before anybody else, to be kept. `startup_s` and `race_s` are as in `Fencing`. `lease_s` is 0 where there
    are no leases; `on_lease(until_s)` tells until when (boot clock) this node may act, `on_expelled(reason)` that
    it may not at all.
    """

    def __init__(
        self,
        life: Life,
        pid: int,
        nodes: Iterable[Configured],
        config: str,
        medium: Medium,
        fence_shell: FenceShell,
        clock: Clock,
        trace: Trace,
        *,
        ended: Iterable[tuple[int, str]] = (),
        fenced: Iterable[tuple[Key, str]] = (),
        on_proof: Callable[[Key, str], None] = lambda life, words: None,
        startup_s: float,
        race_s: float = 0.0,
        lease_s: float = 0.0,
        unresponsive_s: float,
        on_lease: Callable[[float], None] = lambda until_s: None,
        on_expelled: Callable[[str], None],
    ) -> None:
        self.me = life.member
        self.max_payload = MAX_PAYLOAD_BYTES
        self.view = View((0, 0, 0), (), (), (), False)
        self.frozen = "not a member yet"
        self._life = life
        self._pid = pid
        self._nodes = {node.number: node for node in nodes}
        self._majority = sum(node.votes for node in self._nodes.values()) // 2 + 1
        self._config = config
        self._medium = medium
        self._clock = clock
        self._trace = trace
        self._lease_s = lease_s
        self._unresponsive_s = unresponsive_s
        self._on_lease = on_lease
        self._on_proof = on_proof
        self._on_expelled = on_expelled
        self._events: StatefulEvents | None = None
        self._over = ""
        # the medium's membership, ring and quorum
        self._peers: tuple[Peer, ...] = ()
        self._gone: set[int] = set()
        self._ring: tuple[int, int] = (0, 0)
        self._ring_nodes: frozenset[int] = frozenset()
        self._quorum: tuple[bool, tuple[int, int]] = (False, (0, 0))
        self._said: tuple[Any, ...] = ()
        self._hellos: dict[Peer, Hello] = {}
        self._strangers: set[Peer] = set()
        # the view
        self._tag: Tag | None = None
        self._members: dict[Peer, Member] = {}
        self._number = self._floor = 0
        self._acks = Acks(self.me.key, {}, self._majority)
        self._lease: Lease | None = None
        self._unbroken = True
        self._ending: Tag | None = None
        self._late: list[tuple[Member, bytes | str]] = []
        # what outlives views
        self._last: dict[Key, Life] = {}
        self._left: set[Key] = set()
        self._proofs: dict[Key, str] = dict(fenced)
        self._proofs |= {(self.me.node, incarnation): words for incarnation, words in ended}
        self._kept: set[Key] = set(self._proofs)
        self._absent: dict[Key, str] = {}
        self._fencing = Fencing(self.me.node, fence_shell, startup_s, race_s, trace)
        # what goes out, and who owes what for how long
        self._outgoing: deque[bytes] = deque()
        self._under_way: deque[float] = deque()
        self._ticked_s = 0.0
        self._last_tick_s = clock.monotonic_s()
        self._owing: dict[int, float] = {}
        self._left_cleanly: Callable[[], None] | None = None

    # ---- ProcessGroup, as far as it is pure

    def multicast(self, payload: bytes) -> None:
        """As `ProcessGroup.multicast`."""
        if self._over or self._events is None:
            raise not_a_member(self.me)
        check_size(payload, self.max_payload)
        if self._tag is None:
            raise Busy("the membership is changing")
        if len(self._under_way) >= WINDOW:
            raise Busy(f"{len(self._under_way)} messages are under way")
        self._under_way.append(self._ticked_s)
        self._send(tagged(self._tag, *self._acks.say(self._events.installed), payload))

    def join(self, events: StatefulEvents) -> None:
        """Begin; the first view comes to `events` when all members have met."""
        self._events = events
        self.frozen = "waiting for the members to meet"
        self._greet()

    def leave(self, done: Callable[[], None]) -> None:
        """Say goodbye; `done()` is called when it is in the order, or when there is nobody to say it to."""
        self._left_cleanly = done
        if self._tag is None:
            if self._events is None:
                done()
            return  # said when the next view begins
        self._send(control(["leave"]))

    def end(self, reason: str) -> None:
        """Nothing is heard or sent any more."""
        self._over = reason
        self.frozen = reason
        self._tag = None
        self._fencing.suspend()

    # ---- from the medium, in its order

    def on_change(self, peers: tuple[Peer, ...], gone: Iterable[int], come: Iterable[int]) -> None:
        """The medium's membership: `peers` now; nodes that the ring lost are `gone`, others have `come`."""
        me = (self.me.node, self._pid)
        if me in self._peers and me not in peers:
            self._expel("corosync does not count this node's lockd any more, though it runs")
            return
        self._peers = tuple(sorted(peers))
        self._gone |= set(gone)
        self._gone -= set(come)
        self._hellos = {}
        self._strangers = set()
        self._floor = 0
        self._said = ()
        self._owing = {}
        self._ending = None
        self._pause("the membership is changing")
        self._greet()

    def on_message(self, peer: Peer, data: bytes) -> None:
        if self._over or not data:
            return
        try:
            if data[0] == PAYLOAD:
                self._on_payload(peer, data)
            elif data[0] == ACK:
                self._on_ack(peer, data)
            elif data[0] == CONTROL:
                self._on_control(peer, read_control(data))
            else:
                raise BadBytes("bad-message", f"a message of kind {data[0]} is none that this version knows")
        except BadBytes as error:
            self._trace.point("group.bad_message", node=peer[0], why=error.message)

    # ---- from the medium, in no order

    def on_ring(self, ring: tuple[int, int], nodes: Iterable[int]) -> None:
        """The ring, (sequence, lowest node), and its nodes."""
        if ring != self._ring:
            self._gone = set()  # who is in a ring that is told after the loss is there anew
        self._ring = ring
        self._ring_nodes = frozenset(nodes)
        self._fencing.ring(self._ring_nodes, self._clock.boottime_s())
        self._greet()

    def on_quorum(self, quorate: bool, ring: tuple[int, int]) -> None:
        """Whether this node has quorum in `ring`."""
        self._quorum = (quorate, ring)
        if not quorate:
            self._unbroken = False
            self._absent.clear()
            self._freeze("this node has no quorum")
        self._greet()

    def flush(self) -> None:
        """Send what the medium did not take before."""
        while self._outgoing and self._medium.send(self._outgoing[0]):
            self._outgoing.popleft()

    def swept(self) -> None:
        """The medium has told all that it has for now: acknowledge it."""
        events = self._events
        if self._tag is None or events is None:
            return
        keeps = events.installed
        self._acks.swept(keeps)
        self._look()
        if self._acks.due(keeps):
            self._send(ack(self._tag, *self._acks.say(keeps)))

    def tick(self) -> None:
        """Some times a second: beats, bounds, startup grace."""
        if self._over:
            return
        self.flush()
        monotonic_s, now_s = self._clock.monotonic_s(), self._clock.boottime_s()
        elapsed_s = min(monotonic_s - self._last_tick_s, TICK_MOST_S)
        self._last_tick_s = monotonic_s
        self._ticked_s += elapsed_s
        self._fencing.act(now_s)
        if self._acks.hurry():
            self.swept()
        self._beat(now_s)
        self._watch(elapsed_s)

    def _beat(self, now_s: float) -> None:
        lease = self._lease
        if lease is not None and self._tag is not None and not self._outgoing and lease.due(now_s):
            number, heard = lease.beat(now_s)
            self._send(control(["beat", list(self._tag), number, [list(pair) for pair in heard]]))
            if lease.alone():
                self._on_lease(lease.until_s)

    def _watch(self, elapsed_s: float) -> None:
        """Nobody may keep the others waiting for ever: not this node by its slowness, nor a peer that does nothing."""
        if self._under_way and self._tag is not None:
            late_s = self._ticked_s - self._under_way[0]
            if late_s > self._unresponsive_s:
                self._expel(
                    f"this node's own messages did not come back for {late_s:.0f} s: it is too slow for its cluster"
                )
                return
        self._owing = {node: self._owing.get(node, 0.0) + elapsed_s for node in self._debtors()}
        self._acks.settle()
        if self._tag is None:
            patient = [node for node, _ in self._hellos]
        else:
            patient = [node for node, _ in self._peers if node not in self._owing]
        for node, for_s in list(self._owing.items()):
            if for_s > self._unresponsive_s and patient and min(patient) == self.me.node:
                self._owing[node] = 0.0
                self._send_away(node)

    def _send_away(self, node: int) -> None:
        """Somebody on `node` keeps the others waiting: what all can go on without is left out."""
        members = {life.key[0] for hello in self._hellos.values() for life in hello.last}
        if self._tag is None and (node not in members or any(node == other for other, _ in self._hellos)):
            # there is one lockd on a node: where it has spoken, or was no member, the silent one holds nothing
            silent = [list(peer) for peer in self._awaited() if peer[0] == node]
            self._send(control(["without", [list(peer) for peer in self._peers], silent]))
        elif node != self.me.node:
            self._trace.point("group.evicted", node=node)
            self._medium.evict(node)

    def _awaited(self) -> list[Peer]:
        """Whose hello is awaited."""
        return [peer for peer in self._peers if peer not in self._hellos and peer not in self._strangers]

    def _debtors(self) -> set[int]:
        """Nodes that owe a hello or an acknowledgement."""
        me = self.me.node
        if self._tag is not None:
            return self._acks.debtors() - {me}
        if not self._hellos:
            return set()
        return {node for node, pid in self._awaited() if (node, pid) != (me, self._pid)}

    # ---- fencing, from its shell and from people

    def fence_done(self, node: int, words: str) -> None:
        """This node's fencer made sure that `node` is off."""
        self._fencing.done(node, words)
        self._say_proofs()

    def fence_failed(self, node: int, why: str) -> None:
        self._fencing.given_up(node)
        if self._tag is not None:
            self._send(control(["fence-failed", list(self._tag), node, why]))

    def vouch(self, name: str, words: str) -> None:
        """An operator vouches that a lost node is off. Raises Refused ("not-lost") if no such node is waited for."""
        nodes = {key[0] for key, lost in self._fencing.lost.items() if lost.life.member.name == name}
        if not nodes:
            waiting = sorted({lost.life.member.name for lost in self._fencing.lost.values()})
            raise Refused(
                "not-lost",
                f"{name} is not waited for: "
                + (f"fencing is waited for of {', '.join(waiting)}" if waiting else "nobody is"),
            )
        for node in nodes:
            self._fencing.vouched(node, words)
        self._say_proofs()

    def _say_proofs(self) -> None:
        if self._tag is None:
            return
        for key, words in self._fencing.to_say():
            if not self._acks.stability.by_majority and key[1] and key not in self._kept:
                # a majority remembers by itself; and there, a life whose end was not told yet may be a member again
                self._kept.add(key)
                self._on_proof(key, words)
            self._send(control(["fenced", list(self._tag), list(key), words]))

    # ---- the change of membership

    def _greet(self) -> None:
        """Say hello if ring, quorum and membership fit together and it was not said yet."""
        events = self._events
        quorate, ring = self._quorum
        me = (self.me.node, self._pid)
        if events is None or self._over or me not in self._peers or ring != self._ring:
            return
        if self._gone & self._ring_nodes or not {node for node, _ in self._peers} <= self._ring_nodes:
            return  # the ring that goes with this membership is not told yet
        said = (self._peers, ring, quorate)
        if said == self._said:
            return
        self._said = said
        hello = Hello(
            peers=self._peers,
            ring=ring,
            quorate=quorate,
            number=self._number,
            life=self._life,
            config=self._config,
            has_state=events.has_state,
            last=tuple(sorted(self._last.values())),
            lost=tuple(sorted(lost.life for lost in self._fencing.lost.values())),
            left=tuple(sorted(self._left)),
            proofs=tuple((*key, words) for key, words in sorted({**self._proofs, **self._absent}.items())),
        )
        self._trace.point("group.hello", ring=ring, quorate=quorate)
        self._send(control(hello.to_wire()))

    def _on_hello(self, peer: Peer, wire: list[Any]) -> None:
        if peer not in self._peers:
            return
        hello = Hello.from_wire(wire)
        if hello.life.member.node != peer[0]:
            raise BadBytes("bad-hello", f"a process on node {peer[0]} says that it is {hello.life.member}")
        if hello.peers != self._peers:
            return  # it answers an older change
        if peer in self._strangers:
            # it is a lockd after all: all begin this change anew, as from here on all know that
            self._strangers.discard(peer)
            self._hellos = {}
            self._said = ()
            self._ending = None
            self._pause("the membership is changing")
            self._greet()
            return
        self._hellos[peer] = hello
        self._meet()

    def _on_without(self, peer: Peer, peers: list[Any], silent: list[Any]) -> None:
        """In the order: the change goes on without processes that have said nothing up to here."""
        try:
            of = tuple((int(node), int(pid)) for node, pid in peers)
            strangers = {(int(node), int(pid)) for node, pid in silent}
        except (ValueError, TypeError, OverflowError):
            raise BadBytes("bad-message", "a word about strangers names no processes") from None
        if of != self._peers or peer not in self._hellos:
            return
        self._strangers |= strangers & set(self._awaited())
        for node, pid in sorted(self._strangers):
            self._trace.point("group.stranger", node=node, pid=pid)
        self._meet()

    def _meet(self) -> None:
        """Begin the view if all have said hello, in one ring."""
        rings = {said.ring for said in self._hellos.values()}
        if self._awaited() or len(rings) != 1 or (self.me.node, self._pid) not in self._hellos:
            return
        # only of what all know alike: members that come from different sides had different views
        number = 1 + max(*(said.number for said in self._hellos.values()), self._floor)
        self._begin((number, *rings.pop()), work_out(self._hellos, self._nodes.values()))

    def _begin(self, tag: Tag, change: Change) -> None:
        reason = change.expelled.get(self._life.key)
        if reason is not None:
            self._expel(reason)
            return
        events = self._events
        assert events is not None
        self._number = max(self._number, tag[0])
        self._floor = tag[0]
        members = tuple(life.member for life in change.members)
        self._members = change.peers
        self._ending = None
        if not change.quorate or not self._quorum[0]:
            self._begin_frozen(tag, change, members)
            return
        self._tag = tag
        self.frozen = ""
        self._under_way.clear()
        votes = _votes(members, self._nodes)
        self._acks = Acks(self.me.key, votes, self._majority)
        self._last = {life.key: life for life in change.members}
        self._keep_proofs(change)
        unbroken, self._unbroken = self._unbroken, True
        late, self._late = self._late, []
        self.view = View(
            tag,
            members,
            change.joined,
            tuple((life.member, reason_left) for life, reason_left in change.left),
            True,
            votes=tuple(votes.values()),
            majority=self._majority,
            all_votes=tuple((node.number, node.votes) for node in self._nodes.values()),
            unbroken=unbroken,
            late=tuple(late),
        )
        self._trace.point(
            "group.view",
            ring=tag,
            members=[member.node for member in members],
            quorate=True,
            majority=self._majority,
            votes=self._nodes[self.me.node].votes,
        )
        if self._lease_s:
            own_votes = {member.node: self._nodes[member.node].votes for member in members}
            self._lease = Lease(self.me.node, own_votes, self._majority, self._lease_s)
        else:
            self._on_lease(math.inf)
        now_s = self._clock.boottime_s()
        events.on_view(self.view)
        self._begin_fencing(change, unbroken, now_s)
        if self._left_cleanly is not None:
            self._send(control(["leave"]))
        self.tick()

    def _begin_frozen(self, tag: Tag, change: Change, members: tuple[Member, ...]) -> None:
        """All have met, and have no quorum."""
        self._tag = None
        self._unbroken = False
        self._absent.clear()
        self._on_lease(0.0)
        absent = [node.name for node in self._nodes.values() if node.number not in self._ring_nodes]
        self.frozen = "the cluster has no quorum" + (f", it lacks {', '.join(absent)}" if absent else "")
        self._trace.point("group.view", ring=tag, members=[member.node for member in members], quorate=False)
        self.view = View(tag, members, change.joined, (), False)
        if self._events is not None:
            self._events.on_view(self.view)

    def _keep_proofs(self, change: Change) -> None:
        """What the members together know of ends, for the next change."""
        if not change.fresh:
            self._absent.clear()
        for key, (_, words) in change.proved.items():
            if key[1]:
                self._proofs[key] = words
            elif change.fresh and key[0] not in {life.member.node for life in change.members}:
                self._absent[key] = words  # else only a state proves it, which may end with who brought it
        for key in list(self._proofs)[: max(0, len(self._proofs) - PROOFS_KEPT)]:
            del self._proofs[key]

    def _begin_fencing(self, change: Change, unbroken: bool, now_s: float) -> None:
        """Tell whose end is proved, and see to it that the others' is."""
        for key, (life, words) in sorted(change.proved.items()):
            self._fencing.proved(key)
            self._tell_fenced(life.member, words)
        votes_in_ring = sum(node.votes for node in self._nodes.values() if node.number in self._ring_nodes)
        self._fencing.view(
            [life for life, reason_left in change.left if reason_left is Left.LOST],
            tuple(life.member.node for life in change.members),
            now_s,
            {life.key for hello in self._hellos.values() for life in hello.last},
            contested=not self._acks.stability.by_majority,
            outvoted=bool(self._lease_s) and votes_in_ring < self._majority,
            unbroken=unbroken or not self._lease_s,
        )
        self._say_proofs()

    def _pause(self, reason: str) -> None:
        """Between views: nothing is delivered. Who had quorum may go on with what it has."""
        if self._tag is not None:
            self._tag = None
            self.frozen = reason
            self._fencing.suspend()

    def _freeze(self, reason: str) -> None:
        events = self._events
        # quorum is told beside the order, where messages of this view may still be on their way to this node. Others
        # may count on its having them: those that it sent, above all (`Stability.sent`)
        self._ending = self._tag or self._ending
        self._pause(reason)
        if events is not None and self.view.quorate:
            self.frozen = reason
            self._trace.point("group.frozen", reason=reason)
            self.view = View(self.view.ring, self.view.members, (), (), False)
            events.on_view(self.view)
            self._on_lease(0.0)

    def _expel(self, reason: str) -> None:
        if not self._over:
            self.end(reason)
            self._on_expelled(reason)

    # ---- messages

    def _on_payload(self, peer: Peer, data: bytes) -> None:
        tag = read_tag(data)
        if peer == (self.me.node, self._pid) and self._under_way:
            self._under_way.popleft()
        sender = self._members.get(peer)
        if self._tag is None and tag == self._ending and sender is not None:
            self._late.append((sender, data[OVERHEAD_BYTES:]))
        if self._tag is None or tag != self._tag or sender is None:
            return
        events = self._events
        assert events is not None
        events.on_message(self._acks.next(), sender, data[OVERHEAD_BYTES:])
        self._acks.heard(sender.key, read_ack(data))
        self._told(sender)

    def _told(self, sender: Member) -> None:
        """A message of `sender` was told here."""
        events = self._events
        assert events is not None
        self._acks.told(sender.key, events.awaited)
        self._look()

    def _on_ack(self, peer: Peer, data: bytes) -> None:
        sender = self._members.get(peer)
        if self._tag is None or read_tag(data) != self._tag or sender is None:
            return
        self._acks.heard(sender.key, read_ack(data))
        self._look()

    def _look(self) -> None:
        stable = self._acks.stability.look(not self._fencing.lost)
        if stable is not None and self._events is not None:
            self._events.on_stable(stable)

    def _on_control(self, peer: Peer, message: list[Any]) -> None:
        sender = self._members.get(peer)
        match message:
            case ["hello", *_]:
                self._on_hello(peer, message)
            case ["without", list(peers), list(silent)]:
                self._on_without(peer, peers, silent)
            case [
                "fenced",
                [int(number), int(sequence), int(ring)],
                [int(node), int(incarnation)],
                str(words),
            ] if self._tag is None and (number, sequence, ring) == self._ending and sender is not None:
                self._on_late_fenced((node, incarnation), words)
            case [_, [int(number), int(sequence), int(node)], *_] if (number, sequence, node) != self._tag:
                return
            case _ if self._tag is None or sender is None:
                return
            case ["leave"]:
                self._left.add(sender.key)
                if sender == self.me and self._left_cleanly is not None:
                    done, self._left_cleanly = self._left_cleanly, None
                    done()
            case ["fenced", _, [int(node), int(incarnation)], str(words)]:
                self._on_fenced(sender, (node, incarnation), words)
            case ["fence-failed", _, int(node), str(why)]:
                self._trace.point("group.fence_failed", node=node, actor=sender.node, why=why)
                self._fencing.failed(node, sender.node, why, self._clock.boottime_s())
            case ["beat", _, int(number), list(heard)]:
                self._on_beat(sender, number, heard)
            case _:
                raise BadBytes("bad-message", f"{message[0]!r} is no word of a group of this version")

    def _on_fenced(self, sender: Member, key: Key, words: str) -> None:
        lost = self._fencing.proved(key)
        if lost is None:
            return  # a repeat, or it came back meanwhile (dlm.md 6.8.10, 6.8.11)
        if key[1]:
            self._proofs[key] = words
        else:
            # nobody is fenced twice while a cluster starts: good while this node has quorum, for nobody else has
            self._absent[key] = words
        # what a purge gives to others may not be shown before a majority has the purge
        self._tell_fenced(lost.life.member, words, self._acks.next())
        self._told(sender)

    def _on_late_fenced(self, key: Key, words: str) -> None:
        """Said in the view that a loss of quorum has ended here. Of who was only absent nothing is known any more."""
        lost = self._fencing.proved(key) if key[1] else None
        if lost is not None:
            self._proofs[key] = words
            self._late.append((lost.life.member, words))

    def _tell_fenced(self, member: Member, words: str, index: int = 0) -> None:
        self._trace.point(
            "group.fenced", node=member.node, incarnation=f"{member.incarnation:016x}", proof=words
        )
        if self._events is not None:
            self._events.on_fenced(member, words, index)

    def _on_beat(self, sender: Member, number: int, heard: list[Any]) -> None:
        try:
            pairs = {int(node): int(last) for node, last in heard}
        except (ValueError, TypeError):
            raise BadBytes("bad-message", "a beat names no nodes") from None
        if self._lease is not None:
            if self._lease.on_beat(sender.node, number, pairs):
                self._on_lease(self._lease.until_s)
            self._beat(self._clock.boottime_s())

    def _send(self, data: bytes) -> None:
        if self._outgoing or not self._medium.send(data):
            self._outgoing.append(data)

    # ---- for people

    @property
    def unproved(self) -> str:
        """Who is lost without a proof of its end, and what that waits for, or nothing."""
        return self._fencing.words(self._clock.boottime_s())

    def status(self) -> dict[str, Any]:
        """Ring, quorum, members, who is lost, and what anything waits for, as plain JSON values."""
        now_s = self._clock.boottime_s()
        waits = []
        if self._tag is None and not self._over:
            spoken = {node for node, _ in self._hellos}
            waits = [
                self._name(node) + (f" (process {pid})" if node in spoken else "")
                for node, pid in self._awaited()
            ]
        return {
            "ring": list(self._ring),
            "ring_nodes": sorted(self._ring_nodes),
            "quorate": self._quorum[0],
            "view": list(self.view.ring),
            "members": [[m.node, m.name, f"{m.incarnation:016x}"] for m in self.view.members],
            "frozen": self.frozen,
            "awaiting_hello": waits,
            "strangers": [f"process {pid} on {self._name(node)}" for node, pid in sorted(self._strangers)],
            "owing": [
                {"name": self._name(node), "for_s": round(for_s, 1)}
                for node, for_s in sorted(self._owing.items())
                if for_s >= SHOWN_S
            ],
            "majority": self._majority,
            "nodes": [
                {
                    "node": node.number,
                    "name": node.name,
                    "votes": node.votes,
                    "in_ring": node.number in self._ring_nodes,
                }
                for node in sorted(self._nodes.values(), key=lambda node: node.number)
            ],
            "lost": self._fencing.status(now_s),
            "lease_until_s": self._lease.until_s if self._lease is not None else None,
            "lease_left_s": round(self._lease.until_s - now_s, 1) if self._lease is not None else None,
        }

    def _name(self, node: int) -> str:
        return self._nodes[node].name if node in self._nodes else f"node {node}"


def _votes(members: tuple[Member, ...], nodes: dict[int, Configured]) -> dict[Key, int]:
    """Each member's votes: a node has them once, also while a former life of it is not missed yet."""
    votes: dict[Key, int] = {}
    counted: set[int] = set()
    for member in members:
        votes[member.key] = 0 if member.node in counted else nodes[member.node].votes
        counted.add(member.node)
    return votes
