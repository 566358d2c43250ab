"""The value blocks again: who wrote what, what a reader must get, when a value is not to be trusted (dlm.md 2).

Kept from inputs and completions alone: every lock's buffer, every resource's value, sequence and mark.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

from clustermd.dlm.effects import Cast
from clustermd.dlm.modes import Flag, Mode, StatusFlag
from clustermd.dlm.resource import Resource
from clustermd.testing.locks.ledger import Input, Ledger, Record, ResourceKey
from clustermd.testing.locks.rules import LockRuleBroken

READ, WRITE, NOTHING = "read", "write", "nothing"


def transfer(before: int, after: int) -> str:
    """Which way a value goes when a lock's mode changes (dlm.md 2.2)."""
    if before >= Mode.PW:
        return READ if (before, after) == (Mode.PW, Mode.EX) else WRITE
    if after >= before:
        return READ
    return NOTHING


@dataclass(slots=True)
class Value:
    """One value block: absent until first written, its sequence, and whether its last writer died."""

    value: bytes | None = None
    seq: int = 0
    invalid: bool = False


@dataclass(slots=True)
class Values:
    """The value blocks of all resources that have locks, and the marks of those that had."""

    ledger: Ledger
    blocks: dict[ResourceKey, Value] = field(default_factory=dict)
    marks: set[ResourceKey] = field(default_factory=set)

    def clone(self, ledger: Ledger) -> Values:
        return Values(ledger, {key: copy(block) for key, block in self.blocks.items()}, set(self.marks))

    def block(self, key: ResourceKey) -> Value:
        block = self.blocks.get(key)
        if block is None:
            block = self.blocks[key] = Value(invalid=key in self.marks)
            self.marks.discard(key)
        return block

    def given(self, call: Input) -> None:
        """What an input does to value blocks before anybody is granted anything by it."""
        if call.word == "purge":
            for record in self.ledger.records.values():
                if call.frees_orphan(record, self.ledger.lost) and self._granted(record) >= Mode.PW:
                    self.block(record.key).invalid = True
        elif call.purges:
            always = not call.clean and not call.node_died and call.word != "leave"
            for record in self.ledger.records.values():
                if record.session not in call.keys or (call.space and record.key[0] != call.space):
                    continue
                if call.orphans(record):
                    continue
                if self._granted(record) >= Mode.PW and (always or record.fl & Flag.VALBLK):
                    self.block(record.key).invalid = True
        elif (
            call.word in ("unlock", "cancel")
            and call.rc in (0, -22)
            and (unlocked := self.ledger.records.get(call.lock))
        ):
            if call.lvb is not None and unlocked.buffer is not None and len(call.lvb) == len(unlocked.buffer):
                unlocked.buffer = call.lvb
            if call.word == "cancel" or call.rc != 0:
                return
            flags = unlocked.fl | call.flags
            if self._granted(unlocked) >= Mode.PW:
                if flags & Flag.IVVALBLK:
                    self.block(unlocked.key).invalid = True
                elif flags & Flag.VALBLK and unlocked.buffer is not None:
                    self._write(unlocked)

    def granted(self, record: Record, cast: Cast) -> None:
        """A completion with status 0; the record still says what was granted before."""
        before = Mode.NL if cast.sb_flags & StatusFlag.DEMOTED else record.mode
        block = self.block(record.key)
        way = transfer(before, cast.mode)
        uses = bool(record.fl & Flag.VALBLK) and record.buffer is not None
        reported = True
        if way == WRITE and record.fl & Flag.IVVALBLK:
            block.invalid, reported = True, False
        elif way == WRITE and uses:
            self._write(record)
        elif way == WRITE or (way == READ and (not uses or block.value is None)):
            reported = False
        elif way == READ:
            record.buffer = block.value
        marked = bool(cast.sb_flags & StatusFlag.VALNOTVALID)
        if marked != (reported and block.invalid):
            why = (
                "its last writer died" if block.invalid else "it is valid" if reported else "it was not told"
            )
            said = "not valid" if marked else "valid"
            raise LockRuleBroken("value-mark", f"{cast} says that the value is {said}, but {why}")
        if way != WRITE and (cast.lvb if cast.lvb is not None else b"") != (record.buffer or b""):
            raise LockRuleBroken("value-read", f"{cast} brought another value than {record.buffer!r}")

    def adopted(self, record: Record, cast: Cast) -> None:
        """An orphan has a new owner: with VALBLK he reads the value."""
        block = self.block(record.key)
        if not record.fl & Flag.VALBLK:
            expected, marked = None, False
        else:
            if block.value is not None:
                record.buffer = block.value
            expected, marked = record.buffer, block.invalid
        if cast.lvb != expected:
            raise LockRuleBroken("value-read", f"{cast} brought another value than {expected!r}")
        if bool(cast.sb_flags & StatusFlag.VALNOTVALID) != marked:
            raise LockRuleBroken("value-mark", f"{cast}, but the mark is {marked}")

    def _granted(self, record: Record) -> int:
        """What the lock holds; one that was demoted holds less than it was told."""
        for queue in (was := self.ledger.queues[record.key]).granted, was.converting:
            for lock, granted, _ in queue:
                if lock == record.id:
                    return granted
        return Mode.IV

    def _write(self, record: Record) -> None:
        block = self.block(record.key)
        block.value, block.seq, block.invalid = record.buffer, block.seq + 1, False

    def compare(self, key: ResourceKey, resource: Resource) -> None:
        """Whether the engine keeps the same."""
        block = self.block(key)
        if resource.lvb != block.value or resource.lvb_seq != block.seq:
            raise LockRuleBroken(
                "value-changed",
                f"{key} has value {resource.lvb!r} number {resource.lvb_seq}, "
                f"but what was written is {block.value!r} number {block.seq}",
            )
        if resource.invalid != block.invalid:
            raise LockRuleBroken("value-mark", f"{key} is marked {resource.invalid}, not {block.invalid}")

    def forget(self, present: dict[ResourceKey, Resource], spaces: set[str]) -> None:
        """Resources without locks lose their values; marks stay as long as the lockspace."""
        for key in [key for key in self.blocks if key not in present]:
            if self.blocks.pop(key).invalid and key[0] in spaces:
                self.marks.add(key)
        if self.marks:
            self.marks = {key for key in self.marks if key[0] in spaces}
