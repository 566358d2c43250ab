"""One session of a node's lockd: a process that has locks, and the witnesses of its I/O.

A session that says goodbye has let go of its disks; it ends at once and cleanly. One whose socket ends
without goodbye is lost: its waiting requests go, its granted locks stay until its witnesses prove that
its last request has landed, then they are freed as a dead owner's (design sections 3 and 5). A
session without witness does no I/O and ends with its socket.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from clustermd.clock import Clock
from clustermd.group.frames import FrameLink
from clustermd.group.liveness import Bounds, PeerWatch
from clustermd.group.process_group import Witness
from clustermd.group.proof import prove_end, still_held

GOODBYE_GRACE_S = 1.0
_POLL_S = 0.02


@dataclass(eq=False, slots=True)
class SessionState:
    """What lockd knows of a session. `settling` is held while witnesses are registered or proved."""

    link: FrameLink
    pid: int
    pid_started: int
    label: str
    watch: PeerWatch
    begun_s: float
    number: int = 0
    lost_s: float | None = None
    ended: bool = False
    witnesses: dict[str, Witness] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    settling: asyncio.Lock = field(default_factory=asyncio.Lock)

    def key(self, key: str) -> str:
        """The group's name for this session's witness `key`."""
        return f"{self.number}:{key}"

    async def proved(self, clock: Clock, bounds: Bounds) -> str:
        """Wait until the last request of this lost session has landed; says how that is known."""

        async def one(witness: Witness) -> str:
            def waiting(what: str) -> None:
                self.waiting[witness.key] = what

            proof = await prove_end(witness, clock, bounds, waiting)
            self.waiting.pop(witness.key, None)
            return proof

        proofs = await asyncio.gather(*(one(witness) for witness in self.witnesses.values()))
        return "; ".join(proofs) or f"process {self.pid} has closed its session and had no disks"

    async def let_go(self, clock: Clock) -> list[str]:
        """The disks that a session still holds at its goodbye.

        The kernel puts descriptors of a ring away a moment after close(2), so this looks for a while.
        """
        until_s = clock.monotonic_s() + GOODBYE_GRACE_S
        while True:
            held = [path for witness in self.witnesses.values() for path in await still_held(witness)]
            if not held or self.lost_s is not None or clock.monotonic_s() >= until_s:
                return held
            await asyncio.sleep(_POLL_S)
