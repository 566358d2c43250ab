"""Flaws of bitmaps and their takeover: F1-F5, F13, F27, F30, F33, F36, F39, F40, rules 1, 2, 10, 11, 13, 14.

Each story passes, and fails with the flaw put back (see `flaws`).
"""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from array_kit import (
    BLOCK,
    CHUNK,
    clustered,
    data_of,
    dirty_chunks,
    make_images,
    poke,
    run,
    running,
    set_bits,
    slot_area,
    superblock_of,
    until,
)
from cluster_in_process import Crashed, InProcessCluster, Node, cluster_of, settled
from faulty_submitter import Fault
from flaws import Patch, both_ways, flaw, patches_of, patience

from clustermd.array import resync
from clustermd.array.bitmap import Bitmap
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.array.metadata import Metadata
from clustermd.array.resync import Resync
from clustermd.array.slots import Slots
from clustermd.cluster.life import Life
from clustermd.device.member_device import Op
from clustermd.dlm.lockspace import Slot
from clustermd.ondisk.bitmap_superblock import BitmapState, BitmapSuperblock

pytestmark = pytest.mark.usefixtures("quick_retries")


def started_once(paths: list[Path]) -> None:
    """An array that has never been started forgives the bits mdadm sets at creation."""

    async def begin() -> None:
        async with cluster_of(1, paths):
            pass

    run(begin())


def bits_anywhere(paths: list[Path], member: int = 0, slots: int = 4) -> set[int]:
    """The union of the bits of all slots on one member."""
    return {chunk for slot in range(slots) for chunk in dirty_chunks(paths[member], slot)}


async def die_with_halves_apart(cluster: InProcessCluster, paths: list[Path], chunks: list[int]) -> Node:
    """Node 1 writes to those chunks and dies; one half has its last writes and the other has not."""
    one = cluster.nodes[1]
    for chunk in chunks:
        await one.client.write(chunk * CHUNK, b"1" * BLOCK)
    dead = await cluster.kill(1, fence=False)
    for chunk in chunks:
        poke(paths[1], chunk * CHUNK, b"0" * BLOCK)
    return dead


def own_page_fault(paths: list[Path], slot: int, **what: Any) -> Fault:
    """A fault of the bitmap area of one slot."""
    start, length, _ = slot_area(paths[0], slot)
    return Fault(ops=(Op.WRITE,), lo=start, hi=start + length, **what)


# --- F1, rule 1: the own bitmap is loaded before others are merged ----------------------------------------


@both_ways
def test_f1_the_own_bits_survive_the_merging_of_others(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)
    started_once(paths)
    for slot, chunk in ((0, 5), (1, 9)):
        for path in paths:
            set_bits(path, slot, [chunk])
        poke(paths[1], chunk * CHUNK, b"half a write")

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1]), "halves differ: bits were forgotten"

    with flaw(flawed, "bits were forgotten", *patches_of("F1")):
        run(story())


@both_ways
def test_rule_1_a_joiner_serves_after_it_has_merged_what_the_dead_left(tmp_path: Path, flawed: bool) -> None:
    """A joiner that writes before it knows the dead node's bits would read halves that differ."""
    paths = clustered(tmp_path)
    started_once(paths)
    for path in paths:
        set_bits(path, 2, [9])
    poke(paths[1], 9 * CHUNK, b"half a write")

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            one = cluster.nodes[1]
            assert "takeover.source_cleared" in one.names()[: one.names().index("array.serving")], (
                "not merged"
            )
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])

    with flaw(flawed, "not merged|is not in list|in \\[", *patches_of("rule 1")):
        run(story())


# --- F2, F3: chunk 0 is a chunk like any other --------------------------------------------------------------


@both_ways
def test_f2_a_takeover_of_chunk_0_alone_is_copied(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            cluster.fence(await die_with_halves_apart(cluster, paths, [0]))
            await until(lambda: "takeover.done" in cluster.nodes[2].names())
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1]), "chunk 0 was not copied"

    with flaw(flawed, "chunk 0 was not copied", *patches_of("F2")):
        run(story())


