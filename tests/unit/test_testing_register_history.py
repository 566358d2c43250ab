"""The checker of histories: a register's history is never blamed, and each kind of fault always is.

Histories come from a register that really is one: per sector, per copy, with writes that die in the middle. The
general search is compared with all permutations, and the three comparisons with the general search.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, content
from clustermd.testing.exerciser import Exerciser, Plan, Report
from clustermd.testing.history_log import (
    INITIAL,
    SECTORS,
    Action,
    Operation,
    ReadLogWriter,
    Value,
    read_of,
    reads_path,
    write_of,
)
from clustermd.testing.nbd_client import Command, NbdClient
from clustermd.testing.nbdkit import nbdkit
from clustermd.testing.register_history import Fence, History, Rule, check
from clustermd.testing.register_search import Access, TooConcurrent, search
from clustermd.testing.write_log import Kind, LogWriter

BLOCK = 7
SCALE = 100  # room between any two instants of a simulation
NEVER = 10**9


@dataclass
class Story:
    """What a simulated register did."""

    operations: list[Operation] = field(default_factory=list)
    fences: list[Fence] = field(default_factory=list)
    end: int = 0

    @property
    def writes(self) -> list[Operation]:
        return [each for each in self.operations if each.action is Action.WRITE]

    def faults(self, *planted: Operation, mirrored: bool = False) -> list[Rule]:
        found = check([*self.operations, *planted], self.fences, mirrored=mirrored)
        assert all(str(fault) for fault in found)
        return [fault.rule for fault in found]


Landing = tuple[int, int, Value]  # when, by which write (counted), what


def simulate(dice: Random, *, copies: int, owners: int, deaths: bool = True) -> Story:
    """Owners write one block in turn, anybody reads it; some writes die. With 2 copies takeover copies one to all."""
    story, now, owner = Story(), 0, 1
    landings: list[list[list[Landing]]] = [[[] for _ in range(SECTORS)] for _ in range(copies)]
    generations = dict.fromkeys(range(1, owners + 1), 0)
    # who writes in turn: each write starts after the last ended or was overtaken
    for number in range(dice.randint(1, 7)):
        now += dice.randint(1, 3) * SCALE
        start, length = now, dice.randint(0, 5) * SCALE
        generations[owner] += 1
        value = Value(owner, generations[owner])
        torn = dice.random() < 0.5
        dies = deaths and dice.random() < 0.3
        for copy in landings:
            at = start + dice.randint(0, length)
            lands = not dies or dice.random() < 0.5
            for sector in copy:
                if torn:
                    at = start + dice.randint(0, length)
                    lands = not dies or dice.random() < 0.5
                if lands:
                    sector.append((at, number, value))
        now += length
        story.operations.append(write_of(*value[:1], BLOCK, value.generation, start, None if dies else now))
        if dies:
            now += dice.randint(1, 3) * SCALE
            story.fences.append(Fence(owner, now))
            for sector in range(SECTORS):
                # takeover: all copies hold from now on what the first one holds
                held = value_at(landings[0][sector], now)
                for copy in landings[1:]:
                    copy[sector].append((now, number, held))
        if dice.random() < 0.4:
            owner = dice.randint(1, owners)
    story.end = now + 3 * SCALE
    for _ in range(dice.randint(0, 25)):
        since = dice.randint(0, story.end)
        until = since + dice.choice((1, SCALE // 2, SCALE, 4 * SCALE))
        copy = dice.choice(landings)
        values = [value_at(sector, dice.randint(since + 1, until)) for sector in copy]
        story.operations.append(read_of(dice.randint(1, 3), BLOCK, since, until, *packed(values)))
    dice.shuffle(story.operations)
    return story


def value_at(sector: Sequence[Landing], now: int) -> Value:
    """What the newest landing before left; of one instant the last in order."""
    landed = [each for each in sector if each[0] < now]
    return max(landed, key=lambda each: each[:2])[2] if landed else INITIAL


def packed(values: Sequence[Value]) -> Sequence[Value]:
    return values[:1] if len(set(values)) == 1 else values


# seeds, not hypothesis's own choices: those shrink well but seldom make two things happen at once
dice = st.integers(0, 1 << 32).map(Random)


@settings(deadline=None, max_examples=300)
@given(dice, st.integers(1, 2))
def test_a_register_is_never_blamed(dice: Random, owners: int) -> None:
    story = simulate(dice, copies=1, owners=owners)
    assert story.faults() == []
    assert story.faults(mirrored=True) == []


@settings(deadline=None, max_examples=300)
@given(dice, st.integers(1, 2))
def test_a_mirror_is_never_blamed_when_it_is_known_as_one(dice: Random, owners: int) -> None:
    assert simulate(dice, copies=2, owners=owners).faults(mirrored=True) == []


@settings(deadline=None, max_examples=150)
@given(dice, st.booleans())
def test_a_lost_write_is_found(dice: Random, mirrored: bool) -> None:
    """Whoever reads, however long after: something older than an acknowledged write.

    Where a later, unanswered write had been read before, that one is missing as well, and may be what is named.
    """
    story = simulate(dice, copies=1, owners=1)
    ended = [each for each in story.writes if each.end_ns is not None]
    assume(ended)
    write = dice.choice(ended)
    since = (write.end_ns or 0) + dice.randint(1, 3 * SCALE)
    old = Value(1, dice.randrange(write.value_of(0).generation))  # type: ignore[union-attr]
    planted = read_of(2, BLOCK, since, since + 1, old if old.generation else INITIAL)
    assert {Rule.STALE, Rule.LATE} & set(story.faults(planted, mirrored=mirrored))


@settings(deadline=None, max_examples=150)
@given(dice)
def test_an_older_value_after_a_newer_one_is_found(dice: Random) -> None:
    """While the write is under way, when both values are allowed, but not in this order."""
    story = simulate(dice, copies=1, owners=1)
    long = [each for each in story.writes if each.end_ns is None or each.end_ns > each.start_ns]
    assume(long)
    write = dice.choice(long)
    before = write.value_of(0).generation - 1  # type: ignore[union-attr]
    old = Value(1, before) if before else INITIAL
    new = read_of(2, BLOCK, write.start_ns, write.start_ns + 3, *write.values)
    stale = read_of(dice.randint(1, 3), BLOCK, write.start_ns + 4, write.start_ns + 5, old)
    assert {Rule.UNREAD, Rule.STALE, Rule.LATE, Rule.TORN} & set(story.faults(new, stale))


@settings(deadline=None, max_examples=150)
@given(dice, st.booleans())
def test_a_torn_block_at_rest_is_found(dice: Random, mirrored: bool) -> None:
    story = simulate(dice, copies=1, owners=1, deaths=False)
    last = Value(1, len(story.writes))
    sectors = [last] * SECTORS
    sectors[dice.randrange(SECTORS)] = Value(1, last.generation - 1) if last.generation > 1 else INITIAL
    planted = read_of(2, BLOCK, story.end, story.end + 1, *sectors)
    assert Rule.TORN in story.faults(planted, mirrored=mirrored)


@settings(deadline=None, max_examples=150)
@given(dice, st.booleans(), st.sampled_from([None, Value(9, 1), Value(1, 1000)]))
def test_content_nobody_wrote_is_found(dice: Random, mirrored: bool, value: Value | None) -> None:
    story = simulate(dice, copies=1, owners=1)
    since = dice.randint(0, story.end)
    sectors: list[Value | None] = [INITIAL] * SECTORS
    sectors[dice.randrange(SECTORS)] = value
    planted = read_of(2, BLOCK, since, since + SCALE, *(sectors if dice.random() < 0.5 else [value]))
    assert Rule.NEVER_WRITTEN in story.faults(planted, mirrored=mirrored)


@settings(deadline=None, max_examples=150)
@given(dice, st.booleans())
def test_content_of_a_later_write_is_found(dice: Random, mirrored: bool) -> None:
    story = simulate(dice, copies=1, owners=2)
    write = dice.choice(story.writes)
    planted = read_of(2, BLOCK, write.start_ns - 2, write.start_ns - 1, *write.values)
    assert Rule.EARLY in story.faults(planted, mirrored=mirrored)


@settings(deadline=None, max_examples=150)
@given(dice, st.booleans(), st.booleans())
def test_a_write_that_lands_after_the_fence_is_found(dice: Random, mirrored: bool, overlap: bool) -> None:
    story = simulate(dice, copies=1, owners=1, deaths=False)
    fence = story.end + SCALE
    dead = write_of(1, BLOCK, len(story.writes) + 1, story.end, None)
    story.fences.append(Fence(1, fence))
    old = read_of(2, BLOCK, fence + 1, fence + 5, Value(1, len(story.writes)))
    since = fence + (3 if overlap else 7)
    new = read_of(3, BLOCK, since, since + 9, *dead.values)
    assert story.faults(dead, old, mirrored=mirrored) == []
    assert story.faults(dead, new, mirrored=mirrored) == []
    assert Rule.LATE in story.faults(dead, old, new, mirrored=mirrored)


def test_a_mirror_may_flicker_only_while_its_write_is_unfinished() -> None:
    write = write_of(1, BLOCK, 1, 10, 40)
    new, old = read_of(2, BLOCK, 12, 14, Value(1, 1)), read_of(2, BLOCK, 16, 18, INITIAL)
    assert check([write, new, old], mirrored=True) == []
    assert [fault.rule for fault in check([write, new, old])] == [Rule.UNREAD]
    too_late = replace(old, start_ns=41, end_ns=42)
    assert [fault.rule for fault in check([write, new, too_late], mirrored=True)] == [Rule.STALE]


# --- the search


def some_history(dice: Random, writers: int, most: int) -> tuple[list[Operation], list[Fence]]:
    """Operations of a few instants with any values: some are possible and some are not."""
    generations = dict.fromkeys(range(1, writers + 1), 0)
    over = dict.fromkeys(range(1, writers + 1), 0)
    operations: list[Operation] = []
    for _ in range(dice.randint(1, most)):
        node = dice.randint(1, writers)
        start = over[node] + dice.randint(1, 6)
        end = start + dice.randint(0, 8)
        if dice.random() < 0.5:
            generations[node] += 1
            over[node] = end if dice.random() < 0.8 else start
            answered = dice.random() < 0.6
            operations.append(write_of(node, BLOCK, generations[node], start, end if answered else None))
        else:
            written = [value for each in operations for value in each.values if value]
            start = dice.randint(0, 16)
            value = dice.choice([INITIAL, *written])
            operations.append(read_of(4, BLOCK, start, start + dice.randint(0, 6), value))
    fences = [Fence(dice.randint(1, writers), dice.randint(1, 20)) for _ in range(dice.randint(0, 3))]
    return operations, fences


def accesses_of(operations: Sequence[Operation], fences: Sequence[Fence]) -> list[Access]:
    return [
        Access(
            each.action is Action.WRITE,
            each.start_ns,
            each.end_ns,
            each.value_of(0) or INITIAL,
            min(
                (f.time_ns for f in fences if f.node == each.node and f.time_ns >= each.start_ns),
                default=None,
            ),
        )
        for each in operations
    ]


def explained(accesses: Sequence[Access]) -> bool:
    """By trying every order of every choice of the unanswered writes."""
    doubtful = [each for each in accesses if each.end_ns is None]
    sure = [each for each in accesses if each.end_ns is not None]
    for chosen in range(1 << len(doubtful)):
        picked = sure + [each for number, each in enumerate(doubtful) if chosen >> number & 1]
        if any(is_register(order) for order in permutations(picked)):
            return True
    return False


def is_register(order: Sequence[Access]) -> bool:
    value = INITIAL
    for number, each in enumerate(order):
        for later in order[number + 1 :]:
            end = later.end_ns if later.end_ns is not None else later.gone_ns
            if end is not None and end < each.start_ns:
                return False
            both_write = each.is_write and later.is_write and each.value.node == later.value.node
            if both_write and later.value.generation < each.value.generation:
                return False
        if each.is_write:
            value = each.value
        elif each.value != value:
            return False
    return True


@settings(deadline=None, max_examples=2000)
@given(dice)
def test_the_search_agrees_with_all_permutations(dice: Random) -> None:
    accesses = accesses_of(*some_history(dice, writers=3, most=6))
    assert (search(accesses, 10_000) is None) == explained(accesses)


@settings(deadline=None, max_examples=2000)
@given(dice, st.integers(1, 2))
def test_the_comparisons_agree_with_the_search(dice: Random, writers: int) -> None:
    operations, fences = some_history(dice, writers, most=14)
    stuck = search(accesses_of(operations, fences), 10_000)
    faults = check(operations, fences)
    assert bool(faults) == (stuck is not None)


@settings(deadline=None, max_examples=150)
@given(dice)
def test_nodes_that_write_at_once_are_searched(dice: Random) -> None:
    """Every node writes when it likes; what each sector held is what somebody's landing left."""
    landings: list[Landing] = []
    operations: list[Operation] = []
    for node in (1, 2, 3):
        now = 0
        for generation in range(1, dice.randint(2, 5)):
            start = now + dice.randint(1, 3 * SCALE)
            now = start + dice.randint(1, 4 * SCALE)
            landings.append((dice.randint(start, now - 1), len(landings), Value(node, generation)))
            operations.append(write_of(node, BLOCK, generation, start, now))
    for _ in range(20):
        since = dice.randint(0, 20 * SCALE)
        until = since + dice.randint(1, 2 * SCALE)
        value = value_at(landings, dice.randint(since + 1, until))
        operations.append(read_of(4, BLOCK, since, until, value))
    assert check(operations) == []
    last = max(each.end_ns or 0 for each in operations)
    final = value_at(landings, NEVER)
    end = [read_of(4, BLOCK, last + 1, last + 2, final), read_of(4, BLOCK, last + 3, last + 4, Value(1, 1))]
    assume(final != Value(1, 1))
    (fault,) = check([*operations, *end])
    assert fault.rule is (Rule.STALE if in_turn(operations) else Rule.ORDER)


