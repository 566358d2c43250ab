"""The model: what may stand in every sector, given what clients asked for and were told.

Each write has a number, its *generation*, and every sector it writes says which sector of which generation it is. For
each sector the model knows the generations that may be read there. A write that is issued adds its own. A write that
is acknowledged takes out all whose writes had *closed* before it was issued. A write closes when it is answered, or,
if its process died, when that process is proved dead and every living node knows of it: until then it may still land.
One that was refused since its node was excluded, or that its node still had when all had gone on, never may (`landed`).
A read returns what may stand there at some time between its start and its end; once everything is closed, what one
reader saw, all see from then on.

A second set a sector holds what a loss of power at the boxes may leave: there a write takes older ones out only when
it is durable, by FUA or by a flush that was answered after it (design 7, rule 19).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from clustermd.array.state import EXCLUDED
from clustermd.testing.simulator.boxes import SECTOR

_HEAD = struct.Struct("<QQ")
_REPEAT = SECTOR // _HEAD.size
_ZEROES = bytes(SECTOR)


def content(lo: int, hi: int, generation: int) -> bytes:
    """Sectors [lo, hi) of a write."""
    pack = _HEAD.pack
    return b"".join(pack(sector, generation) * _REPEAT for sector in range(lo, hi))


def generation_of(data: bytes | bytearray | memoryview, sector: int) -> int | None:
    """Whose sector this is; 0 for zeroes, None if it is no whole sector of any write to this place."""
    if data == _ZEROES:
        return 0
    head = bytes(data[: _HEAD.size])
    place, generation = _HEAD.unpack(head)
    if place != sector or data != head * _REPEAT:
        return None
    return int(generation)


class ModelBroken(Exception):
    """A reader, or a disk, shows what cannot be there."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule
        self.message = message


@dataclass(slots=True, eq=False)
class Write:
    """One write, discard or writing of zeroes, of sectors [lo, hi). `closed` is 0 while it may still land."""

    generation: int
    node: str
    lo: int
    hi: int
    fua: bool
    zeroes: bool
    perhaps: bool  # a discard may leave what was there
    issued: int
    closed: int = 0
    acknowledged: int = 0
    barred: bool = False  # nothing of it may land any more


@dataclass(slots=True, eq=False)
class Read:
    """A read in flight with what it may return, sector by sector."""

    lo: int
    hi: int
    started: int
    may: list[frozenset[int]]
    also: set[int] = field(default_factory=set)


