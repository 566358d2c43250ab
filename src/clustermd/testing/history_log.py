"""What an exerciser read, and when: the second half of a history, beside its `write_log`.

`write_log` tells of each write when it was issued and when it was answered. Here each block of each answered read
is one fixed record: who asked, start, end, and whose generation it held. The records lie in a file of their own
(`reads_path`), so that whoever counts or follows the records of writes finds only those. A read that was never
answered tells nothing and leaves nothing.

A block that is not exactly what one write leaves is kept as one digest a sector. What those sectors are is found
when the history is read, because only then all writes to the block are known: a torn block shows which
sectors are old and which are new, anything else shows as no write's content.

Start is taken before the request is sent and end after its answer came, on CLOCK_MONOTONIC, so the true time of
the operation lies between them on one machine. Logs of several machines must not be mixed.
"""

from __future__ import annotations

import enum
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, content, parse
from clustermd.testing.write_log import Kind, Record, read_log

SECTOR_BYTES = 512
SECTORS = BLOCK_BYTES // SECTOR_BYTES

_RECORD = struct.Struct(
    "<HBxIIIQQQQ"
)  # magic, part, reader, writer, pad, block, generation or digest, start, end
_MAGIC = 0x4C52
_WHOLE = 0  # else the number of a sector, from 1


class Value(NamedTuple):
    """Which node's how manieth write. `INITIAL` is what was there before any."""

    node: int
    generation: int

    def __str__(self) -> str:
        return f"{self.node}:{self.generation}" if self.generation else "0"


INITIAL = Value(0, 0)


class Action(enum.Enum):
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Operation:
    """A read or a write of one block by a client of `node`. Times are in ns; `end_ns` None: never answered well.

    `values` is one value for a whole block, or one for each of its 8 sectors; None is content that nobody's
    write of this block leaves. A write has one value, with its own node in it.
    """

    action: Action
    node: int
    block: int
    start_ns: int
    end_ns: int | None
    values: tuple[Value | None, ...]

    def value_of(self, sector: int) -> Value | None:
        """What the sector (0 to 7) holds by this operation."""
        return self.values[sector] if len(self.values) > 1 else self.values[0]

    def __str__(self) -> str:
        texts = ["?" if value is None else str(value) for value in self.values]
        runs: list[list[str]] = []
        for text in texts:
            if runs and runs[-1][0] == text:
                runs[-1].append(text)
            else:
                runs.append([text])
        shown = " ".join(run[0] + (f"×{len(run)}" if len(texts) > 1 else "") for run in runs)
        return f"node {self.node} {self.action.value} {shown}"


def write_of(node: int, block: int, generation: int, start_ns: int, end_ns: int | None) -> Operation:
    """A write; `end_ns` None when it was not answered, or with an error."""
    return Operation(Action.WRITE, node, block, start_ns, end_ns, (Value(node, generation),))


def read_of(node: int, block: int, start_ns: int, end_ns: int, *values: Value | None) -> Operation:
    """A read that returned one value, or eight."""
    return Operation(Action.READ, node, block, start_ns, end_ns, values)


def reads_path(log: str | Path) -> Path:
    """Where the reads stand of the exerciser with that log of writes."""
    return Path(f"{log}.reads")


class ReadLogWriter:
    """Appends the blocks of answered reads; each call is one write(2)."""

    def __init__(self, log: str | Path, node: int) -> None:
        self._node = node
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(reads_path(log), flags, 0o600)

    def append(self, first_block: int, data: bytes, start_ns: int, end_ns: int) -> None:
        """Record what a read of whole blocks returned."""
        records = b"".join(
            _RECORD.pack(_MAGIC, part, self._node, writer, 0, block, number, start_ns, end_ns)
            for at in range(0, len(data), BLOCK_BYTES)
            for block in (first_block + at // BLOCK_BYTES,)
            for part, writer, number in _parts(block, data[at : at + BLOCK_BYTES])
        )
        if records and os.write(self._file, records) != len(records):
            raise OSError("short write to the log of an exerciser's reads")

    def close(self) -> None:
        os.close(self._file)


def _parts(block: int, data: bytes) -> list[tuple[int, int, int]]:
    """(part, writer, generation) of a whole block, or (part, 0, digest) of each sector of any other."""
    if data == ZEROES:
        return [(_WHOLE, 0, 0)]
    identity = parse(data)
    if identity is not None and identity.block == block:
        return [(_WHOLE, identity.node, identity.generation)]
    return [(sector + 1, 0, digest) for sector, digest in enumerate(_digests(data))]


def _digests(data: bytes) -> list[int]:
    sectors = (data[at : at + SECTOR_BYTES] for at in range(0, BLOCK_BYTES, SECTOR_BYTES))
    return [int.from_bytes(hashlib.blake2b(sector, digest_size=8).digest(), "little") for sector in sectors]


def operations_of_logs(paths: Iterable[str | Path]) -> Iterator[Operation]:
    """All writes and reads of the exercisers with these logs of writes; a log that does not exist is empty.

    Raises ValueError where a log holds something else. A record cut off at the end is left out.
    """
    paths = [path for path in paths if Path(path).exists()]
    written: dict[int, list[Value]] = {}
    for path in paths:
        for operation in _writes(read_log(path), path):
            written.setdefault(operation.block, [INITIAL]).extend(
                value for value in operation.values if value
            )
            yield operation
    for path in paths:
        if reads_path(path).exists():
            yield from _reads(reads_path(path), written)


def _writes(records: Iterable[Record], path: str | Path) -> Iterator[Operation]:
    begun: dict[tuple[int, int], Record] = {}
    for record in records:
        key = (record.block, record.generation)
        if record.kind is Kind.ISSUED:
            begun[key] = record
        elif record.kind is Kind.ACKNOWLEDGED:
            issued = begun.pop(key, None)
            if issued is None:
                raise ValueError(f"{path}: an answer to a write that was not issued: {record}")
            yield write_of(record.node, record.block, record.generation, issued.time_ns, record.time_ns)
    for record in begun.values():
        yield write_of(record.node, record.block, record.generation, record.time_ns, None)


def _reads(path: Path, written: dict[int, list[Value]]) -> Iterator[Operation]:
    data = path.read_bytes()
    parts: list[int] = []
    sectors: dict[int, list[dict[int, Value]]] = {}
    for offset in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        magic, part, reader, writer, _, block, number, start_ns, end_ns = _RECORD.unpack_from(data, offset)
        if magic != _MAGIC or part not in (_WHOLE, len(parts) + 1):
            raise ValueError(f"{path}: no record at byte {offset}")
        if part == _WHOLE:
            yield read_of(reader, block, start_ns, end_ns, Value(writer, number) if number else INITIAL)
            continue
        parts.append(number)
        if part == SECTORS:
            if block not in sectors:
                sectors[block] = _known_sectors(block, written.get(block, [INITIAL]))
            found = [known.get(digest) for known, digest in zip(sectors[block], parts, strict=True)]
            parts = []
            yield read_of(reader, block, start_ns, end_ns, *found)


def _known_sectors(block: int, values: Iterable[Value]) -> list[dict[int, Value]]:
    """For each sector of the block: whose write leaves which digest."""
    known: list[dict[int, Value]] = [{} for _ in range(SECTORS)]
    for value in values:
        for sector, digest in enumerate(_digests(content(value.node, block, value.generation))):
            known[sector][digest] = value
    return known
