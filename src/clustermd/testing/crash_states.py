"""Other states a crash could have left, made on purpose.

A node that dies in the middle of a write to two disks may leave the halves of the mirror different:
one disk got the write, the other did not. A SIGKILL alone seldom does, because the kernel finishes
what it was handed. Yet the state is legal, and it is the one that repair after a crash exists for.
So while the survivors are held, `make_halves_differ` rewrites what the dead node had in flight:
of each write that was sent and not answered, one half gets the old content and the other the new.

It changes only what the crash itself left open, and checks that before the first byte is written:

- the block is in doubt: its last write was issued and never acknowledged, and never seen by a read;
- a bit of the dead node's bitmap on the disks covers it. A node sets the bit before it writes data,
  so under a clear bit no half could have been new while the other was old;
- what each half holds now is one of the allowed generations.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from clustermd.testing.blocks import BLOCK_BYTES, content
from clustermd.testing.judge import judge_block
from clustermd.testing.write_log import Knowledge


@dataclass(frozen=True, slots=True)
class Change:
    """One half of one block was given another allowed generation."""

    path: str
    block: int
    chunk: int
    generation: int


class IllegalState(Exception):
    """What stands on the disks is not what this crash could have left; nothing was changed."""


def in_doubt_under_dirty_bits(
    known: dict[int, Knowledge], dirty_chunks: Collection[int], chunk_bytes: int
) -> dict[int, Knowledge]:
    """The blocks whose last write was never answered and whose chunk is dirty."""
    dirty = frozenset(dirty_chunks)
    return {
        block: entry
        for block, entry in known.items()
        if entry.in_doubt and block * BLOCK_BYTES // chunk_bytes in dirty
    }


def make_halves_differ(
    known: dict[int, Knowledge],
    paths: Sequence[str | Path],
    data_offset_bytes: int,
    dirty_chunks: Collection[int],
    chunk_bytes: int,
) -> list[Change]:
    """Give the halves different, legal contents wherever the crash left that open.

    `known` is what the dead node's exerciser knew, `dirty_chunks` the bits of the dead node's slot.
    The odd blocks get the old content (the floor) on the first half, the even ones on the second;
    the other half gets the newest issued one. Returns what was rewritten, which may be nothing.
    Raises IllegalState, before anything is written, when a half holds what it cannot hold.
    """
    files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
    try:
        changes: list[tuple[int, Change, bytes]] = []
        for block, entry in sorted(in_doubt_under_dirty_bits(known, dirty_chunks, chunk_bytes).items()):
            offset = data_offset_bytes + block * BLOCK_BYTES
            stale = 0 if block % 2 else 1
            for half, (file, path) in enumerate(zip(files, paths, strict=True)):
                now = os.pread(file, BLOCK_BYTES, offset)
                fault = judge_block(block, entry, now)
                if fault is not None:
                    raise IllegalState(f"{path}: {fault}")
                generation = entry.floor if half == stale else entry.issued
                wanted = content(entry.node, block, generation)
                if wanted != now:
                    chunk = block * BLOCK_BYTES // chunk_bytes
                    changes.append((file, Change(str(path), block, chunk, generation), wanted))
        for file, change, wanted in changes:
            os.pwrite(file, wanted, data_offset_bytes + change.block * BLOCK_BYTES)
        for file in files:
            os.fsync(file)
        return [change for _, change, _ in changes]
    finally:
        for file in files:
            os.close(file)
