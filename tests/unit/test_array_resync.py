"""A resync among others: what is taken over meanwhile is copied as well; neither it nor clients wait for long."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from array_kit import Client, data_of, make_images, poke, running

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
    merged: list[int] = []
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


async def write_until(over: asyncio.Event, client: Client, at: int, length: int) -> None:
    while not over.is_set():
        await client.write(at, bytes(length))


def test_clients_that_never_pause_do_not_keep_a_resync_waiting(tmp_path: Path) -> None:
    """Overlapping writes, so that there is no moment at which the range is free by itself."""
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths) as (array, client):
            await asyncio.wait_for(array.idle(), 20)
            over = asyncio.Event()
            writers = [asyncio.create_task(write_until(over, client, 4096 * at, 8192)) for at in range(15)]
            await client.write(0, bytes(4096))
            array.state.the_bitmap().mark([0])
            array.resync.wake()
            try:
                await asyncio.wait_for(array.idle(), 5)
            finally:
                over.set()
                await asyncio.gather(*writers)

    asyncio.run(story())


def test_a_window_is_copied_in_the_time_that_its_size_was_made_for(tmp_path: Path) -> None:
    """A copy that yields to clients announces less, not the same for longer: others cannot write in the window."""
    paths = make_images(tmp_path, assume_clean=False)
    trace = Trace()
    opened_s = 0.0
    open_s: list[float] = []

    def listen(name: str, _: dict[str, Any]) -> None:
        nonlocal opened_s
        if name == "resync.window":
            opened_s = asyncio.get_running_loop().time()
        elif name == "resync.copied":
            open_s.append(asyncio.get_running_loop().time() - opened_s)

    trace.listen(listen)

    async def story() -> None:
        async with running(paths, trace=trace, limits=lambda: (4000, 50000)) as (array, client):
            over = asyncio.Event()
            writer = asyncio.create_task(write_until(over, client, 0, 4096))
            try:
                await asyncio.wait_for(array.idle(), 20)
            finally:
                over.set()
                await writer

    asyncio.run(story())
    assert len(open_s) > 2, "clients were there, so the copy was to go slowly"
    assert max(open_s) < 1.0
