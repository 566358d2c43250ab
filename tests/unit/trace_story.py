"""Stories for the judge of traces: a few words for the events that nodes pass, one after the other."""

from __future__ import annotations

from typing import Any

from clustermd.testing.trace.events import Event, Violation
from clustermd.testing.trace.judge import judge_all

SPACE = "array"


class Story:
    """Events in order, each a microsecond after the one before. Every method tells of one node's step."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._locks: dict[tuple[str, str], int] = {}

    def say(self, node: str, point: str, /, **fields: Any) -> Story:
        number = len(self.events)
        self.events.append(Event(number, number * 1e-6, node, point, fields))
        return self

    def _lock(self, node: str, point: str, resource: str, **fields: Any) -> Story:
        number = self._locks.setdefault((node, resource), len(self._locks) + 1)
        return self.say(node, point, space=SPACE, resource=resource, lock=number, **fields)

    def granted(self, node: str, resource: str, mode: str, block: str | None = None) -> Story:
        return self._lock(node, "lock.granted", resource, mode=mode, block=block, valid=True)

    def given(self, node: str, resource: str, mode: str, had: str = "EX", block: str | None = None) -> Story:
        return self._lock(node, "lock.given", resource, mode=mode, had=had, block=block)

    def joins(self, node: str, slot: int, nodes: int = 2, dirty: tuple[int, ...] = ()) -> Story:
        """A join in order, up to serving."""
        self.say(node, "session.begin")
        self.say(node, "array.assembled", uuid="u", clustered=True, members={0: "a", 1: "b"})
        self.say(node, "join.member", slot=slot, nodes=nodes)
        self.say(node, "join.armed", slot=slot)
        self.granted(node, f"bitmap{slot:04d}", "PW")
        self.say(node, "join.slot", slot=slot)
        self.say(node, "slot.loaded", slot=slot, dirty=len(dirty), chunks=list(dirty))
        self.say(node, "slot.stable", slot=slot)
        for other in range(nodes):
            if other != slot:
                self.say(node, "join.window", slot=other, lo=0, hi=0)
        self.say(node, "join.gathered", slot=slot)
        return self.say(node, "array.serving", slot=slot)

    def pair(self) -> Story:
        return self.joins("one", 0).joins("two", 1)

    def sets_bits(self, node: str, slot: int, *chunks: int) -> Story:
        """The first page goes to disk with exactly these bits."""
        self.say(node, "bitmap.flush", slot=slot, pages=[0], chunks=list(chunks), writes=1)
        return self.say(node, "bitmap.stable", slot=slot, pages=[0], writes=1)

    def begins(self, node: str, lo: int, hi: int, *chunks: int) -> Story:
        return self.say(node, "write.begin", lo=lo, hi=hi, chunks=list(chunks), stable=True)

    def issues(self, node: str, lo: int, hi: int, *chunks: int) -> Story:
        return self.say(node, "write.issue", lo=lo, hi=hi, chunks=list(chunks), members=[0, 1])

    def answers(self, node: str, lo: int, hi: int, *, error: int = 0, needed: bool = False) -> Story:
        return self.say(node, "write.done", lo=lo, hi=hi, error=error, missed=[], needed=needed)

    def announces(self, node: str, lo: int, hi: int) -> Story:
        return self.say(node, "resync.announce", lo=lo, hi=hi)

    def acknowledged(self, node: str, lo: int, hi: int) -> Story:
        return self.say(node, "resync.window", lo=lo, hi=hi)

    def told(self, node: str, slot: int, lo: int, hi: int) -> Story:
        return self.say(node, "window.set", slot=slot, lo=lo, hi=hi)

    def sends(self, node: str, step: str, sequence: int, kind: str = "METADATA_UPDATED") -> Story:
        return self.say(node, f"send.{step}", type=kind, sequence=sequence, slot=0, low=0, high=0)

    def lives_on(self, node: str) -> Story:
        """Something that proves only that the node is there."""
        return self.say(node, "sweep.done", count=0)

    def judged(self) -> list[Violation]:
        return judge_all(self.events).violations

    def rules(self) -> list[str]:
        """The names of the rules it breaks."""
        return [violation.rule for violation in self.judged()]
