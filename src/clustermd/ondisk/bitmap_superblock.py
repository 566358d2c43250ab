"""The 256-byte superblock of a write-intent bitmap: bytes <-> values.

Each slot of a clustered array has a bitmap of its own, and each bitmap starts with such a superblock
(version 5); an array of one node has one bitmap (version 4). There is no checksum: what the kernel checks
(md-cluster spec 2.5) is all there is, and `BitmapSuperblock.check` keeps those rules.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any

from clustermd.errors import BadBytes

MAGIC = 0x6D746962
VERSION_HOST_ENDIAN = 3
VERSION_NORMAL = 4
VERSION_CLUSTERED = 5
HEADER_BYTES = 256
MAX_WRITE_BEHIND = 16383
MIN_CHUNK_BYTES = 512
MAX_NODES = 9999
"""The lock of a slot is named `bitmap` and four digits."""
CLUSTER_NAME_MAX_BYTES = 63

FIELDS: tuple[tuple[str, str], ...] = (
    ("magic", "I"),
    ("version", "I"),
    ("uuid", "16s"),
    ("events", "Q"),
    ("events_cleared", "Q"),
    ("sync_size", "Q"),
    ("state", "I"),
    ("chunksize", "I"),
    ("daemon_sleep", "I"),
    ("write_behind", "I"),
    ("sectors_reserved", "I"),
    ("nodes", "I"),
    ("cluster_name", "64s"),
    ("pad", "120s"),
)
FIXED = struct.Struct("<" + "".join(code for _, code in FIELDS))
_NAMES = tuple(name for name, _ in FIELDS)


class BitmapState(enum.IntFlag):
    """The state word (md-cluster spec 2.2). WRITE_ERROR is never written."""

    STALE = 1 << 1
    WRITE_ERROR = 1 << 2
    FIRST_USE = 1 << 3
    CLEAN = 1 << 4
    DAEMON_BUSY = 1 << 5
    HOST_ENDIAN = 1 << 15


_OK = BitmapState(0)


@dataclass(slots=True, frozen=True)
class BitmapSuperblock:
    """One bitmap superblock, fields named as on disk (md-cluster spec 2.1).

    `sync_size` and `sectors_reserved` are sectors, `chunksize` bytes per bit, `daemon_sleep` seconds
    between sweeps, `nodes` the number of slots (0: not clustered).
    """

    version: int
    uuid: bytes
    events: int
    events_cleared: int
    sync_size: int
    chunksize: int
    state: BitmapState = _OK
    daemon_sleep: int = 5
    write_behind: int = 0
    sectors_reserved: int = 0
    nodes: int = 0
    cluster_name: str = ""

    @classmethod
    def from_bytes(cls, data: bytes) -> BitmapSuperblock:
        """The bitmap superblock in the first 256 bytes of `data`.

        Raises BadBytes with a code per check of md-cluster spec 2.5, except for the UUID and what else
        only the array knows: that is `check`.
        """
        header = parse_lenient(data)
        if data[:4] != MAGIC.to_bytes(4, "little"):
            raise BadBytes(
                "bad-bitmap-magic",
                f"the bitmap has the magic number {int.from_bytes(data[:4], 'little'):08x}, not {MAGIC:08x}: "
                "it was overwritten, or never written",
            )
        if not VERSION_HOST_ENDIAN <= header.version <= VERSION_CLUSTERED:
            raise BadBytes(
                "bad-bitmap-version", f"the bitmap has version {header.version}; 3, 4 and 5 are known"
            )
        chunk = header.chunksize
        if chunk < MIN_CHUNK_BYTES or chunk & (chunk - 1):
            raise BadBytes(
                "bad-bitmap-chunk",
                f"the bitmap's chunk of {chunk} bytes is not a power of two of 512 or more",
            )
        if header.daemon_sleep < 1:
            raise BadBytes("bad-bitmap-delay", "the bitmap's daemon_sleep of 0 seconds is not possible")
        if header.write_behind > MAX_WRITE_BEHIND:
            raise BadBytes(
                "bad-bitmap-write-behind",
                f"the bitmap allows {header.write_behind} writes behind, more than {MAX_WRITE_BEHIND}",
            )
        if header.nodes > MAX_NODES:
            raise BadBytes(
                "bad-bitmap-nodes", f"the bitmap claims {header.nodes} nodes, more than {MAX_NODES}"
            )
        return header

    def check(self, uuid: bytes, *, nodes: int | None = None, cluster_name: str | None = None) -> None:
        """Refuse a bitmap that is not the array's: `uuid` is the array's `set_uuid` (16 bytes).

        `nodes` and `cluster_name`, where given, must match too: all slots of an array carry the same.
        Raises BadBytes `bitmap-of-other-array`, `bitmap-slots-differ`, `other-cluster`.
        """
        if self.uuid != uuid:
            raise BadBytes(
                "bitmap-of-other-array",
                f"the bitmap is that of array {self.uuid.hex()}, not of {uuid.hex()}",
            )
        if nodes is not None and self.nodes != nodes:
            raise BadBytes("bitmap-slots-differ", f"the bitmap has {self.nodes} slots, the array {nodes}")
        if cluster_name is not None and self.cluster_name != cluster_name:
            raise BadBytes(
                "other-cluster",
                f"the array belongs to the cluster {self.cluster_name!r}, this node to {cluster_name!r}",
                cluster_name=self.cluster_name,
            )

    def stale_for(self, array_events: int) -> bool:
        """Whether all chunks must count as dirty: marked so, or written by an older array.

        A clustered bitmap may be older than the array, as another node may have counted on (spec 2.5).
        """
        return bool(self.state & BitmapState.STALE) or (self.nodes == 0 and self.events < array_events)

    def to_bytes(self) -> bytes:
        """256 bytes. `cluster_name` must fit in 64 bytes."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in _NAMES if name not in ("magic", "pad")
        }
        values |= {
            "magic": MAGIC,
            "pad": b"",
            "state": int(self.state) & ~int(BitmapState.WRITE_ERROR),
            "cluster_name": self.cluster_name.encode("utf-8", "surrogateescape"),
        }
        return FIXED.pack(*(values[name] for name in _NAMES))


def parse_lenient(data: bytes) -> BitmapSuperblock:
    """The 256 bytes as they stand, right or wrong: what `-X` shows. Raises BadBytes `short-bitmap`."""
    if len(data) < HEADER_BYTES:
        raise BadBytes("short-bitmap", f"only {len(data)} of the bitmap superblock's 256 bytes could be read")
    values: dict[str, Any] = dict(zip(_NAMES, FIXED.unpack_from(data), strict=True))
    del values["magic"], values["pad"]
    values["state"] = BitmapState(values["state"])
    values["cluster_name"] = values["cluster_name"].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return BitmapSuperblock(**values)
