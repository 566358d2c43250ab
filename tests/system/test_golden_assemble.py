"""Arrays that Linux made, in every state that was recorded: we assemble them, repair them and stop.

The images come from real kernels (`goldens/README.md`): idle, written, killed, in the middle of a
resync or a recovery, degraded. What must hold after assembly and stop, from each snapshot:

- the members that are in sync are equal byte by byte in their data;
- where no bit was dirty they hold what they held, elsewhere what one of them held, or the recorded
  pattern that `expect.json` allows;
- their superblocks agree on roles and events, all slots are clear unless the array is degraded, and
  the real `mdadm -E` and `-X` say the same.

The images are no part of the repository: `CLUSTERMD_GOLDENS` names their directory.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_kit import mdadm_dirty_bits, mdadm_examine

from clustermd.ondisk.superblock import ROLE_FAULTY, ROLE_LIMIT
from clustermd.testing.blocks import BLOCK_BYTES
from clustermd.testing.disks import Disk, differing_blocks, look
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

CLUSTER_NAME = "goldens"
PATTERN_LINE_BYTES = 32
RECOVERY_S = 40

LOST_BY_LINUX = {
    "c09-both-killed/assembled-ro": {800, 2500},
    "c09-both-killed/recovered": {800, 2500},
}
"""Blocks that differ under clear bits in the snapshot itself: Linux had forgotten the bits (F1), so no
later assembly can know of them. From `c09-both-killed/crash`, where the bits are still there, all is equal."""


GOLDENS = Path(
    os.environ.get("CLUSTERMD_GOLDENS") or Path(__file__).resolve().parents[2].parent / "shared" / "goldens"
)


def snapshots() -> list[str]:
    """The RAID1 snapshots as case/snapshot; none where there are no golden images."""
    found = []
    for info in sorted(GOLDENS.glob("*/*/info.json")):
        levels = {member["sb"]["level"] for member in json.loads(info.read_text())["members"] if member["sb"]}
        if levels == {1}:
            found.append(str(info.parent.relative_to(GOLDENS)))
    return found


@dataclass
class Snapshot:
    """A recorded state: the disks as found, and which of them are in sync, recovering, spare or out."""

    paths: list[str]
    before: list[Disk]
    data: list[bytes]

    @property
    def newest(self) -> Disk:
        """The member that knows most: the most events among those that have a role."""
        return max(
            (disk for disk in self.before if role(disk) is not None), key=lambda disk: disk.superblock.events
        )

    @property
    def in_sync(self) -> list[int]:
        """Which disks hold all data: a role by the newest superblock, current events, no recovery offset."""
        roles = self.newest.superblock.dev_roles
        return [
            number
            for number, disk in enumerate(self.before)
            if roles[disk.superblock.dev_number] < ROLE_LIMIT
            and disk.superblock.events + 1 >= self.newest.superblock.events
            and not disk.superblock.recovering
        ]

    @property
    def recovering(self) -> list[int]:
        return [number for number, disk in enumerate(self.before) if disk.superblock.recovering]

    @property
    def clustered(self) -> bool:
        return self.newest.superblock.clustered

    @property
    def dirty(self) -> set[int]:
        """Chunks that are dirty in any slot of any disk that is in sync."""
        return {
            chunk for number in self.in_sync for slot in self.before[number].slots for chunk in slot.dirty
        }


def role(disk: Disk) -> int | None:
    value = disk.superblock.dev_roles[disk.superblock.dev_number]
    return value if value < ROLE_LIMIT else None


def unpack(directory: Path, cluster: LocalCluster) -> Snapshot:
    paths = []
    for packed in sorted(directory.glob("disk*.img.xz")):
        path = cluster.directory / packed.stem
        path.write_bytes(lzma.decompress(packed.read_bytes()))
        paths.append(str(path))
    disks = [look(path) for path in paths]
    return Snapshot(paths, disks, [data_of(disk) for disk in disks])


def data_of(disk: Disk) -> bytes:
    with open(disk.path, "rb") as image:
        image.seek(disk.data_offset_bytes)
        return image.read(disk.size_bytes)


@pytest.mark.needs("mdadm", "loop")
@pytest.mark.parametrize("name", snapshots())
def test_an_array_made_by_linux(cluster: LocalCluster, name: str) -> None:
    snapshot = unpack(GOLDENS / name, cluster)
    degraded_before = len(snapshot.in_sync) + len(snapshot.recovering) < snapshot.newest.superblock.raid_disks
    node = cluster.node("node1")
    home = ["--home-cluster", CLUSTER_NAME] if snapshot.clustered else []
    node.run("-A", "md0", *home, *snapshot.paths)
    if snapshot.recovering:
        wait_until(
            lambda: (
                not any(look(snapshot.paths[number]).superblock.recovering for number in snapshot.recovering)
            ),
            "the recovery to end",
            RECOVERY_S,
            last_words=cluster.logs,
        )
    node.run("-W", "md0", expect=None)
    node.run("-S", "md0")
    assert cluster.processes(role="array") == []

    now_in_sync = sorted({*snapshot.in_sync, *snapshot.recovering})
    paths = [snapshot.paths[number] for number in now_in_sync]
    lost = LOST_BY_LINUX.get(name, set())
    assert set(differing_blocks(paths)) == lost
    check_content(snapshot, GOLDENS / name, paths[0], lost)
    check_metadata(paths, degraded_before)
    check_spares(snapshot, set(now_in_sync))


def check_content(snapshot: Snapshot, directory: Path, path: str, lost: set[int]) -> None:
    """Each block is what some member in sync held, and the same as before where no bit was dirty."""
    sources = [snapshot.data[number] for number in snapshot.in_sync]
    after = data_of(look(path))
    chunk_bytes = snapshot.newest.chunk_bytes or len(after)
    # Without a bitmap, a crash of the array would leave everything dirty; these were stopped cleanly.
    dirty = snapshot.dirty
    for offset in range(0, len(after), BLOCK_BYTES):
        block = after[offset : offset + BLOCK_BYTES]
        held = {source[offset : offset + BLOCK_BYTES] for source in sources}
        assert block in held, f"block {offset // BLOCK_BYTES} holds what no member held"
        if offset // chunk_bytes not in dirty and offset // BLOCK_BYTES not in lost:
            assert len(held) == 1, f"block {offset // BLOCK_BYTES} differed under a clear bit"
    check_labels(directory.parent / "expect.json", after)


def check_labels(expectation: Path, data: bytes) -> None:
    """The recorded pattern: `base`, and where a write was acknowledged that one, in flight either."""
    if not expectation.exists():
        return
    expect = json.loads(expectation.read_text())
    if "shift" in expect:
        return  # the label of this case depends on where the resync stood
    allowed: dict[int, set[str]] = {}
    for write in expect.get("writes", []):
        per_unit = write["unit"] // BLOCK_BYTES
        for chunk in write["chunks"]:
            for block in range(chunk * per_unit, (chunk + 1) * per_unit):
                before = allowed.get(block, {expect["base"]}) if write["inflight"] else set()
                allowed[block] = before | {write["label"]}
    limit = expect.get("limit_blocks", len(data) // BLOCK_BYTES)
    for block in range(min(limit, len(data) // BLOCK_BYTES)):
        line = data[block * BLOCK_BYTES : block * BLOCK_BYTES + PATTERN_LINE_BYTES].decode(errors="replace")
        match = re.fullmatch(r"MDGOLD (\S+) +blk (\d+)[ .]*\n", line)
        found = (match[1], int(match[2])) if match else line
        labels = allowed.get(block, {expect["base"]})
        assert found in {(label, block) for label in labels}, f"block {block}: {found}, allowed {labels}"


def check_metadata(paths: list[str], degraded: bool) -> None:
    """Roles and events agree; slots are clear unless degraded; by us and by mdadm."""
    disks = [look(path) for path in paths]
    assert len({disk.superblock.events for disk in disks}) == 1
    roles = {disk.superblock.dev_roles for disk in disks}
    assert len(roles) == 1
    texts = mdadm_examine(paths)
    assert len({re.search(r"Array State : (\S+)", text)[1] for text in texts}) == 1  # type: ignore[index]
    if not disks[0].slots:
        return
    counts = mdadm_dirty_bits(paths)
    assert counts == [[len(slot.dirty) for slot in disk.slots] for disk in disks]
    if not degraded:
        assert counts == [[0] * len(disk.slots) for disk in disks]


def check_spares(snapshot: Snapshot, in_sync: set[int]) -> None:
    """A spare stays a spare, and what failed stays out: neither gets data nor a role."""
    for number, disk in enumerate(snapshot.before):
        if number in in_sync:
            continue
        after = look(disk.path)
        assert after.superblock.dev_roles[disk.superblock.dev_number] in {
            snapshot.newest.superblock.dev_roles[disk.superblock.dev_number],
            disk.superblock.dev_roles[disk.superblock.dev_number],
            ROLE_FAULTY,
        }
        assert data_of(after) == snapshot.data[number], f"{disk.path} was not to be written"
