"""Lost lives, until their end is proved.

The lockd is killed at once if it still runs: without the order it is of no use, and its sessions might
believe in it. Its array processes notice, drain and let go of their disks by themselves; `group.proof` waits for
that and kills only who has not done so after `unresponsive_s`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustermd.clock import Clock
from clustermd.group.incarnations import Incarnation
from clustermd.group.liveness import Bounds
from clustermd.group.process import ended, kill
from clustermd.group.process_group import Witness
from clustermd.group.proof import prove_end
from clustermd.group.tasks import Tasks

log = logging.getLogger("clustermd.sequencer")


@dataclass(eq=False, slots=True)
class Ending:
    """A life whose end is being proved; `waiting` says on what, by witness key."""

    record: Incarnation
    begun_s: float
    waiting: dict[str, str] = field(default_factory=dict)
    proof: str | None = None


class Endings:
    """All of them, by incarnation. `proved(ending)` is called when one has its proof."""

    def __init__(self, clock: Clock, bounds: Bounds, tasks: Tasks, proved: Callable[[Ending], None]) -> None:
        self._clock = clock
        self._bounds = bounds
        self._tasks = tasks
        self._proved = proved
        self.open: dict[int, Ending] = {}

    def begin(self, record: Incarnation) -> None:
        """`record`'s life is over; nothing can be registered for it any more."""
        record.over = True
        ending = Ending(record, self._clock.monotonic_s())
        self.open[record.member.incarnation] = ending
        self._tasks.spawn(self._prove(ending))

    @property
    def unproved(self) -> bool:
        return any(ending.proof is None for ending in self.open.values())

    async def _prove(self, ending: Ending) -> None:
        record = ending.record
        if kill(record.pid, record.pid_started):
            log.info("killed lockd %d of %s", record.pid, record.title)
        ending.waiting["lockd"] = f"process {record.pid}: the node's lockd still runs"
        await ended(record.pid, record.pid_started)
        del ending.waiting["lockd"]

        async def one(witness: Witness) -> str:
            def waiting(what: str) -> None:
                ending.waiting[witness.key] = what

            proof = await prove_end(witness, self._clock, self._bounds, waiting)
            ending.waiting.pop(witness.key, None)
            return proof

        proofs = await asyncio.gather(*(one(witness) for witness in record.witnesses.values()))
        ending.proof = "; ".join([f"lockd {record.pid} has ended", *proofs])
        log.info("proved the end of %s: %s", record.title, ending.proof)
        self._proved(ending)

    def status(self) -> list[dict[str, Any]]:
        """Who is not proved dead yet, for how long, and what that waits for."""
        now_s = self._clock.monotonic_s()
        return [
            {
                "node": ending.record.member.name,
                "incarnation": f"{incarnation:016x}",
                "for_s": round(now_s - ending.begun_s, 1),
                "waiting": list(ending.waiting.values()),
            }
            for incarnation, ending in self.open.items()
            if ending.proof is None
        ]
