"""What lock daemons multicast to each other, and how long things are cut into parts.

    ["start", config, ring, start]           a member's state at a new view (`Start`)
    ["ops", applied, first, ops]             operations of its clients, numbered from `first`
    ["ack", applied, digest_at, digest]      how far it is; a digest of its state at an agreed place, or 0 and b""
    ["snapshot", ring, number, count, bytes] the state at the install point, for members that have none
    ["tail", ring, number, count, bytes]     the last entries, for members that missed them

`config` is a hash of everything that all must agree on; who has another one cannot read the rest.
`applied` on operations and acks says which log entries nobody needs any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from clustermd.dlm.machine import NodeKey
from clustermd.dlm.wire import array_head, pack, unpack
from clustermd.errors import BadBytes

PROTOCOL = 2
CONFIG = blake2b(b"clustermd dlm %d" % PROTOCOL, digest_size=8).digest()
PART_BYTES_MAX = 60 << 10
PART_OVERHEAD_BYTES = 128
_ARRAY_OF_4 = array_head(4)


@dataclass(frozen=True, slots=True)
class Start:
    """What one member brings to a view.

    `members` are those of its last installed view; `left` and `fenced` what it saw happen since then and
    others may have missed; `unfenced` the lost ones of whose end it has no proof. `shown` is how many entries it
    knows to be stable, `recent` the hashes after its last entries, newest last, and `unbroken` that it had quorum
    all the time. `outlived` are nodes that were proved dead when this history began, and have not joined since.
    """

    has_state: bool
    epoch: int
    applied: int
    chain: bytes
    digest: bytes
    members: tuple[NodeKey, ...]
    left: tuple[NodeKey, ...]
    fenced: tuple[tuple[int, int, str], ...]
    unfenced: tuple[NodeKey, ...]
    shown: int = 0
    recent: tuple[bytes, ...] = ()
    unbroken: bool = True
    outlived: tuple[int, ...] = ()

    def chain_at(self, applied: int) -> bytes | None:
        """The hash after `applied` entries, as far back as it was told."""
        if applied == self.applied:
            return self.chain
        place = len(self.recent) - (self.applied - applied)
        return self.recent[place] if 0 <= place < len(self.recent) else None

    def to_wire(self) -> list[Any]:
        return [
            self.has_state,
            self.epoch,
            self.applied,
            self.chain,
            self.digest,
            [list(key) for key in self.members],
            [list(key) for key in self.left],
            [list(item) for item in self.fenced],
            [list(key) for key in self.unfenced],
            self.shown,
            list(self.recent),
            self.unbroken,
            list(self.outlived),
        ]

    @classmethod
    def from_wire(cls, wire: Any) -> Start:
        """Raises BadBytes."""
        try:
            (
                has_state, epoch, applied, chain, digest, members, left, fenced, unfenced, shown, recent,
                unbroken, outlived,
            ) = wire  # fmt: skip
            return cls(
                bool(has_state),
                int(epoch),
                int(applied),
                bytes(chain),
                bytes(digest),
                tuple((int(node), int(incarnation)) for node, incarnation in members),
                tuple((int(node), int(incarnation)) for node, incarnation in left),
                tuple((int(node), int(incarnation), str(proof)) for node, incarnation, proof in fenced),
                tuple((int(node), int(incarnation)) for node, incarnation in unfenced),
                int(shown),
                tuple(map(bytes, recent)),
                bool(unbroken),
                tuple(map(int, outlived)),
            )
        except (ValueError, TypeError) as error:
            raise BadBytes("bad-frame", f"a lock daemon's start message cannot be read: {error}") from None


def decode(payload: bytes) -> list[Any]:
    """A message, its first field one of the words above. Raises BadBytes."""
    message = unpack(payload)
    match message:
        case ["start", bytes(), list(), _] | ["ops", int(), int(), list()] | ["ack", int(), int(), bytes()]:
            return list(message)
        case ["snapshot" | "tail", list(), int(), int(), bytes()]:
            return list(message)
    raise BadBytes("bad-frame", "a lock daemon sent a message that this version does not know")


def ops_message(applied: int, first: int, ops: list[bytes]) -> bytes:
    """The "ops" message of operations that are packed already."""
    return _ARRAY_OF_4 + pack("ops") + pack(applied) + pack(first) + array_head(len(ops)) + b"".join(ops)


def in_parts(word: str, ring: tuple[int, ...], data: bytes, max_payload: int) -> list[bytes]:
    """`data` as messages that fit the group."""
    size = min(PART_BYTES_MAX, max_payload - PART_OVERHEAD_BYTES)
    chunks = [data[place : place + size] for place in range(0, len(data), size)] or [b""]
    return [pack([word, list(ring), number, len(chunks), chunk]) for number, chunk in enumerate(chunks)]
