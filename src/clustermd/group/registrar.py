"""Registering witnesses: from here on the end of a process that does I/O can be proved.

A registration is acknowledged when the disks are ours against the kernel (`group.claims`), the process holds
its lock on each of them, and the list of the living that says so is durable. Whoever is not
acknowledged writes nothing.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from clustermd.clock import Clock
from clustermd.errors import DeviceRefused, Refused
from clustermd.group.claims import Claims
from clustermd.group.incarnations import Incarnation, Incarnations
from clustermd.group.process_group import Member, Witness
from clustermd.group.proof import beside_loop, still_held

log = logging.getLogger("clustermd.sequencer")


class Registrar:
    """The sequencer's witnesses and claims."""

    def __init__(self, incarnations: Incarnations, clock: Clock) -> None:
        self._incarnations = incarnations
        self._clock = clock
        self._claims = Claims()
        self._at_work: dict[tuple[int, str], tuple[Member, float]] = {}

    async def register(self, member: Member, witness: Witness) -> None:
        """Make `witness` of `member` durable. Raises DeviceRefused, Refused ("not-a-member")."""
        owner = (member.incarnation, witness.key)
        self._at_work[owner] = (member, self._clock.monotonic_s())
        try:
            opened = await beside_loop(partial(self._claims.look, witness))
            self._claims.keep(owner, witness, opened)
            try:
                held = await still_held(witness)
                if len(held) < len(witness.paths):
                    raise DeviceRefused(
                        "witness-not-held",
                        f"process {witness.pid} does not hold its lock at byte {witness.offset} of "
                        "every disk: it must take the locks before it registers them",
                    )
                record = self._incarnations.living.get(member.incarnation)
                if record is None or record.over:
                    raise Refused("not-a-member", f"{member.name} is no member any more")
            except Refused:
                self._claims.drop(*owner)
                raise
            record.witnesses[witness.key] = witness
            self._incarnations.save()
        finally:
            self._at_work.pop(owner, None)

    def withdraw(self, member: Member, key: str) -> None:
        """The process of witness `key` has ended in peace."""
        record = self._incarnations.living.get(member.incarnation)
        if record is not None and record.witnesses.pop(key, None) is not None:
            self._incarnations.save()
            self._claims.drop(member.incarnation, key)

    async def reclaim(self, record: Incarnation) -> None:
        """Hold the block devices of a former life again; the old sequencer's claims ended with it."""
        for witness in list(record.witnesses.values()):
            try:
                opened = await beside_loop(partial(self._claims.look, witness))
            except DeviceRefused as error:
                log.error("a disk in use could not be claimed again: %s", error.message)
                continue
            owner = (record.member.incarnation, witness.key)
            self._claims.keep(owner, witness, opened)
            if self._incarnations.living.get(owner[0]) is None or witness.key not in record.witnesses:
                self._claims.drop(*owner)

    def forget(self, incarnation: int) -> None:
        """That life has ended: release what it had, and strike it off the list, durably."""
        self._claims.drop(incarnation)
        self._incarnations.living.pop(incarnation, None)
        self._incarnations.save()

    def close(self) -> None:
        self._claims.close()

    def status(self) -> list[dict[str, Any]]:
        """Registrations that are not done yet: a disk that hangs shows here."""
        now_s = self._clock.monotonic_s()
        return [
            {"node": member.name, "witness": key, "for_s": round(now_s - begun_s, 1)}
            for (_, key), (member, begun_s) in self._at_work.items()
        ]
