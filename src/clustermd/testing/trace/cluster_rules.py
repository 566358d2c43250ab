"""Rules of the cluster layer: joining, slots, messages, the token and the resync right (md-cluster spec 9).

They assume that locks are kept: a run that breaks one of these and no lock rule shows a bug above the lock manager.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from clustermd.dlm.modes import Mode
from clustermd.testing.trace.events import Event, Violation
from clustermd.testing.trace.lives import Life, Lives, RuleOverLives
from clustermd.testing.trace.lock_rules import holds


class MessageSkipped(RuleOverLives):
    """When a message counts as sent, every member that was armed before it was written has processed it.

    `send.acknowledged` only says that all let go of it: the sender reads their answers next, and may find one missing.
    """

    rule = "message-skipped"
    spec = "I13"
    names: tuple[str, ...] = ("send.written", "send.done", "recv.answered")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._written: dict[str, tuple[int, list[Life]]] = {}

    def see(self, event: Event) -> Iterable[Violation]:
        fields = event.fields
        life = self.lives.of.get(event.node)
        if life is None:
            return ()
        if event.name == "recv.answered":
            life.answered = fields["sequence"]
            return ()
        if event.name == "send.written":
            awaited = [
                other for other in self.lives.others(life) if other.armed and other.member and not other.deaf
            ]
            self._written[event.node] = (event.number, awaited)
            return ()
        number, awaited = self._written.pop(event.node, (event.number, []))
        found: list[Violation] = []
        for other in awaited:
            if other.answered == fields["sequence"] or other.over or other.deaf:
                continue
            message = (
                f"{fields['type']} number {fields['sequence']} of {event.node} counts as sent, but {other} "
                f"has processed none after number {other.answered}"
            )
            found += self.lives.broken(self.violation(event, message, number), other)
        return found


class MessageTwice(RuleOverLives):
    """A member processes messages in the order of their numbers, each once."""

    rule = "message-twice"
    spec = "I13"
    names: tuple[str, ...] = ("recv.answered",)

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._last: dict[Life, tuple[int, int]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None:
            return ()
        sequence = event.fields["sequence"]
        last, number = self._last.get(life, (0, 0))
        self._last[life] = (sequence, event.number)
        if sequence > last:
            return ()
        message = f"{event.node} processes message number {sequence} after number {last}"
        return (self.violation(event, message, number),)


class MessageDiffers(RuleOverLives):
    """What a member receives under a number is what was sent under it."""

    rule = "message-differs"
    spec = "I13"
    names: tuple[str, ...] = ("send.written", "recv.message")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._sent: dict[int, tuple[tuple[object, ...], int]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        fields = event.fields
        what = (fields["type"], fields["slot"], fields["low"], fields["high"])
        if event.name == "send.written":
            self._sent[fields["sequence"]] = (what, event.number)
            return ()
        sent = self._sent.get(fields["sequence"])
        if sent is None or sent[0] == what:
            return ()
        message = f"{event.node} receives {what} as number {fields['sequence']}, but {sent[0]} was sent"
        return (self.violation(event, message, sent[1]),)


class TwoResyncers(RuleOverLives):
    """At most one node has the resync right."""

    rule = "two-resyncers"
    spec = "I7"
    names: tuple[str, ...] = ("resync.right", "resync.right_given")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._having: dict[Life, int] = {}

    def see(self, event: Event) -> Iterable[Violation]:
        life = self.lives.of.get(event.node)
        if life is None:
            return ()
        if event.name == "resync.right_given":
            self._having.pop(life, None)
            return ()
        found: list[Violation] = []
        for other, number in list(self._having.items()):
            if other.over:
                del self._having[other]
            elif other is not life:
                message = f"{event.node} begins to resync while {other} does"
                found += self.lives.broken(self.violation(event, message, number), other)
        self._having[life] = event.number
        return found


class SlotOwnedTwice(RuleOverLives):
    """No two living nodes own the same slot."""

    rule = "slot-owned-twice"
    spec = "I20"
    names: tuple[str, ...] = ("join.slot", "leave.unlocking")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._owners: dict[int, tuple[Life, int]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None:
            return ()
        slot = event.fields["slot"]
        if event.name == "leave.unlocking":
            if slot in self._owners and self._owners[slot][0] is life:
                del self._owners[slot]
            return ()
        before = self._owners.get(slot)
        self._owners[slot] = (life, event.number)
        if before is None or before[0].over or before[0] is life:
            return ()
        message = f"{event.node} takes slot {slot}, which {before[0]} owns"
        return self.lives.broken(self.violation(event, message, before[1]), before[0])


class MetadataWithoutToken(RuleOverLives):
    """Superblocks of a clustered array are written by the holder of `token` in EX only."""

    rule = "metadata-without-token"
    spec = "I12"
    names: tuple[str, ...] = ("metadata.write",)

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or not life.joined or not life.member or holds(life, "token", Mode.EX):
            return ()
        return (self.violation(event, f"{event.node} writes superblocks without holding token in EX"),)


class EventsNotGrowing(RuleOverLives):
    """Every set of superblocks has more events than any complete one before it."""

    rule = "events-not-growing"
    spec = "I12"
    names: tuple[str, ...] = ("array.assembled", "metadata.write", "metadata.written")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._array: dict[str, str] = {}
        self._most: dict[str, tuple[int, int]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        if event.name == "array.assembled":
            self._array[event.node] = event.fields["uuid"]
            return ()
        array = self._array.get(event.node, "")
        events = event.fields["events"]
        most, number = self._most.get(array, (-1, 0))
        if event.name == "metadata.written":
            if events > most:
                self._most[array] = (events, event.number)
            return ()
        if events > most:
            return ()
        message = f"{event.node} writes superblocks with {events} events, but there were {most} already"
        return (self.violation(event, message, number),)


class JoinedTooEarly(RuleOverLives):
    """A joiner loads its own bitmap first, looks at every other slot next, and serves last."""

    rule = "joined-too-early"
    spec = "rule 1"
    names: tuple[str, ...] = ("takeover.read", "join.gathered", "array.serving")

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or not life.joined or not life.member:
            return ()
        if event.name == "takeover.read":
            if life.loaded:
                return ()
            slot = event.fields["slot"]
            return (
                self.violation(event, f"{event.node} takes slot {slot} over before its own bits are loaded"),
            )
        if event.name == "array.serving":
            if life.gathered:
                return ()
            return (self.violation(event, f"{event.node} serves before it has looked at all slots"),)
        missing = set(range(life.nodes)) - life.seen_slots - {life.slot}
        if not missing:
            return ()
        slots = ", ".join(map(str, sorted(missing)))
        return (self.violation(event, f"{event.node} has gathered without looking at slot {slots}"),)


class WindowEndedEarly(RuleOverLives):
    """A dead node's window ends only after its bits are ours."""

    rule = "window-ended-early"
    spec = "I6"
    names: tuple[str, ...] = ("takeover.source_cleared", "window.end")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._merged: dict[str, tuple[Life, int]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None:
            return ()
        slot = event.fields["slot"]
        if event.name == "takeover.source_cleared":
            self._merged[event.node] = (life, slot)
            return ()
        if event.fields["why"] != "merged" or self._merged.pop(event.node, None) == (life, slot):
            return ()
        return (
            self.violation(event, f"{event.node} ends the window of slot {slot} without having its bits"),
        )


class SlotWrittenWithoutLock(RuleOverLives):
    """A slot's area is written by the holder of its `bitmapNNNN` in PW only."""

    rule = "slot-written-without-lock"
    spec = "I4"
    names: tuple[str, ...] = ("bitmap.flush", "takeover.source_written")

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or not life.joined or not life.member:
            return ()
        if event.name == "bitmap.flush" and not event.fields["pages"]:
            return ()
        name = f"bitmap{event.fields['slot']:04d}"
        if holds(life, name, Mode.PW):
            return ()
        return (
            self.violation(event, f"{event.node} writes slot {event.fields['slot']} without {name} in PW"),
        )


RULES = (
    MessageSkipped,
    MessageTwice,
    MessageDiffers,
    TwoResyncers,
    SlotOwnedTwice,
    MetadataWithoutToken,
    EventsNotGrowing,
    JoinedTooEarly,
    WindowEndedEarly,
    SlotWrittenWithoutLock,
)
