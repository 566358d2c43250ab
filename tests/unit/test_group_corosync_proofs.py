"""Ends that a node proved are there after its reboot, and a file that cannot be read is no empty one."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustermd.errors import BadBytes
from clustermd.group.corosync.proofs import MOST, Proofs


def test_what_was_kept_is_read_by_the_next_one(tmp_path: Path) -> None:
    assert Proofs(tmp_path).load() == []
    proofs = Proofs(tmp_path)
    proofs.keep((2, 1 << 63), "off")
    proofs.keep((3, 5), "the lease ran out")
    assert Proofs(tmp_path).load() == [((2, 1 << 63), "off"), ((3, 5), "the lease ran out")]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    proofs = Proofs(tmp_path)
    for number in range(1, MOST + 3):
        proofs.keep((2, number), "off")
    told = Proofs(tmp_path).load()
    assert len(told) == MOST and told[-1] == ((2, MOST + 2), "off") and told[0] == ((2, 3), "off")


@pytest.mark.parametrize("text", ["", "[[1]]", "[[1, 2, 3]]", "nothing"])
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "fenced.json").write_text(text)
    with pytest.raises(BadBytes, match="then remove it"):
        Proofs(tmp_path).load()
