"""Rules of one array on one node: bits before data, bits kept, faults recorded, the gate (md-cluster spec 9).

Most of them look at one node's events only, whose order is certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from clustermd.array.bitmap import HEADER_BYTES, PAGE_BYTES
from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.lives import Lives, RuleOverLives

Range = tuple[int, int]


def page_of(chunk: int) -> int:
    return (HEADER_BYTES + (chunk >> 3)) // PAGE_BYTES


class Bits:
    """The own slot of one node as its events tell: `stable` are the bits that are on every member for sure."""

    __slots__ = ("read", "slot", "stable", "under_way")

    def __init__(self, slot: int, chunks: Iterable[int]) -> None:
        self.slot = slot
        self.stable: dict[int, set[int]] = {}
        self.under_way: dict[int, set[int]] = {}
        self.read: tuple[int, set[int], int] | None = None
        for chunk in chunks:
            self.stable.setdefault(page_of(chunk), set()).add(chunk)

    def flush(self, pages: Sequence[int], chunks: Iterable[int]) -> None:
        """Pages go out: what they lack may be gone at any moment, what they add is not there yet."""
        self.under_way = {page: set() for page in pages}
        for chunk in chunks:
            self.under_way[page_of(chunk)].add(chunk)
        for page, bits in self.under_way.items():
            old = self.stable.get(page)
            if old:
                old &= bits

    def flushed(self) -> None:
        self.stable.update(self.under_way)
        self.under_way = {}

    def lacking(self, chunks: Iterable[int]) -> list[int]:
        nothing: set[int] = set()
        return [chunk for chunk in chunks if chunk not in self.stable.get(page_of(chunk), nothing)]


class BitRules(RuleOverLives):
    """The two rules about where a bit must be, over one picture of the own slot."""

    layer = Layer.ARRAY
    _FOLLOWS = ("slot.loaded", "bitmap.flush", "bitmap.stable", "array.drained")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._of: dict[str, Bits] = {}

    def follow(self, event: Event) -> Bits | None:
        """The node's bits after `event`."""
        name, fields = event.name, event.fields
        if name == "slot.loaded":
            bits = self._of[event.node] = Bits(fields["slot"], fields["chunks"])
            return bits
        known = self._of.get(event.node)
        if known is None:
            return None
        if name == "bitmap.flush":
            if fields["pages"] and fields["slot"] == known.slot:
                known.flush(fields["pages"], fields["chunks"])
        elif name == "bitmap.stable":
            if known.under_way:
                known.flushed()
        elif name == "array.drained":
            del self._of[event.node]
        return known


class DataBeforeBit(BitRules):
    """Data is sent to the members only when the bit of every chunk it touches is stable on all of them."""

    rule = "data-before-bit"
    spec = "I1"
    names: tuple[str, ...] = (*BitRules._FOLLOWS, "write.issue")

    def see(self, event: Event) -> Sequence[Violation]:
        if event.name != "write.issue":
            self.follow(event)
            return ()
        bits = self._of.get(event.node)
        if bits is None:
            return ()
        fields = event.fields
        lacking = bits.lacking(fields["chunks"])
        if not lacking:
            return ()
        message = (
            f"{event.node} sends data for sectors {fields['lo']} to {fields['hi']}, but the bit of "
            f"{_chunks(lacking)} is not stable in slot {bits.slot}"
        )
        return (self.violation(event, message),)


class SourceClearedEarly(BitRules):
    """A slot that is taken over is written only after its bits are stable in our own slot."""

    rule = "source-cleared-early"
    spec = "I5"
    names: tuple[str, ...] = (*BitRules._FOLLOWS, "takeover.read", "takeover.source_written")

    def see(self, event: Event) -> Sequence[Violation]:
        if event.name not in ("takeover.read", "takeover.source_written"):
            self.follow(event)
            return ()
        bits = self._of.get(event.node)
        if bits is None:
            return ()
        slot = event.fields["slot"]
        if event.name == "takeover.read":
            bits.read = (slot, set(event.fields["chunks"]), event.number)
            return ()
        if bits.read is None or bits.read[0] != slot:
            return (self.violation(event, f"{event.node} writes slot {slot} without having read its bits"),)
        lacking = bits.lacking(sorted(bits.read[1]))
        if not lacking:
            return ()
        message = f"{event.node} clears slot {slot} while {_chunks(lacking)} is not stable in its own slot {bits.slot}"
        return (self.violation(event, message, bits.read[2]),)


