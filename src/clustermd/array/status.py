"""What a running array says of itself: the values behind mdstat, `--detail` and JSON.

Plain frozen values, so that the control socket can carry them (`to_wire`/`from_wire`) and the command line words them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member device. `role` is None for a spare or a faulty device without one.

    `number` is the permanent device number (desc_nr). A missing role has no MemberStatus.
    """

    path: str
    number: int
    role: int | None
    faulty: bool
    in_sync: bool
    recovery_offset_sectors: int | None
    write_mostly: bool = False
    failfast: bool = False
    major: int = 0
    minor: int = 0

    @property
    def spare(self) -> bool:
        """A device that has no role and is not faulty."""
        return self.role is None and not self.faulty


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """A sync of any kind. action: resync, recovery, check, repair. state: running, pending, remote, delayed.

    `done_sectors` of `total_sectors`; speed in KiB/s of the last seconds. All 0 unless running.
    """

    action: str
    state: str
    done_sectors: int = 0
    total_sectors: int = 0
    speed_kib_s: int = 0


@dataclass(frozen=True, slots=True)
class BitmapStatus:
    """The write-intent bitmap of this node. Pages are of 2048 counters (16 bit each), as Linux counts them."""

    chunk_bytes: int
    chunks: int
    dirty_chunks: int
    pages: int
    pages_used: int
    nodes: int
    cluster_name: str
    slot: int
    daemon_sleep_s: int


@dataclass(frozen=True, slots=True)
class ArrayStatus:
    """One running array on one node. Times are seconds since the epoch; sizes are sectors of 512 bytes.

    `held` is why I/O is held (lost contact, quorum), or "". `counters` are totals since the start, among them
    data_writes, bitmap_writes, superblock_writes, messages_sent, resynced_chunks.
    """

    name: str
    uuid: str
    set_name: str
    metadata: str
    level: int
    layout: int
    chunk_sectors: int
    raid_disks: int
    array_sectors: int
    component_sectors: int
    created_s: int
    updated_s: int
    events: int
    read_only: bool
    clean: bool
    degraded: int
    failed: bool
    members: tuple[MemberStatus, ...]
    sync: SyncStatus | None
    bitmap: BitmapStatus | None
    held: str
    counters: dict[str, int]

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ArrayStatus:
        values = dict(wire)
        values["members"] = tuple(MemberStatus(**member) for member in values["members"])
        values["sync"] = SyncStatus(**values["sync"]) if values["sync"] else None
        values["bitmap"] = BitmapStatus(**values["bitmap"]) if values["bitmap"] else None
        return cls(**values)
