"""The one history that all replicas of the lock manager share, judged once and compared on each of them.

Whoever is the first to apply an entry has its engine watched by the `Checker`. Everybody else must come to the same
hash of the history, the same digest of the whole state and the same effects (dlm.md 6.9 I3), so what was found right
on one is right on all. The effects are kept as the frames that each session must be shown, in order (I18, I24).

In a group whose messages can be lost, entries that only lost members applied never happened: `roll_back`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clustermd.dlm.effects import Effect, SessionKey
from clustermd.dlm.machine import Machine, chain_after
from clustermd.dlm.wire import Frame, effect_frame
from clustermd.testing.locks.invariants import Checker, Ends
from clustermd.testing.locks.rules import LockRuleBroken


@dataclass(frozen=True, slots=True)
class Entry:
    """What applying one entry led to. `before` is the checker that did not know it yet, if it may be undone."""

    chain: bytes
    digest: bytes
    effects: list[Effect]
    before: Checker | None


@dataclass
class History:
    """Entries from 1. `undo` keeps what `roll_back` needs; `ended` is what really became of nodes."""

    undo: bool = False
    entries: list[Entry] = field(default_factory=list)
    frames: dict[SessionKey, list[Frame]] = field(default_factory=dict)
    checker: Checker = field(default_factory=Checker)
    ended: Ends = field(default_factory=Ends)

    def __post_init__(self) -> None:
        self.checker.ended = self.ended

    def clear(self) -> None:
        """Nobody is left who knows it: another one begins."""
        self.entries.clear()
        self.checker = Checker()
        self.checker.ended = self.ended

    def loaded(self, who: str, machine: Machine) -> None:
        """A replica has taken a snapshot: it must be the state after so many entries (I28). Raises LockRuleBroken."""
        known = self.entries[machine.applied - 1] if 0 < machine.applied <= len(self.entries) else None
        if known is not None and known.chain == machine.chain and known.digest != machine.digest():
            raise LockRuleBroken(
                "snapshot-differs",
                f"{who} took a snapshot that is not the state after {machine.applied} entries",
            )

    def apply(self, who: str, machine: Machine, really: Callable[[bytes], list[Effect]], entry: bytes) -> Any:
        """Let a replica apply an entry, and judge it. Returns its effects. Raises LockRuleBroken."""
        number = machine.applied
        if number > len(self.entries):
            raise LockRuleBroken("replicas-differ", f"{who} has applied {number} entries, nobody else has")
        if number < len(self.entries):
            effects = really(entry)
            known = self.entries[number]
            same = (machine.chain, machine.digest()) == (known.chain, known.digest)
            if not same or effects != known.effects:
                raise LockRuleBroken(
                    "replicas-differ", f"{who} differs from the others after {number + 1} entries"
                )
            return effects
        before = self.checker.clone() if self.undo else None
        engine = machine.engine
        self.checker.watch(engine)
        try:
            effects = really(entry)
        finally:
            self.checker.unwatch(engine)
        if machine.applied == number:
            return effects  # it was none
        self.checker.after(effects)
        self.entries.append(Entry(machine.chain, machine.digest(), effects, before))
        for effect in effects:
            self.frames.setdefault(effect.session, []).append(effect_frame(effect))
        return effects

    def differs(self, machine: Machine, entry: bytes) -> bool:
        """Whether another entry is known in the place where a replica is about to apply this one."""
        number = machine.applied
        return (
            number < len(self.entries) and chain_after(machine.chain, [entry]) != self.entries[number].chain
        )

    def roll_back(self, applied: int) -> None:
        """Entries after number `applied` never happened."""
        while len(self.entries) > applied:
            last = self.entries.pop()
            assert last.before is not None, "only a history with undo is rolled back"
            self.checker = last.before
            for effect in last.effects:
                self.frames[effect.session].pop()
