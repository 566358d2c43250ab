"""A simulated node's fencer (`group.agreed.fencing.FenceShell`): attempts that take a while, fail, or succeed.

storage   the boxes take nothing more from the lost node, which may live on; a node that they refuse can fence nobody
power     the lost machine is switched off; it is done when nothing that it sent can land any more
lease     nothing is done: the lost node's lease must have run out (dlm.md 6.2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clustermd.group.agreed.fencing import Victim
from clustermd.lockd.fencing.lease import harmless_at_s
from clustermd.testing.simulator.dice import Stream

if TYPE_CHECKING:
    from clustermd.testing.simulator.agreed import AgreedPort
    from clustermd.testing.simulator.cluster import SimCluster
    from clustermd.testing.simulator.machine import ArrayProcess

TAKES_S = (0.05, 0.3, 1.5)
POLL_S = 0.02
DRIFT = 0.001
"""By which clocks go wrong at most; the simulated ones go wrong by less."""


class SimFencer:
    """Of one lock daemon."""

    def __init__(self, cluster: SimCluster, port: AgreedPort, draw: Stream) -> None:
        self._cluster = cluster
        self._port = port
        self._draw = draw
        self._attempts: dict[int, int] = {}
        self._doomed: dict[int, list[ArrayProcess]] = {}
        self._serial = 0

    def begin(self, victim: Victim) -> None:
        self._serial += 1
        self._attempts[victim.node] = self._serial
        self._cluster.counted("fence-begun")
        self._later(TAKES_S[self._draw.below(len(TAKES_S))], self._act, victim, self._serial)

    def cancel(self, node: int) -> None:
        self._attempts.pop(node, None)

    def _later(self, delay_s: float, what: object, *args: object) -> None:
        loop = self._cluster.loop
        loop.call_later(delay_s, what, *args, context=self._port.process.context.copy())  # type: ignore[arg-type]

    def _wanted(self, victim: Victim, serial: int) -> bool:
        return self._attempts.get(victim.node) == serial

    def _act(self, victim: Victim, serial: int) -> None:
        if not self._wanted(victim, serial):
            return
        cluster, me = self._cluster, self._port.me.node
        if cluster.plan.fencing != "lease" and self._draw.one_in(5):
            self._failed(victim, "the device does not answer")
        elif cluster.plan.fencing == "storage" and cluster.refused_at_boxes(me):
            self._failed(victim, "the boxes refuse this node itself")
        else:
            # what runs there from now on is another life
            if cluster.plan.fencing == "storage":
                cluster.fence_at_boxes(victim.node)
            elif cluster.plan.fencing == "power":
                cluster.switch_off(victim.node)
            self._doomed[victim.node] = cluster.arrays_of(victim.node)
            self._look(victim, serial)

    def _look(self, victim: Victim, serial: int) -> None:
        """Whether it is done."""
        if not self._wanted(victim, serial):
            return
        cluster = self._cluster
        if cluster.plan.fencing == "lease":
            at_s = harmless_at_s(
                victim.lost_at_boottime_s, cluster.plan.lease_s, DRIFT, cluster.plan.device_bound_s
            )
            done = cluster.clock_of(self._port.me.node).boottime_s() >= at_s
        else:
            done = cluster.nothing_can_land(self._doomed[victim.node])
        if not done:
            self._later(POLL_S, self._look, victim, serial)
            return
        del self._attempts[victim.node]
        cluster.counted("fence-done")
        machine = cluster.machines[victim.node]
        machine.fenced_off = machine.refused
        assert self._port.agreed is not None
        self._port.agreed.fence_done(victim.node, f"{cluster.plan.fencing}: nothing of it can land any more")

    def _failed(self, victim: Victim, why: str) -> None:
        del self._attempts[victim.node]
        self._cluster.counted("fence-failed")
        assert self._port.agreed is not None
        self._port.agreed.fence_failed(victim.node, why)
