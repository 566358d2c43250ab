"""Simulated boxes and the way to them: what survives what, whose requests land when, and who is told."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from clustermd.device.member_device import Op
from clustermd.testing.simulator.boxes import SECTOR, Box, Io, Path, Trouble, Watcher
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop
from clustermd.testing.simulator.submitter import SimSubmitter

SIZE = 64
LATE_S = (5.0,)


class Landed(Watcher):
    def __init__(self) -> None:
        self.sectors: list[tuple[int, ...]] = []

    def landed(self, io: Io, sectors: Any) -> None:
        self.sectors.append(tuple(sectors))


class Kit:
    """One box, and processes with a path to it."""

    def __init__(self, seed: int = 0, decisions: dict[str, list[int]] | None = None) -> None:
        self.failed: list[dict[str, Any]] = []
        self.dice = Dice(seed, decisions)
        self.loop = SimLoop(self.dice.stream("loop"), self.failed.append)  # type: ignore[abstract]
        self.watcher = Landed()
        self.box = Box("box0", SIZE, self.dice, self.watcher)

    def node(self, name: str, discard_zeroes: bool = True) -> Node:
        return Node(self, name, discard_zeroes)

    def run(self, for_s: float = 0.1) -> None:
        until_s = self.loop.time() + for_s
        self.loop.later(for_s, int)  # time goes on that far though nothing else happens
        self.loop.run(lambda: False, until_s)
        assert not self.failed


class Node:
    """A process, its submitter and its path. `done` holds (tag, result)."""

    def __init__(self, kit: Kit, name: str, discard_zeroes: bool) -> None:
        self.kit = kit
        self.process = Process(name)
        self.submitter = SimSubmitter(kit.loop, self.process, kit.dice, kit.watcher)
        self.submitter.gate.open()
        self.path = Path(kit.box, discard_zeroes)
        self.done: list[tuple[int, int]] = []

    def io_done(self, tag: int, result: int) -> None:
        self.done.append((tag, result))

    def write(self, sector: int, letters: bytes, tag: int = 1, fua: bool = False, submit: bool = True) -> Any:
        """One letter a sector."""
        length = len(letters) * SECTOR
        buffer = self.submitter.pool.take(length)
        buffer.view[:length] = b"".join(bytes([letter]) * SECTOR for letter in letters)
        self.submitter.queue(self.path, Op.WRITE, sector * SECTOR, length, buffer, 0, self, tag, fua)
        if submit:
            self.submitter.submit()
        return buffer

    def ask(self, op: Op, sector: int = 0, count: int = 0, tag: int = 1) -> Any:
        buffer = self.submitter.pool.take(max(count, 1) * SECTOR)
        self.submitter.queue(self.path, op, sector * SECTOR, count * SECTOR, buffer, 0, self, tag)
        self.submitter.submit()
        return buffer

    def die(self) -> None:
        self.process.alive = False
        self.submitter.process_died(LATE_S)


def letters(box: Box, first: int, count: int) -> bytes:
    found = [set(box.sector(number)) for number in range(first, first + count)]
    assert all(len(one) == 1 for one in found), "a sector is torn within itself"
    return bytes(one.pop() for one in found)


# --- in peace -----------------------------------------------------------------------------------------------------


def test_a_write_lands_takes_time_and_is_read_by_others() -> None:
    kit = Kit()
    one, two = kit.node("one"), kit.node("two")
    one.write(8, b"ab")
    assert one.submitter.in_flight == 1 and letters(kit.box, 8, 2) == b"\0\0"
    kit.run()
    assert one.done == [(1, 2 * SECTOR)] and letters(kit.box, 8, 2) == b"ab"
    assert one.submitter.in_flight == 0 and kit.watcher.sectors == [(8, 9)]
    buffer = two.ask(Op.READ, 7, 3)
    kit.run()
    assert bytes(buffer.view[: 3 * SECTOR : SECTOR]) == b"\0ab"


def test_the_buffer_is_read_when_the_write_lands() -> None:
    """Whoever gives a buffer away too early shows it on the disk."""
    kit = Kit()
    node = kit.node("one")
    buffer = node.write(8, b"a")
    buffer.view[:SECTOR] = b"x" * SECTOR
    kit.run()
    assert letters(kit.box, 8, 1) == b"x"


def test_nothing_passes_a_shut_gate() -> None:
    kit = Kit()
    node = kit.node("one")
    node.submitter.gate.shut("lost")
    node.write(8, b"a")
    kit.run()
    assert node.done == [(1, -errno.ESHUTDOWN)] and letters(kit.box, 8, 1) == b"\0"


def test_a_held_gate_keeps_requests_until_it_opens() -> None:
    kit = Kit()
    node = kit.node("one")
    node.submitter.gate.hold("no quorum")
    node.write(8, b"a")
    kit.run()
    assert not node.done
    node.submitter.gate.open()
    kit.run()
    assert node.done and letters(kit.box, 8, 1) == b"a"


def test_discards_read_zeroes_or_are_refused() -> None:
    kit = Kit()
    able, unable = kit.node("able"), kit.node("unable", discard_zeroes=False)
    able.write(8, b"ab")
    kit.run()
    unable.ask(Op.DISCARD, 8, 1)
    kit.run()
    assert unable.done == [(1, -errno.EOPNOTSUPP)] and letters(kit.box, 8, 2) == b"ab"
    able.ask(Op.DISCARD, 8, 1, tag=2)
    kit.run()
    assert able.done[-1] == (2, 0) and letters(kit.box, 8, 2) == b"\0b"


def test_a_buffer_is_given_back_once() -> None:
    node = Kit().node("one")
    buffer = node.submitter.pool.take(SECTOR)
    assert node.submitter.memory.out == 1
    buffer.release()
    assert node.submitter.memory.out == 0
    with pytest.raises(RuntimeError):
        buffer.release()


# --- loss of power --------------------------------------------------------------------------------------------------


def after_power_loss(seed: int, cover: Callable[[Kit, Node], None]) -> bytes:
    kit = Kit(seed)
    node = kit.node("one")
    node.write(8, b"abcdefgh")
    kit.run()
    cover(kit, node)
    kit.box.lose_power()
    return letters(kit.box, 8, 8)


def flushed(kit: Kit, node: Node) -> None:
    node.ask(Op.FLUSH)
    kit.run()


def overwritten(kit: Kit, node: Node) -> None:
    flushed(kit, node)
    for text in (b"ABCDEFGH", b"12345678"):
        node.write(8, text)
        kit.run()


def test_a_power_loss_leaves_any_subset_of_what_nothing_covered() -> None:
    found = {after_power_loss(seed, lambda kit, node: None) for seed in range(30)}
    assert len(found) > 20
    assert {letter for text in found for letter in text} == set(b"abcdefgh\0")


def test_a_power_loss_leaves_what_a_flush_covered() -> None:
    assert {after_power_loss(seed, flushed) for seed in range(10)} == {b"abcdefgh"}


def test_a_power_loss_leaves_any_version_since_the_last_flush() -> None:
    found = [after_power_loss(seed, overwritten) for seed in range(40)]
    assert {text[0] for text in found} == set(b"aA1")


def test_fua_is_durable_by_itself_and_covers_nothing_else() -> None:
    found = set()
    for seed in range(20):
        kit = Kit(seed)
        node = kit.node("one")
        node.write(8, b"a")
        node.write(9, b"b", fua=True)
        kit.run()
        kit.box.lose_power()
        found.add(letters(kit.box, 8, 2))
    assert found == {b"ab", b"\0b"}


def test_a_flush_covers_only_what_had_landed() -> None:
    kit = Kit()
    node = kit.node("one")
    kit.box.flush()
    node.write(8, b"a")
    kit.run()
    assert kit.box.durable_sector(8) == bytes(SECTOR) and kit.box.sector(8) == b"a" * SECTOR


# --- death ----------------------------------------------------------------------------------------------------------


def test_every_fate_of_a_write_in_flight_is_met() -> None:
    """Whole, in part, not at all; at once or late; nobody is told, and nothing is left in flight."""
    at_once, in_the_end = set(), set()
    for seed in range(120):
        kit = Kit(seed)
        node = kit.node("one")
        node.write(8, b"abcd")
        node.die()
        at_once.add(letters(kit.box, 8, 4))
        late = node.submitter.in_flight
        kit.run(1.0)
        assert node.submitter.in_flight == late, "what is late comes when it is due"
        kit.run(10.0)
        in_the_end.add(letters(kit.box, 8, 4))
        assert node.submitter.in_flight == 0 and not node.done
    whole, nothing = b"abcd", bytes(4)
    assert {whole, nothing} < at_once and {whole, nothing} < in_the_end
    assert len(at_once) > 4 and len(in_the_end) > 8


def test_a_late_write_overwrites_what_others_wrote_meanwhile() -> None:
    """Only a proof of the end, or a fence, keeps that from happening: it is what both are for."""
    kit = Kit(decisions={"fate": [3]})
    one, two = kit.node("one"), kit.node("two")
    one.write(8, b"old!")
    one.die()
    two.write(8, b"new!")
    kit.run(1.0)
    assert letters(kit.box, 8, 4) == b"new!" and one.submitter.in_flight == 1
    kit.run(10.0)
    assert letters(kit.box, 8, 4) == b"old!"


def test_what_landed_before_the_death_stays_and_what_was_queued_never_goes_out() -> None:
    for seed in range(20):
        kit = Kit(seed)
        node = kit.node("one")
        node.write(8, b"a")
        kit.run()
        node.write(10, b"b", submit=False)
        node.die()
        node.submitter.submit()
        kit.run(10.0)
        assert letters(kit.box, 8, 3) == b"a\0\0"


def test_what_is_fenced_never_lands() -> None:
    for seed in range(30):
        kit = Kit(seed, None)
        node = kit.node("one")
        node.write(8, b"abcd")
        node.die()
        before = letters(kit.box, 8, 4)
        node.path.fenced = True
        node.submitter.cut_off()
        kit.run(10.0)
        assert letters(kit.box, 8, 4) == before and node.submitter.in_flight == 0


# --- troubles -------------------------------------------------------------------------------------------------------


def test_errors_come_before_or_after_some_sectors_have_landed() -> None:
    left = set()
    for seed in range(20):
        kit = Kit(seed)
        node = kit.node("one")
        node.path.troubles.append(Trouble(ops=(Op.WRITE,), error=errno.EIO, after=bool(seed % 2), times=1))
        node.write(8, b"abcd")
        kit.run()
        assert node.done == [(1, -errno.EIO)]
        left.add((bool(seed % 2), letters(kit.box, 8, 4)))
        node.write(8, b"efgh", tag=2)
        kit.run()
        assert node.done[-1] == (2, 4 * SECTOR)
    assert {text for after, text in left if not after} == {bytes(4)}
    assert len({text for after, text in left if after}) > 3


def test_a_stuck_path_keeps_requests_of_one_node_until_it_is_well() -> None:
    kit = Kit()
    one, two = kit.node("one"), kit.node("two")
    one.path.troubles.append(Trouble(stuck=True))
    one.write(8, b"a")
    two.write(9, b"b")
    kit.run(60.0)
    assert not one.done and two.done
    one.path.troubles.clear()
    one.submitter.release(one.path)
    kit.run()
    assert one.done == [(1, SECTOR)] and letters(kit.box, 8, 2) == b"ab"


def test_a_stuck_request_of_a_dead_process_is_the_boxes_and_lands_late_or_in_part() -> None:
    for seed in range(20):
        kit = Kit(seed)
        node = kit.node("one")
        node.path.troubles.append(Trouble(stuck=True))
        node.write(8, b"abcd")
        node.die()
        assert letters(kit.box, 8, 4) == bytes(4) and node.submitter.in_flight == 1
        kit.run(10.0)
        assert node.submitter.in_flight == 0
        assert set(letters(kit.box, 8, 4)) <= set(b"abcd\0")


def test_a_lost_path_is_lost_for_one_node() -> None:
    kit = Kit()
    one, two = kit.node("one"), kit.node("two")
    one.path.lost_path = True
    one.write(8, b"a")
    two.write(9, b"b")
    kit.run()
    assert one.done == [(1, -errno.EIO)] and two.done == [(1, SECTOR)]


def test_what_is_on_its_way_when_the_path_is_lost_does_not_land() -> None:
    for cut in ("lost_path", "fenced"):
        kit = Kit()
        node = kit.node("one")
        node.write(8, b"a")
        setattr(node.path, cut, True)
        kit.run()
        assert node.done == [(1, -errno.EIO)] and letters(kit.box, 8, 1) == b"\0"


def test_bad_sectors_fail_reads_until_they_are_written() -> None:
    kit = Kit()
    node = kit.node("one")
    kit.box.bad_sectors.add(9)
    node.ask(Op.READ, 8, 4)
    kit.run()
    node.write(9, b"b")
    kit.run()
    node.ask(Op.READ, 8, 4, tag=3)
    kit.run()
    assert [result for _, result in node.done] == [-errno.EIO, SECTOR, 4 * SECTOR]


def test_a_pause_between_gate_and_medium_lets_the_gate_shut_behind_a_request() -> None:
    kit = Kit()
    node = kit.node("one")
    node.submitter.pause_s = 1.0
    node.write(8, b"a")
    node.submitter.gate.shut("lost")
    kit.run(0.5)
    assert not node.done and node.submitter.in_flight == 1
    kit.run(1.0)
    assert letters(kit.box, 8, 1) == b"a" and node.submitter.in_flight == 0


def test_a_box_without_power_answers_with_errors() -> None:
    kit = Kit()
    node = kit.node("one")
    kit.box.powered = False
    node.write(8, b"a")
    kit.run()
    assert node.done == [(1, -errno.EIO)] and letters(kit.box, 8, 1) == b"\0"
