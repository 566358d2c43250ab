"""The judge must turn red for one wrong block among thousands, and for nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, Identity, content, parse
from clustermd.testing.crash_states import IllegalState, make_halves_differ
from clustermd.testing.judge import Verdict, Wrong, compare_halves, image_reader, judge
from clustermd.testing.write_log import Kind, Knowledge, LogWriter, knowledge_of_logs, read_log

BLOCKS = 512


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[int, bytes]]:
    """A log of three acknowledged generations of every block, and a disk that holds the last."""
    log = tmp_path / "node1.log"
    writer = LogWriter(log, node=1)
    for generation in (1, 2, 3):
        for block in range(BLOCKS):
            writer.append(Kind.ISSUED, [(block, generation)])
            writer.append(Kind.ACKNOWLEDGED, [(block, generation)])
    writer.close()
    return log, {block: content(1, block, 3) for block in range(BLOCKS)}


def verdict_of(log: Path, disk: dict[int, bytes]) -> Verdict:
    return judge([log], disk.__getitem__)


def the_fault(verdict: Verdict) -> tuple[Wrong, int]:
    assert not verdict.good
    (fault,) = verdict.faults
    return fault.wrong, fault.block


def test_a_disk_that_holds_everything_is_good(written: tuple[Path, dict[int, bytes]]) -> None:
    verdict = verdict_of(*written)
    assert verdict.good
    assert (verdict.blocks, verdict.acknowledged, verdict.in_doubt) == (BLOCKS, BLOCKS, 0)


def test_one_dropped_write_turns_it_red(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    disk[100] = content(1, 100, 2)
    verdict = verdict_of(log, disk)
    assert the_fault(verdict) == (Wrong.LOST, 100)
    assert "acknowledged write is gone" in str(verdict)


def test_a_write_that_never_arrived_turns_it_red(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    disk[7] = ZEROES
    assert the_fault(verdict_of(log, disk)) == (Wrong.LOST, 7)


@pytest.mark.parametrize("cut", [512, 2048, 3584])
def test_one_torn_write_turns_it_red(written: tuple[Path, dict[int, bytes]], cut: int) -> None:
    log, disk = written
    disk[9] = content(1, 9, 3)[:cut] + content(1, 9, 2)[cut:]
    assert the_fault(verdict_of(log, disk)) == (Wrong.TORN, 9)


def test_a_block_in_the_wrong_place_turns_it_red(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    disk[30] = content(1, 31, 3)
    assert the_fault(verdict_of(log, disk)) == (Wrong.MISPLACED, 30)


def test_the_block_of_another_node_turns_it_red(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    disk[30] = content(2, 30, 3)
    assert the_fault(verdict_of(log, disk)) == (Wrong.MISPLACED, 30)


def test_a_generation_nobody_issued_turns_it_red(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    disk[30] = content(1, 30, 4)
    assert the_fault(verdict_of(log, disk)) == (Wrong.UNASKED, 30)


def test_a_write_in_doubt_may_be_there_or_not(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    writer = LogWriter(log, node=1)
    writer.append(Kind.ISSUED, [(5, 4), (6, 4)])
    writer.close()
    disk[5] = content(1, 5, 4)
    verdict = verdict_of(log, disk)
    assert verdict.good
    assert verdict.in_doubt == 2


def test_what_was_read_once_may_not_be_unread(written: tuple[Path, dict[int, bytes]]) -> None:
    log, disk = written
    writer = LogWriter(log, node=1)
    writer.append(Kind.ISSUED, [(5, 4)])
    writer.append(Kind.SEEN, [(5, 4)])
    writer.close()
    assert the_fault(verdict_of(log, disk)) == (Wrong.LOST, 5)


def test_a_record_cut_off_by_a_kill_is_no_record(written: tuple[Path, dict[int, bytes]]) -> None:
    log, _ = written
    whole = len(list(read_log(log)))
    os.truncate(log, log.stat().st_size - 5)
    assert len(list(read_log(log))) == whole - 1


def test_two_owners_of_one_block_are_a_mistake_of_the_test(tmp_path: Path) -> None:
    for node in (1, 2):
        writer = LogWriter(tmp_path / f"{node}.log", node)
        writer.append(Kind.ISSUED, [(5, 1)])
        writer.close()
    with pytest.raises(ValueError, match="both wrote block 5"):
        knowledge_of_logs([tmp_path / "1.log", tmp_path / "2.log"])


def test_a_block_says_who_wrote_it() -> None:
    data = content(3, 77, 12)
    assert len(data) == BLOCK_BYTES
    assert parse(data) == Identity(3, 77, 12)
    assert parse(ZEROES) is None
    assert parse(data[:100]) is None


def test_every_sector_of_a_block_tells_generations_apart() -> None:
    one, other = content(1, 5, 1), content(1, 5, 2)
    assert all(one[at : at + 512] != other[at : at + 512] for at in range(0, BLOCK_BYTES, 512))


DATA_OFFSET = 1 << 20


@pytest.fixture
def halves(tmp_path: Path) -> list[Path]:
    """Two equal member images, 1 MiB before the data area."""
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        path.write_bytes(bytes(DATA_OFFSET) + b"".join(content(1, block, 3) for block in range(BLOCKS)))
    return paths


def overwrite(path: Path, block: int, data: bytes) -> None:
    with path.open("r+b") as image:
        image.seek(DATA_OFFSET + block * BLOCK_BYTES)
        image.write(data)


def test_halves_are_compared_byte_by_byte(halves: list[Path]) -> None:
    size = BLOCKS * BLOCK_BYTES
    assert compare_halves(halves, DATA_OFFSET, size) == []
    overwrite(halves[1], 400, content(1, 400, 3)[:-1] + b"?")
    overwrite(halves[0], 3, content(1, 3, 2))
    assert compare_halves(halves, DATA_OFFSET, size) == [3, 400]


CHUNK = 64 << 10


def known_with(**in_doubt: int) -> dict[int, Knowledge]:
    known = {block: Knowledge(1, floor=3, issued=3) for block in range(BLOCKS)}
    for name, issued in in_doubt.items():
        known[int(name[1:])].issued = issued
    return known


def test_halves_are_made_to_differ_only_where_the_crash_left_it_open(halves: list[Path]) -> None:
    # Block 20 is in doubt in a dirty chunk (1), block 40 in a clean one (2), block 21 not in doubt.
    known = known_with(b20=4, b40=4)
    changes = make_halves_differ(known, halves, DATA_OFFSET, dirty_chunks={1}, chunk_bytes=CHUNK)
    assert [(change.block, change.chunk) for change in changes] == [(20, 1)]
    assert compare_halves(halves, DATA_OFFSET, BLOCKS * BLOCK_BYTES) == [20]
    generations = {parse(image_reader(half, DATA_OFFSET, BLOCKS * BLOCK_BYTES)(20)) for half in halves}
    assert generations == {Identity(1, 20, 3), Identity(1, 20, 4)}


def test_either_half_can_be_the_stale_one(halves: list[Path]) -> None:
    changes = make_halves_differ(
        known_with(b20=4, b21=4), halves, DATA_OFFSET, dirty_chunks={1}, chunk_bytes=CHUNK
    )
    assert {(Path(change.path).name, change.block) for change in changes} == {("a.img", 20), ("b.img", 21)}


def test_a_state_no_crash_could_leave_is_refused_and_nothing_is_written(halves: list[Path]) -> None:
    overwrite(halves[1], 21, content(1, 21, 1))
    before = [half.read_bytes() for half in halves]
    with pytest.raises(IllegalState, match="acknowledged write is gone"):
        make_halves_differ(known_with(b20=4, b21=4), halves, DATA_OFFSET, dirty_chunks={1}, chunk_bytes=CHUNK)
    assert [half.read_bytes() for half in halves] == before