def in_turn(operations: Sequence[Operation]) -> bool:
    writes = sorted((each for each in operations if each.action is Action.WRITE), key=lambda w: w.start_ns)
    return all((one.end_ns or 0) < two.start_ns for one, two in pairwise(writes))


def test_generations_that_do_not_grow_have_no_order_known_beforehand() -> None:
    writes = [write_of(1, BLOCK, 2, 0, 9), write_of(1, BLOCK, 1, 3, 7)]
    assert check([*writes, read_of(2, BLOCK, 10, 11, Value(1, 2))]) == []
    (fault,) = check([*writes, read_of(2, BLOCK, 10, 11, Value(1, 1))])
    assert fault.rule is Rule.ORDER


def test_the_fence_of_another_node_says_nothing() -> None:
    dead = write_of(1, BLOCK, 1, 10, None)
    reads = [read_of(2, BLOCK, 40, 41, INITIAL), read_of(2, BLOCK, 50, 51, Value(1, 1))]
    assert check([dead, *reads], [Fence(2, 30)]) == []
    assert [fault.rule for fault in check([dead, *reads], [Fence(1, 30)])] == [Rule.LATE]
    assert check([dead, *reads], [Fence(1, 5)]) == [], "that was before the write"


def test_too_many_writes_at_once_are_refused_not_guessed() -> None:
    writes = [write_of(node, BLOCK, 1, 0, 100) for node in range(1, 30)]
    reads = [read_of(50, BLOCK, 1 + 2 * node, 2 + 2 * node, Value(node, 1)) for node in (28, 3, 17)]
    with pytest.raises(TooConcurrent, match=f"block {BLOCK}: 29 writes overlap"):
        check([*writes, *reads], most_states=2000)


