"""Time tables: a column a node, never too wide, cut to what matters."""

from __future__ import annotations

import pytest
from trace_story import Story

from clustermd.testing.trace.events import Layer, Violation
from clustermd.testing.trace.table import cut, table, words
from clustermd.testing.trace.verdict import to_wire, verdict


def violation_of(*events: int) -> Violation:
    return Violation("some-rule", "I1", Layer.ARRAY, "it is wrong", "one", 1.5, events)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [80, 118])
def test_a_table_is_never_wider_than_it_may_be(nodes: int, width: int) -> None:
    s = Story()
    for number in range(nodes):
        s.joins(f"node{number}", number, nodes=8, dirty=tuple(range(100)))
    text = table(s.events, width=width)
    widest = max(width, 24 + nodes * 20)
    assert max(map(len, text.splitlines())) <= widest
    assert all(f"node{number}" in text.splitlines()[0] for number in range(nodes))


def test_a_table_reads_like_a_conversation() -> None:
    s = Story().granted("one", "token", "EX").sends("one", "written", 7)
    s.say("two", "recv.message", type="RESYNCING", sequence=8, slot=0, low=0, high=512)
    s.given("one", "token", "NL")
    assert table(s.events, [2], width=80).splitlines() == [
        "               one                             two",
        "               ------------------------------  ------------------------------",
        "  0  0.000000  lock.granted token EX",
        "  1  0.000001  send.written METADATA_UPDATED",
        "                 #7 slot 0",
        "> 2  0.000002                                  recv.message RESYNCING #8",
        "                                                 0-512 slot 0",
        "  3  0.000003  lock.given token EX -> NL",
    ]


def test_long_lists_are_shortened() -> None:
    event = Story().say("one", "slot.loaded", slot=0, dirty=100, chunks=list(range(100))).events[0]
    assert words(event) == "slot.loaded slot 0 dirty 100 chunks 0 1 2 3 4 5 6 7 ... (100)"


def test_long_texts_and_bytes_are_shortened() -> None:
    s = Story().say("one", "gate.shut", reason="word " * 100).say("one", "dlm.apply", entry=bytes(500))
    assert max(len(words(event)) for event in s.events) < 100


def test_a_cut_keeps_what_is_about_the_same_thing_however_long_ago() -> None:
    s = Story().pair().granted("one", "token", "EX").begins("one", 0, 8, 0).begins("one", 64, 72, 1)
    begin = len(s.events) - 3
    for number in range(200):
        s.say("one", "sweep.done", count=number).say("two", "sweep.done", count=number)
    s.granted("two", "token", "EX").issues("one", 0, 8, 0)
    end = len(s.events) - 1
    numbers = [event.number for event in cut(s.events, violation_of(end))]
    assert begin + 1 in numbers, "the same sectors"
    assert begin not in numbers and begin + 2 not in numbers
    assert numbers == sorted(numbers) and len(numbers) < 20
    numbers = [event.number for event in cut(s.events, violation_of(end - 1))]
    assert begin in numbers and begin + 1 not in numbers, "the same lock"
    assert end not in numbers, "nothing after it"


def test_a_cut_keeps_what_a_violation_names_and_is_bounded() -> None:
    s = Story()
    for _ in range(500):
        s.issues("one", 0, 8, 0)
    numbers = [event.number for event in cut(s.events, violation_of(3, 499), most=20)]
    assert len(numbers) == 20 and numbers[0] == 3 and numbers[-1] == 499


def test_a_cut_works_on_the_end_of_a_trace_whose_begin_is_gone() -> None:
    s = Story()
    for _ in range(50):
        s.issues("one", 0, 8, 0)
    numbers = [event.number for event in cut(s.events[30:], violation_of(3, 49))]
    assert numbers[0] >= 30 and numbers[-1] == 49


def test_a_verdict_names_rule_spec_layer_and_shows_it() -> None:
    s = Story().begins("one", 0, 8, 0).issues("one", 0, 8, 0)
    text = verdict(violation_of(1), s.events)
    assert "some-rule (I1) is broken on one at 1.500000 s" in text
    assert "it is wrong" in text and "at fault: the array" in text
    assert "> 1" in text and "write.issue 0-8" in text
    assert to_wire(violation_of(1))["layer"] == "array"