class Model:
    """See the module. `now` counts the events of the model."""

    def __init__(self, sectors: int) -> None:
        first = frozenset((0,))
        self.may: list[frozenset[int]] = [first] * sectors
        self.durable: list[frozenset[int]] = [first] * sectors
        self.writes: dict[int, Write] = {0: Write(0, "", 0, sectors, True, True, False, 0, closed=1)}
        self.zero_generations = {0}
        self.open: dict[int, Write] = {}
        self.unflushed: dict[str, list[Write]] = {}
        self.reads: dict[int, Read] = {}
        self.tentative: dict[
            int, tuple[frozenset[int], frozenset[int]]
        ] = {}  # sector -> (before, after) of a pin
        self.now = 1
        self.acknowledged = 0
        self.checked_sectors = 0

    def _tick(self) -> int:
        self.now += 1
        return self.now

    # --- writes -----------------------------------------------------------------------------------------

    def issue(
        self, node: str, lo: int, hi: int, *, fua: bool = False, zeroes: bool = False, perhaps: bool = False
    ) -> Write:
        generation = len(self.writes)
        write = Write(generation, node, lo, hi, fua, zeroes, perhaps, self._tick())
        self.writes[generation] = self.open[generation] = write
        if zeroes:
            self.zero_generations.add(generation)
        one = frozenset((generation,))
        for sector in range(lo, hi):
            self.may[sector] |= one
            self.durable[sector] |= one
        for read in self.reads.values():
            if read.lo < hi and read.hi > lo:
                read.also.add(generation)
        return write

    def answered(self, write: Write, error: int) -> None:
        """The client has its answer."""
        write.closed = self._tick()
        self.open.pop(write.generation, None)
        if error:
            write.barred = error == EXCLUDED
            return
        write.acknowledged = write.closed
        self.acknowledged += 1
        if write.perhaps:
            return
        self._settle(self.may, write)
        if write.fua:
            self._settle(self.durable, write)
        else:
            self.unflushed.setdefault(write.node, []).append(write)

    def _settle(self, table: list[frozenset[int]], write: Write) -> None:
        """Whatever had closed before `write` was issued is not there any more."""
        writes = self.writes
        issued = write.issued
        for sector in range(write.lo, write.hi):
            may = table[sector]
            if len(may) > 1 and write.generation in may:
                table[sector] = frozenset(
                    value
                    for value in may
                    if value == write.generation or not 0 < writes[value].closed < issued
                )

    def close(self, writes: Iterable[Write]) -> None:
        """These can land no more: their process is proved dead, and all know."""
        now = self._tick()
        for write in writes:
            if not write.closed:
                write.closed = now
                self.open.pop(write.generation, None)

    def bar(self, writes: Iterable[Write]) -> None:
        """These were asked of a life that others have gone on without: what has not landed yet never may."""
        for write in writes:
            write.barred = True

    def landed(self, data: bytes | bytearray | memoryview, sector: int) -> str:
        """A client's write lands from `sector` on; what is wrong with that, "" if nothing is."""
        write = self.writes.get(generation_of(data[:SECTOR], sector) or 0)
        if write is None or not write.barred:
            return ""
        return f"sector {sector} of {self._name(write.generation)} lands, and others had gone on without that life"

    def flush_issued(self, node: str) -> list[Write]:
        """What a flush of that node must make durable."""
        return self.unflushed.pop(node, [])

    def flush_answered(self, node: str, covered: list[Write], error: int) -> None:
        if error:
            self.unflushed.setdefault(node, []).extend(covered)
            return
        for write in covered:
            self._settle(self.durable, write)

    def power_lost(self) -> None:
        """All boxes and nodes lost power: what no flush covered may be older, sector by sector."""
        self.close(list(self.open.values()))
        self.unflushed.clear()
        self.may = list(self.durable)

    # --- reads ------------------------------------------------------------------------------------------

    def read_issued(self, number: int, lo: int, hi: int) -> Read:
        read = self.reads[number] = Read(lo, hi, self._tick(), self.may[lo:hi])
        return read

    def read_dropped(self, number: int) -> None:
        self.reads.pop(number, None)

    def read_answered(
        self, number: int, data: bytes | memoryview, pin: bool, undecided: bool = False
    ) -> None:
        """Raises ModelBroken. `pin`: all nodes knew of every death when it began; `undecided`: copies may still differ,
        so that what it saw goes with the member that it was read from, should that one fail now."""
        if not undecided:
            self.tentative.clear()
        read = self.reads.pop(number)
        now = self._tick()
        del now
        for place, sector in enumerate(range(read.lo, read.hi)):
            seen = self._check(
                data[place * SECTOR : (place + 1) * SECTOR],
                sector,
                read.may[place],
                read.also,
                "a client read",
            )
            if pin and len(self.may[sector]) > 1:
                self._pin(sector, seen, read.started)

    def _pin(self, sector: int, seen: frozenset[int], started: int) -> None:
        may = self.may[sector]
        writes = self.writes
        if seen & may and all(0 < writes[value].closed < started for value in may):
            self.may[sector] = seen & may
            self.tentative[sector] = (may, seen & may)

    def member_failed(self) -> None:
        """A first copy may be gone before the others were made equal to it."""
        for sector, (before, after) in self.tentative.items():
            if after <= self.may[sector]:
                self.may[sector] |= before
        self.tentative.clear()

    def _check(
        self,
        data: bytes | bytearray | memoryview,
        sector: int,
        may: frozenset[int],
        also: Iterable[int],
        who: str,
    ) -> frozenset[int]:
        self.checked_sectors += 1
        found = generation_of(data, sector)
        if found is None:
            raise ModelBroken(
                "torn-sector",
                f"{who} sees in sector {sector} what no write has put there: {bytes(data[:32]).hex()}",
            )
        allowed = may | frozenset(also)
        seen = (self.zero_generations if found == 0 else {found}) & allowed
        if not seen:
            raise ModelBroken(*self._words(sector, found, allowed, who))
        return frozenset(seen)

    def _words(self, sector: int, found: int, allowed: frozenset[int], who: str) -> tuple[str, str]:
        must = ", ".join(self._name(value) for value in sorted(allowed))
        newer = found < max(allowed)
        rule = "acknowledged-write-lost" if newer else "unasked-value"
        return rule, f"{who} sees in sector {sector} {self._name(found)}, where only {must} may be"

    def _name(self, generation: int) -> str:
        write = self.writes.get(generation)
        if write is None or generation == 0:
            return f"generation {generation}"
        state = "acknowledged" if write.acknowledged else "closed" if write.closed else "open"
        return f"generation {generation} ({write.node}, {state})"

    # --- disks ------------------------------------------------------------------------------------------

    def check_disk(self, who: str, data: bytes | bytearray | memoryview, first: int = 0) -> None:
        """Every sector of a copy that counts holds what may be there. Raises ModelBroken."""
        for place in range(len(data) // SECTOR):
            sector = first + place
            self._check(data[place * SECTOR : (place + 1) * SECTOR], sector, self.may[sector], (), who)
