"""Stopping and holding: every request is answered once, nothing is left to nobody, and a stop ends."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    clustered,
    data_at,
    data_of,
    dirty_chunks,
    disks_of,
    make_images,
    poke,
    run,
    running,
    slot_area,
    superblock_of,
    until,
)
from cluster_in_process import InProcessCluster, Node, NodeLink, cluster_of, settled

from clustermd.array import array as array_module
from clustermd.array.request import Kind, Request
from clustermd.cluster import channel as channel_module
from clustermd.cluster import cluster as cluster_module
from clustermd.device.member_device import Op
from clustermd.ondisk.superblock import MAX_SECTOR, ROLE_FAULTY

WINDOW = 2048


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, quick_retries: None) -> None:
    monkeypatch.setattr(cluster_module, "LEAVE_S", 0.5)
    monkeypatch.setattr(array_module, "CUT_S", 0.5)


async def stopped(cluster: InProcessCluster, node: Node, limit_s: float = 10) -> None:
    await asyncio.wait_for(node.array.stop(), limit_s)
    del cluster.nodes[node.number]


async def answer_of(answer: asyncio.Future[Request]) -> int:
    request = await asyncio.wait_for(asyncio.shield(answer), 10)
    if request.buffer is not None:
        request.buffer.release()
    return request.error


# --- an array of one node ------------------------------------------------------------------------------


def test_a_write_that_fails_a_member_during_the_stop_is_recorded_and_answered(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True, stop=False) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"0" * BLOCK)
            disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), stuck=True, times=1)
            answer = client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await until(lambda: disks.stuck)
            stopping = asyncio.ensure_future(array.stop())
            await until(lambda: array.state.held == "stopping")
            disks.release(error=errno.EIO)
            assert await answer_of(answer) == 0
            await asyncio.wait_for(stopping, 10)
            assert superblock_of(paths[0]).dev_roles[1] == ROLE_FAULTY

    run(story())
    assert data_of(paths[0])[:BLOCK] == b"1" * BLOCK
    assert dirty_chunks(paths[0]) == [0]


@pytest.mark.parametrize("what", ["write", "flush", "bits"])
def test_a_stop_does_not_wait_for_ever_for_a_member_that_does_not_answer(tmp_path: Path, what: str) -> None:
    paths = make_images(tmp_path, delay=60)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with running(paths, faulty=True, stop=False, device_timeout_s=4, tick_s=0.1) as (array, client):
            disks = disks_of(array)
            await client.write(0, b"0" * BLOCK)
            if what == "write":
                disks.fault(member="disk1", ops=(Op.WRITE,), lo=data_at(paths[1]), stuck=True, times=1)
                answer = client.send(Kind.WRITE, 0, b"1" * BLOCK)
                await until(lambda: disks.stuck)
            elif what == "bits":
                disks.fault(member="disk1", ops=(Op.WRITE,), lo=start, hi=start + length, stuck=True, times=1)
                answer = client.send(Kind.WRITE, 5 * CHUNK, b"1" * BLOCK)
                await until(lambda: disks.stuck)
            else:
                disks.fault(member="disk1", ops=(Op.FLUSH,), stuck=True)
                answer = client.send(Kind.READ, 0, BLOCK)
            stopping = asyncio.ensure_future(array.stop())
            assert await answer_of(answer) == 0
            await until(lambda: superblock_of(paths[0]).dev_roles[1] == ROLE_FAULTY)
            await until(lambda: array.state.held == "stopped")
            disks.well()
            disks.release()  # the disk itself is waited for: what it has of ours must not outlive us
            await asyncio.wait_for(stopping, 10)

    run(story())


def test_a_stop_over_a_write_that_the_last_good_member_does_not_answer(tmp_path: Path) -> None:
    paths = make_images(tmp_path, delay=60)

    async def story() -> None:
        async with running(paths, faulty=True, stop=False, device_timeout_s=4, tick_s=0.1) as (array, client):
            disks = disks_of(array)
            disks.fault(member="disk1", ops=(Op.WRITE,), error=errno.EIO)
            await client.write(0, b"0" * BLOCK)
            disks.fault(member="disk0", ops=(Op.WRITE,), lo=data_at(paths[0]), stuck=True, times=1)
            assert await answer_of(client.send(Kind.WRITE, 0, b"1" * BLOCK)) == errno.EIO
            behind = client.send(Kind.WRITE, 0, b"2" * BLOCK)
            stopping = asyncio.ensure_future(array.stop())
            await until(lambda: array.state.held == "stopped")
            disks.well()
            disks.release()
            await asyncio.wait_for(stopping, 10)
            assert await answer_of(behind) == errno.ESHUTDOWN

    run(story())


def test_a_stop_answers_everything_once_whatever_it_waits_for(tmp_path: Path) -> None:
    """Requests in flight, behind one another, behind their bits; sent before, while and after the array stops."""
    paths = make_images(tmp_path)

    async def story() -> None:
        chooser = random.Random(5)
        for turn in range(8):
            async with running(paths, faulty=True, stop=False) as (array, client):
                answers = []

                def some(count: int) -> None:
                    for _ in range(count):
                        kind = chooser.choice([Kind.WRITE, Kind.WRITE, Kind.READ, Kind.FLUSH, Kind.TRIM])
                        at = chooser.randrange(64) * BLOCK
                        data: Any = chooser.randbytes(BLOCK) if kind is Kind.WRITE else BLOCK
                        answers.append(client.send(kind, at, 0 if kind is Kind.FLUSH else data))  # noqa: B023

                some(100)
                for _ in range(turn * 2):
                    await asyncio.sleep(0)
                stopping = asyncio.ensure_future(array.stop())
                for _ in range(10):
                    some(5)
                    await asyncio.sleep(0)
                await asyncio.wait_for(stopping, 10)
                for answer in answers:
                    assert answer.done(), "a request was never answered"
                    assert await answer_of(answer) in (0, errno.ESHUTDOWN)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
    assert superblock_of(paths[0]).resync_offset == MAX_SECTOR


# --- in a cluster ------------------------------------------------------------------------------------------


def test_a_request_behind_a_foreign_window_is_answered_when_its_node_stops(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            async with one.array.coordinator.resync_right():
                await one.array.coordinator.announce(0, WINDOW)
                inside = two.client.send(Kind.WRITE, 0, b"i" * BLOCK)
                await stopped(cluster, two)
                assert inside.done(), "never answered"
                assert await answer_of(inside) == errno.ESHUTDOWN

    run(story())


def test_a_node_that_stops_without_contact_answers_and_leaves_its_bits_to_the_others(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            await one.client.write(3 * CHUNK, b"0" * BLOCK)
            one.array.hold("no contact")
            held = [one.client.send(Kind.WRITE, place * CHUNK, b"1" * BLOCK) for place in (3, 4)]
            await stopped(cluster, one)
            for answer in held:
                assert answer.done(), "never answered"
                assert await answer_of(answer) == errno.ESHUTDOWN
            await until(lambda: "takeover.done" in two.names())
            await settled(cluster)
            assert dirty_chunks(paths[0], 0) == []

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_writes_on_their_way_when_contact_is_lost_are_answered_by_a_stop(tmp_path: Path) -> None:
    """Queued at the held gate, behind their bits, behind one another and behind a fault nobody could record."""
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            at = data_at(paths[0])
            await one.client.write(0, b"0" * BLOCK)
            bits = one.disks.fault(
                member="disk0", ops=(Op.WRITE,), lo=start, hi=start + length, stuck=True, times=1
            )
            behind_bits = one.client.send(Kind.WRITE, 9 * CHUNK, b"1" * BLOCK)
            data = one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            on_its_way = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            behind_another = one.client.send(Kind.WRITE, 0, b"2" * BLOCK)
            await until(lambda: bits.hits and data.hits)
            one.array.hold("no contact")
            kept = one.client.send(Kind.WRITE, 20 * CHUNK, b"1" * BLOCK)
            stopping = asyncio.ensure_future(one.array.stop())
            await asyncio.sleep(0.02)
            one.disks.release()
            await asyncio.wait_for(stopping, 10)
            del cluster.nodes[1]
            for answer in (behind_bits, on_its_way, behind_another, kept):
                assert answer.done(), "never answered"
                assert await answer_of(answer) in (0, errno.ESHUTDOWN)
            await until(lambda: "takeover.done" in cluster.nodes[2].names())
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_stop_ends_although_nobody_acknowledges_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            monkeypatch.setattr(channel_module, "ACK_S", 0.1)

            async def never(message: Any) -> int:
                await asyncio.Event().wait()
                return 0

            two.array.coordinator._life.channel._handle = never  # type: ignore[attr-defined]
            one.array.faults.fail(1 << 1, "the test says so")
            answer = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            await asyncio.sleep(0.05)
            assert not answer.done()
            await stopped(cluster, one)
            assert await answer_of(answer) == errno.EIO
            await cluster.kill(2)

    run(story())


def test_a_stop_ends_although_the_group_is_gone(tmp_path: Path) -> None:
    """In the middle of an announcement, so that a lock operation is pending that nobody will ever answer."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]

            def gone(_: dict[str, Any]) -> None:
                cluster.group.break_sequencer()

            one.at("send.begin", gone)
            one.array.state.the_bitmap().mark([3])
            one.array.resync.wake()
            await until(lambda: one.array.state.held)
            await stopped(cluster, one, 15)
            await cluster.kill(2)
            del two

    run(story())


