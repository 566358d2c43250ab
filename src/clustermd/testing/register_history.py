"""Judges what clients of real nodes saw: was every block a register, from the first operation to the last?

Each 512-byte sector of each 4 KiB block is a register on its own: a disk writes sectors whole and
blocks not. A write of a block writes its 8 sectors, a read reads them, each at some instant between the operation's
start and end (linearizability, Herlihy and Wing 1990). A write that was not answered, or with an error, may
take effect at any later instant or never; but not after its node was fenced (`Fence`), and not after a later
write of its node to the block. So nothing but old or new can be read per sector, and a read that no
unfinished write overlaps is whole (md-cluster spec 9: acknowledged writes survive, unacknowledged ones are old or
new per sector, a fenced node's late write never lands).

Blocks written in turn have one order of writes, known beforehand: an exerciser's generations grow, and
when ownership moves the next owner starts after the last one's writes were answered or fenced. Then atomicity is, for
each read, three comparisons (proof: sort by value, writes first, reads by start; no operation then stands before
one that ended before it started):

- its value is not older than the last write that ended before it started (STALE, LATE, TORN),
- it is not newer than the newest write issued before it ended (EARLY, NEVER_WRITTEN),
- it is not older than what a read returned that ended before it started, on any node (UNREAD).

Blocks that nodes wrote at the same time get the general search (`register_search`), rule ORDER.

`mirrored`: a mirror promises less. While a write is unfinished one copy may be new and another old, and reads of
other nodes go to either; users of a shared disk do not read what another node is writing. With
`mirrored=True` the third comparison is left out, and an unanswered write may be read and un-read until its
node's fence, after which all must agree on it. Let a `Fence` then stand where takeover has ended.

What a history cannot prove:

- What nobody read. A lost write that no later read met, or that a later write covered, does not show; read all blocks
  at the end. A history says nothing about copies that no read happened to take: `judge.compare_halves` does.
- Durability: nothing here knows of power losses. Nor order between blocks: each block is judged alone.
- What happened between a request's start and its true effect. A stalled client makes operations long, long operations
  overlap more, and what overlaps is allowed more. A clean history under heavy stalls is weak.
- Anything across machines: times are one machine's monotonic clock.
- That the exerciser asked for what it logged: it is the witness, and is believed.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.testing.history_log import INITIAL, SECTORS, Action, Operation, operations_of_logs
from clustermd.testing.register_search import Access, TooConcurrent, search

MOST_STATES = 20_000
_COLUMNS = 48
_MOST_DRAWN = 14


class Rule(enum.Enum):
    """What an operation contradicts."""

    STALE = "older than a write that was acknowledged before the read began"
    TORN = "sectors of different writes although no write was under way"
    UNREAD = "older than what an earlier read had already returned"
    EARLY = "content of a write that was issued only after the read had ended"
    NEVER_WRITTEN = "content that no write to this block leaves"
    LATE = "after the fence of its node an unanswered write was there for one read and not for another"
    ORDER = "no order of the operations explains it"


@dataclass(frozen=True, slots=True)
class Fence:
    """From `time_ns` on no write can land any more that clients of `node` had issued before that time.

    `node` is the number the exerciser writes into its blocks.
    """

    node: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class HistoryFault:
    """The first break of one rule in one block. `operations`: the one at fault, then what it contradicts.

    `around` is what overlaps those; `more` counts further operations of the block that break the same rule.
    """

    rule: Rule
    block: int
    sectors: tuple[int, ...]
    operations: tuple[Operation, ...]
    around: tuple[Operation, ...] = ()
    more: int = 0

    def __str__(self) -> str:
        more = f", and {self.more} more like it" if self.more else ""
        sectors = "" if len(self.sectors) == SECTORS else f", sectors {', '.join(map(str, self.sectors))}"
        head = f"block {self.block}{sectors}: {self.operations[0]}: {self.rule.value}{more}"
        return f"{head}\n{draw(self.operations, self.around)}"


@dataclass(slots=True)
class History:
    """Operations of any blocks in any order, and when nodes were fenced."""

    operations: list[Operation] = field(default_factory=list)
    fences: list[Fence] = field(default_factory=list)

    @classmethod
    def read_from_logs(cls, paths: Iterable[str | Path]) -> History:
        """The history of the exercisers with these logs, reads included. Raises ValueError for a broken log."""
        return cls(list(operations_of_logs(paths)))

    def fence(self, node: int, time_ns: int) -> None:
        """Say that what clients of `node` had issued before `time_ns` can no longer land then."""
        self.fences.append(Fence(node, time_ns))

    def check(self, *, mirrored: bool = False) -> list[HistoryFault]:
        """`check` of all operations."""
        return check(self.operations, self.fences, mirrored=mirrored)


def check(
    records: Iterable[Operation],
    fences: Iterable[Fence] = (),
    *,
    mirrored: bool = False,
    most_states: int = MOST_STATES,
) -> list[HistoryFault]:
    """Every rule broken in every block, once; empty when each sector was a register all the time.

    Blocks hold `INITIAL` before the first operation. Raises TooConcurrent when nodes wrote a block so much at the
    same time that the search was given up, ValueError when two writes of a block have the same value.
    """
    blocks: dict[int, list[Operation]] = {}
    for operation in records:
        blocks.setdefault(operation.block, []).append(operation)
    fences = list(fences)
    return [
        fault
        for block in sorted(blocks)
        for fault in _Block(block, blocks[block], fences, mirrored, most_states).faults()
    ]


@dataclass(frozen=True, slots=True)
class _Break:
    rule: Rule
    sector: int
    operation: Operation
    against: tuple[Operation, ...]


class _Block:
    """One block's operations and what is known before they are judged."""

    def __init__(
        self, block: int, operations: list[Operation], fences: list[Fence], mirrored: bool, most_states: int
    ) -> None:
        self.block = block
        self.operations = sorted(operations, key=lambda operation: operation.start_ns)
        self.mirrored = mirrored
        self.most_states = most_states
        self.writes = [each for each in self.operations if each.action is Action.WRITE]
        self.reads = [each for each in self.operations if each.action is Action.READ]
        self.place = {value: number + 1 for number, each in enumerate(self.writes) for value in each.values}
        if len(self.place) < len(self.writes):
            raise ValueError(f"two writes of block {block} have the same value")
        self.place[INITIAL] = 0
        self.gone_ns = [_gone_ns(write, fences) for write in self.writes]

    def faults(self) -> list[HistoryFault]:
        whole = all(len(each.values) == 1 for each in self.reads)
        judge_sector = self._in_turn if self._written_in_turn() else self._at_once
        breaks: dict[tuple[Rule, int], list[_Break]] = {}
        for sector in range(1 if whole else SECTORS):
            for found in judge_sector(sector):
                breaks.setdefault((found.rule, id(found.operation)), []).append(found)
        first: dict[Rule, list[list[_Break]]] = {}
        for (rule, _), group in breaks.items():
            first.setdefault(rule, []).append(group)
        return [self._fault(rule, groups, whole) for rule, groups in first.items()]

    def _fault(self, rule: Rule, groups: list[list[_Break]], whole: bool) -> HistoryFault:
        group = min(groups, key=lambda group: group[0].operation.start_ns)
        involved = tuple(dict.fromkeys([group[0].operation, *(op for each in group for op in each.against)]))
        since = min(each.start_ns for each in involved)
        until = max(each.start_ns if each.end_ns is None else each.end_ns for each in involved)
        around = [
            each
            for each in self.operations
            if each not in involved
            and each.start_ns <= until
            and (since <= each.end_ns if each.end_ns is not None else each.start_ns >= since)
        ]
        sectors = tuple(range(SECTORS)) if whole else tuple(each.sector for each in group)
        drawn = tuple(around[-max(0, _MOST_DRAWN - len(involved)) :])
        return HistoryFault(rule, self.block, sectors, involved, drawn, len(groups) - 1)

    def _written_in_turn(self) -> bool:
        """Whether the writes have one order whatever happened: no two nodes wrote at the same time."""
        last: dict[int, int] = {}  # generation by node
        finished: dict[int, float] = {}  # by node: when its writes so far were over
        for write, gone_ns in zip(self.writes, self.gone_ns, strict=True):
            ((node, generation),) = [value for value in write.values if value]
            if generation <= last.get(node, 0):
                return False
            if any(until >= write.start_ns for other, until in finished.items() if other != node):
                return False
            over = write.end_ns if write.end_ns is not None else gone_ns
            last[node] = generation
            finished[node] = max(finished.get(node, 0), float("inf") if over is None else over)
        return True

    def _in_turn(self, sector: int) -> list[_Break]:
        """The three comparisons."""
        found: list[_Break] = []
        reads: list[tuple[Operation, int, int]] = []  # the read, its end, the place of its value
        for read in self.reads:
            value, end_ns = read.value_of(sector), read.end_ns
            assert end_ns is not None, "a read that was not answered is not part of a history"
            place = None if value is None else self.place.get(value)
            if place is None:
                found.append(_Break(Rule.NEVER_WRITTEN, sector, read, ()))
            else:
                reads.append((read, end_ns, place))
        starts = [write.start_ns for write in self.writes]
        ended = _Newest((end_ns, place) for end_ns, place, _ in self._ends(reads))
        settled = {place for _, place, by_fence in self._ends(reads) if by_fence}
        seen = _Newest((end_ns, place) for _, end_ns, place in reads)
        readers = {(end_ns, place): read for read, end_ns, place in reads}
        for read, end_ns, place in reads:
            least = ended.before(read.start_ns)
            if place > bisect_right(starts, end_ns):
                found.append(_Break(Rule.EARLY, sector, read, (self.writes[place - 1],)))
            elif least is not None and place < least[1]:
                rule = Rule.LATE if least[1] in settled else Rule.STALE
                if len(set(read.values)) > 1 and not self._overlaps_write(read):
                    rule = Rule.TORN
                against = (self.writes[least[1] - 1], *self.writes[place - 1 : place])
                if rule is Rule.LATE:
                    against += tuple(each for each, _, at in reads if at == least[1])[-1:]
                found.append(_Break(rule, sector, read, against))
            elif not self.mirrored:
                newest = seen.before(read.start_ns)
                if newest is not None and place < newest[1]:
                    against = (readers[newest], self.writes[newest[1] - 1], *self.writes[place - 1 : place])
                    found.append(_Break(Rule.UNREAD, sector, read, against))
        return found

    def _ends(self, reads: Sequence[tuple[Operation, int, int]]) -> list[tuple[int, int, bool]]:
        """(when, place, by a fence) of each write that is certainly over.

        An unanswered write that was read had taken effect, and so before its node's fence. On a mirror that
        counts for reads begun after the fence only: before it the read may have met one copy of two.
        """
        latest: dict[int, int] = {}
        for read, _, place in reads:
            latest[place] = max(latest.get(place, 0), read.start_ns)
        ends = []
        for place, (write, gone_ns) in enumerate(zip(self.writes, self.gone_ns, strict=True), 1):
            if write.end_ns is not None:
                ends.append((write.end_ns, place, False))
            elif gone_ns is not None and place in latest and (not self.mirrored or latest[place] > gone_ns):
                ends.append((gone_ns, place, True))
        return ends

    def _overlaps_write(self, read: Operation) -> bool:
        until = read.end_ns
        return any(
            (until is None or write.start_ns <= until)
            and (write.end_ns is None or write.end_ns >= read.start_ns)
            for write in self.writes
        )

    def _at_once(self, sector: int) -> list[_Break]:
        """The general search, for blocks that several nodes wrote at the same time."""
        found: list[_Break] = []
        accesses: list[Access] = []
        operations: list[Operation] = []
        gone = dict(zip(map(id, self.writes), self.gone_ns, strict=True))
        for each in self.operations:
            value = each.value_of(sector)
            if value is None or value not in self.place:
                found.append(_Break(Rule.NEVER_WRITTEN, sector, each, ()))
                continue
            is_write = each.action is Action.WRITE
            accesses.append(Access(is_write, each.start_ns, each.end_ns, value, gone.get(id(each))))
            operations.append(each)
        try:
            stuck = search(accesses, self.most_states)
        except TooConcurrent as error:
            raise TooConcurrent(f"block {self.block}: {error}") from None
        if stuck is not None:
            at = operations[stuck.at]
            source = [write for write in self.writes if write.value_of(sector) == at.value_of(sector)]
            against = [
                op for op in [*source, *(operations[number] for number in stuck.open_)] if op is not at
            ]
            found.append(_Break(Rule.ORDER, sector, at, tuple(against)))
        return found


