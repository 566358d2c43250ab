"""Until when this node may do I/O: the earliest of what the group and the fence device allow, in the lease file.

The group allows nothing without quorum, and with leases no longer than a majority has answered for; a fence device
allows as long as it was looked at with success. Array processes see the outcome before each submission
(`device.lease`).
"""

from __future__ import annotations

import math

from clustermd.device.lease import UNBOUNDED_NS, LeaseFile


class NodeLease:
    """`by_device`: a fence device has to allow it too."""

    def __init__(self, file: LeaseFile, *, by_device: bool) -> None:
        self._file = file
        self._group_s = 0.0
        self._device_s = 0.0 if by_device else math.inf

    def by_group(self, until_s: float) -> None:
        """The group allows it until then (CLOCK_BOOTTIME): 0 not at all, infinity without bound."""
        self._group_s = until_s
        self._write()

    def by_watch(self, until_s: float) -> None:
        """The fence device allows it until then."""
        self._device_s = until_s
        self._write()

    def _write(self) -> None:
        until_s = min(self._group_s, self._device_s)
        if until_s <= 0:
            self._file.expire()
        else:
            self._file.renew(UNBOUNDED_NS if math.isinf(until_s) else int(until_s * 1e9))
