"""Bugs of our own that simulated runs found, those with a story simpler than a run: each right, and with the bug back.

The bugs are those of `clustermd.testing.simulator.flaws_found`; its others are kept as runs (`test_bugs_found.py`).
"""

from __future__ import annotations

import asyncio
import errno
import gc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    clustered,
    data_of,
    poke,
    run,
    slot_area,
    superblock_of,
    until,
)
from cluster_in_process import InProcessCluster, Node, cluster_of, settled
from faulty_submitter import Fault
from flaws import both_ways, flaw, patches_of, patience

from clustermd.array.array import Array
from clustermd.cluster import life as life_module
from clustermd.cluster.life import Life
from clustermd.cluster.messages import SlotBlock
from clustermd.cluster.slot_lock import OwnSlot
from clustermd.device.member_device import Op
from clustermd.dlm.lockspace import Slot
from clustermd.ondisk.superblock import ROLE_FAULTY

pytestmark = pytest.mark.usefixtures("quick_retries")


def dies_when_somebody_looks(cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Node `number` dies, and its end is proved, in the moment in which a joiner begins to read its value block."""
    right = life_module.read_block

    async def too_late(lockspace: Any, slot: int) -> Any:
        if number in cluster.nodes and slot == number - 1:
            await cluster.kill(number)
            cluster.group.settle()
        return await right(lockspace, slot)

    monkeypatch.setattr(life_module, "read_block", too_late)


@both_ways
def test_a_joiner_does_not_take_a_lost_value_block_for_no_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await cluster.nodes[1].client.write(3 * CHUNK, b"1" * BLOCK)
            two = cluster.add(2)
            dies_when_somebody_looks(cluster, monkeypatch, 1)
            await asyncio.wait_for(two.assemble(paths), 20)
            begun = two.names().index("array.serving")
            assert ("join.merged", {"slot": 0}) in two.events[:begun], "it serves without the bits"

    with flaw(flawed, "serves without the bits", *patches_of("lost-value-block-is-no-window")):
        run(story())


async def opens_a_window(node: Node) -> Any:
    """`node` announces [0, 1024), and never comes to its end. Keep what is returned: that is the resync right."""
    right = node.array.coordinator.resync_right()
    await right.__aenter__()
    await node.array.coordinator.announce(0, 1024)
    return right


@both_ways
def test_a_joiner_reads_again_when_members_change_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool
) -> None:
    """While it reads a window its owner dies, is taken over, and comes back: nobody will end that window."""
    paths = clustered(tmp_path)
    right = life_module.read_block

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            kept = await opens_a_window(one)
            back: list[asyncio.Task[None]] = []

            async def slowly(lockspace: Any, slot: int) -> Any:
                block = await right(lockspace, slot)
                if slot == 0 and not back:
                    assert block.hi
                    await cluster.kill(1)
                    await until(lambda: "takeover.done" in two.names())
                    again = cluster.add(1)
                    back.append(asyncio.create_task(again.assemble(paths)))
                    await until(lambda: "join.member" in again.names())
                return block

            monkeypatch.setattr(life_module, "read_block", slowly)
            three = cluster.add(3)
            await asyncio.wait_for(three.assemble(paths), 20)
            await back[0]
            assert not three.array.state.windows.any, "a window of an earlier life"
            del kept

    with flaw(flawed, "of an earlier life", *patches_of("window-of-a-former-owner")):
        run(story())


@pytest.mark.parametrize("dies", [False, True], ids=["left", "died"])
@both_ways
def test_a_joiner_meets_no_window_of_an_owner_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool, dies: bool
) -> None:
    """The slot's next owner has the lock, and has not cleared the block yet, when the joiner looks."""
    paths = clustered(tmp_path)
    write, merge = OwnSlot._write, Life._merge
    claimed, may_clear, may_merge = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def later(self: Life, slot: int) -> None:
        await may_merge.wait()
        await merge(self, slot)

    async def slowly(self: OwnSlot, block: SlotBlock) -> None:
        if self._lock.name == "bitmap0000" and block == SlotBlock():
            claimed.set()
            await may_clear.wait()
        await write(self, block)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.nodes[2]
            life: Any = two.array.coordinator._life  # type: ignore[attr-defined]
            keeper = await life._lockspace.lock("bitmap0000", value_block=True)  # the resource lives on
            kept = await opens_a_window(one)
            if dies:
                await cluster.kill(1)
                await until(lambda: "takeover.done" in two.names())
            else:
                monkeypatch.setattr(Life, "_merge", later)
                one.array.faults.fail(1 << 1, "the test says so")
                await one.client.write(30 * CHUNK, b"1" * BLOCK)
                await asyncio.wait_for(one.array.stop(), 20)
                assert "leave.announced" in one.names()
            monkeypatch.setattr(OwnSlot, "_write", slowly)
            back = asyncio.create_task(cluster.add(1).assemble(paths))
            await claimed.wait()
            three = cluster.add(3)
            joining = asyncio.create_task(three.assemble(paths))
            await until(lambda: any(name == "join.window" for name, _ in three.events))
            may_clear.set()
            may_merge.set()
            await asyncio.wait_for(asyncio.gather(back, joining), 20)
            assert not three.array.state.windows.any, "a window of an earlier life"
            await keeper.unlock()
            del kept

    with flaw(flawed, "of an earlier life", *patches_of("window-of-a-former-owner")):
        run(story())


@both_ways
def test_what_a_joiner_merged_is_copied_before_anybody_takes_the_array_for_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool
) -> None:
    """The joiner is quicker than the survivor, and then slow: it looks at a last slot before it may copy."""
    paths = clustered(tmp_path)
    last, length, _ = slot_area(paths[0], 3)
    may_merge = asyncio.Event()
    merge = Life._merge

    async def later(self: Life, slot: int) -> None:
        await may_merge.wait()
        await merge(self, slot)

    monkeypatch.setattr(Life, "_merge", later)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            for node in (one, two):
                await asyncio.wait_for(node.array.idle(), 20)
            await one.client.write(3 * CHUNK, b"1" * BLOCK)
            poke(paths[1], 3 * CHUNK, b"0" * BLOCK)
            three = cluster.add(3)
            dies_when_somebody_looks(cluster, monkeypatch, 1)
            slow = Fault(ops=(Op.READ,), lo=last, hi=last + length, stuck=True)
            joining = asyncio.create_task(three.assemble(paths, faults=[slow]))
            await until(lambda: slow.hits)
            assert ("join.merged", {"slot": 0}) in three.events
            may_merge.set()
            await until(lambda: "takeover.done" in two.names())
            await until(
                lambda: any(
                    name == "lock.asked" and fields["resource"] == "resync" and fields["mode"] == "EX"
                    for name, fields in two.events[two.names().index("takeover.done") :]
                )
            )
            for _ in range(5):
                reads = [two.client.read(3 * CHUNK, BLOCK) for _ in range(8)]  # enough for both copies
                assert set(await asyncio.gather(*reads)) == {b"1" * BLOCK}, "an older copy is read"
            slow.end()
            three.disks.release()
            await joining
            for node in (two, three):
                await asyncio.wait_for(node.array.idle(), 20)

    with flaw(flawed, "an older copy is read", *patches_of("settled-before-the-joiner-copied")):
        run(story())
    if not flawed:
        assert data_of(paths[0]) == data_of(paths[1])


