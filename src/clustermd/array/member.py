"""One member device of an array, as one node sees it.

`number` is the permanent device number (index in dev_roles), `role` the place in the array or None for a
spare. A member with a role that is not `in_sync` is recovering: it gets every write, and may be
read below `recovery_offset`. `index` is the member's place in the node's own list and its bit in masks.
"""

from __future__ import annotations

import os
import stat

from clustermd.device.member_device import MemberDevice
from clustermd.layout import raid1
from clustermd.ondisk.superblock import MAX_SECTOR, FeatureMap, Superblock

WRITE_MOSTLY = 1
FAIL_FAST = 2


class Member:
    """A device with its superblock. `reads` are in flight there; `bad_blocks` are device sectors (start, count).

    `read_errors` is the budget of those that may be repaired, `corrected_errors` counts repaired blocks for people.
    """

    __slots__ = (
        "bad_blocks",
        "corrected_errors",
        "data_offset_bytes",
        "device",
        "fault_recorded",
        "faulty",
        "has_bad_block_log",
        "in_sync",
        "index",
        "next_sector",
        "number",
        "read_error_tick",
        "read_errors",
        "reads",
        "recovery_offset",
        "role",
        "stuck",
        "superblock",
        "why",
    )

    def __init__(self, device: MemberDevice, superblock: Superblock, index: int) -> None:
        self.device = device
        self.index = index
        self.number = superblock.dev_number
        self.superblock = superblock
        self.data_offset_bytes = superblock.data_offset * 512
        self.role: int | None = None
        self.in_sync = False
        self.faulty = False
        self.fault_recorded = False
        self.recovery_offset = 0
        self.has_bad_block_log = superblock.has_bad_block_log
        self.bad_blocks: list[tuple[int, int]] = []
        self.reads = 0
        self.next_sector = -1
        self.corrected_errors = 0
        self.read_errors = 0
        self.read_error_tick = 0
        self.stuck = 0
        self.why = ""

    @property
    def path(self) -> str:
        return self.device.path

    @property
    def write_mostly(self) -> bool:
        return bool(self.superblock.devflags & WRITE_MOSTLY)

    @property
    def fail_fast(self) -> bool:
        return bool(self.superblock.devflags & FAIL_FAST)

    @property
    def writable(self) -> bool:
        """Has a role and works: gets data and bitmap writes."""
        return self.role is not None and not self.faulty

    def adopt(self, superblock: Superblock, role: int | None) -> None:
        """Take over what a superblock of this device says (spec 1.13): role, and how far it is filled."""
        self.superblock = superblock
        self.role = role
        recovering = bool(superblock.feature_map & FeatureMap.RECOVERY_OFFSET)
        self.in_sync = role is not None and not recovering
        self.recovery_offset = superblock.recovery_offset if recovering else MAX_SECTOR

    def good_for(self, lo: int, hi: int) -> bool:
        """Whether array sectors [lo, hi) can be read here: in sync or filled so far, and no bad block."""
        if not self.writable or not (self.in_sync or self.recovery_offset >= hi):
            return False
        if self.bad_blocks:
            first = raid1.device_sector(lo, self.superblock.data_offset)
            end = raid1.device_sector(hi, self.superblock.data_offset)
            return not any(start < end and start + count > first for start, count in self.bad_blocks)
        return True

    def numbers(self) -> tuple[int, int]:
        """(major, minor) of a block device, (0, 0) of a file."""
        try:
            status = os.stat(self.device.path)
        except OSError:
            return 0, 0
        if not stat.S_ISBLK(status.st_mode):
            return 0, 0
        return os.major(status.st_rdev), os.minor(status.st_rdev)
