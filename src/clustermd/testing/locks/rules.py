"""The rules of the lock manager by name, and the error that says which one does not hold.

Whoever finds a broken rule raises `LockRuleBroken`. It is an assertion, so a test fails by it; a simulator catches it,
turns it into a `Violation` and so names the layer: these rules speak of nothing but the lock manager.
"""

from __future__ import annotations

from clustermd.testing.trace.events import Layer, Violation

RULES = {
    "excluding-modes-granted": "dlm.md 6.9 I1",
    "excluding-modes-shown": "dlm.md 6.9 I2",
    "replicas-differ": "dlm.md 6.9 I3",
    "applied-while-frozen": "dlm.md 6.9 I4",
    "rise-not-held-back": "dlm.md 6.9 I5",
    "lock-vanished": "dlm.md 6.9 I7",
    "zombie-granted": "dlm.md 6.9 I7",
    "purged-unproved": "dlm.md 6.9 I7",
    "epoch-not-new": "dlm.md 6.9 I8",
    "slot": "dlm.md 6.9 I9",
    "one-queue": "dlm.md 6.9 I10",
    "lock-id-again": "dlm.md 6.9 I10",
    "waiting-order": "dlm.md 6.9 I11",
    "converting-order": "dlm.md 6.9 I12",
    "missed-grant": "dlm.md 6.9 I13",
    "down-conversion-waits": "dlm.md 6.9 I14",
    "noqueue-waits": "dlm.md 6.9 I15",
    "conversion-deadlock": "dlm.md 6.9 I16",
    "deadlock": "dlm.md 1.6, 6.7",
    "orphan": "dlm.md 1.7",
    "completion-twice": "dlm.md 6.9 I17",
    "callback-after-end": "dlm.md 6.9 I17",
    "callback-order": "dlm.md 6.9 I18",
    "callback-needless": "dlm.md 1.8, 6.9 I18",
    "holder-not-told": "dlm.md 1.5, 1.8, 6.9 I19",
    "status": "dlm.md 1.3, 6.9 I20",
    "value-read": "dlm.md 2.2, 6.9 I21",
    "value-changed": "dlm.md 2.2, 2.3, 6.9 I22",
    "value-mark": "dlm.md 2.2, 2.4, 6.9 I23",
    "completion-lost": "dlm.md 6.9 I24",
    "recovery-order": "dlm.md 3.3, 6.9 I25",
    "left-over": "dlm.md 6.9 I27",
    "snapshot-differs": "dlm.md 6.9 I28",
    "applied-twice": "dlm.md 6.9 I30",
    "must-restart": "dlm.md 6.3",
    "never-quiet": "dlm.md 6.9 I24",
    "exception": "dlm.md 6.1",
}
"""Rule name -> where it is written."""


class LockRuleBroken(AssertionError):
    """A rule of the lock manager does not hold. `rule` is its name in `RULES`, `spec` where it is written."""

    def __init__(self, rule: str, text: str) -> None:
        self.rule = rule
        self.spec = RULES[rule]
        self.text = text
        super().__init__(f"{rule} ({self.spec}): {text}")

    def violation(self, node: str, time_s: float, events: tuple[int, ...] = ()) -> Violation:
        """The same for a report over a trace; its layer is always the lock manager."""
        return Violation(self.rule, self.spec, Layer.LOCK_MANAGER, self.text, node, time_s, events)