@both_ways
def test_f3_reads_of_chunk_0_keep_to_the_first_copy_until_it_is_copied(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            at = superblock_of(paths[0]).data_offset * 512
            copy = two.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True)
            cluster.fence(await die_with_halves_apart(cluster, paths, [0, 5]))
            await until(lambda: copy.hits)
            for content in await asyncio.gather(*(two.client.read(512, BLOCK // 2) for _ in range(8))):
                assert content[:4] == b"1111", "a read of the other copy"
            copy.end()
            two.disks.release()
            await settled(cluster)

    with flaw(flawed, "a read of the other copy", *patches_of("F3")):
        run(story())


# --- F4, F40, F27: a dirty bit is always on the disks somewhere ----------------------------------------------


@both_ways
def test_f4_the_source_keeps_its_bits_until_ours_are_on_every_disk(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            own = own_page_fault(paths, 1, member="disk1", stuck=True)
            two.disks.faults.append(own)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3, 7]))
            # The page may be on its way for the new superblock's sake already: the takeover itself must have come.
            reached = {"takeover.merged", "takeover.source_cleared"}

            def taking_over() -> bool:
                names = two.names()
                return "takeover.locked" in names and bool(
                    reached & set(names[names.index("takeover.locked") :])
                )

            await until(lambda: own.hits and taking_over())
            for member in (0, 1):
                assert bits_anywhere(paths, member) >= {3, 7}, "a bit is nowhere on a disk"
            own.end()
            two.disks.release()
            await settled(cluster)
            assert bits_anywhere(paths) <= {3, 7} and dirty_chunks(paths[0], 0) == []

    with flaw(flawed, "nowhere on a disk", *patches_of("F4")):
        run(story())


@both_ways
def test_f40_bits_that_were_taken_over_survive_the_death_of_their_new_owner(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            dead: list[Node] = []

            def die(node: Node, _: dict[str, Any]) -> None:
                if not dead:
                    dead.append(cluster.crash(node.number))
                    raise Crashed

            for node in (cluster.nodes[2], cluster.nodes[3]):
                node.at("takeover.source_cleared", partial(die, node))
            cluster.fence(await die_with_halves_apart(cluster, paths, [3]))
            await until(lambda: dead)
            await cluster.bury(dead[0])
            await until(lambda: all("takeover.done" in n.names() for n in cluster.nodes.values()))
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1]), "the second crash lost the bits"

    with flaw(flawed, "lost the bits|nowhere", *patches_of("F4")):
        run(story())


