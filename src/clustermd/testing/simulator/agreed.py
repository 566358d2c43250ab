"""A simulated lock daemon's group where nodes meet by corosync: `AgreedGroup`, the production code, over `totem`.

This is what `group/corosync/group.py` is for real nodes: it hands the medium's events over, says when time passes,
and ends the lock daemon when the medium is gone or the group says that this life is over. A daemon enters the group
when its node's corosync works and the former lives of its node have ended, so that it can tell the others (dlm.md 6.4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clustermd.errors import Refused
from clustermd.group.agreed.change import Configured
from clustermd.group.agreed.group import MAX_PAYLOAD_BYTES, AgreedGroup, StatefulEvents
from clustermd.group.agreed.hello import Key, Life, Peer
from clustermd.group.corosync.cpg import Reason
from clustermd.group.process_group import Member, Witness
from clustermd.testing.simulator.fencer import SimFencer
from clustermd.testing.simulator.loop import Process
from clustermd.testing.simulator.totem import Client, Connection, Ring_
from clustermd.trace import Trace

if TYPE_CHECKING:
    from clustermd.testing.simulator.cluster import SimCluster

TICK_S = 0.1
LOOK_S = 0.02
UNRESPONSIVE_S = 6.0
STARTUP_S = 3.0


class SimLease:
    """Until when one life of a node's lock daemon lets the node's processes submit."""

    def __init__(self, clock: NodeClock) -> None:
        self._clock = clock
        self.until_s = 0.0

    def valid(self) -> bool:
        return self._clock.boottime_s() < self.until_s


class NodeClock:
    """A node's clocks: each began at another time, and goes a little faster or slower than the others'."""

    def __init__(self, time_s: Callable[[], float], began_s: float, rate: float) -> None:
        self._time_s = time_s
        self._began_s = began_s
        self._rate = rate

    def monotonic_s(self) -> float:
        return self.boottime_s()

    def boottime_s(self) -> float:
        return self._began_s + self._time_s() * self._rate

    def now_s(self) -> float:
        return self.boottime_s()


class AgreedPort(Client):
    """One member's end of the group (a `ProcessGroup`)."""

    def __init__(
        self, cluster: SimCluster, me: Member, process: Process, trace: Trace, over: Callable[[str], None]
    ) -> None:
        self.me = me
        self.max_payload = MAX_PAYLOAD_BYTES
        self.process = process
        self.events: StatefulEvents | None = None
        self.slow_s = 0.0
        self.agreed: AgreedGroup | None = None
        self.boot = ""
        self._cluster = cluster
        self._trace = trace
        self._over = over
        self._ended = False
        self._connection: Connection | None = None
        clock = cluster.clock_of(me.node)
        self.lease = SimLease(clock)
        self._clock = clock

    # --- the life

    def enter(self, pid: int, boot: str, ended: list[tuple[int, str]], fenced: dict[Key, str]) -> None:
        """Join the group. `fenced` is what the machine keeps over its reboots of the ends that it proved."""
        cluster, plan = self._cluster, self._cluster.plan
        assert self.events is not None and cluster.totem is not None
        self.boot = boot
        self.agreed = AgreedGroup(
            Life(self.me, boot),
            pid,
            [Configured(number, f"node{number}", votes) for number, votes in plan.votes_of.items()],
            "simulated",
            self,
            SimFencer(cluster, self, cluster.dice.stream("fencer")),
            self._clock,
            self._trace,
            ended=ended,
            fenced=fenced.items(),
            on_proof=fenced.__setitem__,
            startup_s=STARTUP_S,
            lease_s=plan.lease_s,
            unresponsive_s=UNRESPONSIVE_S,
            on_lease=self._on_lease,
            on_expelled=self._over,
        )
        self.agreed.join(self.events)
        self._connection = cluster.totem.connect(self.me.node, pid, self.process, self)
        self._connection.slow_s = self.slow_s
        self._tick()

    def _on_lease(self, until_s: float) -> None:
        self.lease.until_s = until_s

    def _tick(self) -> None:
        if self._ended:
            return
        assert self.agreed is not None
        self.agreed.tick()
        self._cluster.loop.call_later(TICK_S, self._tick, context=self.process.context.copy())

    def set_slow(self, slow_s: float) -> None:
        """All that it hears is late."""
        self.slow_s = slow_s
        if self._connection is not None:
            self._connection.slow_s = slow_s

    def died(self, detect_s: float) -> None:
        """Its process has ended; the node's corosync notices after `detect_s`."""
        self._ended = True
        if self._connection is not None:
            assert self._cluster.totem is not None
            self._cluster.totem.process_gone(self._connection, detect_s)

    def say_goodbye(self, done: Callable[[], None]) -> None:
        def said() -> None:
            if self._connection is not None:
                self._connection.leave()
            self._ended = True
            done()

        if self.agreed is None:
            said()
        else:
            self.agreed.leave(said)

    # --- ProcessGroup

    def multicast(self, payload: bytes) -> None:
        if self.agreed is None:
            raise Refused("not-a-member", f"{self.me.name} is in no group yet")
        self.agreed.multicast(payload)

    async def register_witness(self, witness: Witness) -> None: ...

    async def withdraw_witness(self, key: str) -> None: ...

    async def leave(self) -> None:
        self.say_goodbye(lambda: None)

    # --- Medium

    def send(self, data: bytes) -> bool:
        return self._connection is not None and self._connection.send(data)

    def evict(self, node: int) -> None:
        totem = self._cluster.totem
        assert totem is not None
        totem.evict(totem.daemons[self.me.node], node)

    # --- Client

    def on_confchg(
        self,
        members: tuple[Peer, ...],
        left: tuple[tuple[Peer, Reason], ...],
        joined: tuple[tuple[Peer, Reason], ...],
    ) -> None:
        assert self.agreed is not None
        gone = [peer[0] for peer, reason in left if reason is Reason.NODEDOWN]
        self.agreed.on_change(members, gone, [peer[0] for peer, _ in joined])

    def on_ring(self, ring: Ring_, nodes: frozenset[int]) -> None:
        assert self.agreed is not None
        self.agreed.on_ring(ring, nodes)

    def on_deliver(self, peer: Peer, data: bytes) -> None:
        assert self.agreed is not None
        self.agreed.on_message(peer, data)

    def on_quorum(self, quorate: bool, ring: Ring_) -> None:
        assert self.agreed is not None
        self.agreed.on_quorum(quorate, ring)

    def swept(self) -> None:
        if self.agreed is not None and not self._ended:
            self.agreed.flush()
            self.agreed.swept()

    def flush(self) -> None:
        assert self.agreed is not None
        self.agreed.flush()

    def lost(self) -> None:
        self._over("corosync is gone")
