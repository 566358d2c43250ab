"""The process group of a corosync cluster, as a member has it: `agreed` over libcpg and libquorum.

Node numbers, names, votes and the cluster's name are corosync's (cmap). `connect` reads them and opens the
connections; `join` first has the end of this node's former lives proved (their lockds are dead, for only one has the
file lock; their array processes drain by themselves), so that it can tell the others, then enters the group.

What proves the end of this life's processes is kept durably beside the node's sockets (`incarnations`), for this node's
next lockd. Other nodes cannot look at our processes: what ends a lost *machine* for them is fencing.

A connection that ends means that corosync is gone: this life is over (`on_expelled`), as is one that corosync's
members have given up.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from clustermd.clock import Clock, Random
from clustermd.conf import Conf
from clustermd.errors import Refused
from clustermd.group.agreed.change import Configured
from clustermd.group.agreed.fencing import FenceShell
from clustermd.group.agreed.group import MAX_PAYLOAD_BYTES, AgreedGroup, StatefulEvents
from clustermd.group.agreed.hello import Key, Life
from clustermd.group.corosync import cmap
from clustermd.group.corosync.cfg import kill_node
from clustermd.group.corosync.cpg import Cpg, Reason
from clustermd.group.corosync.errors import CorosyncRefused
from clustermd.group.corosync.proofs import Proofs
from clustermd.group.corosync.quorum import Quorum
from clustermd.group.endings import Ending, Endings
from clustermd.group.incarnations import Incarnation, Incarnations
from clustermd.group.liveness import Bounds
from clustermd.group.process import boot_id, start_time
from clustermd.group.process_group import Member, View, Witness, not_a_member
from clustermd.group.proof import beside_loop
from clustermd.group.registrar import Registrar
from clustermd.group.tasks import Tasks
from clustermd.rundir import RunDir
from clustermd.trace import Trace

GROUP = b"clustermd:lockd"
RETRY_S = 0.005
TICK_S = 0.1
PROOF_MOST = 512
"""Characters of a proof that the others are told: all that are kept fit in one hello."""
RACE_S = 5.0
"""How long one side of a cluster that was cut in two quorate halves waits for the other to switch it off."""
SWITCHES_OFF = ("agent", "stonith", "device")
"""Policies under which two sides could end each other."""

log = logging.getLogger("clustermd.group")


class CorosyncGroup:
    """`NodeGroup` on corosync. `on_lease` and `on_expelled` are as `AgreedGroup` has them."""

    def __init__(
        self,
        rundir: RunDir,
        conf: Conf,
        bounds: Bounds,
        clock: Clock,
        random: Random,
        trace: Trace,
        fence_shell: FenceShell,
        on_lease: Callable[[float], None],
        on_expelled: Callable[[str], None],
    ) -> None:
        self.me = Member(0, int.from_bytes(random.bytes(8), "big"), rundir.node)
        self.max_payload = MAX_PAYLOAD_BYTES
        self._conf = conf
        self._clock = clock
        self._trace = trace
        self._fence_shell = fence_shell
        self._on_lease = on_lease
        self._on_expelled = on_expelled
        self._unresponsive_s = bounds.unresponsive_s
        self._tasks = Tasks()
        self._boot = boot_id()
        self._incarnations = Incarnations(rundir.make(), self._boot)
        self._proofs = Proofs(rundir.make(rundir.state_dir))
        self._registrar = Registrar(self._incarnations, clock)
        self._endings = Endings(clock, bounds, self._tasks, self._proved)
        self._ended: list[tuple[int, str]] = []
        self._fenced: list[tuple[Key, str]] = []
        self._nodes: tuple[Configured, ...] = ()
        self._cluster = ""
        self._cpg: Cpg | None = None
        self._quorum: Quorum | None = None
        self._ring: tuple[tuple[int, int], tuple[int, ...]] | None = None
        self._quorate: tuple[bool, tuple[int, int]] | None = None
        self._agreed: AgreedGroup | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._over = ""

    # --- NodeGroup

    @property
    def frozen(self) -> str:
        """Why nothing is delivered, or nothing."""
        if self._over:
            return self._over
        if self._agreed is None:
            waiting = [what for ending in self._endings.status() for what in ending["waiting"]]
            return "the end of this node's former life is not proved yet: " + (
                "; ".join(waiting) or "proving"
            )
        return self._agreed.frozen

    @property
    def unproved(self) -> str:
        """As `NodeGroup.unproved`."""
        return self._agreed.unproved if self._agreed is not None else ""

    @property
    def view(self) -> View:
        """The last view."""
        return self._agreed.view if self._agreed is not None else View((0,), (), (), (), False)

    async def connect(self) -> None:
        """Open the connections. Raises CorosyncRefused, Refused ("lease-needs-three"), BadBytes ("bad-proofs")."""
        self._fenced = self._proofs.load()
        configured = cmap.nodelist()
        self._cluster = cmap.cluster_name()
        self._nodes = tuple(
            Configured(node.number, node.name or (node.addresses or (f"node{node.number}",))[0], node.votes)
            for node in configured
        )
        number = cmap.local_number()
        name = next(node.name for node in self._nodes if node.number == number)
        self.me = Member(number, self.me.incarnation, name)
        if self._conf.fence == "lease" and len(self._nodes) == 2:
            raise Refused(
                "lease-needs-three",
                'a cluster of two nodes cannot use fence = "lease": after the loss of one the other is no majority '
                "and has no lease either. Choose another policy, or add a third node (it needs no disks)",
            )
        self._quorum = Quorum(self._on_quorum)
        self._cpg = Cpg(GROUP, self._on_deliver, self._on_confchg, self._on_ring)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._quorum.fileno(), self._sweep)
        loop.add_reader(self._cpg.fileno(), self._sweep)

    def join(self, events: StatefulEvents) -> None:
        """As `NodeGroup.join`, after the proofs that this node owes."""
        self._tasks.spawn(self._join(events))
        self._tasks.spawn(self._tick())

    def multicast(self, payload: bytes) -> None:
        """As `ProcessGroup.multicast`."""
        if self._agreed is None:
            raise not_a_member(self.me)
        self._agreed.multicast(payload)

    async def register_witness(self, witness: Witness) -> None:
        """As `ProcessGroup.register_witness`."""
        await self._registrar.register(self.me, witness)

    async def withdraw_witness(self, key: str) -> None:
        """As `ProcessGroup.withdraw_witness`."""
        self._registrar.withdraw(self.me, key)

    async def leave(self) -> None:
        """As `ProcessGroup.leave`. Raises Refused ("not-clean") while witnesses are registered."""
        record = self._incarnations.living.get(self.me.incarnation)
        if record is not None and record.witnesses:
            raise Refused(
                "not-clean", f"{self.me.name} cannot leave: {', '.join(record.witnesses)} may still do I/O"
            )
        if self._agreed is not None and not self._over:
            said: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._agreed.leave(lambda: None if said.done() else said.set_result(None))
            # without quorum nobody hears a goodbye, and the others find out for themselves
            await asyncio.wait((said,), timeout=self._unresponsive_s)
        if record is not None:
            self._registrar.forget(self.me.incarnation)
        self.abandon("left")

    def abandon(self, reason: str) -> None:
        """As `NodeGroup.abandon`."""
        if self._over:
            return
        self._over = reason
        if self._agreed is not None:
            self._agreed.end(reason)
        self._tasks.cancel()
        loop = asyncio.get_running_loop()
        for connection in (self._cpg, self._quorum):
            if connection is not None:
                loop.remove_reader(connection.fileno())
        self._registrar.close()
        # corosync sees the sockets end with the process; closing them here would wait for a stopped corosync

    async def status(self, within_s: float = 1.0) -> dict[str, Any]:
        """As `NodeGroup.status`: what `AgreedGroup.status` tells, and this node's own waits."""
        state: dict[str, Any] = {
            "engine": "corosync",
            "cluster": self._cluster,
            "fence": self._conf.fence,
            "frozen": self.frozen,
            "unproved": self._endings.status(),
            "registering": self._registrar.status(),
        }
        return state | (self._agreed.status() if self._agreed is not None else {})

    def vouch(self, name: str, words: str) -> None:
        """As `NodeGroup.vouch`."""
        if self._agreed is None:
            raise Refused(
                "not-lost", f"this node is in no cluster yet, so nobody waits for {name}: {self.frozen}"
            )
        self._agreed.vouch(name, words)

    # --- the fencer's reports

    def fence_done(self, node: int, words: str) -> None:
        """As `AgreedGroup.fence_done`."""
        if self._agreed is not None:
            self._agreed.fence_done(node, words)

    def fence_failed(self, node: int, why: str) -> None:
        """As `AgreedGroup.fence_failed`."""
        if self._agreed is not None:
            self._agreed.fence_failed(node, why)

    # --- life

    async def _join(self, events: StatefulEvents) -> None:
        self._incarnations.load()
        for record in list(self._incarnations.living.values()):
            self._endings.begin(record)
        former = list(self._endings.open.values())
        while self._endings.unproved:
            await asyncio.sleep(TICK_S / 4)
        self._ended = [
            (ending.record.member.incarnation, (ending.proof or "")[:PROOF_MOST]) for ending in former
        ]
        me = Incarnation(self.me, os.getpid(), start_time(os.getpid()) or 0)
        self._incarnations.living[self.me.incarnation] = me
        self._incarnations.save()
        lease_s = self._conf.lease_s if self._conf.fence == "lease" else 0.0
        cpg = self._cpg
        assert cpg is not None
        self._agreed = AgreedGroup(
            Life(self.me, self._boot),
            os.getpid(),
            self._nodes,
            common_configuration(self._cluster, self._nodes, self._conf),
            self,
            self._fence_shell,
            self._clock,
            self._trace,
            ended=self._ended,
            fenced=self._fenced,
            on_proof=self._proofs.keep,
            startup_s=self._conf.startup_s,
            race_s=RACE_S if self._conf.fence in SWITCHES_OFF else 0.0,
            lease_s=lease_s,
            unresponsive_s=self._unresponsive_s,
            on_lease=self._on_lease,
            on_expelled=self._expelled,
        )
        if self._ring is not None:
            self._agreed.on_ring(*self._ring)
        if self._quorate is not None:
            self._agreed.on_quorum(*self._quorate)
        self._agreed.join(events)
        try:
            while not cpg.join():
                await asyncio.sleep(RETRY_S)
        except CorosyncRefused as error:
            self._expelled(error.message)

    def _proved(self, ending: Ending) -> None:
        log.info("proved the end of the former life %s: %s", ending.record.title, ending.proof)

    def _expelled(self, reason: str) -> None:
        if not self._over:
            self.abandon(reason)
            self._on_expelled(reason)

    def _forget_former(self) -> None:
        """A quorate view has heard of our former lives' ends: they need not be kept any more."""
        for incarnation, _ in self._ended:
            self._registrar.forget(incarnation)
        self._ended = []

    # --- Medium

    def send(self, data: bytes) -> bool:
        """As `Medium.send`."""
        cpg = self._cpg
        assert cpg is not None
        try:
            sent = cpg.send(data)
        except CorosyncRefused as error:
            asyncio.get_running_loop().call_soon(self._expelled, error.message)
            return False
        if not sent and self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._flush)
        return sent

    def evict(self, node: int) -> None:
        """As `Medium.evict`."""
        log.error("node %d does not do its part for %g s: its corosync is ended", node, self._unresponsive_s)
        self._tasks.spawn(self._evict(node))

    async def _evict(self, node: int) -> None:
        try:
            await beside_loop(lambda: kill_node(node, "its clustermd lockd does not answer"))
        except CorosyncRefused as error:
            log.error("node %d could not be evicted: %s", node, error.message)

    def _flush(self) -> None:
        self._retry = None
        if self._agreed is not None and not self._over:
            self._agreed.flush()

    # --- corosync's callbacks

    def _sweep(self) -> None:
        """Everything that waits on both connections, then one acknowledgement."""
        cpg, quorum = self._cpg, self._quorum
        assert cpg is not None and quorum is not None
        try:
            quorum.dispatch()
            cpg.dispatch()
        except CorosyncRefused as error:
            self._expelled(error.message)
            return
        if self._agreed is not None and not self._over:
            self._agreed.flush()
            self._agreed.swept()
            if self._ended and self._agreed.view.quorate:
                self._forget_former()

    def _on_quorum(self, quorate: bool, ring: tuple[int, int], nodes: tuple[int, ...]) -> None:
        self._quorate = (quorate, ring)
        if self._agreed is not None:
            self._agreed.on_quorum(quorate, ring)

    def _on_ring(self, ring: tuple[int, int], nodes: tuple[int, ...]) -> None:
        self._ring = (ring, nodes)
        if self._agreed is not None:
            self._agreed.on_ring(ring, nodes)

    def _on_confchg(
        self,
        members: tuple[tuple[int, int], ...],
        left: tuple[tuple[int, int, Reason], ...],
        joined: tuple[tuple[int, int, Reason], ...],
    ) -> None:
        if self._agreed is not None:
            gone = [node for node, _, reason in left if reason is Reason.NODEDOWN]
            self._agreed.on_change(members, gone, [node for node, _, _ in joined])

    def _on_deliver(self, node: int, pid: int, payload: bytes) -> None:
        if self._agreed is not None:
            self._agreed.on_message((node, pid), payload)

    # --- time

    async def _tick(self) -> None:
        while not self._over:
            await asyncio.sleep(TICK_S)
            if self._agreed is not None and not self._over:
                self._agreed.tick()


def common_configuration(cluster: str, nodes: tuple[Configured, ...], conf: Conf) -> str:
    """In words, all on which safety rests and that all nodes must have alike (dlm.md 6.3, 6.8.35)."""
    lease_s = conf.lease_s if conf.fence == "lease" else 0.0
    names = ", ".join(f"{node.number} {node.name} ({node.votes})" for node in nodes)
    return (
        f"cluster {cluster} of {names}; fence {conf.fence}; lease {lease_s:g} s, "
        f"device bound {conf.device_bound_s:g} s"
    )