@both_ways
def test_a_member_that_one_node_cannot_read_keeps_nobody_from_recording_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool
) -> None:
    paths = clustered(tmp_path, 3)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            one, two = cluster.nodes[1], cluster.nodes[2]
            for node in (one, two):
                await asyncio.wait_for(node.array.idle(), 20)
            two.disks.fault(member="disk1", ops=(Op.READ,), error=errno.EIO)
            at = superblock_of(paths[0]).data_offset * 512
            one.disks.fault(member="disk2", ops=(Op.WRITE,), lo=at, error=errno.EIO, times=1)
            writing = one.client.write(3 * CHUNK, b"1" * BLOCK)
            await asyncio.wait_for(writing, patience(flawed))
            assert superblock_of(paths[0]).dev_roles[1:3] == (ROLE_FAULTY, ROLE_FAULTY)

    with flaw(flawed, "TimeoutError", *patches_of("one-node-blocks-all")):
        run(story())


@both_ways
def test_the_loss_that_ends_giving_back_the_resync_right_is_noticed(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)
    said: list[str] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        async with cluster_of(1, paths) as cluster:
            one = cluster.nodes[1]
            await asyncio.wait_for(one.array.idle(), 20)
            held = asyncio.Event()

            async def hold() -> None:
                async with one.array.coordinator.resync_right():
                    held.set()
                    await asyncio.Event().wait()

            holding = asyncio.create_task(hold())
            await held.wait()
            given = asyncio.Event()
            one.at("resync.right_given", lambda fields: given.set())
            cluster._pumping = True  # no answer
            holding.cancel()
            await given.wait()
            holding.cancel()
            with suppress(asyncio.CancelledError):
                await holding
            before = loop.get_exception_handler()
            loop.set_exception_handler(lambda _, context: said.append(str(context["message"])))
            cluster._pumping = False
            one.end_session(one.lose_session())
            del holding
            await until(lambda: one.names().count("array.serving") == 2 or one.array.state.counters.rejoins)
            gc.collect()
            loop.set_exception_handler(before)
            assert not said, f"{said}"

    with flaw(flawed, "never retrieved", *patches_of("loss-that-nobody-hears-of")):
        run(story())


