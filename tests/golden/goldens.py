"""Finding and unpacking the golden disks: images that Linux md wrote.

They are no part of the repository: the environment variable CLUSTERMD_GOLDENS names their directory, else
`shared/goldens` beside the repository is taken. Without it `snapshots()` is empty and the tests that are
parametrised with it are skipped.
"""

from __future__ import annotations

import json
import lzma
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

_SECTOR = 512


def directory() -> Path | None:
    """Where the golden images are, None when this machine has none."""
    given = os.environ.get("CLUSTERMD_GOLDENS")
    path = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "goldens"
    return path if path.is_dir() else None


@dataclass(frozen=True)
class Snapshot:
    """One moment of one case: the images of all members and what was recorded with them."""

    path: Path

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @cached_property
    def info(self) -> dict[str, Any]:
        """`info.json`: superblock fields, dirty bits per slot, md5 sums, differing blocks."""
        info: dict[str, Any] = json.loads((self.path / "info.json").read_text())
        return info

    @property
    def images(self) -> list[Path]:
        """The compressed images, disk0 first."""
        return sorted(self.path.glob("disk*.img.xz"))

    def member(self, image: Path) -> dict[str, Any]:
        """What `info.json` says of one image."""
        stem = image.name.split(".")[0]
        member: dict[str, Any] = next(m for m in self.info["members"] if m["file"].split(".")[0] == stem)
        return member

    def text(self, name: str) -> str:
        """A recorded text, empty where there is none."""
        path = self.path / name
        return path.read_text() if path.exists() else ""


def snapshots(pattern: str = "*/*") -> list[Snapshot]:
    """All snapshots whose `case/tag` matches the pattern."""
    root = directory()
    if root is None:
        return []
    return [Snapshot(path.parent) for path in sorted(root.glob(f"{pattern}/info.json"))]


def snapshot(name: str) -> Snapshot:
    """One snapshot by `case/tag`; skips the test where there are no golden images."""
    root = directory()
    if root is None:
        pytest.skip("no golden images: set CLUSTERMD_GOLDENS to their directory")
    return Snapshot(root / name)


def unpack(image: Path, into: Path) -> Path:
    """Unpack an image as a sparse file in directory `into`, once; returns its path."""
    target = into / f"{image.parents[1].name}-{image.parent.name}-{image.name.removesuffix('.xz')}"
    if target.exists():
        return target
    part = target.with_suffix(".part")
    with lzma.open(image) as source, part.open("wb") as out:
        while piece := source.read(1 << 20):
            if piece.count(0) == len(piece):
                out.seek(len(piece), os.SEEK_CUR)
            else:
                out.write(piece)
        out.truncate(out.tell())
    part.rename(target)
    return target


class Disk:
    """The start of an image, or all of it, in memory: enough to read its metadata."""

    def __init__(self, image: Path, size_bytes: int, whole: bool = False) -> None:
        with lzma.open(image) as source:
            self.data = source.read(size_bytes if whole else 2 << 20)
        self.sectors = size_bytes // _SECTOR

    def read(self, sector: int, count: int) -> bytes:
        return self.data[sector * _SECTOR : (sector + count) * _SECTOR]
