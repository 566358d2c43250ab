"""The end of a life: what it was asked is kept where nobody went on without it, and refused where others may have.

Each story loses the lock session with requests in every place where one can wait, joins again, and looks at what every
request was answered, when, and what was submitted after that.
"""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from array_kit import BLOCK, CHUNK, MIB, clustered, data_at, data_of, run, until
from cluster_in_process import InProcessCluster, Node, cluster_of, settled
from faulty_submitter import Io
from nbd_client import Client as NbdClient

from clustermd.array import array as array_module
from clustermd.array.request import Kind, Request
from clustermd.array.state import EXCLUDED
from clustermd.device.member_device import Op
from clustermd.export.nbd import NbdServer
from clustermd.export.nbd_protocol import Command, NbdError

Answer = asyncio.Future[Request]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, quick_retries: None) -> None:
    monkeypatch.setattr(array_module, "REJOIN_S", 0.02)


@asynccontextmanager
async def two_nodes(paths: list[Path], excludes: bool, **options: object) -> AsyncIterator[InProcessCluster]:
    async with cluster_of(2, paths, faulty=True, excludes=excludes, **options) as cluster:
        await settled(cluster)
        yield cluster


def lives(node: Node) -> int:
    return node.names().count("array.serving")


async def lose_and_join(node: Node, meanwhile: Callable[[], None] = lambda: None) -> None:
    """The session ends, what is stuck lands, and the node joins again."""
    before = lives(node)
    number = node.lose_session()
    meanwhile()
    node.disks.release()
    await node.disks.drained()
    node.end_session(number)
    await until(lambda: lives(node) == before + 1)


async def errors_of(answers: list[Answer]) -> list[int]:
    return [answer.error for answer in await asyncio.wait_for(asyncio.gather(*answers), 20)]


def data_writes(node: Node, paths: list[Path], first: int) -> list[Io]:
    """What was written to the data areas from log entry `first` on."""
    at = data_at(paths[0])
    return [
        io
        for io in node.disks.log[first:]
        if io.op in (Op.WRITE, Op.DISCARD) and io.offset >= at and io.result != -errno.ESHUTDOWN
    ]


@asynccontextmanager
async def nothing_recorded(node: Node) -> AsyncIterator[None]:
    """The token is with `node`, so no other node can record a fault."""
    life = node.array.coordinator._life
    async with life.channel.token():
        yield


