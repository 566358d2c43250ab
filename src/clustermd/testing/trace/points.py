"""The steps of appendix D of the md-cluster specification, and the trace points that are reached exactly there.

A crash in such a point is the crash the step means: what the step says is done is done, what it does not say has not
begun. Where a point serves several steps its fields tell them apart, or what the node passed before. Step 6
(add disk) and step 8 (grow) have no points because these operations do not exist yet; step 9 is no point but a
demand: all of the above with one, two and three nodes, and with a second crash in the recovery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]
Where = Callable[[Fields], bool]


def _always(_: Fields) -> bool:
    return True


def _is_metadata(fields: Fields) -> bool:
    return bool(fields["type"] == "METADATA_UPDATED")


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `points` are alternatives; `where` looks at the fields of the point.

    `since` and `until`: it counts only after the node passed the one (with those fields) and before any of the others.
    `victim` is who dies there: the node that passes the point ("self"), or the sender of the message it has ("sender").
    """

    id: str
    points: tuple[str, ...]
    sentence: str
    where: Where = _always
    since: tuple[str, Where] | None = None
    until: tuple[str, ...] = ()
    victim: str = "self"


STEPS = (
    Step(
        "1a", ("write.begin",), "a write is registered, its bit is not written yet", lambda f: not f["stable"]
    ),
    Step(
        "1b",
        ("bitmap.member",),
        "the bit of a write is on one member and not on all",
        lambda f: f["writes"] > 0 and f["left"] > 0,
    ),
    Step(
        "1c",
        ("bitmap.stable",),
        "the bit of a write is on all members, its data has not been sent",
        lambda f: f["writes"] > 0,
    ),
    Step("1d", ("write.member",), "data is on some members", lambda f: f["left"] > 0),
    Step(
        "1e", ("write.member",), "data is on all members, the write has not ended", lambda f: f["left"] == 0
    ),
    Step("2a", ("sweep.cleared",), "bits are cleared in memory", lambda f: f["count"] > 0),
    Step(
        "2b",
        ("bitmap.member",),
        "a page with cleared bits is on some members",
        lambda f: f["left"] > 0,
        since=("sweep.cleared", lambda f: f["count"] > 0),
        until=("sweep.done",),
    ),
    Step(
        "2c",
        ("sweep.header",),
        "events_cleared is on all members before any bit is cleared, so a later page can never be alone",
    ),
    Step("3a", ("metadata.token",), "the token is held, nothing is written"),
    Step("3b", ("metadata.header",), "the own bitmap's superblock is written"),
    Step("3c", ("metadata.superblock",), "some superblocks are written"),
    Step("3d", ("metadata.written",), "all superblocks are written, nothing is announced"),
    Step("3e", ("send.written",), "METADATA_UPDATED is written (M4)", _is_metadata),
    Step(
        "3f",
        ("recv.answered",),
        "some receivers have processed METADATA_UPDATED",
        since=("recv.message", _is_metadata),
        until=("recv.processed",),
        victim="sender",
    ),
    Step(
        "3g",
        ("send.acknowledged",),
        "all have acknowledged, the fault still counts as unrecorded",
        _is_metadata,
    ),
    Step("4a", ("takeover.locked", "join.locked"), "the lock of a dead node's slot is granted"),
    Step("4b", ("takeover.merged",), "its bits are merged in memory"),
    Step(
        "4c",
        ("bitmap.member",),
        "the own page with them is on some members",
        lambda f: f["left"] > 0,
        since=("takeover.merged", _always),
        until=("takeover.own_stable",),
    ),
    Step("4d", ("takeover.source_written",), "the source's superblock is written", lambda f: f["page"] == 0),
    Step("4e", ("takeover.source_written",), "the source's last page is written", lambda f: f["last"]),
    Step("4f", ("takeover.source_cleared",), "the source is clean everywhere, nothing is copied yet"),
    Step("4g", ("takeover.done",), "all is done but giving the slot's lock back"),
    Step("5a", ("resync.announce",), "before an announcement"),
    Step("5b", ("resync.window",), "after an announcement, before the first copy"),
    Step("5c", ("resync.wrote",), "in the middle of a copy: the target has a part of the window"),
    Step("5d", ("resync.finishing",), "before (0,0)"),
    Step("5e", ("resync.right_given",), "between (0,0) and the end of the resync right"),
    Step("7a", ("leave.announcing",), "before BITMAP_NEEDS_SYNC"),
    Step("7b", ("leave.announced",), "after BITMAP_NEEDS_SYNC"),
    Step("7c", ("leave.unlocking",), "before the own slot's lock is freed"),
)
BY_ID = {step.id: step for step in STEPS}


class Reached:
    """Tells which of `steps` a node is at, point by point, and counts them all. One for a whole cluster."""

    def __init__(self, steps: Sequence[Step] = STEPS) -> None:
        self.steps = steps
        self.counts: Counter[str] = Counter()
        self._open: set[tuple[str, str]] = set()  # (node, step) between `since` and `until`
        self._at: dict[str, list[Step]] = {}
        self._opens: dict[str, list[Step]] = {}
        self._closes: dict[str, list[Step]] = {}
        for step in steps:
            for point in step.points:
                self._at.setdefault(point, []).append(step)
            if step.since is not None:
                self._opens.setdefault(step.since[0], []).append(step)
            for point in step.until:
                self._closes.setdefault(point, []).append(step)

    def see(self, node: str, name: str, fields: Fields) -> list[Step]:
        """The steps that `node` is at in this point. Call it for every point of every node."""
        for step in self._closes.get(name, ()):
            self._open.discard((node, step.id))
        for step in self._opens.get(name, ()):
            assert step.since is not None
            if step.since[1](fields):
                self._open.add((node, step.id))
        found = []
        for step in self._at.get(name, ()):
            if (step.since is None or (node, step.id) in self._open) and step.where(fields):
                self.counts[step.id] += 1
                found.append(step)
        return found

    def gone(self, node: str) -> None:
        """The node died: what it was in the middle of is over."""
        self._open = {(other, step) for other, step in self._open if other != node}

    def missing(self) -> list[str]:
        """Steps that nobody came to."""
        return [step.id for step in self.steps if not self.counts[step.id]]
