"""The order and its log: replaying gives the same state, a cut record is forgotten, a member misses nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.errors import BadBytes
from clustermd.group import orderlog
from clustermd.group.frames import encode
from clustermd.group.order import Event, Order, view_from_event
from clustermd.group.orderlog import OrderLog, missed
from clustermd.group.process_group import Left, Member

ONE, TWO, THREE = Member(1, 11, "a"), Member(2, 22, "b"), Member(3, (1 << 64) - 1, "c")


def started() -> tuple[Order, list[Event]]:
    order = Order()
    return order, [order.join(ONE), order.join(TWO)]


def test_views_name_who_came_and_who_went_and_why() -> None:
    order, _ = started()
    view = view_from_event(order.view(joined=[THREE], left=[(ONE, Left.LOST), (TWO, Left.LEFT)]))
    assert view.members == (THREE,) and view.joined == (THREE,) and view.quorate
    assert view.left == ((ONE, Left.LOST), (TWO, Left.LEFT))
    assert list(order.lost.values()) == [ONE], "only the lost must be fenced"
    order.fenced(ONE.incarnation, "seen dead")
    assert not order.lost


def test_a_newcomer_is_told_who_is_lost_and_not_proved_dead() -> None:
    order, _ = started()
    order.view(left=[(ONE, Left.LOST)])
    assert view_from_event(order.join(THREE)).left == ((ONE, Left.LOST),)
    order.fenced(ONE.incarnation, "seen dead")
    assert view_from_event(order.join(Member(4, 44, "d"))).left == ()


def test_a_message_sent_again_is_not_ordered_again_and_a_gap_is_refused() -> None:
    order, _ = started()
    assert order.message(11, 1, b"x") == ["message", 3, 1, 1, 11, 1, b"x"]
    assert order.message(22, 1, b"y") == ["message", 4, 2, 2, 22, 1, b"y"]
    assert order.message(11, 1, b"x") is None
    with pytest.raises(BadBytes):
        order.message(11, 3, b"z")
    assert order.place == 4


def test_a_new_sequencer_is_a_new_life_of_the_ring() -> None:
    order, events = started()
    assert [event[2] for event in events] == [[1, 1], [1, 2]]
    successor = Order.from_base(order.base())
    assert successor.view(left=[(TWO, Left.LOST)])[2] == [2, 1]
    assert successor.join(THREE)[2] == [2, 2]


def test_an_event_out_of_place_is_refused() -> None:
    order, _ = started()
    for event in (["fenced", 9, [1, 11, "a"], ""], ["what", 3]):
        with pytest.raises(BadBytes):
            order.apply(event)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    order, events = started()
    for number in range(draw(st.integers(0, 12))):
        what = draw(st.sampled_from(["message", "join", "lose", "leave", "fence"]))
        members, lost = list(order.members.values()), list(order.lost)
        if what == "message" and members:
            sender = draw(st.sampled_from(members)).incarnation
            event = order.message(sender, order.seqs[sender] + 1, draw(st.binary(max_size=9)))
            assert event is not None
            events.append(event)
        elif what == "join":
            events.append(order.join(Member(number + 5, number + 100, f"n{number}")))
        elif what in ("lose", "leave") and members:
            left = Left.LOST if what == "lose" else Left.LEFT
            events.append(order.view(left=[(draw(st.sampled_from(members)), left)]))
        elif what == "fence" and lost:
            events.append(order.fenced(draw(st.sampled_from(lost)), "proof"))
    return events


@settings(max_examples=150, deadline=None)
@given(histories(), st.data())
def test_replay_from_any_base_gives_the_same_state(events: list[Event], data: st.DataObject) -> None:
    whole = Order()
    for event in events:
        whole.apply(event)
    cut = data.draw(st.integers(0, len(events)))
    first = Order()
    for event in events[:cut]:
        first.apply(event)
    second = Order.from_base(first.base())
    for event in events[cut:]:
        second.apply(event)
    assert second.base() == whole.base()


# --- the log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[OrderLog]:
    log = OrderLog(tmp_path, "boot")
    yield log
    log.close()


def write(log: OrderLog, order: Order, count: int) -> list[Event]:
    """Join ONE and append `count` messages of it."""
    events = [order.join(ONE)]
    for seq in range(1, count + 1):
        event = order.message(11, seq, b"%d" % seq)
        assert event is not None
        events.append(event)
    log.append(b"".join(map(encode, events)))
    return events


def test_a_successor_goes_on_where_the_log_ends(tmp_path: Path, log: OrderLog) -> None:
    order = log.open()
    write(log, order, 3)
    again = OrderLog(tmp_path, "boot")
    successor = again.open()
    assert successor.base() == order.base()
    event = successor.message(11, 4, b"4")
    assert event is not None
    again.append(encode(event))
    again.close()
    assert [event[1] for event in missed(tmp_path, 2)] == [3, 4, 5]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_record_cut_by_a_kill_was_never_told_and_is_cut_off(
    tmp_path: Path, log: OrderLog, cut: int
) -> None:
    events = write(log, log.open(), 3)
    path = tmp_path / "order.log"
    os.truncate(path, path.stat().st_size - cut)
    assert list(missed(tmp_path, 0)) == events[:-1]
    again = OrderLog(tmp_path, "boot")
    successor = again.open()
    event = successor.message(11, 3, b"another")
    assert event is not None, "the cut message may be sent again"
    again.append(encode(event))
    again.close()
    assert list(missed(tmp_path, 0)) == [*events[:-1], event]


def test_a_large_log_rotates_and_members_that_lag_miss_nothing(
    tmp_path: Path, log: OrderLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orderlog, "ROTATE_BYTES", 400)
    order = log.open()
    events = write(log, order, 40)
    log.rotate(order, 0)
    more = []
    for seq in range(41, 90):
        event = order.message(11, seq, b"x")
        assert event is not None
        log.append(encode(event))
        more.append(event)
        log.rotate(order, 0)  # nobody has confirmed: the file before must stay
    assert list(missed(tmp_path, 7)) == [*events[7:], *more]
    log.rotate(order, order.place)
    assert list(missed(tmp_path, order.place - 1)) == [more[-1]]
    again = OrderLog(tmp_path, "boot")
    assert again.open().base() == order.base()
    again.close()


def test_a_rotation_cut_by_a_kill_is_undone(tmp_path: Path, log: OrderLog) -> None:
    order = log.open()
    write(log, order, 3)
    os.rename(tmp_path / "order.log", tmp_path / "order.prev")
    again = OrderLog(tmp_path, "boot")
    assert again.open().base() == order.base()
    again.close()


def test_members_do_not_outlive_the_machine_but_rings_and_places_do(tmp_path: Path, log: OrderLog) -> None:
    order = log.open()
    write(log, order, 3)
    again = OrderLog(tmp_path, "another boot")
    successor = again.open()
    assert not successor.members and not successor.seqs
    assert (successor.place, successor.index, successor.ring) == (order.place, order.index, order.ring)
    assert successor.join(TWO)[2] == [2, 1]
    again.close()


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 30, encode(["clustermd-order", 99, "boot"]), encode(["x", 1, "b"])]
)
def test_a_log_that_cannot_be_read_is_refused_not_guessed(
    tmp_path: Path, log: OrderLog, content: bytes
) -> None:
    (tmp_path / "order.log").write_bytes(content)
    with pytest.raises(BadBytes):
        log.open()
