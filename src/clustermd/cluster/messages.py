"""The messages of md-cluster: 48 bytes in the `message` value block, and what we add behind them.

The table is md-cluster spec 4.5, the bytes are Linux's. Ours: a sequence number in bytes 48-55, so that an
answer can be told from an old one and a message is processed once. A receiver answers in its own `bitmapNNNN`
value block: bytes 0-15 stay its resync window (lo, hi), bytes 16-31 carry (sequence, result),
result 0 or a positive errno.

    type               low     high    uuid         raid_slot
    METADATA_UPDATED                                number of a device with a good superblock
    RESYNCING          lo      hi, 0: finished
    NEWDISK                            device uuid  number
    REMOVE                                          number
    RE_ADD                                          number
    BITMAP_NEEDS_SYNC          (the sender's slot names the bitmap)
    CHANGE_CAPACITY
    BITMAP_RESIZE              new size in sectors
    RESYNCING_START
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from clustermd.errors import BadBytes

LVB_BYTES = 64
_MESSAGE = struct.Struct("<IIQQ16sI4xQ8x")
_BLOCK = struct.Struct("<QQQQ32x")


class MessageType(enum.IntEnum):
    METADATA_UPDATED = 0
    RESYNCING = 1
    NEWDISK = 2
    REMOVE = 3
    RE_ADD = 4
    BITMAP_NEEDS_SYNC = 5
    CHANGE_CAPACITY = 6
    BITMAP_RESIZE = 7
    RESYNCING_START = 8


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `slot` is the sender's md slot (from 0); `low` and `high` are sectors."""

    type: MessageType
    slot: int
    low: int = 0
    high: int = 0
    uuid: bytes = bytes(16)
    raid_slot: int = 0
    sequence: int = 0

    def to_bytes(self) -> bytes:
        """The 64 bytes of the value block."""
        return _MESSAGE.pack(
            self.type, self.slot, self.low, self.high, self.uuid, self.raid_slot, self.sequence
        )

    @classmethod
    def from_bytes(cls, block: bytes | bytearray) -> Message:
        """Raises BadBytes for an unknown type or a block of another length."""
        if len(block) != LVB_BYTES:
            raise BadBytes("bad-message", f"a message block has {LVB_BYTES} bytes, this one {len(block)}")
        kind, slot, low, high, uuid, raid_slot, sequence = _MESSAGE.unpack(block)
        try:
            known = MessageType(kind)
        except ValueError:
            raise BadBytes(
                "unknown-message", f"message type {kind} is unknown here: is a node newer?"
            ) from None
        return cls(known, slot, low, high, uuid, raid_slot, sequence)


def sequence_of(block: bytes | bytearray) -> int:
    """The sequence number in a message block, whatever else it holds."""
    return int(_MESSAGE.unpack(block)[6])


@dataclass(frozen=True, slots=True)
class SlotBlock:
    """The value block of a `bitmapNNNN` lock: the owner's resync window and its last answer."""

    lo: int = 0
    hi: int = 0
    sequence: int = 0
    result: int = 0

    def to_bytes(self) -> bytes:
        return _BLOCK.pack(self.lo, self.hi, self.sequence, self.result)

    @classmethod
    def from_bytes(cls, block: bytes | bytearray) -> SlotBlock:
        return cls(*_BLOCK.unpack(block))
