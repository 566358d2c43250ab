"""What a node's daemon asks of its process group, whatever carries it: `ProcessGroup` with a beginning and an end."""

from __future__ import annotations

from typing import Any, Protocol

from clustermd.group.agreed.group import StatefulEvents
from clustermd.group.process_group import ProcessGroup


class NodeGroup(ProcessGroup, Protocol):
    """`connect`, then `join`; `leave` or `abandon` end it."""

    @property
    def frozen(self) -> str:
        """Why nothing is delivered, or nothing."""

    @property
    def unproved(self) -> str:
        """Who is lost without a proof of its end and what that waits for, or nothing."""

    async def connect(self) -> None:
        """Find what carries the group and learn who this node is. Raises Refused."""

    def join(self, events: StatefulEvents) -> None:
        """Begin the membership; the first view comes to `events` when the group takes us."""

    def abandon(self, reason: str) -> None:
        """End without leaving: for a process that is about to end."""

    async def status(self, within_s: float = 1.0) -> dict[str, Any]:
        """What this member knows of the group, for people."""

    def vouch(self, name: str, words: str) -> None:
        """An operator vouches that the lost node `name` is off. Raises Refused ("not-lost", "not-offered")."""