class _Newest:
    """Which of (time, place) has the newest place among those before some time."""

    def __init__(self, items: Iterable[tuple[int, int]]) -> None:
        self._times: list[int] = []
        self._best: list[tuple[int, int]] = []
        for item in sorted(items):
            self._times.append(item[0])
            best = self._best[-1] if self._best and self._best[-1][1] >= item[1] else item
            self._best.append(best)

    def before(self, time_ns: int) -> tuple[int, int] | None:
        count = bisect_left(self._times, time_ns)
        return self._best[count - 1] if count else None


def _gone_ns(write: Operation, fences: list[Fence]) -> int | None:
    """When an unanswered write can no longer land."""
    return min(
        (f.time_ns for f in fences if f.node == write.node and f.time_ns >= write.start_ns), default=None
    )


def draw(operations: Sequence[Operation], around: Sequence[Operation] = ()) -> str:
    """Operations as time lines, those at fault marked with `>`. Columns keep order and overlap, not lengths."""
    rows = sorted([*operations, *around], key=lambda operation: operation.start_ns)
    times = sorted({time for row in rows for time in (row.start_ns, row.end_ns) if time is not None})
    step = max(1, _COLUMNS // max(1, len(times)))
    column = {time: number * step for number, time in enumerate(times)}
    width = column[times[-1]] + 2
    labels = [str(row) for row in rows]
    lines = []
    for row, label in zip(rows, labels, strict=True):
        first = column[row.start_ns]
        if row.end_ns is None:
            line = " " * first + "|" + "-" * (width - first - 1) + "?"
        else:
            last = max(column[row.end_ns], first + 1)
            line = " " * first + "|" + "-" * (last - first - 1) + "|"
        since = (row.start_ns - times[0]) / 1e6
        until = "not answered" if row.end_ns is None else f"{(row.end_ns - times[0]) / 1e6:.3f} ms"
        mark = ">" if row in operations else " "
        lines.append(f" {mark} {label:<{max(map(len, labels))}}  {line:<{width + 1}}  {since:.3f} .. {until}")
    return "\n".join(lines)
