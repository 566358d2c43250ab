"""This node's attempts to fence lost nodes: runs the policy (`lockd.fencing`), says how it ended.

Who acts, and for whom, is the group's decision (`group.agreed.fencing`): one node at a time for a victim, for
all arrays. An attempt that fails is followed by another node's, at once; when this node's turn comes again it
waits a little.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from clustermd.clock import Clock
from clustermd.errors import Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.lockd.fencing.fencer import Fencer

AGAIN_S = 2.0

log = logging.getLogger("clustermd.lockd")


class FenceReports(Protocol):
    """Where the outcome goes."""

    def fence_done(self, node: int, words: str) -> None: ...

    def fence_failed(self, node: int, why: str) -> None: ...


class FenceActor:
    """Implements `FenceShell`. `fencer` is set before the group is joined; `reports` is known after it is made."""

    fencer: Fencer

    def __init__(self, clock: Clock, reports: Callable[[], FenceReports]) -> None:
        self._clock = clock
        self._reports = reports
        self._at_work: dict[int, tuple[Victim, asyncio.Task[None]]] = {}
        self._failed_s: dict[int, float] = {}

    def begin(self, victim: Victim) -> None:
        """Start an attempt at `victim`'s node."""
        log.warning("fencing %s (node %d) by %s", victim.name, victim.node, self.fencer.policy)
        task = asyncio.get_running_loop().create_task(self._fence(victim))
        self._at_work[victim.node] = (victim, task)

    def cancel(self, node: int) -> None:
        """It is not this node's task any more, or has become needless."""
        victim, task = self._at_work.pop(node, (None, None))
        if victim is not None and task is not None:
            log.warning("fencing of %s is given up here", victim.name)
            task.cancel()

    async def _fence(self, victim: Victim) -> None:
        wait_s = self._failed_s.get(victim.node, -AGAIN_S) + AGAIN_S - self._clock.monotonic_s()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        try:
            words = await self.fencer.fence(victim)
        except Refused as refusal:
            log.error("fencing %s failed: %s", victim.name, refusal.message)
            self._failed_s[victim.node] = self._clock.monotonic_s()
            self._at_work.pop(victim.node, None)
            self._reports().fence_failed(victim.node, refusal.message)
        else:
            log.warning("fenced %s: %s", victim.name, words)
            self._failed_s.pop(victim.node, None)
            self._at_work.pop(victim.node, None)
            self._reports().fence_done(victim.node, words)

    def status(self) -> list[dict[str, Any]]:
        """Attempts under way here."""
        return [{"node": victim.node, "name": victim.name} for victim, _ in self._at_work.values()]
