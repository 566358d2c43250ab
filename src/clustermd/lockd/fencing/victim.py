"""Who is to be fenced."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Victim:
    """A lost life of a node. Fencing ends this `incarnation`, never the node's next one (dlm.md 6.8, 10 and 11).

    `lost_at_boottime_s` is when this node learned of the loss, on its own CLOCK_BOOTTIME.
    """

    node: int
    name: str
    incarnation: int
    lost_at_boottime_s: float
