"""Locks that stay with a program until somebody else wants them, through real lockds of two nodes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from lock_kit import PATIENCE_S

from clustermd.dlm.modes import Mode
from clustermd.errors import ClusterLost, LockRefused
from clustermd.lockd.api import HeldLock, KeptLock, OpenLockspace, connect_lockspace
from clustermd.lockd.plain import PlainLockspace
from clustermd.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.system

Story = Callable[[OpenLockspace, OpenLockspace], Awaitable[None]]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("CLUSTERMD_LINGER_S", "2")
    with LocalCluster() as cluster:
        yield cluster


def tell(cluster: LocalCluster, story: Story) -> None:
    """`story` with a lockspace on each of two nodes."""

    async def both() -> None:
        async with (
            connect_lockspace("space", rundir=cluster.node("n1").rundir) as one,
            connect_lockspace("space", rundir=cluster.node("n2").rundir) as two,
        ):
            async with asyncio.timeout(PATIENCE_S):
                await story(one, two)

    asyncio.run(both())


async def use(kept: KeptLock, mode: Mode) -> None:
    async with kept.use(mode):
        pass


async def waits(task: asyncio.Task[None] | asyncio.Task[HeldLock]) -> None:
    """Nothing has come of it after a while."""
    done, _ = await asyncio.wait((task,), timeout=0.3)
    assert not done


def test_it_stays_until_somebody_else_wants_it(cluster: LocalCluster) -> None:
    async def story(one: OpenLockspace, two: OpenLockspace) -> None:
        kept = one.keep("r")
        assert kept.mode is Mode.IV
        for _ in range(3):
            async with kept.use() as lock:
                assert lock.mode is Mode.EX
            assert kept.mode is Mode.EX
            assert [who["name"] for who in await two.holders("r", Mode.CR)] == ["n1"]
        async with await two.lock("r", Mode.EX):
            assert kept.mode is Mode.IV
            next_use = asyncio.create_task(use(kept, Mode.EX))
            await waits(next_use)
        await next_use
        assert kept.mode is Mode.EX

        await kept.give_back()
        assert kept.mode is Mode.IV and await two.holders("r", Mode.CR) == []
        async with kept.use(Mode.PR), await two.lock("r", Mode.PR):
            assert kept.mode is Mode.PR

    tell(cluster, story)


def test_a_use_is_the_last_one_before_who_waits(cluster: LocalCluster) -> None:
    turns: list[str] = []

    async def story(one: OpenLockspace, two: OpenLockspace) -> None:
        kept = one.keep("r")

        async def other() -> None:
            async with await two.lock("r", Mode.EX):
                turns.append("two")

        async def again() -> None:
            async with kept.use(Mode.PR):  # which would go with the one under way
                turns.append("one again")

        async with kept.use():
            wants = asyncio.create_task(other())
            await waits(wants)
        await wants
        assert turns == ["two"], "nobody used it any more"

        async with kept.use(Mode.PR):
            turns.append("one")
            wants = asyncio.create_task(other())
            await waits(wants)
            next_use = asyncio.create_task(again())
            await waits(next_use)
        await asyncio.gather(wants, next_use)

    tell(cluster, story)
    assert turns == ["two", "one", "two", "one again"]


def test_who_does_nothing_but_use_it_hears_that_it_is_wanted(cluster: LocalCluster) -> None:
    async def story(one: OpenLockspace, two: OpenLockspace) -> None:
        kept = one.keep("r")
        await use(kept, Mode.EX)

        async def other() -> None:
            async with await two.lock("r"):
                assert kept.mode is Mode.IV

        wanted = asyncio.create_task(other())
        until_s = time.monotonic() + PATIENCE_S
        while not wanted.done():
            assert time.monotonic() < until_s, "nobody heard that the other one waits"
            await use(kept, Mode.EX)
        await wanted

    tell(cluster, story)


def test_uses_in_one_program_exclude_each_other_as_on_many(cluster: LocalCluster) -> None:
    async def story(one: OpenLockspace, two: OpenLockspace) -> None:
        kept = one.keep("r")
        async with kept.use(Mode.PR):
            async with kept.use(Mode.CR), kept.use(Mode.PR):
                assert kept.mode is Mode.PR
            with pytest.raises(LockRefused) as late:
                async with kept.use(Mode.EX, timeout_s=0.2):
                    pass
            assert late.value.code == "timed-out" and "in this program" in late.value.message
        async with kept.use(Mode.EX):
            assert kept.mode is Mode.EX
            reader = asyncio.create_task(use(kept, Mode.PR))
            await waits(reader)
        await reader
        assert kept.mode is Mode.EX, "EX has PR in it"
        async with await two.lock("r", Mode.PR):
            with pytest.raises(LockRefused) as late:
                async with kept.use(Mode.EX, timeout_s=0.2):
                    pass
            assert late.value.code == "timed-out" and "it is held by n2" in late.value.message
        async with kept.use(Mode.EX, timeout_s=PATIENCE_S):
            assert kept.mode is Mode.EX

    tell(cluster, story)


def test_a_count_and_a_value_come_out_right(cluster: LocalCluster) -> None:
    counter = 0

    async def story(one: OpenLockspace, two: OpenLockspace) -> None:
        keepers = [await space.lock("value", Mode.NL, value_block=True) for space in (one, two)]
        kept = [space.keep("value", value_block=True) for space in (one, two)]

        async def count(number: int) -> None:
            nonlocal counter
            for turn in range(30):
                async with kept[number % 2].use(Mode.EX) as lock:
                    seen, told = counter, int.from_bytes(lock.value[:4], "big")
                    assert told == seen
                    await asyncio.sleep(0.0005 * (turn % 3))
                    counter = seen + 1
                    lock.value = counter.to_bytes(4, "big")
                async with kept[number % 2].use(Mode.PR) as lock:
                    assert int.from_bytes(lock.value[:4], "big") == counter

        await asyncio.gather(*(count(number) for number in range(6)))
        assert keepers[0].mode is Mode.NL

    tell(cluster, story)
    assert counter == 180


def test_lost_with_the_session_it_holds_nobody_up_unless_it_is_used(cluster: LocalCluster) -> None:
    async def story(one: OpenLockspace, two: OpenLockspace) -> None:
        idle, used = one.keep("idle"), one.keep("used")
        async with idle.use():
            pass
        wanted: list[asyncio.Task[HeldLock]] = []

        async def lose_it_while_it_is_used() -> None:
            async with used.use():
                cluster.kill(cluster.processes("n1", "lockd"))
                while not one.lost:
                    await asyncio.sleep(0.01)
                assert idle.mode is Mode.IV and used.mode is Mode.IV
                with pytest.raises(ClusterLost):
                    await use(idle, Mode.EX)
                wanted.append(asyncio.create_task(two.lock("used")))
                await waits(wanted[0])

        with pytest.raises(ClusterLost):
            await lose_it_while_it_is_used()
        async with await wanted[0], await two.lock("idle"):
            pass

    tell(cluster, story)


def test_the_same_from_threads(cluster: LocalCluster) -> None:
    counter = 0
    failed: list[BaseException] = []
    with (
        PlainLockspace("space", rundir=cluster.node("n1").rundir) as one,
        PlainLockspace("space", rundir=cluster.node("n2").rundir) as two,
    ):
        kept = [one.keep("counter"), two.keep("counter")]

        def work(number: int) -> None:
            nonlocal counter
            try:
                for _ in range(20):
                    with kept[number % 2].use(timeout_s=PATIENCE_S) as lock:
                        assert lock.mode is Mode.EX
                        seen = counter
                        time.sleep(0.0005)
                        counter = seen + 1
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not failed and counter == 80
        with pytest.raises(KeyError), kept[0].use():
            raise KeyError
        kept[0].give_back()
        assert kept[0].mode is Mode.IV
        kept[1].give_back()
        one.lock("counter", noqueue=True).unlock()
