"""The completion ring where its 32-bit counters wrap, in memory that plays the kernel."""

from __future__ import annotations

import struct

import pytest

from clustermd.device.ring import CQE, CQE_BYTES, CompletionRing

ENTRIES = 8
HEAD_AT, TAIL_AT, ENTRIES_AT = 0, 4, 64


class Kernel:
    """The other end: puts entries at the tail, may only use places that the head has passed."""

    def __init__(self, start: int) -> None:
        self.memory = bytearray(ENTRIES_AT + ENTRIES * CQE_BYTES)
        struct.pack_into("<II", self.memory, 0, start, start)
        self.tail = start
        self.ring = CompletionRing(memoryview(self.memory), HEAD_AT, TAIL_AT, ENTRIES_AT, ENTRIES, start)

    def room(self) -> int:
        head: int = struct.unpack_from("<I", self.memory, HEAD_AT)[0]
        return ENTRIES - ((self.tail - head) & 0xFFFFFFFF)

    def complete(self, number: int) -> None:
        assert self.room() > 0
        place = ENTRIES_AT + (self.tail % ENTRIES) * CQE_BYTES
        struct.pack_into("<Qi", self.memory, place, number, -number)
        self.tail = (self.tail + 1) & 0xFFFFFFFF
        struct.pack_into("<I", self.memory, TAIL_AT, self.tail)


@pytest.mark.parametrize("start", [0, 5, (1 << 32) - 21, (1 << 32) - 8, (1 << 32) - 1])
@pytest.mark.parametrize("step", range(1, ENTRIES + 1))
def test_each_completion_is_taken_once_in_order_across_the_wrap(start: int, step: int) -> None:
    kernel = Kernel(start)
    seen: list[tuple[int, int]] = []
    for number in range(0, 40 * step, step):
        for offset in range(step):
            kernel.complete(number + offset)
        seen.extend(CQE.iter_unpack(kernel.ring.take()))
        assert kernel.room() == ENTRIES
    assert seen == [(number, -number) for number in range(40 * step)]


def test_an_empty_ring_gives_nothing() -> None:
    kernel = Kernel((1 << 32) - 1)
    assert kernel.ring.take() == b""
    kernel.complete(1)
    assert len(kernel.ring.take()) == CQE_BYTES
    assert kernel.ring.take() == b""
