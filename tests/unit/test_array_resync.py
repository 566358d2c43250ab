"""A resync while more is taken over: chunks that come in behind it or under it are copied (again), and it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from array_kit import data_of, make_images, poke, running

from clustermd.array.array import Array
from clustermd.trace import Trace

CHUNK = 4 << 20


@pytest.mark.parametrize("when", ["resync.window", "resync.read"])
@pytest.mark.parametrize("chunk", [0, 3])
def test_what_is_taken_over_while_the_last_chunk_is_copied_is_copied_as_well(
    tmp_path: Path, when: str, chunk: int
) -> None:
    """The last chunk is cut short by the end of the array, as it nearly always is."""
    paths = make_images(tmp_path, chunk=CHUNK)
    size = len(data_of(paths[0]))
    last = size // CHUNK
    assert last == 3 and size % CHUNK
    trace = Trace()
    arrays: list[Array] = []
    merged = []
    windows = 0

    def listen(name: str, fields: dict[str, Any]) -> None:
        nonlocal windows
        windows += name == "resync.window"
        assert windows < 100, "it goes round and round"
        if name == when and fields["hi"] * 512 == size and not merged and arrays:
            # what another node left: it says that the halves may differ here, and they do
            merged.append(chunk)
            poke(paths[1], chunk * CHUNK + 512, b"stale" * 100)
            arrays[0].state.the_bitmap().mark([chunk])

    trace.listen(listen)

    async def story() -> None:
        async with running(paths, trace=trace) as (array, _):
            await asyncio.wait_for(array.idle(), 20)
            arrays.append(array)
            array.state.the_bitmap().mark([last])
            array.resync.wake()
            await asyncio.wait_for(array.idle(), 20)

    asyncio.run(story())
    assert merged
    assert data_of(paths[0]) == data_of(paths[1])