@pytest.mark.parametrize("excludes", [False, True])
def test_writes_in_flight_are_refused_after_they_have_landed_or_replayed(
    tmp_path: Path, excludes: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with two_nodes(paths, excludes) as cluster:
            one = cluster.nodes[1]
            at = data_at(paths[0])
            await one.client.write(0, b"o" * BLOCK)
            stuck = one.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            torn = one.client.send(Kind.WRITE, 0, b"n" * BLOCK)
            behind = one.client.send(Kind.WRITE, 0, b"N" * BLOCK)
            await until(lambda: stuck.hits and one.disks.in_flight == 1)
            seen: list[bool] = []

            def meanwhile() -> None:
                seen.append(torn.done())
                seen.append(len(one.disks.log) > first)

            first = len(one.disks.log)
            await lose_and_join(one, meanwhile)
            assert seen == [False, False], "answered while it could land"
            if excludes:
                assert await errors_of([torn, behind]) == [EXCLUDED, EXCLUDED]
                assert data_writes(one, paths, first) == []
            else:
                assert await errors_of([torn, behind]) == [0, 0]
                after = data_writes(one, paths, first)
                assert len(after) == 2, "the one that had landed everywhere, and so was answered, too"
            assert await one.client.read(0, BLOCK) in (
                [b"o" * BLOCK, b"n" * BLOCK] if excludes else [b"N" * BLOCK]
            )
            await one.client.write(0, b"x" * BLOCK)
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_write_that_all_members_have_is_refused_when_that_is_heard_after_the_exclusion(
    tmp_path: Path,
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with two_nodes(paths, True) as cluster:
            one = cluster.nodes[1]
            one.disks.fault(ops=(Op.WRITE,), lo=data_at(paths[0]), stuck=True, times=2)
            write = one.client.send(Kind.WRITE, 0, b"n" * BLOCK)
            await until(lambda: len(one.disks.stuck) == 2)
            await lose_and_join(one)
            assert await errors_of([write]) == [EXCLUDED]
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


@pytest.mark.parametrize("excludes", [False, True])
def test_what_waits_anywhere_shares_the_end_of_its_life(tmp_path: Path, excludes: bool) -> None:
    """Behind a window, for its bits, in a hold, a flush and a read on their way, the pieces of a long zeroing."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with two_nodes(paths, excludes) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            one.array.set_window(1, 20 * CHUNK // 512, 21 * CHUNK // 512)
            window = one.client.send(Kind.WRITE, 20 * CHUNK, b"w" * BLOCK)
            one.disks.fault(ops=(Op.FLUSH,), stuck=True, times=1)
            flush = one.client.send(Kind.FLUSH)
            one.disks.fault(ops=(Op.READ,), lo=at, stuck=True, times=1)
            read = one.client.send(Kind.READ, 0, BLOCK)
            bits = one.disks.fault(ops=(Op.WRITE,), hi=at, stuck=True, times=1)
            waits = one.client.send(Kind.WRITE, 30 * CHUNK, b"b" * BLOCK)
            queued = one.client.send(Kind.WRITE, 31 * CHUNK, b"q" * BLOCK)
            zeroes = one.client.send(Kind.WRITE_ZEROES, 4 * MIB, 6 * MIB, no_hole=True)
            await until(lambda: bool(bits.hits))
            one.array.hold("no contact")
            held = one.client.send(Kind.WRITE, 40 * CHUNK, b"h" * BLOCK)
            between: list[Answer] = []

            def meanwhile() -> None:
                if excludes:
                    assert held.done(), "nothing of it was in flight"
                between.append(one.client.send(Kind.WRITE, 41 * CHUNK, b"m" * BLOCK))
                between.append(one.client.send(Kind.READ, 41 * CHUNK, BLOCK))
                between.append(one.client.send(Kind.FLUSH))

            first = len(one.disks.log)
            await lose_and_join(one, meanwhile)
            answers = [window, flush, read, waits, queued, zeroes, held, *between]
            assert await errors_of(answers) == [EXCLUDED if excludes else 0] * len(answers)
            assert bool(data_writes(one, paths, first)) is not excludes
            assert not one.array.state.parked and not one.array.state.ranges.count
            for block in (20, 30, 31, 40, 41):
                content = await two.client.read(block * CHUNK, BLOCK)
                assert (content == bytes(BLOCK)) is excludes
            await one.client.write(40 * CHUNK, b"a" * BLOCK)
            assert await two.client.read(40 * CHUNK, BLOCK) == b"a" * BLOCK
            assert (await one.client.send(Kind.FLUSH)).error == 0
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


@pytest.mark.parametrize("excludes", [False, True])
def test_a_read_that_is_put_together_from_two_copies(tmp_path: Path, excludes: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with two_nodes(paths, excludes) as cluster:
            one = cluster.nodes[1]
            at = data_at(paths[0])
            await one.client.write(0, b"g" * 2 * BLOCK)
            one.array.state.settled = False
            one.disks.fault(
                member="disk0", ops=(Op.READ,), lo=at, hi=at + 512, error=errno.EIO, until_written=True
            )
            part = one.disks.fault(
                ops=(Op.READ,), lo=at + 15 * 512, stuck=True, times=1, only=lambda io: io.length == 512
            )
            read = one.client.send(Kind.READ, 0, 2 * BLOCK)
            await until(lambda: bool(part.hits))
            await lose_and_join(one)
            assert await errors_of([read]) == [EXCLUDED if excludes else 0]
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


@pytest.mark.parametrize("excludes", [False, True])
def test_writes_and_flushes_that_wait_for_the_record_of_a_fault(tmp_path: Path, excludes: bool) -> None:
    paths = clustered(tmp_path, 3)

    async def story() -> None:
        async with two_nodes(paths, excludes) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            at = data_at(paths[0])
            one.disks.fault(member="disk2", ops=(Op.WRITE,), lo=at, error=errno.EIO, times=1)
            one.disks.fault(member="disk2", ops=(Op.FLUSH,), error=errno.EIO, times=1)
            async with nothing_recorded(two):
                flush = one.client.send(Kind.FLUSH)
                await until(lambda: one.array.members()[2].faulty)
                write = one.client.send(Kind.WRITE, 0, b"w" * BLOCK)
                await until(lambda: one.array.faults._delayed)
                assert not write.done() and not flush.done()
                first = len(one.disks.log)
                number = one.lose_session()
                if excludes:
                    assert await errors_of([write, flush]) == [EXCLUDED, EXCLUDED]
            await one.disks.drained()
            one.end_session(number)
            await until(lambda: lives(one) == 2)
            assert await errors_of([write, flush]) == [EXCLUDED if excludes else 0] * 2
            assert bool(data_writes(one, paths, first)) is not excludes
            await one.client.write(0, b"x" * BLOCK)

    run(story())


def test_a_write_that_was_given_up_on_a_member_is_refused_only_when_that_member_has_let_it_go(
    tmp_path: Path,
) -> None:
    paths = clustered(tmp_path, 3)

    async def story() -> None:
        async with two_nodes(paths, True, device_timeout_s=2, tick_s=0.05) as cluster:
            one = cluster.nodes[1]
            at = data_at(paths[0])
            one.disks.fault(member="disk2", ops=(Op.WRITE,), lo=at, stuck=True, times=1)
            async with nothing_recorded(cluster.nodes[2]):
                write = one.client.send(Kind.WRITE, 0, b"w" * BLOCK)
                await until(lambda: one.array.faults._delayed)
                number = one.lose_session()
                await asyncio.sleep(0.1)
                assert not write.done(), "it may still land"
            one.disks.release()
            assert await errors_of([write]) == [EXCLUDED]
            await one.disks.drained()
            one.end_session(number)
            await until(lambda: lives(one) == 2)
            await one.client.write(0, b"x" * BLOCK)
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_who_only_stood_still_goes_on_with_what_it_kept(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with two_nodes(paths, True) as cluster:
            one = cluster.nodes[1]
            ended: list[str] = []
            one.array.watch_exclusion(ended.append, lambda: ended.append(""))
            one.suspended("no contact")
            write = one.client.send(Kind.WRITE, 0, b"w" * BLOCK)
            flush = one.client.send(Kind.FLUSH)
            await asyncio.sleep(0.05)
            assert not write.done() and not flush.done()
            one.resumed()
            assert await errors_of([write, flush]) == [0, 0]
            assert ended == []
            await lose_and_join(one)
            assert ended == ["the test says so", ""]
            late: list[str] = []
            one.array.watch_exclusion(late.append, lambda: late.append(""))
            assert late == [], "nobody is shut out now"
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_nbd_clients_of_an_excluded_life_get_errors_and_have_to_connect_anew(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story(socket: str) -> None:
        async with two_nodes(paths, True) as cluster:
            one = cluster.nodes[1]
            server = NbdServer(one.array, socket)
            await server.start()
            one.array.watch_exclusion(server.exclude, server.admit)
            client = await NbdClient.connect(socket)
            stuck = one.disks.fault(ops=(Op.WRITE, Op.FLUSH), lo=data_at(paths[0]), stuck=True)
            client.send(Command.WRITE, 0, BLOCK, cookie=7, payload=b"w" * BLOCK)
            client.send(Command.FLUSH, cookie=8)
            await until(lambda: len(stuck.hits) == 4)
            stuck.end()
            number = one.lose_session()
            connecting = asyncio.ensure_future(NbdClient.connect(socket))
            one.disks.release()
            answers = [await client.answer() for _ in range(2)]
            assert {answer.cookie: answer.error for answer in answers} == {7: NbdError.EIO, 8: NbdError.EIO}
            assert await client.ended() == b""
            await one.disks.drained()
            assert not connecting.done() and not server.clients()
            one.end_session(number)
            again = await asyncio.wait_for(connecting, 20)
            assert lives(one) == 2
            assert (await again.ask(Command.WRITE, 0, BLOCK, payload=b"n" * BLOCK)).error == 0
            assert (await again.ask(Command.FLUSH)).error == 0
            await again.close()
            await client.close()
            await server.stop(force=True)
            await settled(cluster)

    with tempfile.TemporaryDirectory(prefix="nbd") as directory:  # a path short enough for a unix socket
        run(story(f"{directory}/nbd.sock"))
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_join_that_fails_lets_nothing_through_in_between(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with two_nodes(paths, True) as cluster:
            one = cluster.nodes[1]
            doors: list[str] = []
            one.array.watch_exclusion(doors.append, lambda: doors.append(""))
            at = data_at(paths[0])
            reads = one.disks.fault(ops=(Op.READ,), hi=at, error=errno.EIO)
            number = one.lose_session()
            await one.disks.drained()
            one.end_session(number)
            await until(lambda: one.names().count("life.over") >= 2)
            assert await errors_of([one.client.send(Kind.WRITE, 0, b"w" * BLOCK)]) == [EXCLUDED]
            assert len(doors) == 1
            reads.end()
            await until(lambda: lives(one) == 2)
            assert doors == ["the test says so", ""]
            await one.client.write(0, b"x" * BLOCK)
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