def test_what_a_leaving_node_has_decided_to_leave_is_not_added_to(tmp_path: Path) -> None:
    """A takeover after the last look at its own bits would be handed over by nobody: others do it."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            one, two, three = (cluster.nodes[number] for number in (1, 2, 3))
            await three.client.write(3 * CHUNK, b"3" * BLOCK)
            clean, looked, go_on = one.array.sweep.clean, asyncio.Event(), asyncio.Event()

            async def slowly() -> bool:
                result = await clean()
                looked.set()
                await go_on.wait()
                return result

            one.array.sweep.clean = slowly  # type: ignore[method-assign]
            stopping = asyncio.ensure_future(one.array.stop())
            await asyncio.wait_for(looked.wait(), 10)
            await cluster.kill(3)
            poke(paths[1], 3 * CHUNK, b"0" * BLOCK)
            await until(lambda: "takeover.done" in two.names())
            go_on.set()
            await asyncio.wait_for(stopping, 10)
            del cluster.nodes[1]
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])
            assert dirty_chunks(paths[0], 0) == dirty_chunks(paths[0], 2) == []

    run(story())


def test_bits_that_a_leaving_node_takes_over_at_the_last_moment_are_handed_over(tmp_path: Path) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 2)

    async def story() -> None:
        async with cluster_of(3, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two, three = (cluster.nodes[number] for number in (1, 2, 3))
            await three.client.write(3 * CHUNK, b"3" * BLOCK)
            reading = one.disks.fault(ops=(Op.READ,), lo=start, hi=start + length, stuck=True)
            await cluster.kill(3)
            poke(paths[1], 3 * CHUNK, b"0" * BLOCK)
            await until(lambda: reading.hits or "takeover.done" in two.names())
            stopping = asyncio.ensure_future(one.array.stop())
            await asyncio.sleep(0.02)
            reading.end()
            one.disks.release()
            await asyncio.wait_for(stopping, 10)
            del cluster.nodes[1]
            await until(lambda: not list(two.array.coordinator.takeovers()))
            await settled(cluster)
            await until(lambda: data_of(paths[0]) == data_of(paths[1]))
            assert dirty_chunks(paths[0], 0) == dirty_chunks(paths[0], 2) == []

    run(story())


def test_the_gate_is_held_and_opened_again_and_again_under_load(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            written: dict[int, bytes] = {}
            stop = False

            async def load(node: Node, blocks: range) -> None:
                turn = 0
                while not stop:
                    turn += 1
                    for block in blocks:
                        content = f"{node.number}-{turn}-{block} ".encode().ljust(BLOCK, b".")
                        assert await answer_of(node.client.send(Kind.WRITE, block * BLOCK, content)) == 0
                        written[block] = content

            loads = [
                asyncio.ensure_future(load(node, range(first, first + 2000, 400)))
                for node, first in ((one, 0), (one, 1), (two, 2), (two, 3))
            ]
            for turn in range(20):
                one.array.hold("no contact")
                await one.disks.drained()
                passed = len(one.disks.done)
                held = one.client.send(Kind.READ, 0, BLOCK)
                await asyncio.sleep(0.003)
                assert len(one.disks.done) == passed and not held.done(), "something passed the held gate"
                if turn % 3 == 0:
                    one.array.hold("still none")
                one.array.resume()
                assert await answer_of(held) == 0
                assert one.array.state.held == ""
            stop = True
            await asyncio.gather(*loads)
            for block, content in written.items():
                assert await two.client.read(block * BLOCK, BLOCK) == content

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_stuck_member_is_not_blamed_for_time_without_contact(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True, device_timeout_s=4, tick_s=0.1) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            one.array.hold("no contact")
            kept = one.client.send(Kind.WRITE, 0, b"1" * BLOCK)
            repairing = asyncio.ensure_future(one.array.sweep.flush_members())
            await asyncio.sleep(0.8)
            one.array.resume()
            assert await answer_of(kept) == 0
            assert await asyncio.wait_for(repairing, 10)
            assert not any(member.faulty for member in one.array.members())

    run(story())


def test_a_stop_without_quorum_ends_although_no_unlock_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clustered(tmp_path)

    async def goodbye(link: NodeLink) -> None:
        """The session is closed; who still waits for an answer in it hears nothing."""

    monkeypatch.setattr(NodeLink, "close", goodbye)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            one.suspended("no quorum")
            one.alive = False
            await stopped(cluster, one)

    run(story())
