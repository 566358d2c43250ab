"""Rules of the lock manager, judged from what its clients were shown (dlm.md 1.1, 2, 6.9).

A client relies on a mode from when the grant is shown to it (`lock.granted`) until it sends what gives it back
(`lock.given`); a down conversion counts for the lower mode from when it is sent. The lock manager's own idea of the two
moments lies before the first and after the second, so an overlap in the trace is one in the lock manager.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clustermd.dlm.modes import Mode, compatible
from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.lives import Life, Lives, RuleOverLives

MODES = {mode.name: int(mode) for mode in Mode}
NAMES = {int(mode): mode.name for mode in Mode}


class IncompatibleGrant(RuleOverLives):
    """Modes that exclude each other are never relied on at the same time, whoever holds them."""

    rule = "incompatible-grant"
    spec = "dlm I2"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("lock.granted", "lock.given")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._shown: dict[tuple[Life, str, str, int], int] = {}

    def see(self, event: Event) -> Iterable[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or life.over or life.dead:
            return ()
        fields = event.fields
        key = (fields["space"], fields["resource"], fields["lock"])
        mode = MODES[fields["mode"]]
        if event.name == "lock.given":
            if mode < 0:
                life.holds.pop(key, None)
            else:
                life.holds[key] = min(mode, life.holds.get(key, mode))
            return ()
        life.holds[key] = mode
        self._shown[life, *key] = event.number
        if mode <= Mode.NL:
            return ()
        return self._excluded(event, life, key, mode)

    def _excluded(
        self, event: Event, life: Life, key: tuple[str, str, int], mode: int
    ) -> Iterable[Violation]:
        found: list[Violation] = []
        space, resource, number = key
        for other in self.lives.all:
            for (held_space, held_resource, held), held_mode in other.holds.items():
                if (
                    held_resource != resource
                    or held_space != space
                    or (other is life and held == number)
                    or compatible(mode, held_mode)
                ):
                    continue
                whose = f"{other} relies on {NAMES[held_mode]}"
                if other.dead:
                    whose = f"{other}, which is dead but not proved to have drained, holds {NAMES[held_mode]}"
                message = f"{NAMES[mode]} of {resource} is granted to {event.node} while {whose}"
                shown = self._shown.get((other, held_space, held_resource, held))
                violation = self.violation(event, message, *(() if shown is None else (shown,)))
                found += (violation,) if other is life else self.lives.broken(violation, other)
        return found


class StaleValueBlock(RuleOverLives):
    """A grant that waited for a writer shows what the writer wrote, or says that the block is not valid."""

    rule = "stale-value-block"
    spec = "dlm 2.3"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("lock.granted", "lock.given")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._written: dict[tuple[str, str], _Block] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        fields = event.fields
        block = fields["block"]
        life = self.lives.of.get(event.node)
        if block is None or life is None:
            return ()
        space, resource = place = fields["space"], fields["resource"]
        if event.name == "lock.given":
            lock = (space, resource, fields["lock"])
            self._written[place] = _Block(block, MODES[fields["had"]], life, lock, event.number)
            return ()
        written = self._written.get(place)
        if (
            written is None
            or written.lock
            not in written.writer.holds  # with its last lock a resource and its block are gone
            or not fields["valid"]
            or written.content == block
            or compatible(MODES[fields["mode"]], written.had)
        ):
            return ()
        message = (
            f"{event.node} is shown the value block {block or '(zeros)'} of {resource}, but {written.writer} wrote "
            f"{written.content or '(zeros)'} when it gave up {NAMES[written.had]}"
        )
        return (self.violation(event, message, written.number),)


class TakenForDeadEarly(RuleOverLives):
    """Members learn of a death only when nothing of the dead process can land any more.

    Only who records a whole cluster knows that moment (`process.drained`). What they learn may be the death of a
    former life in that slot: then nothing is said.
    """

    rule = "taken-for-dead-early"
    spec = "I22"
    layer = Layer.LOCK_MANAGER
    names: tuple[str, ...] = ("process.died", "process.drained", "cluster.lost")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._dying: dict[Life, int] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if event.name == "process.died":
            if life is not None and life.dead and not life.over and life.joined:
                self._dying[life] = event.number
            return ()
        if event.name == "process.drained":
            for dead in [dead for dead in self._dying if dead.node == event.node]:
                del self._dying[dead]
            return ()
        slot, node = event.fields["slot"], event.fields["node"]
        meant = self.lives.meant
        early = [life for life in meant if life in self._dying]
        if early and all(life in self._dying or life.member for life in meant):
            message = (
                f"{event.node} is told that {node} in slot {slot} is dead, and what it sent can still land"
            )
            return (self.violation(event, message, self._dying[early[0]]),)
        return ()


@dataclass(frozen=True, slots=True)
class _Block:
    """A value block as it was written, by which lock of whom, and the mode that was given up with it."""

    content: str
    had: int
    writer: Life
    lock: tuple[str, str, int]
    number: int


def holds(life: Life, resource: str, least: Mode) -> bool:
    """Whether a life relies on `resource` in `least` or a stronger mode, in any lockspace."""
    return any(key[1] == resource and mode >= least for key, mode in life.holds.items())
