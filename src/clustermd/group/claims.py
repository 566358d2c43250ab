"""Block devices that nodes of this machine use, kept from everybody else on it.

A mounted, md or device-mapper member would be written behind our back. An exclusive descriptor of a block
device fails when the kernel holds it, and while we keep it nobody can mount the device, put it into
an array or claim it. Nodes share the claim, so the sequencer keeps one for all of them, from the
first witness on a device to the end of the last (design section 5).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from clustermd.device.direct import claim_exclusive, identity
from clustermd.device.in_use import in_use_by_kernel
from clustermd.errors import DeviceRefused
from clustermd.group.process_group import Witness

Opened = list[tuple[int, int]]


class Claims:
    """The exclusive descriptors, by device number, each with the witnesses it is kept for."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, set[tuple[int, str]]]] = {}

    def look(self, witness: Witness) -> Opened:
        """(device number, descriptor) of what `witness` needs and is not ours yet.

        May block for as long as a disk hangs. Raises DeviceRefused ("device-busy", "device-changed" or
        as `device.direct` does) and keeps nothing then.
        """
        opened: Opened = []
        try:
            for path, device, inode in witness.paths:
                if identity(path) != (device, inode):
                    raise DeviceRefused(
                        "device-changed",
                        f"{path} is not the file or device node any more that the array opened "
                        "(it was replaced): put the old one back under this name",
                        path=path,
                    )
                if stat.S_ISBLK(os.stat(path).st_mode) and device in self._kept:
                    continue
                user = in_use_by_kernel(path)
                if user:
                    raise DeviceRefused(
                        "device-busy", f"{path} is in use by the kernel ({user}): release it first", path=path
                    )
                if stat.S_ISBLK(os.stat(path).st_mode):
                    opened.append((device, claim_exclusive(path)))
        except BaseException:
            for _, descriptor in opened:
                os.close(descriptor)
            raise
        return opened

    def keep(self, owner: tuple[int, str], witness: Witness, opened: Opened) -> None:
        """Take over what `look` opened, for `owner` (incarnation, key)."""
        for number, descriptor in opened:
            if number in self._kept:
                os.close(descriptor)
            else:
                self._kept[number] = (descriptor, set())
        for _, device, _ in witness.paths:
            # a regular file's device number is its file system's, never one that is kept here: a
            # mounted device cannot have been claimed
            if device in self._kept:
                self._kept[device][1].add(owner)
        used = {device for _, device, _ in witness.paths}
        self._drop(lambda number, kept: kept == owner and number not in used)

    def drop(self, incarnation: int, key: str | None = None) -> None:
        """`incarnation` (or only its witness `key`) uses its devices no more."""
        self._drop(lambda _, owner: owner[0] == incarnation and key in (None, owner[1]))

    def _drop(self, gone: Callable[[int, tuple[int, str]], bool]) -> None:
        for number, (descriptor, owners) in list(self._kept.items()):
            owners -= {owner for owner in owners if gone(number, owner)}
            if not owners:
                os.close(descriptor)
                del self._kept[number]

    def close(self) -> None:
        for descriptor, _ in self._kept.values():
            os.close(descriptor)
        self._kept.clear()
