"""`fence = "device"`: a message on a small shared disk makes the lost node end itself.

Who fences writes "off" into the block that the victim's lockd reads every second (`watch`). A node that reads it,
or cannot read the disk for `watchdog_s` (W), ends its array processes. And even one whose lockd is dead or stopped
stops writing: its lease runs for W from the *start* of the last good look at the disk.

The message names the life that gave the last heartbeat there. That is the one that may still act: a lockd gives a
heartbeat before it acts at all, the victim may have had several lost lives, and of a node that was not seen since
the cluster started nobody knows which life it lives. One that begins later does not obey it (dlm.md 6.8, 10, 11).

So the proof is a wait. Whatever look started before the message was durable gives leave for W more; every later
look sees the message. After W, counted by the victim's clock, nothing passes its gate; D (`device_bound_s`) is
for what passed it before. The wait is 2 W + D: the second W covers clocks that differ, and the time that ending
processes takes (sbd's msgwait; dlm.md 3.6).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from clustermd.clock import Clock
from clustermd.errors import BadBytes, Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.group.process_group import Member
from clustermd.group.proof import beside_loop
from clustermd.lockd.fencing.fence_disk import Beat, FenceDisk, Pill
from clustermd.lockd.fencing.watch import DeviceWatch

CHECK_S = 2.5
T = TypeVar("T")
log = logging.getLogger("clustermd.lockd")


class DeviceFencer:
    """`Fencer` by message. `me` is the sender."""

    policy = "device"
    unsafe = ""

    def __init__(
        self, disk: FenceDisk, me: Member, clock: Clock, watchdog_s: float, device_bound_s: float
    ) -> None:
        self._disk = disk
        self._me = me
        self._clock = clock
        self._watchdog_s = watchdog_s
        self._bound_s = device_bound_s

    @property
    def wait_s(self) -> float:
        """From a durable message to the proof."""
        return 2 * self._watchdog_s + self._bound_s

    def watch(
        self, self_fence: Callable[[str], None], renew: Callable[[float], None], interval_s: float = 1.0
    ) -> DeviceWatch:
        """This node's own look at the device; lockd runs it. See `DeviceWatch`."""
        return DeviceWatch(self._disk, self._me, self._clock, self._watchdog_s, self_fence, renew, interval_s)

    async def fence(self, victim: Victim) -> str:
        me, disk = self._me, self._disk
        beat = await self._try(lambda: disk.beat(victim.node), victim)
        if beat is not None and beat.name != victim.name:
            raise self._failed(
                victim, f"its number {victim.node} is used by {beat.name}: two nodes have one nodeid"
            )
        incarnation = beat.incarnation if beat is not None else victim.incarnation
        pill = Pill(victim.node, incarnation, me.name)
        await self._try(lambda: disk.write_pill(pill), victim)
        written_s = self._clock.boottime_s()
        if await self._try(lambda: disk.pill(victim.node), victim) != pill:
            raise self._failed(victim, "the message was not found where it was written")
        log.info("%s was told to end on %s; %.1f s more", victim.name, disk.path, self.wait_s)
        # the loop's clock stands still while the machine sleeps: look again
        while (left_s := written_s + self.wait_s - self._clock.boottime_s()) > 0:
            await asyncio.sleep(left_s)
        return (
            f"{victim.name} was told to end on {disk.path} {self.wait_s:g} s ago, and obeys within that time"
        )

    async def check(self, node: str) -> str:
        """Who gives heartbeats on the device."""
        path = self._disk.path
        try:
            before = await self._bounded(self._disk.beats)
            await asyncio.sleep(CHECK_S)
            after = {beat.name: beat for beat in await self._bounded(self._disk.beats)}
        except (OSError, TimeoutError) as error:
            raise Refused("fence-check-failed", f"{path} cannot be read: {error or 'no answer'}") from error
        names = [node] if node else [beat.name for beat in before]
        silent = [name for name in names if not _went_on(name, before, after)]
        if silent:
            raise Refused(
                "fence-check-failed",
                f"{', '.join(silent)} gave no heartbeat on {path} within {CHECK_S:g} s: clustermd does not run"
                " there, or it has no access to this device",
                nodes=silent,
            )
        return f"{path}: heartbeats of {', '.join(names) or 'nobody yet'}"

    async def _try(self, call: Callable[[], T], victim: Victim) -> T:
        try:
            return await self._bounded(call)
        except TimeoutError:
            raise self._failed(victim, f"it did not answer within {self._watchdog_s:g} s") from None
        except (OSError, BadBytes) as error:
            raise self._failed(victim, str(error)) from error

    async def _bounded(self, call: Callable[[], T]) -> T:
        return await asyncio.wait_for(beside_loop(call), self._watchdog_s)

    def _failed(self, victim: Victim, why: str) -> Refused:
        return Refused(
            "fence-failed",
            f"{victim.name} could not be told to end on {self._disk.path}: {why}",
            policy=self.policy,
            node=victim.name,
        )


def _went_on(name: str, before: list[Beat], after: dict[str, Beat]) -> bool:
    return any(beat.name == name and name in after and after[name] != beat for beat in before)
