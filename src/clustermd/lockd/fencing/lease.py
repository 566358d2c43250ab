"""`fence = "lease"`: nobody acts; survivors wait until the lost node's lease must have run out.

A node may submit I/O for T (`lease_s`) after it last heard a majority, by its own CLOCK_BOOTTIME, and no survivor
was part of that majority after it took note of the loss. So the node's last submission *starts* before the loss
plus T on its clock, which a survivor's clock, faster by the fraction `drift` at most, shows as T * (1 + drift). D
(`device_bound_s`) is added for what no clock can see: the node may have looked at its lease and then been paused
before the kernel got the request, and the disk itself takes time. Nothing enforces D; hence `unsafe`
(dlm.md 6.2, 6.4; docs/fencing.md).
"""

from __future__ import annotations

import asyncio
import logging

from clustermd.clock import Clock
from clustermd.group.agreed.fencing import Victim

log = logging.getLogger("clustermd.lockd")


def harmless_at_s(lost_at_s: float, lease_s: float, drift: float, device_bound_s: float) -> float:
    """When, on the clock that showed `lost_at_s`, a lost node can write nothing more."""
    return lost_at_s + lease_s * (1 + drift) + device_bound_s


class LeaseFencer:
    """`Fencer` by waiting."""

    policy = "lease"

    def __init__(self, clock: Clock, lease_s: float, drift: float, device_bound_s: float) -> None:
        self._clock = clock
        self._lease_s, self._drift, self._bound_s = lease_s, drift, device_bound_s
        self.unsafe = (
            f"nothing stops a lost node but its own lease: a process that is paused for more than"
            f" device_bound_s = {device_bound_s:g} s between its look at the lease and its request, or a request that"
            " the storage holds back for longer, still writes; only a watchdog or storage fencing rules that out"
        )

    @property
    def wait_s(self) -> float:
        """How long after the loss survivors wait."""
        return harmless_at_s(0.0, self._lease_s, self._drift, self._bound_s)

    async def fence(self, victim: Victim) -> str:
        until_s = victim.lost_at_boottime_s + self.wait_s
        log.info(
            "%s is waited out: %.1f s more of its lease", victim.name, until_s - self._clock.boottime_s()
        )
        # the loop's clock stands still while the machine sleeps, the lease's does not: look again
        while (left_s := until_s - self._clock.boottime_s()) > 0:
            await asyncio.sleep(left_s)
        return (
            f"{victim.name} has been lost for {self.wait_s:.1f} s: its lease of {self._lease_s:g} s is over,"
            f" and {self._bound_s:g} s more for what it had on its way"
        )

    async def check(self, node: str) -> str:
        return f"nothing to check: {node or 'a lost node'} is waited out for {self.wait_s:.1f} s"
