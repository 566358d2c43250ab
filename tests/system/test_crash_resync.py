"""A resync on node1 that does not end there goes on at node2: after a stop, and after a kill."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from cluster_kit import CHUNK_BYTES, CREATE, DISK_BYTES, mdadm_dirty_bits

from clustermd.testing.disks import all_clear, differing_blocks, look
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

CRAWL_KIB_S = 4000


def stop(node: Node) -> None:
    node.run("-S", "md0")


def kill(node: Node) -> None:
    node.kill()


@pytest.mark.needs("mdadm", "loop")
@pytest.mark.parametrize("end", [stop, kill])
def test_a_resync_goes_on_where_it_ended(cluster: LocalCluster, end: Callable[[Node], None]) -> None:
    disks = cluster.images(2, DISK_BYTES)
    for number, disk in enumerate(disks):
        with open(disk, "r+b") as image:
            image.seek(4 << 20)
            image.write(bytes([number + 1]) * (48 << 20))
    one, two = cluster.node("node1"), cluster.node("node2")
    for node in (one, two):  # before anything is copied
        node.rundir.make()
        limit_speed(node, CRAWL_KIB_S)
    one.run("-CR", "md0", *CREATE, *disks)
    two.run("-A", "md0", *disks)
    slots = one.slot(), two.slot()
    total = -(-look(disks[0]).size_bytes // CHUNK_BYTES)
    wait_until(lambda: 0 < dirty(disks, slots[0]) < total * 9 // 10, "the resync to have copied a tenth", 30)
    wait_until(lambda: re.search(r"resync ?=(PENDING|REMOTE)", two.mdstat()), "node2 to say that it waits")
    end(one)
    left = max(dirty(disks, slot) for slot in slots)
    assert 0 < left < total, "the resync was to be interrupted in the middle"
    wait_until(lambda: re.search(r"resync = ", two.mdstat()), "node2 to resync", last_words=cluster.logs)
    limit_speed(two, 1 << 20)
    two.run("-W", "md0", expect=None)
    wait_until(lambda: all_clear(disks), "every bit to be clear", 30, last_words=cluster.logs)
    assert differing_blocks(disks) == []
    with open(disks[1], "rb") as image:
        image.seek(4 << 20)
        assert image.read(48 << 20) == b"\1" * (48 << 20), "the first member is the one to copy from"
    two.run("-S", "md0")
    assert mdadm_dirty_bits(disks) == [[0] * 4] * 2


def limit_speed(node: Node, kib_s: int) -> None:
    (node.rundir.node_dir / "speed_limit_min").write_text(f"{min(kib_s, 1000)}\n")
    (node.rundir.node_dir / "speed_limit_max").write_text(f"{kib_s}\n")


def dirty(disks: list[str], slot: int) -> int:
    """How many bits of a slot are set on the first disk."""
    return len(look(disks[0]).slots[slot].dirty)
