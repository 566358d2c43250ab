"""Members that fail or do not answer in the middle of what a cluster does: joins, takeovers, repairs, rejoins."""

from __future__ import annotations

import asyncio
import errno
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
from cluster_in_process import InProcessCluster, cluster_of, faulty_members, settled
from faulty_submitter import Fault

from clustermd.array import array as array_module
from clustermd.array.request import Kind
from clustermd.device.member_device import Op
from clustermd.ondisk.superblock import ROLE_FAULTY


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, quick_retries: None) -> None:
    monkeypatch.setattr(array_module, "REJOIN_S", 0.02)


async def die_with_halves_apart(cluster: InProcessCluster, paths: list[Path]) -> None:
    await cluster.nodes[1].client.write(3 * CHUNK, b"1" * BLOCK)
    dead = await cluster.kill(1, fence=False)
    poke(paths[-1], 3 * CHUNK, b"0" * BLOCK)
    cluster.fence(dead)


@pytest.mark.parametrize("what", ["read the slot", "write our own", "clear the slot", "copy", "flush"])
@pytest.mark.parametrize("how", [{"error": errno.EIO}, {"stuck": True}])
def test_a_takeover_goes_on_without_a_member_that_fails_in_it(
    tmp_path: Path, what: str, how: dict[str, Any]
) -> None:
    paths = clustered(tmp_path, 3)
    slots = {number: slot_area(paths[0], number) for number in (0, 1)}

    async def story() -> None:
        timeout_s = 4 if "stuck" in how else 30
        async with cluster_of(2, paths, faulty=True, device_timeout_s=timeout_s, tick_s=0.1) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            at = data_at(paths[0])
            start, length, _ = slots[1 if what == "write our own" else 0]
            fault = Fault(member="disk1", lo=start, hi=start + length, times=1, ops=(Op.WRITE,), **how)
            if what == "read the slot":
                fault.ops = (Op.READ,)
            elif what == "copy":
                fault.lo, fault.hi = at, 1 << 62
            elif what == "flush":
                fault.ops = (Op.FLUSH,)
            two.disks.faults.append(fault)
            await die_with_halves_apart(cluster, paths)
            await until(lambda: "takeover.done" in two.names() and fault.hits)
            await settled(cluster)
            await until(lambda: two.array.state.settled)
            out = what != "read the slot"  # another member has the same bits
            assert faulty_members(two) == [False, out, False]
            if out:
                assert superblock_of(paths[0]).dev_roles[1] == ROLE_FAULTY
            assert dirty_chunks(paths[0], 0) == dirty_chunks(paths[2], 0) == []
            two.disks.release()
            await two.client.write(3 * CHUNK, b"2" * BLOCK)
            await two.disks.drained()

    run(story())
    assert data_of(paths[0]) == data_of(paths[2])


def test_nothing_of_a_takeover_lands_after_the_slot_was_given_back(tmp_path: Path) -> None:
    """One member refuses the clearing, another is slow: the slot's lock waits for the slow one."""
    paths = clustered(tmp_path, 3)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            where: dict[str, Any] = {"ops": (Op.WRITE,), "lo": start, "hi": start + length, "times": 1}
            refused = two.disks.fault(member="disk1", error=errno.EIO, **where)
            slow = two.disks.fault(member="disk2", stuck=True, **where)
            await die_with_halves_apart(cluster, paths)
            await until(lambda: refused.hits and slow.hits)
            await asyncio.sleep(0.1)
            assert "takeover.done" not in two.names()
            again = cluster.add(1)
            joining = asyncio.ensure_future(again.assemble(paths))
            await asyncio.sleep(0.05)
            assert 0 not in [fields["slot"] for name, fields in again.events if name == "join.slot"]
            two.disks.release()
            await asyncio.wait_for(joining, 10)
            await again.client.write(9 * CHUNK, b"9" * BLOCK)
            assert 9 in dirty_chunks(paths[2], again.array.state.slot)
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[2])


def test_a_repair_cut_short_by_a_lost_session_fails_no_member(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            at = data_at(paths[0])
            await one.client.write(0, b"g" * BLOCK)
            one.array.state.settled = False
            where: dict[str, Any] = {"member": "disk0", "lo": at, "hi": at + 512}
            one.disks.fault(ops=(Op.READ,), error=errno.EIO, until_written=True, **where)
            rewriting = one.disks.fault(ops=(Op.WRITE,), stuck=True, times=1, **where)
            assert await one.client.read(0, BLOCK) == b"g" * BLOCK
            await until(lambda: rewriting.hits)
            number = one.lose_session()
            one.disks.release()
            await one.disks.drained()
            one.end_session(number)
            await until(lambda: one.array.status().counters["rejoins"] == 1)
            await one.client.write(0, b"h" * BLOCK)
            assert faulty_members(one) == [False, False]
            await settled(cluster)

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])


def test_a_joiner_that_cannot_confirm_a_member_does_not_join_and_disturbs_nobody(tmp_path: Path) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths, faulty=True) as cluster:
            await settled(cluster)
            one, two = cluster.nodes[1], cluster.add(2)
            unreadable = Fault(member="disk1", ops=(Op.READ,), lo=4096, hi=8192, error=errno.EIO, skip=1)
            with pytest.raises(Exception, match="no disk says that it has failed"):
                await asyncio.wait_for(two.assemble(paths, faults=[unreadable]), 10)
            await asyncio.wait_for(two.array.stop(), 10)
            del cluster.nodes[2]
            await one.client.write(0, b"1" * BLOCK)
            assert faulty_members(one) == [False, False]
            three = cluster.add(3)
            await asyncio.wait_for(three.assemble(paths), 10)
            assert await three.client.read(0, BLOCK) == b"1" * BLOCK

    run(story())


def test_a_joiner_that_failed_after_it_merged_hands_over_what_it_has(tmp_path: Path) -> None:
    """A vacant slot's bits are its own when it finds that a member is missing here: the others must get them."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            one = cluster.nodes[1]
            two = cluster.add(2)
            await asyncio.wait_for(two.assemble(paths), 10)
            await two.client.write(3 * CHUNK, b"2" * BLOCK)
            two.array.state.the_bitmap().mark([3])
            poke(paths[1], 3 * CHUNK, b"0" * BLOCK)
            two.array.state.held = "as if it had not begun to serve"
            two.array._living = False
            await asyncio.wait_for(two.array.stop(), 10)
            del cluster.nodes[2]
            await until(lambda: "takeover.done" in one.names())
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])

    run(story())


def test_read_only_writes_nothing_whatever_fails(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    before = [path.read_bytes() for path in paths]
    at = data_at(paths[0])

    async def story() -> None:
        async with running(paths, read_only=True, faulty=True, device_timeout_s=4, tick_s=0.1) as (
            array,
            client,
        ):
            disks = disks_of(array)
            disks.fault(member="disk0", ops=(Op.READ,), lo=at, error=errno.EIO, times=1)
            assert await client.read(0, BLOCK) == bytes(BLOCK)
            disks.fault(member="disk0", ops=(Op.READ,), lo=at, stuck=True, times=1)
            assert await client.read(0, BLOCK) == bytes(BLOCK)
            await until(lambda: array.members()[0].faulty)
            await client.do(Kind.FLUSH)
            disks.release()
            await disks.drained()
            await asyncio.sleep(0.1)  # nothing tells that nothing is written
            assert not [io for io in disks.log if io.op is not Op.READ]

    run(story())
    assert [path.read_bytes() for path in paths] == before
