"""RAID1: every member holds the whole array, so an array sector is the same sector of each data area.

The component size is the array size (md-cluster spec 1.3, 2.3); a member's data starts at its own
`data_offset`.
"""

from __future__ import annotations


def array_sectors(size_sectors: int) -> int:
    """The array's size for a component size, both in sectors."""
    return size_sectors


def device_sector(array_sector: int, data_offset_sectors: int) -> int:
    """Where an array sector lies on a member whose data starts at `data_offset_sectors`."""
    return data_offset_sectors + array_sector
