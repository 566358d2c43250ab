"""The judge: says after a crash whether a block holds what it must.

The rule (spec md-cluster 9, "never lose an acknowledged write"): each block holds the last
acknowledged generation or a later issued one, written by the right node to the right place, whole.
Nothing else is allowed: not an older generation, not a mixture, not another block's content.

The judge reads blocks through a function, so the same judgement holds for an array over NBD and for
one half of a mirror in an image file. `compare_halves` needs no log: members of a mirror that are
in sync are equal, byte by byte.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, parse
from clustermd.testing.nbd_client import Command, NbdClient
from clustermd.testing.write_log import Knowledge, knowledge_of_logs

_PIECE_BYTES = 1 << 20
_SHOWN_FAULTS = 10


class Wrong(enum.Enum):
    """What is wrong with a block."""

    LOST = "an older generation: an acknowledged write is gone"
    TORN = "neither the old content nor the new: torn or foreign"
    MISPLACED = "the content of another block or node"
    UNASKED = "a generation nobody issued"


@dataclass(frozen=True, slots=True)
class Fault:
    """One block that holds what it must not; `floor` to `issued` are the generations it may hold."""

    wrong: Wrong
    node: int
    block: int
    floor: int
    issued: int
    found: int | None

    def __str__(self) -> str:
        found = "unreadable content" if self.found is None else f"generation {self.found}"
        return (
            f"block {self.block} of node {self.node} holds {found}, "
            f"allowed is {self.floor} to {self.issued}: {self.wrong.value}"
        )


@dataclass(slots=True)
class Verdict:
    """What the judge found. `in_doubt` counts blocks whose last write was sent and never answered."""

    blocks: int = 0
    acknowledged: int = 0
    in_doubt: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        head = f"{self.blocks} blocks judged, {self.acknowledged} acknowledged, {self.in_doubt} in doubt"
        if self.good:
            return f"{head}: all hold what they must"
        shown = "\n".join(f"  {fault}" for fault in self.faults[:_SHOWN_FAULTS])
        more = len(self.faults) - _SHOWN_FAULTS
        return f"{head}: {len(self.faults)} FAULTS\n{shown}" + (f"\n  and {more} more" if more > 0 else "")


def judge(logs: Iterable[str | Path], read_block: Callable[[int], bytes]) -> Verdict:
    """Judge every block the logs speak of. `read_block(block)` returns its 4096 bytes."""
    return judge_knowledge(knowledge_of_logs(logs), read_block)


def judge_knowledge(known: dict[int, Knowledge], read_block: Callable[[int], bytes]) -> Verdict:
    """`judge` for logs already read."""
    verdict = Verdict()
    for block in sorted(known):
        entry = known[block]
        verdict.blocks += 1
        verdict.acknowledged += entry.floor > 0
        verdict.in_doubt += entry.in_doubt
        fault = judge_block(block, entry, read_block(block))
        if fault is not None:
            verdict.faults.append(fault)
    return verdict


def judge_block(block: int, entry: Knowledge, data: bytes) -> Fault | None:
    """What is wrong with this content of one block, or None."""
    found: int | None
    if data == ZEROES:
        found = 0
    else:
        identity = parse(data)
        if identity is None:
            return Fault(Wrong.TORN, entry.node, block, entry.floor, entry.issued, None)
        found = identity.generation
        if (identity.node, identity.block) != (entry.node, block):
            return Fault(Wrong.MISPLACED, entry.node, block, entry.floor, entry.issued, found)
    if found < entry.floor:
        return Fault(Wrong.LOST, entry.node, block, entry.floor, entry.issued, found)
    if found > entry.issued:
        return Fault(Wrong.UNASKED, entry.node, block, entry.floor, entry.issued, found)
    return None


def nbd_reader(client: NbdClient) -> Callable[[int], bytes]:
    """Reads blocks through an NBD connection, a megabyte at a time."""
    return _pieces(lambda offset, length: client.call(Command.READ, offset, length), client.size_bytes)


def image_reader(path: str | Path, data_offset_bytes: int, size_bytes: int) -> Callable[[int], bytes]:
    """Reads array blocks from one half of a mirror: the data area of a member image."""
    data = Path(path).read_bytes()[data_offset_bytes : data_offset_bytes + size_bytes]
    return lambda block: data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


def compare_halves(paths: Sequence[str | Path], data_offset_bytes: int, size_bytes: int) -> list[int]:
    """The 4 KiB blocks in which the members' data areas differ, byte by byte; empty when all are equal."""
    files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
    differing: list[int] = []
    try:
        for offset in range(0, size_bytes, _PIECE_BYTES):
            length = min(_PIECE_BYTES, size_bytes - offset)
            first, *others = (os.pread(file, length, data_offset_bytes + offset) for file in files)
            if len(first) != length:
                raise ValueError(f"{paths[0]} ends before byte {data_offset_bytes + offset + length}")
            if all(other == first for other in others):
                continue
            for at in range(0, length, BLOCK_BYTES):
                piece = first[at : at + BLOCK_BYTES]
                if any(other[at : at + BLOCK_BYTES] != piece for other in others):
                    differing.append((offset + at) // BLOCK_BYTES)
    finally:
        for file in files:
            os.close(file)
    return differing


def _pieces(read: Callable[[int, int], bytes], size_bytes: int) -> Callable[[int], bytes]:
    """Block reads out of one piece kept in memory: a judge asks in ascending order."""
    start = -1
    piece = b""

    def read_block(block: int) -> bytes:
        nonlocal start, piece
        offset = block * BLOCK_BYTES
        if start < 0 or not start <= offset < start + len(piece):
            start = offset - offset % _PIECE_BYTES
            piece = read(start, min(_PIECE_BYTES, size_bytes - start))
        return piece[offset - start : offset - start + BLOCK_BYTES]

    return read_block