class BitClearedEarly(RuleOverLives):
    """A bit is cleared only when no write runs, no copy of its chunk is due, and its last write was flushed."""

    rule = "bit-cleared-early"
    spec = "I2"
    layer = Layer.ARRAY
    names: tuple[str, ...] = (
        "slot.loaded",
        "takeover.read",
        "write.begin",
        "write.done",
        "write.redo",
        "write.torn",
        "bitmap.reconciled",
        "bitmap.whole",
        "sweep.begin",
        "sweep.flushed",
        "sweep.cleared",
    )

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._of: dict[str, _Chunks] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        name, fields = event.name, event.fields
        if name == "slot.loaded":
            chunks = self._of[event.node] = _Chunks()
            chunks.mark(fields["chunks"], event.number)
            return ()
        known = self._of.get(event.node)
        if known is None:
            return ()
        match name:
            case "write.begin":
                known.writes[fields["lo"], fields["hi"]] = (fields["chunks"], event.number)
            case "write.done" | "write.redo":
                needed = name == "write.redo" or fields["needed"]
                known.write_ended((fields["lo"], fields["hi"]), needed, event.number)
            case "write.torn":
                written = known.writes.get((fields["lo"], fields["hi"]))
                if written is not None:
                    known.mark(written[0], event.number)
            case "takeover.read":
                known.mark(fields["chunks"], event.number)
            case "bitmap.reconciled":
                known.reconciled(fields["chunks"], fields["needed"])
            case "bitmap.whole":
                known.whole()
            case "sweep.begin":
                known.sweep_begun = event.number
            case "sweep.flushed":
                known.flushed = known.sweep_begun
            case "sweep.cleared":
                return self._cleared(event, known)
        return ()

    def _cleared(self, event: Event, known: _Chunks) -> list[Violation]:
        found = []
        running = {chunk: number for chunks, number in known.writes.values() for chunk in chunks}
        for chunk in event.fields["chunks"]:
            if chunk in running:
                why, number = "is being written", running[chunk]
            elif chunk in known.needed:
                why, number = "must be copied first", known.needed[chunk]
            elif known.written.get(chunk, -1) > known.flushed:
                why, number = "was written after the last flush", known.written[chunk]
            else:
                continue
            message = f"{event.node} clears the bit of chunk {chunk}, which {why}"
            found.append(self.violation(event, message, number))
        return found


class _Chunks:
    """What stands against clearing a chunk's bit on one node, with the numbers of the events that say so."""

    __slots__ = ("flushed", "needed", "sweep_begun", "unreconciled", "writes", "written")

    def __init__(self) -> None:
        self.writes: dict[Range, tuple[Sequence[int], int]] = {}
        self.written: dict[int, int] = {}
        self.needed: dict[int, int] = {}
        self.unreconciled: set[int] = set()
        self.sweep_begun = -1
        self.flushed = -1

    def mark(self, chunks: Iterable[int], number: int) -> None:
        for chunk in chunks:
            self.needed[chunk] = number
            self.unreconciled.add(chunk)

    def write_ended(self, where: Range, needed: bool, number: int) -> None:
        chunks, _ = self.writes.pop(where, ((), 0))
        for chunk in chunks:
            self.written[chunk] = number
            if needed:
                self.needed[chunk] = number

    def reconciled(self, chunks: Iterable[int], needed: bool) -> None:
        self.unreconciled.difference_update(chunks)
        if not needed:
            for chunk in chunks:
                self.needed.pop(chunk, None)

    def whole(self) -> None:
        for chunk in [chunk for chunk in self.needed if chunk not in self.unreconciled]:
            del self.needed[chunk]