@both_ways
def test_a_life_begins_without_the_windows_that_the_former_one_heard_of_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool
) -> None:
    """It had forgotten them all when it was told of one more."""
    paths = clustered(tmp_path)
    drain = Array._drain

    async def hears_last(self: Array) -> None:
        await drain(self)
        self.set_window(1, 0, CHUNK // 512)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            one = cluster.nodes[1]
            await settled(cluster)
            monkeypatch.setattr(Array, "_drain", hears_last)
            one.end_session(one.lose_session())
            await until(lambda: one.array.state.counters.rejoins)
            monkeypatch.setattr(Array, "_drain", drain)
            await asyncio.wait_for(one.client.write(0, b"w" * BLOCK), patience(flawed))
            await settled(cluster)

    with flaw(flawed, "TimeoutError|is not over", *patches_of("window-outlives-its-life")):
        run(story())


@both_ways
def test_a_node_that_is_leaving_begins_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flawed: bool
) -> None:
    """A node is proved dead while the last lock operation of one that leaves is still on its way."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            one = cluster.nodes[1]
            await asyncio.wait_for(one.array.idle(), 20)
            life: Any = one.array.coordinator._life  # type: ignore[attr-defined]
            stop = life.channel.stop

            async def one_more_is_dead() -> None:
                life.recover_prep()
                life.recover_slot(Slot(4, 9, "node9"))
                life.recover_done(life._lockspace.slots, 1, 7)
                await asyncio.sleep(0)
                await stop()

            monkeypatch.setattr(life.channel, "stop", one_more_is_dead)
            await asyncio.wait_for(one.array.stop(), 20)
            left = one.events[one.names().index("leave.deaf") :]
            assert not [fields for name, fields in left if name == "lock.asked"], "it begins something"

    with flaw(flawed, "it begins something", *patches_of("leaver-takes-over")):
        run(story())


@both_ways
def test_a_joiner_asks_for_the_resync_right_before_its_slot_has_an_owner(
    tmp_path: Path, flawed: bool
) -> None:
    """Others take the bits of an owned slot for its owner's business, and settle when they get the right."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            asked = [
                (fields["resource"], fields["mode"])
                for name, fields in cluster.nodes[1].events
                if name == "lock.asked"
            ]
            right = asked.index(("resync", "EX"))
            assert right < asked.index(("bitmap0000", "PW")), "others may settle before it copies"
            await asyncio.wait_for(cluster.nodes[1].array.idle(), 20)
            asked_twice = cluster.nodes[1].names().count("resync.right") == 2
            assert asked_twice, "the right that was asked for first settles nothing"

    shows = "may settle before|settles nothing"
    with flaw(flawed, shows, *patches_of("settled-before-the-joiner-copied")):
        run(story())


@both_ways
def test_a_right_that_was_asked_for_before_a_loss_settles_nothing(tmp_path: Path, flawed: bool) -> None:
    """Whoever has taken over meanwhile waits behind us with bits to copy."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            one = cluster.nodes[1]
            await asyncio.wait_for(one.array.idle(), 20)
            life: Any = one.array.coordinator._life  # type: ignore[attr-defined]
            async with one.array.coordinator.resync_right():
                assert life.settles
                life.recover_prep()
                life.recover_done(life._lockspace.slots, 1, 7)
                assert life.all_settled
                assert not life.settles, "it takes the array for settled"
            await asyncio.wait_for(one.array.idle(), 20)
            assert one.array.state.settled

    with flaw(flawed, "takes the array for settled", *patches_of("right-asked-for-too-early")):
        run(story())
