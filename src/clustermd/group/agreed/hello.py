"""What members of an agreed group say to each other, as bytes.

    0  control, a msgpack list that begins with "hello", "without", "fenced", "fence-failed", "leave" or "beat"
    1  tag, index, keeps, payload       what the user of the group multicasts, with an acknowledgement
    2  tag, index (8 bytes), keeps (1)  "I have had messages up to index", and whether a state that I keep has them

A tag is the view in which a message was sent: (number, ring sequence, ring node). A message whose tag is not
the receiver's view counts nowhere (dlm.md 6.5), which all receivers find alike, as views change at the same
place of the order for all. `Hello` is what each says at a change of membership.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack

from clustermd.errors import BadBytes
from clustermd.group.process_group import Member

PROTOCOL = 1
CONTROL, PAYLOAD, ACK = 0, 1, 2

Tag: TypeAlias = tuple[int, int, int]
"""A view: its number, and the sequence and the lowest node of the ring in which it began."""
Peer: TypeAlias = tuple[int, int]
"""A process as the medium names it: node number and process id."""
Key: TypeAlias = tuple[int, int]
"""A life of a node: its number and its incarnation."""

_TAG = struct.Struct(">QQI")
_ACK = struct.Struct(">QB")
TAG_BYTES = _TAG.size
OVERHEAD_BYTES = 1 + TAG_BYTES + _ACK.size


@dataclass(frozen=True, slots=True, order=True)
class Life:
    """A member as the group remembers it: with the boot of its machine, by which a reboot is recognised.

    Incarnation 0 stands for whatever a node did before anybody now living met it (dlm.md 6.6).
    """

    member: Member
    boot: str

    @property
    def key(self) -> Key:
        return self.member.key

    def to_wire(self) -> list[Any]:
        return [self.member.node, self.member.incarnation, self.member.name, self.boot]

    @classmethod
    def from_wire(cls, wire: Any) -> Life:
        node, incarnation, name, boot = wire
        return cls(Member(int(node), int(incarnation), str(name)), str(boot))


@dataclass(frozen=True, slots=True)
class Hello:
    """One member's word at a change of membership.

    `peers` and `ring` say which change it answers. `number` is that of its last view. `last` are the members of
    its last quorate view, `lost` those that it knows to be lost and not proved dead, `left` who said goodbye since,
    `proofs` (node, incarnation, words) the proved ends. `has_state`: it kept what former views agreed on.
    """

    peers: tuple[Peer, ...]
    ring: tuple[int, int]
    quorate: bool
    number: int
    life: Life
    config: str
    has_state: bool
    last: tuple[Life, ...]
    lost: tuple[Life, ...]
    left: tuple[Key, ...]
    proofs: tuple[tuple[int, int, str], ...]

    def to_wire(self) -> list[Any]:
        return [
            "hello",
            PROTOCOL,
            [list(peer) for peer in self.peers],
            list(self.ring),
            self.quorate,
            self.number,
            self.life.to_wire(),
            self.config,
            self.has_state,
            [life.to_wire() for life in self.last],
            [life.to_wire() for life in self.lost],
            [list(key) for key in self.left],
            [list(proof) for proof in self.proofs],
        ]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Hello:
        """Raises BadBytes."""
        try:
            _, protocol, peers, ring, quorate, number, life, config, *rest = wire
            if protocol != PROTOCOL:
                # these fields are the same in all versions, so that both sides see why they do not meet
                config, rest = f"lock daemons of protocol {protocol}", [False, [], [], [], []]
            has_state, last, lost, left, proofs = rest
            return cls(
                peers=tuple((int(node), int(pid)) for node, pid in peers),
                ring=(int(ring[0]), int(ring[1])),
                quorate=bool(quorate),
                number=int(number),
                life=Life.from_wire(life),
                config=str(config),
                has_state=bool(has_state),
                last=tuple(map(Life.from_wire, last)),
                lost=tuple(map(Life.from_wire, lost)),
                left=tuple((int(node), int(incarnation)) for node, incarnation in left),
                proofs=tuple((int(n), int(incarnation), str(words)) for n, incarnation, words in proofs),
            )
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise BadBytes("bad-hello", f"a lock daemon's hello cannot be read: {error}") from None


def control(message: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return bytes((CONTROL,)) + packed


def read_control(data: bytes) -> list[Any]:
    """Raises BadBytes for what is no list that begins with a word."""
    try:
        message = msgpack.unpackb(data[1:], raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData) as error:
        raise BadBytes(
            "bad-message", f"{len(data)} bytes of another lock daemon are no message: {error}"
        ) from None
    if type(message) is not list or not message or type(message[0]) is not str:
        raise BadBytes("bad-message", "another lock daemon sent something that is no message")
    return message


def tagged(tag: Tag, index: int, keeps: bool, payload: bytes) -> bytes:
    return bytes((PAYLOAD,)) + _TAG.pack(*tag) + _ACK.pack(index, keeps) + payload


def ack(tag: Tag, index: int, keeps: bool) -> bytes:
    return bytes((ACK,)) + _TAG.pack(*tag) + _ACK.pack(index, keeps)


def read_tag(data: bytes) -> Tag | None:
    """The tag of a payload or an ack; None if it is cut short."""
    if len(data) < OVERHEAD_BYTES:
        return None
    number, sequence, node = _TAG.unpack_from(data, 1)
    return number, sequence, node


def read_ack(data: bytes) -> tuple[int, bool]:
    """(index, keeps) of an ack, or of one that comes with a payload, which `read_tag` found long enough."""
    index, keeps = _ACK.unpack_from(data, 1 + TAG_BYTES)
    return index, bool(keeps)