class AnswerBeforeRecord(RuleOverLives):
    """A write that some member missed is answered only when every node that serves knows that member as faulty."""

    rule = "answer-before-record"
    spec = "I11"
    layer = Layer.ARRAY
    names: tuple[str, ...] = (
        "array.assembled",
        "member.failed",
        "member.trusted",
        "metadata.adopted",
        "metadata.written",
        "write.done",
    )

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._failed: dict[str, dict[int, int]] = {}  # found out by the node itself, with the event's number
        self._recorded: dict[str, set[int]] = {}  # read from the disks, or written there

    def see(self, event: Event) -> Iterable[Violation]:
        fields = event.fields
        match event.name:
            case "array.assembled":
                self._failed[event.node] = {}
                self._recorded[event.node] = set()
            case "member.failed":
                self._failed.setdefault(event.node, {}).setdefault(fields["number"], event.number)
            case "member.trusted":
                self._failed.setdefault(event.node, {}).pop(fields["number"], None)
            case "metadata.adopted" | "metadata.written":
                self._recorded.setdefault(event.node, set()).update(fields["faulty"])
            case "write.done":
                failed = self._failed.get(event.node)
                if failed and not fields["error"]:
                    return self._answered(event, failed)
        return ()

    def _answered(self, event: Event, failed: dict[int, int]) -> Iterable[Violation]:
        found: list[Violation] = []
        life = self.lives.of.get(event.node)
        where = f"{event.node} answers a write to sectors {event.fields['lo']} to {event.fields['hi']}"
        for number, since in failed.items():
            if number not in self._recorded.get(event.node, ()):
                message = f"{where} while the fault of device {number} is on no disk"
                found.append(self.violation(event, message, since))
            for other in self.lives.others(life):
                if not other.serving or not other.member or other.in_doubt or life is None:
                    continue
                if number in self._failed.get(other.node, ()) or number in self._recorded.get(other.node, ()):
                    continue
                message = f"{where} while {other} still takes device {number}, which may lack it, for good"
                found += self.lives.broken(self.violation(event, message, since), other)
        return found


class GatePassed(RuleOverLives):
    """What is queued while the gate is not open does not succeed before it is open again."""

    rule = "gate-passed"
    spec = "I22"
    layer = Layer.ARRAY
    names: tuple[str, ...] = (
        "array.assembled",
        "gate.open",
        "gate.held",
        "gate.shut",
        "array.lost",
        "write.issue",
        "write.member",
        "bitmap.flush",
        "bitmap.stable",
        "metadata.write",
        "metadata.superblock",
    )

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._closed: dict[str, dict[object, int]] = {}  # what was queued since the gate closed

    def see(self, event: Event) -> Sequence[Violation]:
        name = event.name
        if name in ("gate.held", "gate.shut", "array.lost"):
            self._closed.setdefault(event.node, {})
            return ()
        if name in ("gate.open", "array.assembled"):
            self._closed.pop(event.node, None)
            return ()
        queued = self._closed.get(event.node)
        if queued is None:
            return ()
        fields = event.fields
        what: object
        match name:
            case "write.issue":
                queued[fields["lo"], fields["hi"]] = event.number
            case "bitmap.flush":
                if fields["pages"]:
                    queued["bitmap"] = event.number
                else:
                    queued.pop("bitmap", None)
            case "metadata.write":
                queued["metadata"] = event.number
            case _:
                what = "bitmap" if name == "bitmap.stable" else "metadata"
                if name == "write.member":
                    what = (fields["lo"], fields["hi"])
                    if fields["result"] < 0 or not fields["result"]:
                        return ()
                if what in queued:
                    return (self._passed(event, what, queued[what]),)
        return ()

    def _passed(self, event: Event, what: Any, number: int) -> Violation:
        thing = f"a write to sectors {what[0]} to {what[1]}" if isinstance(what, tuple) else f"a {what} write"
        return self.violation(event, f"{thing} of {event.node} passed its gate while that was closed", number)


def _chunks(numbers: Sequence[int]) -> str:
    few = ", ".join(map(str, numbers[:8]))
    return f"chunk {few}{' ...' if len(numbers) > 8 else ''}"


RULES = (DataBeforeBit, SourceClearedEarly, BitClearedEarly, AnswerBeforeRecord, GatePassed)