@both_ways
def test_f27_what_is_needed_in_memory_has_its_bit_on_the_disks(tmp_path: Path, flawed: bool) -> None:
    """Rule 11, seen at a takeover: while the copy has not been made, the own slot has the bits."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            at = superblock_of(paths[0]).data_offset * 512
            copy = two.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3, 200]))
            await until(lambda: copy.hits)
            bitmap = two.array.state.the_bitmap()
            needed = {chunk for chunk in range(len(bitmap.counters)) if bitmap.needed(chunk)}
            assert needed == {3, 200}
            for path in paths:
                assert needed <= set(dirty_chunks(path, 1)), "needed, but no bit on the disk"
            copy.end()
            two.disks.release()
            await settled(cluster)

    with flaw(flawed, "no bit on the disk", *patches_of("F27")):
        run(story())


# --- F5, F36, F39: takeovers are retried, done once, and not before the own bitmap is there -------------------


@both_ways
def test_f5_a_takeover_that_failed_is_tried_again(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            two.disks.fault(ops=(Op.READ,), lo=start, hi=start + length, error=errno.EIO, times=2)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3]))
            await until(lambda: "takeover.done" in two.names(), patience(flawed))
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])

    with flaw(flawed, "never came to that", *patches_of("F5")):
        run(story())


@both_ways
def test_f36_of_two_survivors_one_finds_the_bits_and_copies_them_once(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3, 4]))
            await until(lambda: all("takeover.done" in n.names() for n in cluster.nodes.values()))
            await settled(cluster)
            copied = [node.array.status().counters["resynced_chunks"] for node in cluster.nodes.values()]
            assert sorted(copied) == [0, 2], f"copied by two: {copied}"

    with flaw(flawed, "copied by two", *patches_of("F36")):
        run(story())


@both_ways
def test_f39_a_node_that_dies_while_another_joins_is_taken_over_after_the_own_bitmap_is_loaded(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 1)
    join, merge = Life.join, Slots.merge

    async def ready_at_once(self: Life, name: str) -> None:
        self._ready.set()
        await join(self, name)

    async def into_what_is_there(self: Slots, slot: int) -> list[int]:
        state, template = self.state, self.template
        if state.bitmap is None and template is not None:
            state.slot, state.bitmap_header, state.bitmap = 1, template, Bitmap(self._geometry())
            state.bitmap.pages[0][:256] = template.to_bytes()
        return await merge(self, slot)

    async def story() -> None:
        async with cluster_of(1, paths, faulty=True) as cluster:
            await settled(cluster)
            for path in paths:
                set_bits(path, 1, [9])
            poke(paths[1], 9 * CHUNK, b"half a write")
            two = cluster.add(2)
            loading = Fault(ops=(Op.READ,), lo=start, hi=start + length, stuck=True)
            joining = asyncio.ensure_future(two.assemble(paths, faults=[loading]))
            await until(lambda: loading.hits)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3]))
            for _ in range(20):
                await asyncio.sleep(0.005)
            loading.end()
            two.disks.release()
            await asyncio.wait_for(joining, 10)
            await until(lambda: not list(two.array.coordinator.takeovers()))
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1]), "our own bits were forgotten"

    patches = [(Life, "join", ready_at_once), (Slots, "merge", into_what_is_there)]
    with flaw(flawed, "were forgotten", *patches):
        run(story())


# --- F13: only vacant slots are merged --------------------------------------------------------------------


@both_ways
def test_f13_the_bitmap_of_a_living_node_is_left_alone(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            await cluster.nodes[1].client.write(3 * CHUNK, b"1" * BLOCK)
            await cluster.add(2).assemble(paths)
            assert dirty_chunks(paths[0], 0) == [3], "the bits of a living node were cleared"
            assert dirty_chunks(paths[0], 1) == []

    with flaw(flawed, "were cleared", *patches_of("F13")):
        run(story())


# --- F30: a bitmap that cannot be believed means all chunks -------------------------------------------------


@both_ways
@pytest.mark.parametrize("kind", ["stale", "garbage"])
def test_f30_a_bitmap_that_is_not_to_be_believed_counts_as_all_dirty(
    tmp_path: Path, kind: str, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    started_once(paths)
    for path in paths:
        start, length, _ = slot_area(path, 1)
        with open(path, "r+b") as file:
            file.seek(start)
            header = BitmapSuperblock.from_bytes(file.read(256))
            file.seek(start)
            if kind == "garbage":
                file.write(bytes(length))
            else:
                raw = bytearray(header.to_bytes())
                raw[48] |= int(BitmapState.STALE)
                file.write(raw)
    poke(paths[1], 77 * CHUNK, b"nobody knows")

    def believe(self: Slots, areas: dict[int, bytes], slot: int) -> tuple[Any, list[int]]:
        area = areas[self.state.in_sync[0].index]
        return self.template, list(self._geometry().dirty_chunks(area))

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1]), "an old bitmap was believed"

    with flaw(flawed, "was believed", (Slots, "_join", believe)):
        run(story())


# --- F33, rule 10: balanced reads come back after the copy ------------------------------------------------


@both_ways
@pytest.mark.parametrize("when", ["before the merge", "before the copy"])
def test_f33_reads_keep_to_the_first_copy_until_the_dead_nodes_chunks_are_equal(
    tmp_path: Path, when: str, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    start, length, _ = slot_area(paths[0], 0)
    merge = Slots.merge

    async def merge_and_balance(self: Slots, slot: int) -> list[int]:
        chunks = await merge(self, slot)
        self.state.settled = True
        self.state.the_bitmap().unreconciled.clear()
        self.state.the_bitmap().unreconciled.update(chunk + 1 for chunk in chunks)
        return chunks

    async def read_many(node: Node) -> None:
        for _ in range(3):
            for content in await asyncio.gather(*(node.client.read(3 * CHUNK, 512) for _ in range(6))):
                assert content[:4] == b"1111", "a read of the other copy"

    async def story() -> None:
        async with cluster_of(2, paths, faulty=True) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            at = superblock_of(paths[0]).data_offset * 512
            if when == "before the merge":
                fault = two.disks.fault(ops=(Op.READ,), lo=start, hi=start + length, stuck=True)
            else:
                fault = two.disks.fault(member="disk1", ops=(Op.WRITE,), lo=at, stuck=True)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3]))
            await until(lambda: fault.hits, patience(flawed))
            await read_many(two)
            fault.end()
            two.disks.release()
            await settled(cluster)
            assert data_of(paths[0]) == data_of(paths[1])

    before_the_copy: tuple[Patch, ...] = ((Slots, "merge", merge_and_balance),)
    patches = before_the_copy if when == "before the copy" else patches_of("F33")
    with flaw(flawed, "a read of the other copy|never came", *patches):
        run(story())


@both_ways
def test_rule_10_a_pass_that_ends_while_a_node_dies_does_not_settle_the_array(
    tmp_path: Path, flawed: bool
) -> None:
    """A resync that is finished between the loss of a node and the proof of its death says nothing of its bits."""
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            two = cluster.nodes[2]
            life: Any = two.array.coordinator._life  # type: ignore[attr-defined]
            life.recover_prep()
            two.array.resync.wake()
            await asyncio.wait_for(two.array.idle(), 10)
            life.recover_slot(Slot(4, 9, "node9"))
            assert not two.array.state.settled, "reads are balanced over a dead node's halves"
            life.recover_done(life._lockspace.slots, 2, 7)
            await settled(cluster)

    wrong = property(lambda self: not self.takeovers)
    with flaw(flawed, "reads are balanced", (Life, "all_settled", wrong)):
        run(story())


@both_ways
def test_rule_10_nobody_settles_while_the_node_with_the_bits_has_to_try_again(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    run_pass = Resync._pass

    async def give_the_right_up(self: Resync) -> None:
        state, retry = self.state, resync.RETRY_S
        if state.the_bitmap().unreconciled and "failed" not in state.name:
            state.name += " failed"
            async with self.coordinator.resync_right():
                pass
            await asyncio.sleep(retry + 0.3)
        await run_pass(self)

    async def story() -> None:
        async with cluster_of(3, paths) as cluster:
            await settled(cluster)
            two, three = cluster.nodes[2], cluster.nodes[3]
            refusals = 3

            async def busy(lo: int, hi: int) -> bool:
                nonlocal refusals
                refusals -= 1
                return refusals < 0

            two.array.quiesce = three.array.quiesce = busy  # type: ignore[method-assign]
            cluster.fence(await die_with_halves_apart(cluster, paths, [3]))
            await until(lambda: all("cluster.lost" in node.names() for node in (two, three)))
            while data_of(paths[0]) != data_of(paths[1]):
                for node in (two, three):
                    assert not node.array.state.settled, "settled over halves that differ"
                await asyncio.sleep(0.005)
            await settled(cluster)

    with flaw(flawed, "settled over halves", (Resync, "_pass", give_the_right_up)):
        run(story())


# --- rules 13 and 14 -----------------------------------------------------------------------------------------


@both_ways
def test_rule_13_a_survivor_that_never_wrote_repairs_at_once(tmp_path: Path, flawed: bool) -> None:
    paths = clustered(tmp_path)

    async def story() -> None:
        async with cluster_of(2, paths) as cluster:
            await settled(cluster)
            cluster.fence(await die_with_halves_apart(cluster, paths, [3]))
            await until(lambda: data_of(paths[0]) == data_of(paths[1]), patience(flawed))

    with flaw(flawed, "never came to that", *patches_of("rule 13")):
        run(story())


@both_ways
def test_rule_14_events_only_grow(tmp_path: Path, flawed: bool) -> None:
    paths = make_images(tmp_path)
    write = Metadata._write

    async def one_back_when_clean(self: Metadata) -> None:
        if self.state.clean and self.state.events > 1:
            self.state.events -= 2
        await write(self)

    async def story() -> None:
        async with running(paths) as (array, client):
            seen = [superblock_of(paths[0]).events]
            for _ in range(3):
                await client.write(0, b"x" * BLOCK)
                seen.append(superblock_of(paths[0]).events)
                await array.activity.mark(True)
                seen.append(superblock_of(paths[0]).events)
            assert seen == sorted(seen), "events went back"

    with flaw(flawed, "events went back", (Metadata, "_write", one_back_when_clean)):
        run(story())


@both_ways
def test_rule_14_a_slots_superblock_is_valid_on_every_member_before_its_bits_matter(
    tmp_path: Path, flawed: bool
) -> None:
    paths = clustered(tmp_path)
    started_once(paths)
    start, length, _ = slot_area(paths[1], 1)
    flush = BitmapWriter.flush

    async def flush_later(self: BitmapWriter) -> None:
        if self.state.held != "not started":
            await flush(self)
        else:
            self.state.the_bitmap().lazy.clear()

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            two = cluster.add(2)
            headers: list[bytes] = []

            def look(_: dict[str, Any]) -> None:
                with open(paths[1], "rb") as file:
                    file.seek(start)
                    headers.append(file.read(4))

            two.at("join.gathered", look)
            with open(paths[1], "r+b") as file:
                file.seek(start)
                file.write(bytes(length))
            await two.assemble(paths)
            assert headers == [b"bitm"], "no valid superblock on one member"

    with flaw(flawed, "no valid superblock", (BitmapWriter, "flush", flush_later)):
        run(story())


def test_a_disk_without_valid_bitmap_does_not_hide_the_bits_of_another(tmp_path: Path) -> None:
    paths = clustered(tmp_path)
    started_once(paths)
    set_bits(paths[0], 1, [9])
    start, length, _ = slot_area(paths[1], 1)
    with open(paths[1], "r+b") as file:
        file.seek(start)
        file.write(bytes(length))
    poke(paths[1], 9 * CHUNK, b"half a write")

    async def story() -> None:
        async with cluster_of(1, paths) as cluster:
            await settled(cluster)
            assert cluster.nodes[1].array.status().counters["resynced_chunks"] == 1

    run(story())
    assert data_of(paths[0]) == data_of(paths[1])