def test_dead_writes_that_nobody_read_cost_nothing() -> None:
    dead = [write_of(node, BLOCK, 1, 0, None) for node in range(1, 40)]
    reads = [read_of(50, BLOCK, 1, 2, Value(3, 1)), read_of(50, BLOCK, 3, 4, Value(17, 1))]
    assert check([*dead, *reads], most_states=20) == []


def test_two_writes_of_one_value_are_no_history() -> None:
    with pytest.raises(ValueError, match="same value"):
        check([write_of(1, BLOCK, 1, 0, 1), write_of(1, BLOCK, 1, 5, 6)])


# --- what people and logs see


def test_a_fault_is_drawn_as_time_lines() -> None:
    first, second = write_of(1, BLOCK, 1, 0, 1_000_000), write_of(1, BLOCK, 2, 2_000_000, 3_000_000)
    aside = read_of(3, BLOCK, 2_500_000, 4_500_000, Value(1, 2))
    stale = read_of(2, BLOCK, 4_000_000, 5_000_000, Value(1, 1))
    again = read_of(2, BLOCK, 6_000_000, 7_000_000, Value(1, 1))
    (fault,) = check([first, second, aside, stale, again])
    assert (fault.rule, fault.block, fault.more) == (Rule.STALE, BLOCK, 1)
    assert fault.operations == (stale, second, first)
    assert str(fault).splitlines() == [
        "block 7: node 2 read 1:1: older than a write that was acknowledged before the read began, "
        "and 1 more like it",
        " > node 1 write 1:1  |-----|                                        0.000 .. 1.000 ms",
        " > node 1 write 1:2              |-----------|                      2.000 .. 3.000 ms",
        "   node 3 read 1:2                     |-----------------|          2.500 .. 4.500 ms",
        " > node 2 read 1:1                                 |-----------|    4.000 .. 5.000 ms",
    ]


