"""What a sequencer keeps on disk, who counts as silent, which process is meant, and how daemons start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from clustermd.clock import SystemClock
from clustermd.conf import Conf
from clustermd.errors import BadBytes, Refused
from clustermd.group.incarnations import Incarnation, Incarnations, Nodes
from clustermd.group.liveness import Bounds, PeerWatch
from clustermd.group.process import alive, ended, kill, start_time
from clustermd.group.process_group import Member, Witness
from clustermd.group.start import connect_or_start, take_lock
from clustermd.rundir import RunDir

WITNESS = Witness("array md0", 77, 1234, 1 << 60, (("/dev/x", 2049, 5),))


def test_living_incarnations_come_back_in_this_boot_only(tmp_path: Path) -> None:
    first = Incarnations(tmp_path, "boot")
    first.load()
    assert not first.living
    entry = Incarnation(Member(1, (1 << 64) - 1, "a"), 55, 66, {WITNESS.key: WITNESS})
    first.living[entry.member.incarnation] = entry
    first.save()
    second = Incarnations(tmp_path, "boot")
    second.load()
    assert second.living == first.living
    third = Incarnations(tmp_path, "next boot")
    third.load()
    assert not third.living
    assert (tmp_path / "incarnations.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"boot_id": "boot", "living": [{}]}', '{"boot_id": "boot", "living": 3}']
)
def test_a_damaged_list_of_the_living_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "incarnations.json").write_text(text)
    with pytest.raises(BadBytes, match="still be on their way"):
        Incarnations(tmp_path, "boot").load()


def test_a_node_keeps_its_number(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    nodes.load()
    assert [nodes.number(name) for name in ("b", "a", "b", "c")] == [1, 2, 1, 3]
    assert (tmp_path / "nodes").read_text() == "1 b\n2 a\n3 c\n"
    again = Nodes(tmp_path)
    again.load()
    assert [again.number(name) for name in ("c", "d")] == [3, 4]
    (tmp_path / "nodes").write_text("one b\n")
    with pytest.raises(BadBytes, match="by hand"):
        Nodes(tmp_path).load()


def test_silence_counts_only_while_we_were_awake() -> None:
    watch = PeerWatch(Bounds(unresponsive_s=10))
    assert not watch.tick(3600), "we slept an hour, not the peer"
    assert watch.silent_s == 1.0
    assert watch.shown
    watch.heard()
    assert watch.silent_s == 0
    ticks = 0
    while not watch.tick(0.5):
        ticks += 1
    assert ticks == 19


@pytest.mark.parametrize("text", ["0.1", "-1", "nan", "soon", "1e9"])
def test_bounds_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CLUSTERMD_UNRESPONSIVE_S", text)
    with pytest.raises(Refused, match="CLUSTERMD_UNRESPONSIVE_S"):
        Bounds.from_environment(Conf())


def test_bounds_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERMD_UNRESPONSIVE_S", "2.5")
    monkeypatch.setenv("CLUSTERMD_LINGER_S", "0")
    assert Bounds.from_environment(Conf()) == Bounds(2.5, 0)


def test_only_the_very_process_is_killed_even_when_it_is_stopped() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        started = start_time(child.pid)
        assert started is not None and alive(child.pid, started)
        assert not kill(child.pid, started + 1), "another process that had this number"
        assert child.poll() is None
        os.kill(child.pid, signal.SIGSTOP)
        assert kill(child.pid, started)
        asyncio.run(asyncio.wait_for(ended(child.pid, started), 5))
        assert not alive(child.pid, started), "a zombie has ended"
        assert not kill(child.pid, started)
    finally:
        child.kill()
        child.wait()
    assert start_time(child.pid) is None
    assert not alive(0, 0)


def test_a_lock_is_had_by_one(tmp_path: Path) -> None:
    first = take_lock(tmp_path / "lock")
    assert first is not None
    assert take_lock(tmp_path / "lock") is None
    os.close(first)
    second = take_lock(tmp_path / "lock")
    assert second is not None
    os.close(second)


async def nobody() -> None:
    raise ConnectionRefusedError


def test_a_daemon_that_fails_says_why(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path, "a")
    log = tmp_path / "log"
    with pytest.raises(Refused, match="No module named") as refused:
        asyncio.run(connect_or_start(nobody, "clustermd.no_such_daemon", rundir, log, SystemClock()))
    assert refused.value.code == "daemon-failed"
    with pytest.raises(Refused) as refused:
        asyncio.run(connect_or_start(nobody, "clustermd.lockd", rundir, log, SystemClock(), start=False))
    assert refused.value.code == "not-running"


def test_a_daemon_that_gives_a_reason_is_quoted_with_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words each time, whatever else its log holds: whoever tries again can say them once."""
    (tmp_path / "sad.py").write_text(
        "import logging, sys\n"
        "logging.basicConfig(format='%(asctime)s [%(process)d] %(message)s')\n"
        "logging.error('ended: corosync is not running')\n"
        "sys.exit(70)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            asyncio.run(
                connect_or_start(nobody, "sad", RunDir(tmp_path, "a"), tmp_path / "log", SystemClock())
            )
        assert refused.value.message == "sad ended by itself: corosync is not running"


def test_a_daemon_that_is_killed_at_its_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever kills it, the one who waits for it gets the next one and no error."""
    (tmp_path / "victim.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    attempts = 0

    async def third_time() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise FileNotFoundError
        return "connected"

    rundir, log = RunDir(tmp_path, "a"), tmp_path / "log"
    assert asyncio.run(connect_or_start(third_time, "victim", rundir, log, SystemClock())) == "connected"


def test_a_daemon_that_never_listens_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    log = tmp_path / "log"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        with pytest.raises(Refused, match="did not listen within 1"):
            asyncio.run(
                connect_or_start(nobody, "sleeper", RunDir(tmp_path, "a"), log, SystemClock(), deadline_s=1)
            )
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    pid = int(log.read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
