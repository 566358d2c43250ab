"""A node's look at the fence device: once a second, its own message, then its own heartbeat.

A good look that started at t allows I/O until t + W (`watchdog_s`), by CLOCK_BOOTTIME; `renew` is told. When the
message names this very life, or no look succeeds for W, `self_fence` is called at once, once, and the watch ends.
W counts only while this process itself was awake: one that was stopped finds its lease over by the clock, and
looks first before it condemns itself for having been late.

A look that hangs, hangs in a thread; there is never more than one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from clustermd.clock import Clock
from clustermd.errors import BadBytes, Refused
from clustermd.group.process_group import Member
from clustermd.group.proof import beside_loop
from clustermd.lockd.fencing.fence_disk import Beat, FenceDisk, Pill

T = TypeVar("T")
log = logging.getLogger("clustermd.lockd")


class DeviceWatch:
    """Made by `DeviceFencer.watch`. `self_fence(reason)` ends whatever writes on this node.

    `renew(until_s)` hears until when, of CLOCK_BOOTTIME, the device allows I/O.
    """

    def __init__(
        self,
        disk: FenceDisk,
        me: Member,
        clock: Clock,
        watchdog_s: float,
        self_fence: Callable[[str], None],
        renew: Callable[[float], None],
        interval_s: float,
    ) -> None:
        self._disk = disk
        self._me = me
        self._clock = clock
        self._watchdog_s = watchdog_s
        self._self_fence = self_fence
        self._renew = renew
        self._interval_s = interval_s
        self._count = 0
        self._looking: asyncio.Task[Pill | None] | None = None
        self._looking_since_s = 0.0
        self._beating: asyncio.Task[None] | None = None
        self.trouble = ""
        """Why the last look failed, "" when it did not."""
        self.silent_s = 0.0
        """For how long no look has succeeded."""

    async def claim(self) -> None:
        """Take this node's slot, with a first heartbeat. Raises Refused ("no-fence-device", "fence-slot-taken")."""
        me, disk = self._me, self._disk
        try:
            beat = await self._bounded(lambda: disk.beat(me.node))
            if beat is not None and beat.name != me.name:
                await asyncio.sleep(3 * self._interval_s)
                if await self._bounded(lambda: disk.beat(me.node)) != beat:
                    raise Refused(
                        "fence-slot-taken",
                        f"node number {me.node} on {disk.path} is in use by {beat.name}, so {me.name} cannot have it:"
                        " give each node a nodeid of its own in corosync.conf, and each cluster its own fence device",
                        node=me.node,
                    )
            self._count = beat.count if beat is not None else 0
            await self._bounded(self._beat)
        except BadBytes as error:
            raise Refused("no-fence-device", error.message, path=disk.path) from error
        except (OSError, TimeoutError) as error:
            why = f"did not answer within {self._watchdog_s:g} s" if not str(error) else f"fails: {error}"
            raise Refused("no-fence-device", f"the fence device {disk.path} {why}", path=disk.path) from error

    async def run(self) -> None:
        """Look until this node has to end."""
        try:
            while True:
                began_s = self._clock.monotonic_s()
                reason = await self._turn()
                if not self.trouble and not reason:
                    self._give_beat()
                if not reason:
                    await asyncio.sleep(max(0.0, began_s + self._interval_s - self._clock.monotonic_s()))
                elapsed_s = min(self._clock.monotonic_s() - began_s, 2 * self._interval_s)
                self.silent_s = self.silent_s + elapsed_s if self.trouble else 0.0
                if self.silent_s >= self._watchdog_s:
                    reason = f"{self._disk.path} could not be read for {self.silent_s:.1f} s: {self.trouble}"
                if reason:
                    log.error("this node ends itself: %s", reason)
                    self._self_fence(reason)
                    return
        finally:
            for task in (self._looking, self._beating):
                if task is not None:
                    task.cancel()

    async def _turn(self) -> str:
        """One look, or one interval of a look that hangs. Why this node has to end, or ""."""
        if self._looking is None:
            self._looking_since_s = self._clock.boottime_s()
            self._looking = asyncio.create_task(beside_loop(lambda: self._disk.pill(self._me.node)))
        await asyncio.wait((self._looking,), timeout=self._interval_s)
        if not self._looking.done():
            self.trouble = "it does not answer"
            return ""
        looking, self._looking = self._looking, None
        try:
            pill = looking.result()
        except (OSError, BadBytes) as error:
            self.trouble = str(error)
            return ""
        self.trouble = ""
        if pill is not None and pill.incarnation == self._me.incarnation:
            return f"{pill.sender} says so on {self._disk.path}"
        self._renew(self._looking_since_s + self._watchdog_s)
        return ""

    def _give_beat(self) -> None:
        """For people and `check`; that it cannot be written harms nobody."""
        if self._beating is not None and not self._beating.done():
            return
        if self._beating is not None and (error := self._beating.exception()) is not None:
            log.warning("no heartbeat could be written to %s: %s", self._disk.path, error)
        self._beating = asyncio.create_task(beside_loop(self._beat))

    def _beat(self) -> None:
        self._count += 1
        self._disk.write_beat(Beat(self._me.node, self._me.name, self._me.incarnation, self._count))

    async def _bounded(self, call: Callable[[], T]) -> T:
        return await asyncio.wait_for(beside_loop(call), self._watchdog_s)
