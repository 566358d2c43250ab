"""Rules of windows and copies: who may write where while one node copies (md-cluster spec 9, I8, I9).

A window counts at its sender from when it is acknowledged (`resync.window`) until just before the next announcement or
"finished" is sent; in between every other node has been told, has no write there and begins none. A node that was
told keeps out from `window.set` to `window.end`. So a write in a window is the array's fault where the node's own trace
shows that it knew of the window, and the cluster layer's where it did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from clustermd.testing.trace.events import Event, Layer, Violation
from clustermd.testing.trace.lives import Life, Lives, RuleOverLives

Range = tuple[int, int]


class WriteInForeignWindow(RuleOverLives):
    """No write is begun or in flight where another node copies."""

    rule = "write-in-foreign-window"
    spec = "I8"
    names: tuple[str, ...] = (
        "write.begin",
        "write.issue",
        "write.done",
        "write.redo",
        "window.set",
        "window.end",
        "join.window",
        "resync.announce",
        "resync.window",
        "resync.finishing",
        "resync.right_given",
        "array.drained",
        "gate.shut",
    )

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._sent: dict[Life, tuple[Range, int]] = {}  # acknowledged windows, with the event's number
        self._known: dict[Life, dict[int, tuple[Range, int]]] = {}  # by the slot that copies
        self._writes: dict[Life, dict[Range, int]] = {}  # issued, with the event's number
        self._steps = {
            "write.begin": self._begin,
            "write.issue": self._issue,
            "write.done": self._done,
            "write.redo": self._done,
            "window.set": self._set,
            "window.end": self._end,
            "join.window": self._read,
            "resync.announce": self._sender_ends,
            "resync.finishing": self._sender_ends,
            "resync.right_given": self._sender_ends,
            "resync.window": self._acknowledged,
            "array.drained": self._drained,
            "gate.shut": self._shut,
        }

    def see(self, event: Event) -> Iterable[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or (life.over and event.name != "array.drained"):
            return ()
        return self._steps[event.name](event, life)

    def _known_at(self, life: Life, lo: int, hi: int) -> tuple[int, Range, int] | None:
        known = self._known.get(life)
        if known:
            for slot, (window, number) in known.items():
                if lo < window[1] and hi > window[0]:
                    return slot, window, number
        return None

    def _begin(self, event: Event, life: Life) -> Sequence[Violation]:
        lo, hi = event.fields["lo"], event.fields["hi"]
        known = self._known_at(life, lo, hi)
        if known is None:
            return ()
        slot, window, number = known
        message = (
            f"{life} begins a write to sectors {lo} to {hi} in the window {_words(window)} of slot {slot}"
        )
        return (self.violation(event, message, number, layer=Layer.ARRAY),)

    def _issue(self, event: Event, life: Life) -> Iterable[Violation]:
        lo, hi = event.fields["lo"], event.fields["hi"]
        if not life.member:
            return ()  # its gate is shut: this comes back
        self._writes.setdefault(life, {})[lo, hi] = event.number
        found: list[Violation] = []
        for sender, (window, number) in self._sent.items():
            if sender is not life and not sender.over and lo < window[1] and hi > window[0]:
                found += self._broken(event, life, (lo, hi), sender, window, number, sender)
        return found

    def _broken(
        self,
        event: Event,
        life: Life,
        write: Range,
        sender: Life,
        window: Range,
        number: int,
        must_live: Life,
    ) -> Sequence[Violation]:
        known = self._known_at(life, *write) is not None
        message = (
            f"{life} writes sectors {_words(write)} in the window {_words(window)} that {sender} copies, and "
            f"{'it was told of that window' if known else 'it was not told of that window'}"
        )
        layer = Layer.ARRAY if known else Layer.CLUSTER
        return self.lives.broken(self.violation(event, message, number, layer=layer), must_live)

    def _done(self, event: Event, life: Life) -> Sequence[Violation]:
        writes = self._writes.get(life)
        if writes:
            writes.pop((event.fields["lo"], event.fields["hi"]), None)
        return ()

    def _set(self, event: Event, life: Life) -> Sequence[Violation]:
        fields = event.fields
        self._known.setdefault(life, {})[fields["slot"]] = ((fields["lo"], fields["hi"]), event.number)
        return ()

    def _end(self, event: Event, life: Life) -> Sequence[Violation]:
        self._known.get(life, {}).pop(event.fields["slot"], None)
        return ()

    def _read(self, event: Event, life: Life) -> Sequence[Violation]:
        """A joiner that reads no window may have heard of one: its block is cleared before "finished" is said."""
        return self._end(event, life) if event.fields["hi"] <= event.fields["lo"] else ()

    def _acknowledged(self, event: Event, life: Life) -> Iterable[Violation]:
        window = (event.fields["lo"], event.fields["hi"])
        self._sent[life] = (window, event.number)
        found: list[Violation] = []
        for other, writes in self._writes.items():
            if other is life or not other.member:
                continue
            for (lo, hi), number in writes.items():
                if lo < window[1] and hi > window[0]:
                    found += self._broken(event, other, (lo, hi), life, window, number, other)
        return found

    def _sender_ends(self, _: Event, life: Life) -> Sequence[Violation]:
        self._sent.pop(life, None)
        return ()

    def _shut(self, _: Event, life: Life) -> Sequence[Violation]:
        self._writes.pop(life, None)  # whether they land or come back is not seen from here
        return ()

    def _drained(self, _: Event, life: Life) -> Sequence[Violation]:
        for table in (self._known, self._writes, self._sent):
            table.pop(life, None)
        return ()


class CopyOutsideWindow(RuleOverLives):
    """A copy stays within its own acknowledged window."""

    rule = "copy-outside-window"
    spec = "I8"
    layer = Layer.ARRAY
    names: tuple[str, ...] = ("resync.announce", "resync.window", "resync.finishing", "resync.write")

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._window: dict[Life, tuple[Range, int]] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or not life.member:
            return ()
        if event.name in ("resync.announce", "resync.finishing"):
            self._window.pop(life, None)
            return ()
        lo, hi = event.fields["lo"], event.fields["hi"]
        if event.name == "resync.window":
            self._window[life] = ((lo, hi), event.number)
            return ()
        window = self._window.get(life)
        if window is not None and window[0][0] <= lo and hi <= window[0][1]:
            return ()
        if window is None:
            message = f"{life} copies sectors {lo} to {hi} without a window that the others know"
            return (self.violation(event, message),)
        message = f"{life} copies sectors {lo} to {hi} outside of its window {_words(window[0])}"
        return (self.violation(event, message, window[1]),)


class WindowMovedEarly(RuleOverLives):
    """A window moves, or is finished, only when no copy runs in it; it counts as copied when it is flushed."""

    rule = "window-moved-early"
    spec = "I9"
    layer = Layer.ARRAY
    names: tuple[str, ...] = (
        "resync.announce",
        "resync.finishing",
        "resync.read",
        "resync.step",
        "resync.write",
        "resync.flushed",
        "resync.copied",
    )

    def __init__(self, lives: Lives) -> None:
        super().__init__(lives)
        self._copying: dict[Life, dict[Range, int]] = {}
        self._unflushed: dict[Life, int] = {}

    def see(self, event: Event) -> Sequence[Violation]:
        life = self.lives.of.get(event.node)
        if life is None or not life.member:
            return ()
        fields = event.fields
        match event.name:
            case "resync.read":
                self._copying.setdefault(life, {})[fields["lo"], fields["hi"]] = event.number
            case "resync.step":
                self._copying.get(life, {}).pop((fields["lo"], fields["hi"]), None)
            case "resync.write":
                if not fields["durable"]:
                    self._unflushed[life] = event.number
            case "resync.flushed":
                self._unflushed.pop(life, None)
            case "resync.copied":
                if life in self._unflushed:
                    message = (
                        f"{life} counts sectors {fields['lo']} to {fields['hi']} as copied before a flush"
                    )
                    return (self.violation(event, message, self._unflushed.pop(life)),)
            case _:
                copying = self._copying.get(life)
                if copying:
                    step, number = next(iter(copying.items()))
                    message = f"{life} moves its window while it copies sectors {_words(step)}"
                    return (self.violation(event, message, number),)
        return ()


def _words(what: Range) -> str:
    return f"{what[0]} to {what[1]}"


RULES = (WriteInForeignWindow, CopyOutsideWindow, WindowMovedEarly)
