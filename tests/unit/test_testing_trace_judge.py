"""Each rule lets a good story pass and finds the bad one beside it; nothing is said that a trace cannot prove."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from trace_story import Story

from clustermd.dlm.wire import pack
from clustermd.testing.trace.events import Event, Layer
from clustermd.testing.trace.judge import Judge, all_rules
from clustermd.testing.trace.lives import Lives

Tell = Callable[[Story], object]
STORIES: dict[str, tuple[Layer, Tell, Tell]] = {}


def story(rule: str, layer: Layer) -> Callable[[Callable[[Story, bool], object]], object]:
    """Register a story that is told twice: well, and so that it breaks `rule`."""

    def add(tell: Callable[[Story, bool], object]) -> object:
        STORIES[rule] = (layer, lambda s: tell(s, False), lambda s: tell(s, True))
        return tell

    return add


@story("incompatible-grant", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    s.pair().granted("one", "token", "EX")
    if not bad:
        s.given("one", "token", "NL")
    s.granted("two", "token", "EX")
    s.lives_on("one")


@story("stale-value-block", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    s.pair().granted("one", "message", "EX").given("one", "message", "CW", block="0107")
    s.granted("two", "message", "CR", block="0106" if bad else "0107")


@story("taken-for-dead-early", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    s.pair().say("two", "process.died")
    if not bad:
        s.say("two", "process.drained")
    s.say("one", "cluster.lost", slot=1, node="two")


@story("message-skipped", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair().sends("one", "written", 7)
    if not bad:
        s.say("two", "recv.answered", sequence=7, result=0)
    s.sends("one", "done", 7).lives_on("two")


@story("message-twice", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair().say("two", "recv.answered", sequence=7, result=0)
    s.say("two", "recv.answered", sequence=7 if bad else 8, result=0)


@story("message-differs", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair().sends("one", "written", 7)
    kind = "RESYNCING" if bad else "METADATA_UPDATED"
    s.say("two", "recv.message", type=kind, sequence=7, slot=0, low=0, high=0)


@story("two-resyncers", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair().say("one", "resync.right")
    if not bad:
        s.say("one", "resync.right_given", slot=0)
    s.say("two", "resync.right").lives_on("one")


@story("slot-owned-twice", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair()
    if not bad:
        s.say("one", "leave.unlocking", slot=0)
    s.say("two", "join.slot", slot=0).lives_on("one")


@story("metadata-without-token", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair()
    if not bad:
        s.granted("one", "token", "EX")
    s.say("one", "metadata.write", events=5)


@story("events-not-growing", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair().granted("one", "token", "EX").say("one", "metadata.write", events=5)
    s.say("one", "metadata.written", events=5, faulty=[]).given("one", "token", "NL")
    s.granted("two", "token", "EX").say("two", "metadata.write", events=5 if bad else 6)


@story("joined-too-early", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.say("one", "session.begin").say("one", "join.member", slot=0, nodes=2)
    if not bad:
        s.say("one", "slot.stable", slot=0)
    s.say("one", "takeover.read", slot=1, dirty=0, chunks=[])


@story("window-ended-early", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair()
    if not bad:
        s.say("one", "takeover.source_cleared", slot=1)
    s.say("one", "window.end", slot=1, why="merged")


@story("slot-written-without-lock", Layer.CLUSTER)
def _(s: Story, bad: bool) -> None:
    s.pair().sets_bits("one", 0, 3)
    if not bad:
        s.say("two", "leave.deaf", slot=1).given("two", "bitmap0001", "IV", "PW")
        s.say("two", "life.over").granted("one", "bitmap0001", "PW")
    s.say("one", "takeover.read", slot=1, dirty=0, chunks=[])
    s.say("one", "takeover.source_written", slot=1, member=0, page=0, last=True)


@story("write-in-foreign-window", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.pair().sets_bits("two", 1, 0).announces("one", 0, 512).told("two", 0, 0, 512).acknowledged(
        "one", 0, 512
    )
    if not bad:
        s.say("one", "resync.finishing", slot=0).say("two", "window.end", slot=0, why="finished")
    s.begins("two", 8, 16, 0)


@story("copy-outside-window", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.pair().announces("one", 0, 512).acknowledged("one", 0, 512)
    lo = 512 if bad else 0
    s.say("one", "resync.write", lo=lo, hi=lo + 128, members=[1], durable=False)


@story("window-moved-early", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.pair().announces("one", 0, 512).acknowledged("one", 0, 512).say("one", "resync.read", lo=0, hi=128)
    if not bad:
        s.say("one", "resync.step", lo=0, hi=128)
    s.announces("one", 512, 1024)


@story("data-before-bit", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.pair().begins("one", 0, 8, 4)
    s.sets_bits("one", 0, 3) if bad else s.sets_bits("one", 0, 3, 4)
    s.issues("one", 0, 8, 4)


@story("source-cleared-early", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.joins("one", 0).granted("one", "bitmap0001", "PW")
    s.say("one", "takeover.read", slot=1, dirty=1, chunks=[9])
    if not bad:
        s.sets_bits("one", 0, 9)
    s.say("one", "takeover.source_written", slot=1, member=0, page=0, last=True)


@story("bit-cleared-early", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.joins("one", 0).sets_bits("one", 0, 4).begins("one", 0, 8, 4).issues("one", 0, 8, 4)
    if not bad:
        s.answers("one", 0, 8)
    s.say("one", "sweep.begin", chunks=[4]).say("one", "sweep.flushed", chunks=[4])
    s.say("one", "sweep.cleared", count=1, chunks=[4])


@story("answer-before-record", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.pair().sets_bits("one", 0, 0).say("one", "member.failed", number=1, why="it is gone")
    s.say("one", "metadata.written", events=5, faulty=[1])
    if not bad:
        s.say("two", "metadata.adopted", events=5, faulty=[1])
    s.answers("one", 0, 8).lives_on("two")


@story("gate-passed", Layer.ARRAY)
def _(s: Story, bad: bool) -> None:
    s.pair().sets_bits("one", 0, 0).begins("one", 0, 8, 0).say("one", "gate.held", reason="no quorum")
    s.issues("one", 0, 8, 0)
    if not bad:
        s.say("one", "gate.open")
    s.say("one", "write.member", lo=0, hi=8, member=0, result=4096, left=1)


def _views(s: Story, *nodes: str, majority: int = 2) -> Story:
    """All lock daemons are in one quorate view."""
    for node in nodes:
        members = list(range(1, len(nodes) + 1))
        s.say(node, "group.view", ring=(1, 4, 1), members=members, majority=majority, votes=1, quorate=True)
    return s


def _applies(s: Story, node: str, number: int, chain: bytes) -> Story:
    return s.say(node, "dlm.apply", applied=number, chain=chain, entry=FENCED)


FENCED = pack(["fenced", 3, 1, "off"])
"""An entry that nobody asked for."""


@story("shown-before-majority", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    _views(s, "one", "two", "three")
    _applies(s, "one", 1, b"a")
    if not bad:
        _applies(s, "three", 1, b"a")
    s.say("one", "dlm.stable", applied=1, chain=b"a")


@story("shown-history-forks", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    for node in ("one", "two"):
        _applies(s, node, 1, b"a")
    s.say("one", "dlm.stable", applied=1, chain=b"a")
    for node in ("three", "four"):
        _applies(s, node, 1, b"b" if bad else b"a")
    s.say("three", "dlm.stable", applied=1, chain=b"b" if bad else b"a")


def _begun_anew(*, fenced: bool) -> Story:
    """Node 3 stood still when the others lost all state, and began anew."""
    s = Story()
    for node in ("node1", "node2", "node3"):
        s.say(node, "dlm.install", epoch=1, members=((1, 1), (2, 2), (3, 3)), authority=None)
    for node in ("node1", "node2", "node3"):
        _applies(_applies(s, node, 1, b"a"), node, 2, b"b")
    s.say("node1", "dlm.stable", applied=1, chain=b"a")
    if fenced:
        s.say("node1", "group.fenced", node=3, incarnation=f"{3:016x}", proof="storage")
    for node in ("node1", "node2"):
        s.say(node, "dlm.install", epoch=1, members=((1, 4), (2, 5)), authority=None)
    for node in ("node1", "node2"):
        _applies(s, node, 1, b"c")
    return s.say("node2", "dlm.stable", applied=1, chain=b"c")


def test_who_was_fenced_before_a_history_began_still_belongs_to_the_former_one() -> None:
    late = {"applied": 2, "chain": b"b"}
    assert _begun_anew(fenced=True).say("node3", "dlm.stable", **late).rules() == []
    assert _begun_anew(fenced=False).say("node3", "dlm.stable", **late).rules() == ["shown-history-forks"]
    goes_on = _applies(_begun_anew(fenced=True), "node3", 3, b"d")
    assert goes_on.say("node3", "dlm.stable", applied=3, chain=b"d").rules() == ["shown-history-forks"]


@story("applied-outside-view", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    _applies(_views(s, "one", "two"), "one", 1, b"a")
    s.say("one", "group.frozen", reason="no quorum")
    if not bad:
        _views(s, "one", "two")
    _applies(s, "one", 2, b"b")


@story("two-fencers", Layer.LOCK_MANAGER)
def _(s: Story, bad: bool) -> None:
    _views(s, "one", "two").say("one", "group.fencing", node=3)
    if not bad:
        s.say("one", "group.fencing_over", node=3, how="failed")
    s.say("two", "group.fencing", node=3)


def test_two_sides_that_fence_the_same_node_know_nothing_of_each_other() -> None:
    s = _views(Story(), "one", "two").say("one", "group.fencing", node=3)
    s.say("two", "group.view", ring=(2, 8, 2), members=[2], majority=1, votes=1, quorate=True)
    assert s.say("two", "group.fencing", node=3).rules() == []


def test_every_rule_has_a_story() -> None:
    assert {rule.rule for rule in all_rules(Lives())} == set(STORIES)


@pytest.mark.parametrize("rule", STORIES)
def test_a_rule_passes_the_good_story_and_finds_the_bad_one(rule: str) -> None:
    layer, good, bad = STORIES[rule]
    told = Story()
    good(told)
    assert told.rules() == []
    told = Story()
    bad(told)
    (violation,) = told.judged()
    assert (violation.rule, violation.layer) == (rule, layer)
    assert violation.message and violation.spec
    assert violation.events and violation.events[-1] < len(told.events)


# --- what a trace can prove ---------------------------------------------------------------------------------


def test_a_node_whose_trace_just_ends_is_accused_of_nothing() -> None:
    assert Story().pair().granted("one", "token", "EX").granted("two", "token", "EX").rules() == []


def test_a_new_process_of_a_node_does_not_prove_that_the_old_one_lived_on() -> None:
    s = Story().pair().granted("one", "token", "EX").granted("two", "token", "EX")
    s.say("one", "trace.begin", node="one").say("one", "session.begin")
    assert s.rules() == []


def test_what_the_lock_daemon_does_does_not_prove_that_its_array_process_lives() -> None:
    s = Story().pair().granted("one", "token", "EX").granted("two", "token", "EX")
    assert s.say("one", "dlm.apply", applied=1, chain=b"", entry=FENCED).rules() == []
    assert s.lives_on("one").rules() == ["incompatible-grant"]


def test_the_locks_of_a_dead_process_count_until_it_has_drained() -> None:
    s = Story().pair().granted("one", "token", "EX").say("one", "process.died")
    assert Story.rules(_copy(s).granted("two", "token", "EX")) == ["incompatible-grant"]
    assert s.say("one", "process.drained").granted("two", "token", "EX").rules() == []


def test_a_death_that_is_told_after_the_grant_proves_life_before_it() -> None:
    s = Story().pair().granted("one", "token", "EX").granted("two", "token", "EX")
    assert s.say("one", "process.died").rules() == ["incompatible-grant"]


def test_the_locks_of_a_node_that_is_fenced_are_free() -> None:
    s = Story().pair().granted("one", "token", "EX").say("two", "cluster.lost", slot=0, node="one")
    assert s.granted("two", "token", "EX").lives_on("one").rules() == []


def _died_and_is_back(*, drained: bool = True) -> Story:
    """Node one has not heard yet that the former life of node two is dead."""
    s = Story().pair().say("two", "process.died")
    if drained:
        s.say("two", "process.drained")
    return s.joins("two", 1)


def test_who_hears_late_of_a_death_is_not_told_of_the_next_one_in_that_slot() -> None:
    s = _died_and_is_back().say("two", "process.died")
    assert s.say("one", "cluster.lost", slot=1, node="two").rules() == []
    assert s.say("one", "cluster.lost", slot=1, node="two").rules() == ["taken-for-dead-early"]


def test_the_life_that_is_taken_for_dead_early_need_not_be_the_last_one() -> None:
    s = _died_and_is_back(drained=False)  # which breaks other rules, too
    assert s.say("one", "cluster.lost", slot=1, node="two").rules()[-1] == "taken-for-dead-early"


def test_who_began_after_a_slot_was_given_on_is_told_of_its_new_owner() -> None:
    s = _died_and_is_back().joins("three", 2, nodes=3).say("two", "process.died")
    assert s.say("three", "cluster.lost", slot=1, node="two").rules() == ["taken-for-dead-early"]


def test_of_a_life_that_left_in_order_nobody_is_told() -> None:
    s = Story().pair().say("two", "leave.unlocking", slot=1).given("two", "bitmap0001", "IV", "PW")
    s.say("two", "leave.done").say("two", "life.over").joins("two", 1).say("two", "process.died")
    assert s.say("one", "cluster.lost", slot=1, node="two").rules() == ["taken-for-dead-early"]


def test_a_life_does_not_end_when_somebody_hears_late_of_the_one_before_it() -> None:
    s = _died_and_is_back().granted("two", "token", "EX").say("one", "cluster.lost", slot=1, node="two")
    assert s.granted("one", "token", "EX").lives_on("two").rules() == ["incompatible-grant"]


def test_locks_count_after_the_session_is_lost_until_nothing_is_in_flight() -> None:
    s = Story().pair().granted("one", "token", "EX").say("one", "lock.lost", reason="the lockd is gone")
    s.say("one", "array.lost", slot=0)
    early = _copy(s).granted("two", "token", "EX").say("one", "array.drained", slot=0)
    assert early.rules() == ["incompatible-grant"]
    assert s.say("one", "array.drained", slot=0).granted("two", "token", "EX").lives_on("one").rules() == []


def test_a_down_conversion_counts_from_when_it_is_sent() -> None:
    s = (
        Story()
        .pair()
        .granted("one", "message", "EX")
        .given("one", "message", "CW")
        .granted("two", "message", "CR")
    )
    assert s.lives_on("one").rules() == []
    assert s.granted("two", "message", "PR").lives_on("one").rules() == ["incompatible-grant"]


def test_two_locks_of_one_node_exclude_each_other_as_well() -> None:
    s = Story().pair()
    fields: dict[str, Any] = {
        "space": "array",
        "resource": "bitmap0000",
        "mode": "PW",
        "block": None,
        "valid": True,
    }
    assert s.say("one", "lock.granted", lock=99, **fields).rules() == ["incompatible-grant"]


def test_a_resource_that_nobody_has_a_lock_of_forgets_its_block() -> None:
    s = Story().pair().granted("one", "message", "EX").given("one", "message", "IV", block="07")
    assert s.granted("two", "message", "EX", block="").rules() == []


# --- windows -------------------------------------------------------------------------------------------------


def test_a_write_of_a_node_that_was_not_told_is_the_cluster_layers_fault() -> None:
    s = Story().pair().sets_bits("two", 1, 0).announces("one", 0, 512).acknowledged("one", 0, 512)
    s.begins("two", 8, 16, 0).issues("two", 8, 16, 0).lives_on("one")
    (violation,) = s.judged()
    assert (violation.rule, violation.layer) == ("write-in-foreign-window", Layer.CLUSTER)


def test_a_write_in_flight_when_its_window_is_acknowledged_is_found_when_it_ends() -> None:
    s = Story().pair().sets_bits("two", 1, 0).begins("two", 8, 16, 0).issues("two", 8, 16, 0)
    s.announces("one", 0, 512).told("two", 0, 0, 512)
    assert _copy(s).answers("two", 8, 16).acknowledged("one", 0, 512).rules() == []
    assert s.acknowledged("one", 0, 512).rules() == [], "it may have died with the write in flight"
    (violation,) = s.answers("two", 8, 16).judged()
    assert (violation.rule, violation.layer) == ("write-in-foreign-window", Layer.ARRAY)


def test_a_write_elsewhere_or_before_the_acknowledgement_is_fine() -> None:
    s = Story().pair().sets_bits("two", 1, 0, 9).announces("one", 0, 512)
    s.begins("two", 8, 16, 0).issues("two", 8, 16, 0).answers("two", 8, 16)
    s.told("two", 0, 0, 512).acknowledged("one", 0, 512)
    assert s.begins("two", 512, 520, 9).issues("two", 512, 520, 9).lives_on("one").rules() == []


def test_the_window_ends_when_the_next_one_is_announced() -> None:
    s = Story().pair().sets_bits("two", 1, 0).announces("one", 0, 512).acknowledged("one", 0, 512)
    assert s.announces("one", 512, 1024).issues("two", 8, 16, 0).lives_on("one").rules() == []


# --- bits ------------------------------------------------------------------------------------------------------


def test_a_bit_that_a_page_on_its_way_lacks_is_not_stable_any_more() -> None:
    s = Story().joins("one", 0).sets_bits("one", 0, 4)
    assert _copy(s).issues("one", 0, 8, 4).rules() == []
    s.say("one", "bitmap.flush", slot=0, pages=[0], chunks=[], writes=0)
    assert s.issues("one", 0, 8, 4).rules() == ["data-before-bit"]


def test_a_page_that_failed_makes_nothing_stable() -> None:
    s = Story().joins("one", 0).say("one", "bitmap.flush", slot=0, pages=[0], chunks=[4], writes=1)
    assert s.issues("one", 0, 8, 4).rules() == ["data-before-bit"]


def test_bits_of_other_pages_stay_where_they_are() -> None:
    far = 40_000
    s = Story().joins("one", 0, dirty=(4, far)).sets_bits("one", 0, 4)
    assert s.issues("one", 0, 8, 4, far).rules() == []


@pytest.mark.parametrize("why", ["needed", "unflushed", "redo"])
def test_a_bit_stays_as_long_as_something_needs_it(why: str) -> None:
    s = Story().joins("one", 0).sets_bits("one", 0, 4).begins("one", 0, 8, 4).issues("one", 0, 8, 4)
    begin = ("sweep.begin", {"chunks": [4]})
    if why == "unflushed":
        s.say("one", begin[0], **begin[1]).answers("one", 0, 8)
    elif why == "redo":
        s.say("one", "write.redo", lo=0, hi=8).say("one", begin[0], **begin[1])
    else:
        s.answers("one", 0, 8, needed=True).say("one", begin[0], **begin[1])
    s.say("one", "sweep.flushed", chunks=[4])
    assert _copy(s).say("one", "sweep.cleared", count=1, chunks=[4]).rules() == ["bit-cleared-early"]
    s.say("one", "bitmap.reconciled", chunks=[4], needed=False)
    s.say("one", "sweep.begin", chunks=[4]).say("one", "sweep.flushed", chunks=[4])
    assert s.say("one", "sweep.cleared", count=1, chunks=[4]).rules() == []


def test_a_fault_that_is_on_no_disk_is_no_record() -> None:
    s = Story().joins("one", 0).say("one", "member.failed", number=1, why="it is gone")
    assert s.answers("one", 0, 8, error=5).rules() == []
    assert s.answers("one", 0, 8).rules() == ["answer-before-record"]


@pytest.mark.parametrize("hi", [0, 64])
def test_a_joiner_that_reads_no_window_forgets_the_one_it_heard_of(hi: int) -> None:
    s = (
        Story()
        .pair()
        .say("two", "window.set", slot=0, lo=0, hi=64)
        .say("two", "join.window", slot=0, lo=0, hi=hi)
    )
    assert s.begins("two", 0, 8, 0).rules() == (["write-in-foreign-window"] if hi else [])


# --- the judge --------------------------------------------------------------------------------------------------


def test_rules_may_be_chosen() -> None:
    lives = Lives()
    chosen = [rule for rule in all_rules(lives) if rule.layer is Layer.LOCK_MANAGER]
    judge = Judge(chosen, lives)
    for event in (
        Story().pair().granted("one", "token", "EX").granted("two", "token", "EX").lives_on("one").events
    ):
        judge.see(event)
    assert [violation.rule for violation in judge.violations] == ["incompatible-grant"]
    judge.see(Event(99, 1.0, "one", "metadata.write", {"events": 1}))
    assert len(judge.violations) == 1


def _copy(s: Story) -> Story:
    other = Story()
    other.events = list(s.events)
    other._locks = dict(s._locks)
    return other