def test_a_history_comes_back_from_its_logs(tmp_path: Path) -> None:
    log = tmp_path / "1.records"
    writer, reads = LogWriter(log, 1), ReadLogWriter(log, 2)
    writer.append(Kind.ISSUED, [(3, 1), (4, 1)])
    writer.append(Kind.ACKNOWLEDGED, [(3, 1), (4, 1)])
    writer.append(Kind.ISSUED, [(3, 2)])
    writer.append(Kind.SEEN, [(3, 2)])
    torn = content(1, 4, 1)[:1024] + ZEROES[1024:4095] + b"!"
    reads.append(3, content(1, 3, 1) + torn + ZEROES + content(1, 3, 1), 10, 20)
    writer.close()
    reads.close()
    with reads_path(log).open("ab") as file:
        file.write(b"cut off")
    history = History.read_from_logs([log, tmp_path / "absent"])
    writes = [each for each in history.operations if each.action is Action.WRITE]
    assert [(w.block, *w.values, w.end_ns is None) for w in writes] == [
        (3, Value(1, 1), False),
        (4, Value(1, 1), False),
        (3, Value(1, 2), True),
    ]
    assert history.operations[3:] == [
        read_of(2, 3, 10, 20, Value(1, 1)),
        read_of(2, 4, 10, 20, *[Value(1, 1)] * 2, *[INITIAL] * 5, None),
        read_of(2, 5, 10, 20, INITIAL),
        read_of(2, 6, 10, 20, *[None] * 8),
    ]


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "1.records"
    log.touch()
    reads_path(log).write_bytes(bytes(96))
    with pytest.raises(ValueError, match="no record at byte 0"):
        History.read_from_logs([log])


