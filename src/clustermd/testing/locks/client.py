"""A session of the lock manager that remembers what it sent, what it was shown, and what it may believe to hold.

It believes no more than it was told, and gives up what it asked to give up at once, as a careful user does: a right is
used from the moment its grant is shown to the moment its release is sent (dlm.md 6.9 I2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clustermd.dlm.effects import SessionKey
from clustermd.dlm.modes import EUNLOCK, Flag, Mode
from clustermd.dlm.wire import Frame
from clustermd.testing.locks.modes import is_down
from clustermd.testing.locks.rules import LockRuleBroken

if TYPE_CHECKING:
    from clustermd.testing.locks.replicas import Node

LOCAL_REFUSALS = ("bad-frame", "no-session", "too-many-operations")
"""Refusals that a lock daemon makes by itself, without asking the others."""


@dataclass(eq=False)
class Client:
    """One session: every frame it sent and got, and what it believes to hold (lock -> mode, resource).

    `due` are the frames that the history has for it, of which it was shown `shown`; `lost` and `ended` are what became
    of it. `caused` has, for each frame its node made for it, the message that must be stable before it is shown (0:
    none), and `heard` is how many it was shown of these. `slots` are those it was told in each lockspace.
    """

    node: Node
    key: SessionKey
    name: str
    due: list[Frame]
    sent: dict[int, Frame] = field(default_factory=dict)
    got: list[Frame] = field(default_factory=list)
    done: dict[int, Frame] = field(default_factory=dict)
    locks: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    freeing: set[int] = field(default_factory=set)
    requests: dict[int, int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    caused: list[int] = field(default_factory=list)
    heard: int = 0
    shown: int = 0
    judged: bool = True
    left: bool = False
    lost: bool = False
    ended: bool = False
    next_op: int = 1

    @property
    def number(self) -> int:
        """Its number in its node's life."""
        return self.key[2]

    def send(self, *frame: object) -> int:
        """Send [word, op, ...]; the op number is put in. Returns it."""
        op = self.next_op
        self.next_op += 1
        word, *rest = frame
        whole = [word, op, *rest]
        self.sent[op] = whole
        match whole:
            case ["convert", _, int(lock), int(mode), int(flags), _] if lock in self.held:
                self.pending.add(lock)
                if flags & Flag.CONVDEADLK:
                    self.held[lock] = Mode.NL
                elif is_down(self.held[lock], mode):
                    self.held[lock] = mode
                elif {self.held[lock], mode} == {Mode.PR, Mode.CW}:
                    self.held[lock] = Mode.CR  # what both allow: the old mode may be gone before he is told
            case ["join", *_]:
                self.left = False
            case ["leave", *_]:
                self.left = True
                self.held.clear()
                self.slots.clear()
            case ["unlock", _, int(lock), int(flags), _] if not flags & Flag.CANCEL:
                self.held.pop(lock, None)
                self.freeing.add(lock)
        self.node.replica.session_frame(self.number, whole)
        return op

    def release(self) -> None:
        """It uses nothing any more: it said goodbye, or is proved dead."""
        self.held.clear()
        self.slots.clear()

    def hear(self, frame: Frame) -> int:
        """One frame. Returns the lock by which it may do more than before, or 0. Raises LockRuleBroken."""
        if self.lost or self.ended:
            raise LockRuleBroken("callback-after-end", f"{self.name} is gone and was shown {frame}")
        self.got.append(frame)
        judged = self.judged and self.node.cluster.judged
        if judged and not (frame[0] == "refused" and frame[2] in LOCAL_REFUSALS):
            if self.shown >= len(self.due) or self.due[self.shown] != frame:
                due = self.due[self.shown : self.shown + 1]
                raise LockRuleBroken("callback-order", f"{self.name} was shown {frame}, but next is {due}")
            self.shown += 1
        match frame:
            case ["answer", op, rc, lock]:
                self._answered(op, rc, lock, frame)
            case ["cast", op, lock, status, _, _, mode]:
                return self._cast(op, lock, status, mode, frame)
            case ["adopted", op, lock, _, _, mode]:
                return self._adopted(op, lock, mode, frame)
            case ["refused", op, *_]:
                self._complete(op, frame)
            case ["done", space, _, our_slot, _]:
                if not self.left:
                    self._joined(space, our_slot, frame)
        return 0

    def _joined(self, space: str, slot: int, frame: Frame) -> None:
        """The first done completes the join that waits longest; a later one tells of somebody else."""
        if space not in self.slots:
            joins = [op for op, whole in self.sent.items() if whole[0] == "join" and whole[2] == space]
            for op in [op for op in joins if op not in self.done][:1]:
                self.done[op] = frame
        self.slots[space] = slot

    def _answered(self, op: int, rc: int, lock: int, frame: Frame) -> None:
        whole = self.sent[op]
        if whole[0] == "request" and rc == 0:
            self.locks[lock] = (whole[2], whole[3])
            self.pending.add(lock)
            self.requests[lock] = op
            return
        self._complete(op, frame)
        if whole[0] == "convert":
            self.pending.discard(lock)

    def _adopted(self, op: int, lock: int, mode: int, frame: Frame) -> int:
        """An orphan, perhaps one that this very session left behind."""
        self._complete(op, frame)
        whole = self.sent[op]
        self.locks[lock] = (whole[2], whole[3])
        self.requests[lock] = op
        if self.left:
            return 0
        self.held[lock] = mode
        return lock

    def _cast(self, op: int, lock: int, status: int, mode: int, frame: Frame) -> int:
        if op:  # 0: the lock went with its lockspace, nothing of it was pending
            self._complete(op, frame)
        self.pending.discard(lock)
        if mode == Mode.IV:
            self.held.pop(lock, None)
            if status == EUNLOCK:
                self._freed(lock, op, frame)
        elif lock not in self.freeing and not self.left:
            self.held[lock] = mode
            return lock
        return 0

    def _freed(self, lock: int, op: int, frame: Frame) -> None:
        """Freeing a lock also ends what was pending on it, without a word of its own."""
        self.done.setdefault(self.requests[lock], frame)
        for other, whole in self.sent.items():
            if whole[0] == "convert" and whole[2] == lock and (other < op or op == 0):
                self.done.setdefault(other, frame)

    def _complete(self, op: int, frame: Frame) -> None:
        if op not in self.sent or op in self.done:
            raise LockRuleBroken("completion-twice", f"{self.name}: {frame} after {self.done.get(op)}")
        self.done[op] = frame

    def words(self, word: str) -> list[Frame]:
        return [frame for frame in self.got if frame[0] == word]
