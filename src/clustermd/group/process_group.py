"""The group waist: who is a member, and the one order in which all members see everything.

A group delivers messages, views and fencing as one sequence, the same for every member. It orders
bytes and knows nothing of locks. A member is an incarnation: a node that restarts its daemon is
another member, and the old one stays unfenced until its end is proved (design section 5).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

from clustermd.errors import Refused


class Busy(Exception):
    """The group's queue is full; try again after the next delivery."""


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One life of one node: its number in the cluster, 64 random bits of this life, and its name."""

    node: int
    incarnation: int
    name: str

    @property
    def key(self) -> tuple[int, int]:
        """The life itself, without its name."""
        return self.node, self.incarnation


class Left(enum.Enum):
    """Why a member is gone. LEFT said so and held nothing; LOST must be fenced."""

    LEFT = "left"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class View:
    """A membership, valid from its place in the order.

    `ring` grows and is never used twice, compared as a whole. `members` is sorted by node number.
    `left` names those lost and not yet fenced again whenever somebody joined, since a newcomer never heard of them.
    A view that is not quorate means: nobody may act; nothing delivered until the next quorate view counts.

    `majority` is 0 where the order is durable, so nobody's memory counts (`local`). Else it is that of all
    configured votes, `votes` are those of `members`, `all_votes` (node, votes) those of all configured nodes, and
    `unbroken` says that this node has had quorum all the time since its last view. Where a loss of quorum ended the
    last quorate view here, `late` is what the order brought of that view afterwards: (sender, message), or (who was
    proved dead, how that is known).
    """

    ring: tuple[int, ...]
    members: tuple[Member, ...]
    joined: tuple[Member, ...]
    left: tuple[tuple[Member, Left], ...]
    quorate: bool
    votes: tuple[int, ...] = ()
    majority: int = 0
    all_votes: tuple[tuple[int, int], ...] = ()
    unbroken: bool = True
    late: tuple[tuple[Member, bytes | str], ...] = ()


class GroupEvents(Protocol):
    """What a member hears, in the agreed order. Calls are synchronous and must not block or raise."""

    def on_view(self, view: View) -> None: ...

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        """`index` grows by one a message within a ring."""

    def on_stable(self, index: int) -> None:
        """Messages up to `index` cannot be lost with their senders any more."""

    def on_fenced(self, member: Member, proof: str, index: int = 0) -> None:
        """`member` has ended and its I/O has drained; `proof` says how that is known.

        `index` is its place among the messages of the ring; 0 if it comes with a view, or is stable as it is told.
        """


def not_a_member(me: Member, why: str = "") -> Refused:
    """The refusal of whatever only a member can do."""
    words = f"any more: {why}" if why else "of the group, so it can send nothing"
    return Refused("not-a-member", f"{me.name} is no member {words}")


def check_size(payload: bytes, most: int) -> None:
    """Raises Refused ("payload-too-large") for more than a group carries in one message."""
    if len(payload) > most:
        raise Refused(
            "payload-too-large",
            f"a message has {len(payload)} bytes, the group carries {most} at most",
        )


@dataclass(frozen=True, slots=True)
class Witness:
    """What proves the end of one process that does I/O for a member of the group.

    The process `pid` (started at `pid_started`, clock ticks after boot as in /proc/PID/stat field 22)
    holds an open-file-description write lock on byte `offset` of each of `paths` (with the given
    device and inode numbers), through the descriptors that do its I/O. Whoever gets that lock
    knows that the process's last request has landed.
    """

    key: str
    pid: int
    pid_started: int
    offset: int
    paths: tuple[tuple[str, int, int], ...]

    def to_wire(self) -> list[Any]:
        return [self.key, self.pid, self.pid_started, self.offset, [list(path) for path in self.paths]]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Witness:
        key, pid, pid_started, offset, paths = wire
        return cls(key, pid, pid_started, offset, tuple((p, d, i) for p, d, i in paths))


class ProcessGroup(Protocol):
    """A membership with agreed order. Implementations: `local`, `agreed` (over corosync), and simulated ones."""

    me: Member
    max_payload: int

    def multicast(self, payload: bytes) -> None:
        """Send to every member, me too. Raises Busy, or Refused if too large or not a member.

        A message sent but not delivered when a view ends is delivered in the next one or never.
        """

    async def register_witness(self, witness: Witness) -> None:
        """Make durable, before any I/O, what will prove the end of one of this member's processes.

        Raises DeviceRefused if a device is held by the kernel (mounted, md, device-mapper).
        """

    async def withdraw_witness(self, key: str) -> None:
        """That process ended in peace."""

    async def leave(self) -> None:
        """End the membership cleanly; only for members that hold nothing."""
