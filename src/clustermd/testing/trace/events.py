"""What a trace is made of, and what a broken rule says.

An event is one trace point that one node passed (`clustermd.trace`), with the time of a clock that all nodes of the
trace share. A rule looks at one event after the other and says what is broken, in whose layer: a broken lock rule
is the lock manager's fault, a broken md rule over correct locks that of the cluster layer or of the array (design 8).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Layer(enum.Enum):
    """Whose bug a broken rule is."""

    LOCK_MANAGER = "lock manager"
    CLUSTER = "cluster"
    ARRAY = "array"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Event:
    """One point: its place in the merged trace, seconds of the common clock, the node's name, the point's name."""

    number: int
    time_s: float
    node: str
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that does not hold. `events` are the numbers of the events that show it, the last one first noticed it.

    `rule` is the rule's stable name (`write-in-foreign-window`), `spec` where it is written (`I8`).
    """

    rule: str
    spec: str
    layer: Layer
    message: str
    node: str
    time_s: float
    events: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        where = f"{self.rule} ({self.spec}, {self.layer.value} layer) at {self.time_s:.6f} s"
        if self.node:
            where += f" on {self.node}"
        return f"{where}: {self.message}"


class Rule(Protocol):
    """One rule. `names` are the event names it wants to see, `see` returns what is broken now, usually nothing."""

    rule: str
    spec: str
    layer: Layer
    names: tuple[str, ...]

    def see(self, event: Event) -> Iterable[Violation]: ...
