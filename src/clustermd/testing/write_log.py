"""What an exerciser knows it asked for and was told: an append-only log of fixed records.

A record is written by one plain `write(2)` to a file opened for append, so it survives the SIGKILL
of the exerciser and of every server. Three kinds:

- ISSUED, before the request is sent: from now on the block may hold this generation.
- ACKNOWLEDGED, after the reply and before the block is written again: from now on the block must
  hold this generation or a later issued one.
- SEEN, after a read that returned a generation nobody had acknowledged: what a client has read
  must not be un-read, so from now on it counts like an acknowledged one.

`Knowledge` is what follows from a log for each block; a judge and a resumed exerciser use the same.
"""

from __future__ import annotations

import enum
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_RECORD = struct.Struct("<BxHIQQQ")  # kind, pad, magic, node, block, generation, monotonic ns
_MAGIC = 0x4C43
RECORD_BYTES = _RECORD.size


class Kind(enum.IntEnum):
    ISSUED = 1
    ACKNOWLEDGED = 2
    SEEN = 3


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the log. `time_ns` is CLOCK_MONOTONIC, so that a test can order it with its own steps."""

    kind: Kind
    node: int
    block: int
    generation: int
    time_ns: int


class LogWriter:
    """Appends records; each call is one write(2)."""

    def __init__(self, path: str | Path, node: int) -> None:
        self._node = node
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self, kind: Kind, blocks: Iterable[tuple[int, int]]) -> None:
        """Record `(block, generation)` pairs."""
        now = time.monotonic_ns()
        data = b"".join(
            _RECORD.pack(kind, _MAGIC, self._node, block, generation, now) for block, generation in blocks
        )
        if data and os.write(self._file, data) != len(data):
            raise OSError("short write to the log of an exerciser")

    def close(self) -> None:
        os.close(self._file)


def read_log(path: str | Path) -> Iterator[Record]:
    """The records of a log, oldest first. A record cut off at the end was never followed by its step."""
    return records_of(Path(path).read_bytes(), path)


def records_of(data: bytes, path: str | Path) -> Iterator[Record]:
    """The records in a piece of a log; `path` is for errors."""
    for offset in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        kind, magic, node, block, generation, time_ns = _RECORD.unpack_from(data, offset)
        if magic != _MAGIC:
            raise ValueError(f"{path}: no record at byte {offset}")
        yield Record(Kind(kind), node, block, generation, time_ns)


@dataclass(slots=True)
class Knowledge:
    """What may stand in one block: any generation from `floor` to `issued`, written by `node`.

    `floor` is the last acknowledged or seen one; 0 means what was there before.
    """

    node: int
    floor: int = 0
    issued: int = 0

    @property
    def in_doubt(self) -> bool:
        """Whether a write was sent and not answered."""
        return self.issued > self.floor


def knowledge_of(records: Iterable[Record]) -> dict[int, Knowledge]:
    """What follows from the logs, per block. Raises ValueError when two nodes wrote one block."""
    known: dict[int, Knowledge] = {}
    for record in records:
        entry = known.get(record.block)
        if entry is None:
            entry = known[record.block] = Knowledge(record.node)
        if entry.node != record.node:
            raise ValueError(f"nodes {entry.node} and {record.node} both wrote block {record.block}")
        if record.kind is Kind.ISSUED:
            entry.issued = max(entry.issued, record.generation)
        else:
            entry.floor = max(entry.floor, record.generation)
    return known


def knowledge_of_logs(paths: Iterable[str | Path]) -> dict[int, Knowledge]:
    """`knowledge_of` for log files; a log that does not exist is empty."""
    return knowledge_of(record for path in paths if Path(path).exists() for record in read_log(path))
