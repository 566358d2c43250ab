"""Storage boxes and one node's way to them: simulated disks.

A `Box` is one disk that all nodes share. It has a volatile cache: what a read returns is the newest that landed, what
a power loss leaves is, sector by sector, anything between what was last covered by a flush or FUA and the newest.
A `Path` is one node's way to a box (a `MemberDevice`): it can be slow, stuck, broken, or cut off by fencing, for that
node alone; each such fault is a `Trouble`. What travels on it is an `Io`, and who sends it is `submitter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clustermd.device.member_device import Buffer, Op, Target
from clustermd.testing.simulator.dice import Dice

if TYPE_CHECKING:
    from clustermd.testing.simulator.submitter import SimSubmitter

SECTOR = 512


class Watcher:
    """Who is told what happens at the boxes; a run's model and rules. Does nothing by itself."""

    def landed(self, io: Io, sectors: Sequence[int]) -> None:
        """A write or discard changed `sectors` (of the box) of `io.box`."""

    def submitted(self, io: Io) -> None:
        """A request passed its gate."""


@dataclass(slots=True, eq=False)
class Io:
    """One request on its way. `owner` is the incarnation that sent it."""

    submitter: SimSubmitter
    path: Path
    op: Op
    offset_bytes: int
    length_bytes: int
    buffer: Buffer | None
    buffer_offset: int
    target: Target
    tag: int
    fua: bool
    gone: bool = False
    ghost: bytes = b""

    @property
    def box(self) -> Box:
        return self.path.box

    @property
    def lo(self) -> int:
        return self.offset_bytes // SECTOR

    @property
    def hi(self) -> int:
        return (self.offset_bytes + self.length_bytes) // SECTOR

    def data(self) -> memoryview | bytes:
        if self.ghost:
            return self.ghost
        assert self.buffer is not None
        return self.buffer.view[self.buffer_offset : self.buffer_offset + self.length_bytes]


class Box:
    """One shared disk of `size_sectors`."""

    def __init__(self, name: str, size_sectors: int, dice: Dice, watcher: Watcher) -> None:
        self.name = name
        self.size_sectors = size_sectors
        self.data = bytearray(size_sectors * SECTOR)
        self.older: dict[int, list[bytes]] = {}  # sector -> what it was, from the last durable content on
        self.powered = True
        self.bad_sectors: set[int] = set()
        self.watcher = watcher
        self._fate = dice.stream("fate")

    def sector(self, number: int) -> bytes:
        return bytes(self.data[number * SECTOR : (number + 1) * SECTOR])

    def durable_sector(self, number: int) -> bytes:
        """What a power loss is sure to leave, unless something newer survives."""
        older = self.older.get(number)
        return older[0] if older else self.sector(number)

    def write(self, io: Io, sectors: Sequence[int]) -> None:
        """Let `sectors` of a write or discard land."""
        first = io.lo
        content = io.data() if io.op is Op.WRITE else None
        data = self.data
        if io.fua:
            for number in sectors:
                self.older.pop(number, None)
        else:
            for number in sectors:
                kept = self.older.setdefault(number, [])
                kept.append(bytes(data[number * SECTOR : (number + 1) * SECTOR]))
        if len(sectors) == io.hi - first:
            data[io.offset_bytes : io.offset_bytes + io.length_bytes] = (
                content if content is not None else bytes(io.length_bytes)
            )
        else:
            for number in sectors:
                at = (number - first) * SECTOR
                piece = content[at : at + SECTOR] if content is not None else bytes(SECTOR)
                data[number * SECTOR : (number + 1) * SECTOR] = piece
        if self.bad_sectors:
            self.bad_sectors.difference_update(sectors)
        self.watcher.landed(io, sectors)

    def flush(self) -> None:
        """Everything that has landed is durable."""
        self.older.clear()

    def lose_power(self) -> None:
        """Of each sector that nothing covered any version survives."""
        for number in sorted(self.older):
            versions = self.older[number]
            pick = self._fate.below(len(versions) + 1)
            if pick < len(versions):
                self.data[number * SECTOR : (number + 1) * SECTOR] = versions[-1 - pick]
        self.older.clear()


@dataclass(slots=True, eq=False)
class Trouble:
    """A fault of one path: for requests of these kinds that touch [lo, hi) sectors of the box.

    `error` fails them; `after` lets a write land first (a late error) or in part; `stuck` keeps them until `Path.well`;
    `slow_s` is added to every latency. `times` 0 means for ever.
    """

    ops: tuple[Op, ...] = (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD)
    lo: int = 0
    hi: int = 1 << 62
    error: int = 0
    after: bool = False
    stuck: bool = False
    slow_s: float = 0.0
    times: int = 0

    def means(self, io: Io) -> bool:
        if io.op not in self.ops:
            return False
        return io.op is Op.FLUSH or (io.lo < self.hi and io.hi > self.lo)


class Path:
    """One node's way to a box, opened by one array process. Implements `MemberDevice`."""

    logical_block_bytes = SECTOR
    read_only = False

    def __init__(self, box: Box, discard_zeroes: bool) -> None:
        self.box = box
        self.path = box.name
        self.size_sectors = box.size_sectors
        self.discard_zeroes = discard_zeroes
        self.closed = False
        self.fenced = False
        self.lost_path = False
        self.troubles: list[Trouble] = []
        self.stuck: list[Io] = []

    def close(self) -> None:
        self.closed = True

    def trouble_with(self, io: Io) -> Trouble | None:
        for trouble in self.troubles:
            if trouble.means(io):
                if trouble.times:
                    trouble.times -= 1
                    if not trouble.times:
                        self.troubles.remove(trouble)
                return trouble
        return None
