"""Random operations through a submitter against a model in memory.

Requests of one batch touch different blocks, since nobody promises an order among them; batches follow
each other.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.device.direct import open_member
from clustermd.device.member_device import Buffer, Gate, Op, Submitter
from clustermd.device.threads import ThreadSubmitter
from clustermd.device.uring import UringSubmitter

BLOCKS = 64
BLOCK_BYTES = 512

MAKE: dict[str, Callable[[asyncio.AbstractEventLoop, Gate], Submitter]] = {
    "uring": lambda loop, gate: UringSubmitter(loop, gate, 16 << 20),
    "small ring": lambda loop, gate: UringSubmitter(loop, gate, 16 << 20, entries=2, completion_entries=4),
    "threads": lambda loop, gate: ThreadSubmitter(loop, gate, 16 << 20, threads=2),
}

operations = st.tuples(
    st.sampled_from([Op.READ, Op.WRITE, Op.WRITE, Op.FLUSH, Op.DISCARD]),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 9),
    st.integers(0, 3),
    st.booleans(),
)
# a batch may meet a held gate, which opens after it was queued, or a shut one
batches = st.tuples(st.lists(operations, max_size=12), st.sampled_from(["open", "open", "held", "shut"]))


class Collector:
    def __init__(self) -> None:
        self.results: dict[int, int] = {}
        self.more = asyncio.Event()

    def io_done(self, tag: int, result: int) -> None:
        assert tag not in self.results
        self.results[tag] = result
        self.more.set()

    async def all(self, count: int) -> None:
        while len(self.results) < count:
            self.more.clear()
            await self.more.wait()


async def play(
    make: Callable[[asyncio.AbstractEventLoop, Gate], Submitter],
    path: str,
    story: list[tuple[list[tuple[Op, int, int, int, bool]], str]],
) -> None:
    model = bytearray(BLOCKS * BLOCK_BYTES)
    device = open_member(path)
    gate = Gate()
    submitter = make(asyncio.get_running_loop(), gate)
    stamp = 0
    for batch, mood in story:
        collector = Collector()
        touched: set[int] = set()
        expected: list[tuple[Op, int, int, int, Buffer]] = []
        if mood != "open":
            gate.hold("test")
        if mood == "shut":
            gate.shut("test")
        for op, block, count, skip, fua in batch:
            count = min(count, BLOCKS - block)
            blocks = set(range(block, block + count))
            if op is not Op.FLUSH and blocks & touched:
                continue
            if op is not Op.FLUSH:
                touched |= blocks
            offset, length, at = block * BLOCK_BYTES, count * BLOCK_BYTES, skip * BLOCK_BYTES
            buffer = submitter.pool.take(at + length)
            stamp += 1
            content = stamp.to_bytes(4, "little") * (length // 4)
            buffer.view[at : at + length] = content
            if mood != "shut" and op is Op.WRITE:
                model[offset : offset + length] = content
            if mood != "shut" and op is Op.DISCARD:
                model[offset : offset + length] = bytes(length)
            submitter.queue(device, op, offset, length, buffer, at, collector, len(expected), fua)
            expected.append((op, offset, length, at, buffer))
        submitter.submit()
        if mood == "held":
            assert submitter.in_flight == 0
            gate.open()
        await collector.all(len(expected))
        for tag, (op, offset, length, at, buffer) in enumerate(expected):
            moved = length if op in (Op.READ, Op.WRITE) else 0
            assert collector.results[tag] == (moved if mood != "shut" else -108)
            if op is Op.READ and mood != "shut":
                assert buffer.view[at : at + length] == model[offset : offset + length]
            buffer.release()
        if mood == "shut":
            gate.renew()
    await submitter.close()
    device.close()
    assert Path(path).read_bytes() == bytes(model)


@pytest.mark.parametrize("kind", list(MAKE))
@settings(max_examples=40, deadline=None)
@given(story=st.lists(batches, max_size=8))
def test_a_device_does_what_the_model_does(
    kind: str, story: list[tuple[list[tuple[Op, int, int, int, bool]], str]]
) -> None:
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(BLOCKS * BLOCK_BYTES)
        asyncio.run(asyncio.wait_for(play(MAKE[kind], image.name, story), 30))