@pytest.mark.needs("nbdkit")
def test_exercisers_record_what_they_read_of_each_other(tmp_path: Path) -> None:
    """One memory, two exercisers: a register. A block set back behind their backs shows, whoever reads it."""
    with nbdkit("memory", "256k") as (socket, _):
        logs = [tmp_path / f"{node}.records" for node in (1, 2)]
        reports = exercise(socket, logs, read_percent=20, cross_read_percent=40)
        assert all(report.errors == [] and report.cross_reads > 100 for report in reports)
        history = History.read_from_logs(logs)
        assert history.check() == []
        writes: dict[int, list[Operation]] = {}
        for each in history.operations:
            if each.action is Action.WRITE:
                writes.setdefault(each.block, []).append(each)
        assert all(in_turn(each) for each in writes.values()), "never two writes of a block in flight"
        reads = [each for each in history.operations if each.action is Action.READ]
        assert any(read.node == 2 and read.block < 16 and read.values[0] != INITIAL for read in reads)
        assert any(read.node == 1 and read.block >= 16 and read.values[0] != INITIAL for read in reads)
        with NbdClient(socket) as client:
            client.call(Command.WRITE, 5 * BLOCK_BYTES + 512, data=bytes(512))
        exercise(socket, logs, read_percent=0, flush_percent=0, cross_read_percent=100)
        faults = History.read_from_logs(logs).check()
        assert [(fault.rule, fault.block, fault.sectors) for fault in faults] == [(Rule.TORN, 5, (1,))]


@pytest.mark.needs("nbdkit")
def test_a_read_begins_before_it_is_sent(tmp_path: Path) -> None:
    """Else an answer that came while the send returned would look newer than it is."""
    sent: list[int] = []

    class Noting(NbdClient):
        def send(self, command: Command, *arguments: Any, **named: Any) -> int:
            if command is Command.READ:
                sent.append(time.monotonic_ns())
            return super().send(command, *arguments, **named)

    with nbdkit("memory", "256k") as (socket, _), Noting(socket) as client:
        plan = Plan(1, 0, 32, seconds=0.2, read_percent=50, cross_read_percent=49, max_blocks=1, depth=1)
        assert Exerciser(client, plan, tmp_path / "log").run().errors == []
    history = History.read_from_logs([tmp_path / "log"])
    began = [each.start_ns for each in history.operations if each.action is Action.READ]
    assert len(began) == len(sent) > 100
    assert all(start <= at for start, at in zip(began, sent, strict=True))


def exercise(socket: str, logs: Sequence[Path], **mix: int) -> list[Report]:
    """Two exercisers at once, each with half of 32 blocks."""
    reports: list[Report] = []

    def run(node: int, log: Path) -> None:
        with NbdClient(socket) as client:
            plan = Plan(node, 16 * node - 16, 16 * node, seconds=0.5, depth=4, cross_blocks=(0, 32), **mix)
            reports.append(Exerciser(client, plan, log).run())

    threads = [Thread(target=run, args=(node, log)) for node, log in enumerate(logs, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports
