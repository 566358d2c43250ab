"""Nodes of one cluster: joining, writing side by side, dying, taking over, leaving."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    clustered,
    data_of,
    dirty_chunks,
    poke,
    run,
    set_bits,
    superblock_of,
)
from cluster_in_process import cluster_of, settled

from clustermd.array.request import Kind
from clustermd.errors import LockRefused


def test_two_nodes_write_and_leave_clean_equal_members(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            assert [one.array.state.slot, two.array.state.slot] == [0, 1]
            await asyncio.gather(
                *(one.client.write(block * BLOCK, os.urandom(BLOCK)) for block in range(0, 512, 2)),
                *(two.client.write(block * BLOCK, os.urandom(BLOCK)) for block in range(1, 512, 2)),
            )
            assert dirty_chunks(paths[0], 0) == dirty_chunks(paths[1], 1) == list(range(32))
            assert await one.client.read(BLOCK, BLOCK) == await two.client.read(BLOCK, BLOCK)
            sent = one.array.status().counters["messages_sent"]
            await one.client.write(0, b"again" + bytes(BLOCK - 5))
            assert one.array.status().counters["messages_sent"] == sent

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    assert [dirty_chunks(paths[0], slot) for slot in range(4)] == [[]] * 4


def test_a_dead_nodes_chunks_are_copied_and_its_bitmap_cleared(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            await settled(cluster)
            for chunk in (0, 9, 17):
                await one.client.write(chunk * CHUNK, b"1" * BLOCK)
            await cluster.kill(1, fence=False)
            poke(paths[1], 9 * CHUNK, b"0" * BLOCK)
            assert dirty_chunks(paths[0], 0) == [0, 9, 17]
            await asyncio.sleep(0.1)
            assert "takeover.locked" not in two.names(), "nothing is taken over before the death is proved"
            cluster.fence(one)
            while "takeover.done" not in two.names():
                await asyncio.sleep(0.01)
            await settled(cluster)
            assert dirty_chunks(paths[0], 0) == dirty_chunks(paths[1], 0) == []
            assert two.array.status().counters["resynced_chunks"] == 3
            assert data_of(paths[0]) == data_of(paths[1])
            again = cluster.add(1)
            await again.assemble(paths)
            assert again.array.state.slot == 0
            assert await again.client.read(9 * CHUNK, BLOCK) == b"1" * BLOCK

    run(story())


@pytest.mark.parametrize("chunks", [{0: [0]}, {0: [5], 1: [6]}, {1: [0], 2: [239]}])
def test_after_a_whole_cluster_died_bits_of_all_slots_are_honoured(
    tmp_path: Path, chunks: dict[int, list[int]]
) -> None:
    paths = clustered(tmp_path, delay=1)

    async def begin() -> None:
        async with cluster_of(1, paths):
            pass

    run(begin())
    for slot, dirty in chunks.items():
        set_bits(paths[0], slot, dirty)
        for chunk in dirty:
            poke(paths[1], chunk * CHUNK, b"half a write")

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])

    run(story())
    assert [dirty_chunks(path, slot) for path in paths for slot in range(4)] == [[]] * 8


def test_a_leaving_node_hands_its_resync_over(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1, assume_clean=False)
    poke(paths[0], 0, os.urandom(8 << 20))

    async def story() -> None:
        slow = True
        async with cluster_of(2, paths, limits=lambda: (100, 2000) if slow else (1000, 10**7)) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            while "resync.copied" not in one.names():
                await asyncio.sleep(0.01)
            assert two.array.status().sync is not None
            await one.array.stop()
            slow = False
            del cluster.nodes[1]
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])
            assert [dirty_chunks(paths[0], 0)] == [[]]

    run(story())


def test_writes_wait_for_a_foreign_window_and_go_on_after_it(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            await settled(cluster)
            async with one.array.coordinator.resync_right():
                await one.array.coordinator.announce(0, 1024)
                inside = two.client.send(Kind.WRITE, 0, b"i" * BLOCK)
                await two.client.write(1024 * 512, b"o" * BLOCK)
                assert not inside.done()
            assert (await asyncio.wait_for(inside, 5)).error == 0

    run(story())


def test_a_failed_member_is_failed_everywhere_before_the_write_is_answered(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            await settled(cluster)
            one.array.faults.fail(1 << 1, "the test says so")
            await one.client.write(0, b"x" * BLOCK)
            assert superblock_of(paths[0]).dev_roles[1] == 0xFFFE
            assert [member.faulty for member in two.array.members()] == [False, True]
            assert await two.client.read(0, BLOCK) == b"x" * BLOCK

    run(story())
    assert dirty_chunks(paths[0], 0) or dirty_chunks(paths[0], 1), "a degraded array keeps its bits"


def test_a_node_that_loses_its_session_joins_again_and_finishes_its_writes(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            await settled(cluster)
            answers = [one.client.send(Kind.WRITE, block * BLOCK, b"w" * BLOCK) for block in range(64)]
            number = max(one.sessions)
            one.replica.session_lost(number)
            one.sessions.pop(number).on_lost("the test says so")
            more = [one.client.send(Kind.WRITE, block * BLOCK, b"w" * BLOCK) for block in range(64, 128)]
            await one.array.state.submitter.drained()
            one.replica.session_end(number, "drained", False)
            cluster.pump_soon()
            for answer in await asyncio.wait_for(asyncio.gather(*answers, *more), 20):
                assert answer.error == 0
            assert one.array.status().counters["rejoins"] == 1
            assert await two.client.read(0, BLOCK) == b"w" * BLOCK
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_third_node_of_two_is_refused(tmp_path: Path) -> None:
    paths = clustered(tmp_path, delay=1, nodes=2)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            third = cluster.add(3)
            with pytest.raises(LockRefused) as refused:
                await third.assemble(paths)
            assert refused.value.code == "too-many-nodes"
            await third.array.stop()
            del cluster.nodes[3]

    run(story())
