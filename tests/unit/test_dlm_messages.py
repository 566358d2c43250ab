"""What lock daemons multicast: operations are packed once, and go out together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clustermd.dlm.messages import decode, ops_message
from clustermd.dlm.outbox import OVERHEAD_BYTES, Outbox
from clustermd.dlm.replica import Replica
from clustermd.dlm.wire import pack
from clustermd.group.process_group import Busy, Member, View
from clustermd.trace import Trace


def test_operations_that_were_packed_one_by_one_are_one_message() -> None:
    for count in (1, 15, 16, 70_000):
        ops = [[1, "unlock", number, number << 40, 8, None] for number in range(count)]
        packed = ops_message(1 << 33, 7, [pack(op) for op in ops])
        assert packed == pack(["ops", 1 << 33, 7, ops])
        assert decode(packed) == ["ops", 1 << 33, 7, ops]


def test_a_batch_is_what_fits_and_begins_behind_what_was_sent() -> None:
    outbox = Outbox()
    ops = [[1, "unlock", number, 5, 8, None] for number in range(1, 8)]
    for op in ops:
        outbox.add(op)
    size = len(pack(ops[0]))
    assert outbox.next_batch(OVERHEAD_BYTES + 3 * size) == (1, [pack(op) for op in ops[:3]])
    outbox.sent = 3
    assert outbox.next_batch(OVERHEAD_BYTES + 3 * size) == (4, [pack(op) for op in ops[3:6]])
    outbox.applied(2)
    assert outbox.next_batch(1) == (4, [pack(ops[3])]), "one always goes"
    outbox.send_again_after(2)
    assert outbox.next_batch(1 << 20) == (3, [pack(op) for op in ops[2:]])
    outbox.applied(7)
    assert outbox.next_batch(1 << 20)[1] == []


class Alone:
    """A group of one, which orders nothing by itself. Implements ProcessGroup and ReplicaShell."""

    def __init__(self) -> None:
        self.me = Member(1, 1, "node1")
        self.max_payload = 1 << 16
        self.sent: list[bytes] = []
        self.asked = 0
        self.full = False
        self.soon: list[Callable[[], None]] = []
        self.replica = Replica(self, Trace(), self.soon.append)  # type: ignore[arg-type]  only multicast is used
        self.replica.attach(self)  # type: ignore[arg-type]
        self.replica.on_view(View((1,), (self.me,), (self.me,), (), True))
        self.deliver()

    def multicast(self, payload: bytes) -> None:
        self.asked += 1
        if self.full:
            raise Busy("for the test")
        self.sent.append(payload)

    def deliver(self) -> None:
        sent, self.sent = self.sent, []
        for payload in sent:
            self.replica.on_message(1, self.me, payload)

    def turn(self) -> None:
        calls = self.soon[:]
        self.soon.clear()
        for call in calls:
            call()

    def to_session(self, session: int, frame: list[Any]) -> None: ...

    def resumed(self) -> None: ...


def test_what_clients_ask_in_one_turn_is_one_message() -> None:
    alone = Alone()
    session = alone.replica.open_session("test", 1)
    alone.replica.session_frame(session, ["join", 1, "s", 64, 4, 0])
    alone.replica.session_frame(session, ["leave", 2, "s"])
    assert alone.sent == [] and len(alone.soon) == 1
    alone.turn()
    (message,) = map(decode, alone.sent)
    assert [op[1] for op in message[3]] == ["open", "join", "leave"]


def test_a_busy_group_is_asked_again_at_the_next_delivery_only() -> None:
    alone = Alone()
    session = alone.replica.open_session("test", 1)
    alone.turn()
    alone.full = True
    alone.asked = 0
    for op in range(1, 50):
        alone.replica.session_frame(session, ["leave", op, "s"])
        alone.turn()
    assert alone.asked == 1
    alone.full = False
    alone.deliver()
    (message,) = map(decode, alone.sent)
    assert len(message[3]) == 49
