"""A node dies under load, and what it leaves is made as bad as a crash may leave it.

The survivors are held while the disks are looked at and changed, so that the takeover starts from
exactly what was shown. The order matters: hold, then kill, then wait until the dead node's last
request has landed (a SIGKILL does not stop requests the kernel has), then look, then change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clustermd.testing.crash_states import Change, make_halves_differ
from clustermd.testing.disks import Disk, differing_blocks, dirty_chunks, look, writers_of
from clustermd.testing.exerciser import DISCONNECTED, Report
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import Node
from clustermd.testing.waiting import wait_until
from clustermd.testing.write_log import knowledge_of_logs


@dataclass(frozen=True, slots=True)
class Crash:
    """What a dead node left. Times are CLOCK_MONOTONIC in ns; the survivors were held from before the kill.

    `dirty` are the bits of the dead node's slot, `differing` the 4 KiB blocks in which the halves
    differ after `changes`.
    """

    slot: int
    dirty: frozenset[int]
    changes: tuple[Change, ...]
    differing: tuple[int, ...]
    report: Report
    held_ns: int
    killed_ns: int
    released_ns: int
    disk: Disk

    @property
    def counts(self) -> bool:
        """Whether this crash proves anything: bits were dirty, a write in flight, and halves differ."""
        in_flight = self.report.ended == DISCONNECTED and self.report.writes_in_flight_at_end > 0
        return bool(self.dirty) and in_flight and bool(self.changes)


def crash(
    load: Load, survivors: Sequence[Node], disks: Sequence[str | Path], *, whole_node: bool = True
) -> Crash:
    """Kill the node under `load` while `survivors` stand still, and make the halves differ legally.

    `whole_node`: lockd dies with the array process; otherwise only the array process does.
    When it returns the survivors run again.
    """
    victim = load.node
    slot = victim.slot()
    with ExitStack() as hold:
        held_ns = time.monotonic_ns()
        for survivor in survivors:
            hold.enter_context(survivor.held())
        writers = writers_of(disks[0])
        killed_ns = time.monotonic_ns()
        if whole_node:
            victim.kill()
        else:
            victim.kill_array()
        wait_until(
            lambda: all(len(writers_of(disk)) < len(writers) for disk in disks),
            f"the last request of {victim.name} to land",
        )
        report = load.report()
        dirty = dirty_chunks(disks, slot)
        disk = look(disks[0])
        known = knowledge_of_logs([load.log])
        changes = make_halves_differ(known, disks, disk.data_offset_bytes, dirty, disk.chunk_bytes)
        differing = differing_blocks(disks)
    return Crash(
        slot=slot,
        dirty=frozenset(dirty),
        changes=tuple(changes),
        differing=tuple(differing),
        report=report,
        held_ns=held_ns,
        killed_ns=killed_ns,
        released_ns=time.monotonic_ns(),
        disk=disk,
    )
