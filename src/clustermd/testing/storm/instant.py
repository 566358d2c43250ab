"""What must hold on the disks at any instant, whoever is dead or stands still: looked at while nobody moves.

- A write that was acknowledged is on every member: each holds the acknowledged generation or a later issued one.
- Where members differ, some slot has the chunk's bit set, on every member.

At the end of a round later writes have covered most of what went wrong in between; here nothing has yet.
Requests that the kernel still has may land while we look, so a block whose last write is not answered may be torn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, parse
from clustermd.testing.disks import look
from clustermd.testing.write_log import RECORD_BYTES, Kind, records_of

_SHOWN = 5


@dataclass(slots=True)
class Ledger:
    """What one exerciser has issued and was told, read from its log as far as that goes; block -> generation."""

    log: Path
    node: int
    acknowledged: dict[int, int] = field(default_factory=dict)
    issued: dict[int, int] = field(default_factory=dict)
    _read_bytes: int = 0

    def read_on(self) -> None:
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self._read_bytes)
            data = file.read()
        data = data[: len(data) - len(data) % RECORD_BYTES]
        self._read_bytes += len(data)
        for record in records_of(data, self.log):
            if record.kind is Kind.ISSUED:
                self.issued[record.block] = record.generation
            elif record.kind is Kind.ACKNOWLEDGED:
                self.acknowledged[record.block] = record.generation


def faults_now(ledgers: Sequence[Ledger], disks: Sequence[str]) -> list[str]:
    """What is wrong on the disks at this instant, for people. Everybody is held."""
    for ledger in ledgers:
        ledger.read_on()
    stable = [dict(ledger.acknowledged) for ledger in ledgers]
    first = look(disks[0])
    halves = [_data(disk, first.data_offset_bytes, first.size_bytes) for disk in disks]
    for ledger in ledgers:
        ledger.read_on()
    found = [
        f"{path}: {wrong}"
        for path, half in zip(disks, halves, strict=True)
        for ledger, acknowledged in zip(ledgers, stable, strict=True)
        for wrong in _wrong_blocks(half, ledger, acknowledged)
    ]
    return found[:_SHOWN] + _uncovered(halves, disks, first.chunk_bytes)[:_SHOWN]


def _data(path: str, offset: int, length: int) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def _wrong_blocks(half: bytes, ledger: Ledger, acknowledged: dict[int, int]) -> list[str]:
    found = []
    for block, generation in acknowledged.items():
        data = half[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        issued = ledger.issued[block]
        identity = parse(data)
        if identity is None and data != ZEROES:
            if issued == generation:
                found.append(
                    f"block {block} is torn or foreign, though generation {generation} was acknowledged"
                )
            continue
        now = 0 if identity is None else identity.generation
        if identity is not None and (identity.node, identity.block) != (ledger.node, block):
            found.append(f"block {block} of node {ledger.node} holds {identity}")
        elif not generation <= now <= issued:
            found.append(
                f"block {block} of node {ledger.node} holds generation {now}; {generation} was acknowledged, "
                f"{issued} issued"
            )
    return found


def _uncovered(halves: Sequence[bytes], disks: Sequence[str], chunk_bytes: int) -> list[str]:
    """Chunks in which members differ and that no slot calls dirty on all of them."""
    first, *others = halves
    differing = [
        at // chunk_bytes
        for at in range(0, len(first), chunk_bytes)
        if any(other[at : at + chunk_bytes] != first[at : at + chunk_bytes] for other in others)
    ]
    slots = zip(*(disk.slots for disk in map(look, disks)), strict=True)
    covered = {chunk for slot in slots for chunk in set.intersection(*(set(area.dirty) for area in slot))}
    return [
        f"the members differ in chunk {chunk}, which no slot calls dirty on all of them"
        for chunk in differing
        if chunk not in covered
    ]
