"""The order in which -C writes: wherever it is cut short, nothing that could be assembled is left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from clustermd.cli import create as module
from clustermd.cli.assemble import scanned_name
from clustermd.cli.create import create, set_name
from clustermd.cli.grammar import parse
from clustermd.errors import BadBytes, DeviceRefused
from clustermd.node.config import ArrayConfig
from clustermd.node.disk import Disk

MIB = 1 << 20
WORDS = "-CR md0 -l1 -n2 -b clustered --bitmap-chunk=64K --home-cluster=c1"


class Cut(Exception):
    """The power went."""


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("CLUSTERMD_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("CLUSTERMD_NODE", "node1")
    monkeypatch.setattr(module, "start", lambda config, rundir: {"uri": "u", "config": config})
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(64 * MIB)
    return [str(path) for path in paths]


def has_superblock(path: str) -> bool:
    with Disk(path) as disk:
        try:
            disk.superblock()
        except BadBytes:
            return False
    return True


def run(*words: str) -> int:
    return create(parse([*WORDS.split(), *words]))


def cut_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `writes` single writes through, over all disks, then nothing."""
    left = writes
    real = Disk.write

    def write(disk: Disk, pieces: Iterable[tuple[int, bytes]]) -> None:
        nonlocal left
        for piece in pieces:
            if not left:
                raise Cut
            left -= 1
            real(disk, [piece])

    monkeypatch.setattr(Disk, "write", write)


@pytest.mark.parametrize("old", [False, True], ids=["empty", "over-an-old-array"])
def test_a_creation_cut_short_anywhere_leaves_nothing_to_assemble(
    disks: list[str], monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    # 4 bitmap areas and a superblock on each of two disks; over an old array its superblocks go first.
    total = 2 * (4 + 1) + (2 if old else 0)
    for writes in range(total):
        with monkeypatch.context() as patch:
            if old:
                run(*disks)
            cut_after(writes, patch)
            with pytest.raises(Cut):
                run(*disks)
        if not (old and writes == 0):
            assert not all(has_superblock(path) for path in disks), writes
        for path in disks:
            with open(path, "r+b") as file:
                file.truncate(0)
                file.truncate(64 * MIB)
    cut_after(total, monkeypatch)
    assert run(*disks) == 0
    assert all(has_superblock(path) for path in disks)


def test_the_array_is_started_as_it_was_made(disks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ArrayConfig] = []

    def start(config: ArrayConfig, _rundir: Any) -> dict[str, Any]:
        started.append(config)
        return {"uri": "u"}

    monkeypatch.setattr(module, "start", start)
    run(*disks)
    (config,) = started
    with Disk(disks[0]) as disk:
        uuid = disk.superblock().set_uuid.hex()
    assert config == ArrayConfig("md0", tuple(disks), uuid=uuid, cluster_name="c1", run=True, created=True)


def test_a_disk_claimed_by_another_creation_is_refused(disks: list[str]) -> None:
    with Disk(disks[1], writable=True) as disk:
        claimed = module._claim(disk)
        before = hashlib.md5(Path(disks[0]).read_bytes()).digest()
        with pytest.raises(DeviceRefused) as refused:
            run(*disks)
        assert refused.value.code == "device-in-array"
        assert hashlib.md5(Path(disks[0]).read_bytes()).digest() == before
        claimed.close()
    assert run(*disks) == 0


@pytest.mark.parametrize(
    ("name", "on_disk"), [("md3", "3"), ("md127", "127"), ("home", "home"), ("md_d0", "md_d0"), ("md", "md")]
)
def test_names_on_disk_follow_mdadm(name: str, on_disk: str) -> None:
    assert set_name(name) == on_disk
    assert scanned_name(f"host:{on_disk}") == name
