"""The exerciser against a real NBD server (nbdkit), with faults switched on."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clustermd.testing.blocks import BLOCK_BYTES, content
from clustermd.testing.exerciser import DISCONNECTED, FINISHED, STOPPED, Exerciser, Plan, Report
from clustermd.testing.judge import Wrong, judge, nbd_reader
from clustermd.testing.nbd_client import FUA, Command, Disconnected, NbdClient
from clustermd.testing.nbdkit import nbdkit
from clustermd.testing.waiting import wait_until
from clustermd.testing.write_log import knowledge_of_logs

pytestmark = pytest.mark.needs("nbdkit")


@pytest.fixture
def exercise(tmp_path: Path) -> Callable[..., Report]:
    def run(socket: str, **plan: Any) -> Report:
        options: dict[str, Any] = {"node": 1, "first_block": 64, "end_block": 320, "seconds": 0.5}
        with NbdClient(socket) as client:
            return Exerciser(client, Plan(**(options | plan)), tmp_path / "log").run()

    return run


def test_requests_reach_the_server_and_come_back() -> None:
    with nbdkit("memory", "1M") as (socket, _), NbdClient(socket) as client:
        assert client.size_bytes == 1 << 20
        client.call(Command.WRITE, 4096, data=content(1, 1, 1), flags=FUA)
        client.call(Command.FLUSH)
        assert client.call(Command.READ, 4096, 4096) == content(1, 1, 1)
        client.call(Command.WRITE_ZEROES, 4096, 2048)
        client.call(Command.TRIM, 6144, 2048)
        assert client.call(Command.READ, 4096, 4096) == bytes(4096)
        handles = {client.send(Command.READ, block * 4096, 4096) for block in range(32)}
        assert client.in_flight == 32
        assert {client.receive().handle for _ in range(32)} == handles


def test_errors_and_the_end_of_a_server_are_told() -> None:
    faults = ["error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit("--filter=error", "memory", "1M", *faults) as (socket, process), NbdClient(socket) as client:
        with pytest.raises(OSError, match="WRITE") as caught:
            client.call(Command.WRITE, 0, data=bytes(4096))
        assert caught.value.errno == errno.ENOSPC
        process.kill()
        process.wait()
        with pytest.raises(Disconnected):
            client.call(Command.READ, 0, 4096)


def test_what_it_wrote_satisfies_the_judge_and_a_dropped_write_does_not(
    exercise: Callable[..., Report], tmp_path: Path
) -> None:
    with nbdkit("memory", "2M") as (socket, _):
        report = exercise(socket)
        assert (report.ended, report.errors) == (FINISHED, [])
        assert min(report.writes, report.reads, report.flushes) > 0
        with NbdClient(socket) as client:
            verdict = judge([tmp_path / "log"], nbd_reader(client))
            assert verdict.good, verdict
            assert verdict.blocks > 200
            assert verdict.in_doubt == 0
            known = knowledge_of_logs([tmp_path / "log"])
            block = next(block for block, entry in known.items() if entry.floor > 1)
            old = content(1, block, known[block].floor - 1)
            client.call(Command.WRITE, block * BLOCK_BYTES, data=old)
            verdict = judge([tmp_path / "log"], nbd_reader(client))
            assert [(fault.wrong, fault.block) for fault in verdict.faults] == [(Wrong.LOST, block)]


def test_it_stays_inside_its_blocks(exercise: Callable[..., Report]) -> None:
    with nbdkit("memory", "2M") as (socket, _):
        exercise(socket)
        with NbdClient(socket) as client:
            assert client.call(Command.READ, 0, 64 * 4096) == bytes(64 * 4096)
            assert client.call(Command.READ, 320 * 4096, 192 * 4096) == bytes(192 * 4096)


def test_it_stays_inside_its_stripes(exercise: Callable[..., Report], tmp_path: Path) -> None:
    with nbdkit("memory", "1M") as (socket, _):
        assert exercise(socket, first_block=0, end_block=240, stripe=(4, 1, 3), rate=2000).errors == []
    written = set(knowledge_of_logs([tmp_path / "log"]))
    assert len(written) > 40
    assert all(block // 4 % 3 == 1 for block in written)


def test_started_again_it_goes_on_with_the_same_log(exercise: Callable[..., Report], tmp_path: Path) -> None:
    with nbdkit("memory", "2M") as (socket, _):
        exercise(socket)
        before = knowledge_of_logs([tmp_path / "log"])
        assert exercise(socket).errors == []
        after = knowledge_of_logs([tmp_path / "log"])
        assert all(after[block].issued >= entry.issued for block, entry in before.items())
        with NbdClient(socket) as client:
            assert judge([tmp_path / "log"], nbd_reader(client)).good


def test_an_old_block_is_noticed_when_it_is_read(exercise: Callable[..., Report]) -> None:
    with nbdkit("memory", "2M") as (socket, _):
        exercise(socket)
        with NbdClient(socket) as client:
            client.call(Command.WRITE_ZEROES, 0, 2 << 20)
        report = exercise(socket, read_percent=99, flush_percent=0)
        assert any("acknowledged write is gone" in error for error in report.errors)


def test_errors_of_the_server_are_reported(exercise: Callable[..., Report]) -> None:
    with nbdkit("--filter=error", "memory", "2M", "error-pwrite=EIO", "error-pwrite-rate=50%") as (socket, _):
        report = exercise(socket)
        assert any(f"error {errno.EIO}" in error for error in report.errors)


def test_a_stall_is_measured_and_a_held_server_is_excused(exercise: Callable[..., Report]) -> None:
    with nbdkit("--filter=delay", "memory", "2M", "wdelay=400ms") as (socket, _):
        report = exercise(socket, depth=2)
        assert 0.35 < report.longest_stall_s() < 2
        everything = [(report.started_ns, report.ended_ns)]
        assert report.longest_stall_s(everything) == 0


def test_a_killed_server_leaves_writes_in_doubt_and_a_report(tmp_path: Path) -> None:
    log, report_path = tmp_path / "log", tmp_path / "report"
    with nbdkit("--filter=delay", "memory", "2M", "wdelay=20ms") as (socket, process):
        command = [sys.executable, "-m", "clustermd.testing.exerciser", "--socket", socket, "--node", "1"]
        command += ["--blocks", "0..512", "--log", str(log), "--report", str(report_path)]
        with subprocess.Popen(command) as exerciser:
            wait_until(
                lambda: any(entry.floor for entry in knowledge_of_logs([log]).values()), "an acknowledgement"
            )
            process.kill()
            assert exerciser.wait(10) == 3
    report = Report.load(report_path)
    assert report.ended == DISCONNECTED
    assert report.writes_in_flight_at_end > 0
    assert any(entry.in_doubt for entry in knowledge_of_logs([log]).values())


def test_sigterm_ends_it_with_nothing_in_flight(tmp_path: Path) -> None:
    log, report_path = tmp_path / "log", tmp_path / "report"
    with nbdkit("memory", "2M") as (socket, _):
        command = [sys.executable, "-m", "clustermd.testing.exerciser", "--socket", socket, "--node", "1"]
        command += ["--blocks", "0..512", "--log", str(log), "--report", str(report_path), "--rate", "500"]
        with subprocess.Popen(command) as exerciser:
            wait_until(lambda: log.exists() and log.stat().st_size > 3200, "a hundred records")
            exerciser.send_signal(signal.SIGTERM)
            assert exerciser.wait(10) == 0
    report = Report.load(report_path)
    assert (report.ended, report.in_flight_at_end) == (STOPPED, 0)
