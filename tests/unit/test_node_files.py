"""The files of a node: one process per name, mdstat from all arrays, resync limits read live."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from clustermd.array.status import ArrayStatus, MemberStatus
from clustermd.errors import Refused
from clustermd.node.config import ArrayConfig, array_name, device_name
from clustermd.node.files import (
    ArrayFiles,
    PidFile,
    SpeedLimits,
    make_private,
    process_started,
    publish,
    rewrite_mdstat,
    running_arrays,
    running_pid,
    write_file,
)
from clustermd.rundir import RunDir


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    rundir = RunDir(tmp_path / "run", "node1")
    make_private(rundir, ArrayFiles.of(rundir, "md0"))
    return rundir


def status(name: str) -> ArrayStatus:
    return ArrayStatus(
        name=name,
        uuid="0" * 32,
        set_name="x",
        metadata="1.2",
        level=1,
        layout=0,
        chunk_sectors=0,
        raid_disks=1,
        array_sectors=64,
        component_sectors=64,
        created_s=0,
        updated_s=0,
        events=0,
        read_only=False,
        clean=True,
        degraded=0,
        failed=False,
        members=(MemberStatus(f"/{name}.img", 0, 0, False, True, None),),
        sync=None,
        bitmap=None,
        held="",
        counters={},
    )


def test_a_name_runs_once_and_its_process_can_be_seen_without_disturbing_it(rundir: RunDir) -> None:
    files = ArrayFiles.of(rundir, "md0")
    first, second = PidFile(files.pid), PidFile(files.pid)
    assert running_pid(rundir, "md0") is None
    first.acquire()
    assert running_pid(rundir, "md0") == os.getpid()
    with pytest.raises(Refused) as refused:
        second.acquire()
    assert refused.value.code == "already-running"
    assert str(os.getpid()) in refused.value.message
    first.release()
    assert running_pid(rundir, "md0") is None
    second.acquire()
    second.release()


def test_a_pid_file_left_by_a_killed_process_means_nothing(rundir: RunDir) -> None:
    files = ArrayFiles.of(rundir, "md0")
    script = f"""
        import os, signal, pathlib
        from clustermd.node.files import PidFile
        PidFile(pathlib.Path({str(files.pid)!r})).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert files.pid.read_text().strip().isdigit()
    assert running_pid(rundir, "md0") is None
    owner = PidFile(files.pid)
    owner.acquire()
    assert running_pid(rundir, "md0") == os.getpid()
    owner.release()


def test_what_a_former_process_left_goes_but_its_log_stays(rundir: RunDir) -> None:
    files = ArrayFiles.of(rundir, "md0")
    for path in (files.nbd_socket, files.control_socket, files.status, files.log):
        path.write_text("old")
    files.remove_leftovers()
    assert [path.name for path in files.directory.iterdir()] == ["log"]


def test_everything_is_private_to_the_user(rundir: RunDir) -> None:
    publish(rundir, status("md0"))
    rewrite_mdstat(rundir)
    for path in (rundir.root, *rundir.root.rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_mdstat_shows_living_processes_only(rundir: RunDir) -> None:
    publish(rundir, status("md0"))
    assert rewrite_mdstat(rundir)
    mdstat = rundir.node_dir / "mdstat"
    assert "md0 : active raid1 md0.img[0]\n" in mdstat.read_text()
    assert running_arrays(rundir) == ["md0"]
    # The same pid with another start time is another process.
    entry = ArrayFiles.of(rundir, "md0").status
    entry.write_text(entry.read_text().replace(f'"started": {process_started(os.getpid())}', '"started": 1'))
    assert running_arrays(rundir) == []
    assert rewrite_mdstat(rundir)
    assert mdstat.read_text() == "Personalities : [raid1] \nunused devices: <none>\n"


def test_a_torn_status_of_another_array_does_not_spoil_mdstat(rundir: RunDir) -> None:
    publish(rundir, status("md0"))
    other = ArrayFiles.of(rundir, "md1")
    make_private(rundir, other)
    other.status.write_text('{"pid": 1, "sta')
    assert rewrite_mdstat(rundir)
    assert running_arrays(rundir) == ["md0"]


def test_mdstat_is_never_waited_for(rundir: RunDir) -> None:
    holder = PidFile(rundir.node_dir / "mdstat.lock")
    holder.acquire()
    assert rewrite_mdstat(rundir) is False
    holder.release()
    assert rewrite_mdstat(rundir) is True


def test_speed_limits_are_read_live_and_nonsense_keeps_the_last_good_one(rundir: RunDir) -> None:
    complaints: list[str] = []
    limits = SpeedLimits(rundir, complaints.append)
    assert limits() == (1000, 200000)
    limits.make()
    low = rundir.node_dir / "speed_limit_min"
    assert low.read_text() == "1000\n"
    low.write_text("5000")
    assert limits() == (5000, 200000)
    write_file(rundir.node_dir / "speed_limit_max", "7777\n")
    assert limits() == (5000, 7777)
    low.write_text("fast")
    assert limits() == (5000, 7777)
    assert limits() == (5000, 7777)
    assert len(complaints) == 1
    assert "fast" not in complaints[0]
    assert str(low) in complaints[0]
    limits.make()
    assert low.read_text() == "fast"


@pytest.mark.parametrize(
    ("word", "name"),
    [("/dev/md0", "md0"), ("md0", "md0"), ("/dev/md/home", "home"), ("./x/md_d1", "md_d1"), ("a.b", "a.b")],
)
def test_the_name_is_the_basename(word: str, name: str) -> None:
    assert array_name(word) == name


@pytest.mark.parametrize("word", ["", "/", "..", ".x", "a b", "x" * 33, "mdstat", "x.sock", "-x", "a\n"])
def test_what_cannot_be_a_name_is_refused(word: str) -> None:
    with pytest.raises(Refused) as refused:
        array_name(word)
    assert refused.value.code == "bad-array-name"


@pytest.mark.parametrize(
    ("name", "device"), [("md0", "/dev/md0"), ("md127", "/dev/md127"), ("home", "/dev/md/home")]
)
def test_devices_are_called_as_linux_calls_them(name: str, device: str) -> None:
    assert device_name(name) == device


def test_a_configuration_survives_its_way_and_a_malformed_one_is_refused() -> None:
    config = ArrayConfig("md0", ("/a", "/b"), uuid="00", run=True)
    assert ArrayConfig.from_json(config.to_json()) == config
    for text in (
        "",
        "[]",
        "{}",
        '{"name": "md0"}',
        '{"name": "a/b", "paths": []}',
        '{"name": "md0", "paths": [], "x": 1}',
    ):
        with pytest.raises(Refused):
            ArrayConfig.from_json(text)


def test_a_run_directory_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    files = ArrayFiles(tmp_path / ("x" * 100))
    with pytest.raises(Refused) as refused:
        files.check_socket_paths()
    assert refused.value.code == "run-directory-too-long"
