"""The verdict on a broken rule: what, written where, whose fault, and the events that show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.table import WIDTH, cut, table

_WHOSE = {
    Layer.LOCK_MANAGER: "the lock manager: what it granted or showed is wrong, whatever md made of it",
    Layer.CLUSTER: "the cluster layer: locks are kept, the protocol over them is not",
    Layer.ARRAY: "the array: it knew, and did otherwise",
    Layer.DEVICE: "the device: what was asked of it is not what happened",
}


def verdict(violation: Violation, events: Sequence[Event], width: int = WIDTH) -> str:
    """The text for people: rule, spec, layer, message, and a table of what matters."""
    where = f" on {violation.node}" if violation.node else ""
    lines = [
        f"{violation.rule} ({violation.spec}) is broken{where} at {violation.time_s:.6f} s",
        f"  {violation.message}",
        f"  at fault: {_WHOSE[violation.layer]}",
        "",
    ]
    shown = cut(events, violation)
    return "\n".join(lines) + "\n" + table(shown, violation.events, width)


def to_wire(violation: Violation) -> dict[str, Any]:
    """For programs."""
    return {
        "rule": violation.rule,
        "spec": violation.spec,
        "layer": violation.layer.value,
        "message": violation.message,
        "node": violation.node,
        "time_s": violation.time_s,
        "events": list(violation.events),
    }
