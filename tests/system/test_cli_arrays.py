"""The command line end to end: real processes, image files, no privilege asked for beyond the user's own files.

Named after mdadm's verbs: what -C, -A, -D, -E, -Q, -W, -S and --zero-superblock do and refuse, with a second node of
the same machine beside the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.nbd_client import Command, NbdClient

pytestmark = pytest.mark.system

MIB = 1 << 20
NEW = ("-CR", "/dev/md0", "-l1", "-n2", "-d1", "--bitmap-chunk=64K")
COMMAND = [sys.executable, "-c", "from clustermd.cli.main import run; run()"]


class Ran:
    """A finished command."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        yield cluster


@pytest.fixture
def disks(cluster: LocalCluster) -> list[str]:
    return cluster.images(3, 64 * MIB)


def run(cluster: LocalCluster, *words: str, node: str = "node1", answer: str = "", **environment: str) -> Ran:
    env = {
        **os.environ,
        "CLUSTERMD_RUN": str(cluster.run_directory),
        "CLUSTERMD_NODE": node,
        "TZ": "UTC",
        **environment,
    }
    env.pop("CLUSTERMD_CLUSTER", None) if "CLUSTERMD_CLUSTER" not in environment else None
    return Ran(
        subprocess.run(
            [*COMMAND, *words],
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
            env=env,
            cwd=cluster.directory,
            check=False,
        )
    )


def ok(ran: Ran) -> Ran:
    assert ran.status == 0, ran.err
    return ran


def sums(paths: list[str]) -> list[str]:
    return [hashlib.md5(Path(path).read_bytes()).hexdigest() for path in paths]


def mdstat(cluster: LocalCluster, node: str = "node1") -> str:
    return (cluster.run_directory / node / "mdstat").read_text()


def test_create_use_from_two_nodes_and_stop(cluster: LocalCluster, disks: list[str]) -> None:
    made = ok(run(cluster, *NEW, "-b", "clustered", "--nodes=4", *disks[:2]))
    assert "clustermd: array /dev/md0 started.\n" in made.err
    uri = f"nbd+unix:///md0?socket={cluster.run_directory}/node1/md0/nbd.sock"
    assert f"clustermd: reach it at {uri}\n" in made.err
    joined = ok(run(cluster, "-A", "/dev/md0", *disks[:2], node="node2"))
    assert "/dev/md0 has been started with 2 drives." in joined.err
    run(cluster, "-W", "md0")
    assert mdstat(cluster).startswith(
        "Personalities : [raid1] \nmd0 : active raid1 disk1.img[1] disk0.img[0]\n"
    )
    assert "md0 : active raid1 disk0.img[0] disk1.img[1]\n" in mdstat(cluster, "node2")
    page = ok(run(cluster, "-D", "/dev/md0", node="node2")).out
    assert page.startswith("/dev/md0:\n           Version : 1.2\n")
    assert "     Intent Bitmap : Internal(Clustered)\n" in page
    assert "              Name : node1:0\n" in page
    assert "(local to host node1)" in run(cluster, "-D", "/dev/md0").out
    with NbdClient(f"{cluster.run_directory}/node1/md0/nbd.sock") as one:
        one.call(Command.WRITE, 4096, data=b"x" * 4096)
    with NbdClient(f"{cluster.run_directory}/node2/md0/nbd.sock") as two:
        assert two.call(Command.READ, 4096, 4096) == b"x" * 4096
    locks = ok(run(cluster, "locks")).out
    assert "slot 1: node1 array md0" in locks
    assert "slot 2: node2 array md0" in locks
    state = ok(run(cluster, "locks", "--json")).json
    assert state["schema"] == 1
    assert ok(run(cluster, "-S", "/dev/md0")).err == "clustermd: stopped /dev/md0\n"
    ok(run(cluster, "--stop", "--scan", node="node2"))
    assert mdstat(cluster) == mdstat(cluster, "node2") == "Personalities : [raid1] \nunused devices: <none>\n"
    assert sorted(path.name for path in (cluster.run_directory / "node1/md0").iterdir()) == ["log"]
    assert not [process for process in cluster.processes() if process.role == "array"]
    first, second = (Path(path).read_bytes()[MIB:] for path in disks[:2])
    assert first == second


@pytest.mark.needs("mdadm")
def test_mdadm_reads_what_create_wrote(cluster: LocalCluster, disks: list[str]) -> None:
    words = ("-b", "clustered", "--nodes=3", "--home-cluster=c7", "-N", "home", "--homehost=h", "-e1.2")
    ok(run(cluster, *NEW, *words, "-u", "01234567:89abcdef:01234567:89abcdef", *disks[:2]))
    ok(run(cluster, "-S", "md0"))
    mdadm = shutil.which("mdadm", path=os.environ["PATH"] + ":/sbin:/usr/sbin")
    assert mdadm
    for options in (["-E"], ["-E", "--export"], ["-E", "--brief"]):
        theirs = subprocess.run(
            [mdadm, *options, disks[0]],
            capture_output=True,
            text=True,
            env={**os.environ, "TZ": "UTC"},
            check=True,
        )
        assert run(cluster, *options, disks[0]).out == theirs.stdout
    page = run(cluster, "-E", disks[0], node="h").out
    assert "           Name : h:home  (local to host h)\n" in page
    assert "   Cluster Name : c7" in page
    assert "     Array UUID : 01234567:89abcdef:01234567:89abcdef\n" in page


def test_create_with_missing_and_a_spare(cluster: LocalCluster, disks: list[str]) -> None:
    made = run(cluster, *NEW, "-b", "internal", "-x1", disks[0], "missing", disks[2])
    ok(made)
    detail = run(cluster, "-D", "-t", "md0")
    assert detail.status == 1
    assert "             State : " in detail.out
    assert ", degraded" in detail.out
    assert "       -       0        0        1      removed\n" in detail.out
    assert f"       2       0        0        -      spare   {disks[2]}\n" in detail.out
    assert f"the spare {disks[2]} stays idle" in detail.err
    assert "disk2.img[2](S)" in mdstat(cluster)
    assert "[2/1] [U_]" in mdstat(cluster)
    ok(run(cluster, "-S", "md0"))
    again = run(cluster, "-A", "md0", disks[0], disks[2])
    assert "started with 1 drive (out of 2) and 1 spare." in ok(again).err


REFUSED_CREATES: list[tuple[str, list[str], str, int]] = [
    ("no-devices", ["-l1", "-n2"], "You haven't given enough devices", 1),
    ("too-many", ["-l1", "-n1", "--force", "0", "1"], "unusual number of drives", 2),
    ("too-few", ["-l1", "-n3", "0", "1"], "You haven't given enough devices (real or missing)", 1),
    ("no-level", ["-n2", "0", "1"], "a RAID level is needed to create an array.", 1),
    ("no-raid-devices", ["-l1", "0", "1"], "no raid-devices specified.", 1),
    ("level", ["-l5", "-n3", "0", "1", "2"], "level raid5 is not offered by clustermd", 1),
    ("all-missing", ["-l1", "-n2", "missing", "missing"], "Subdevs can't be all missing", 1),
    ("twice", ["-l1", "-n2", "0", "0"], "is given twice", 1),
    ("twice-otherwise", ["-l1", "-n2", "0", "link"], "every member needs a disk of its own", 1),
    ("absent", ["-l1", "-n2", "0", "absent"], "cannot open", 2),
    ("directory", ["-l1", "-n2", "0", "."], "cannot open .: Is a directory", 2),
    ("no-disk", ["-l1", "-n2", "0", "/dev/null"], "is neither a block device nor a regular file", 1),
    ("too-small", ["-l1", "-n2", "0", "tiny"], "too small", 1),
    ("size", ["-l1", "-n2", "-z", "1G", "0", "1"], "", 1),
    ("bad-name", ["-l1", "-n2", "0", "1"], "cannot be the name of an array", 1),
    ("nodes", ["-l1", "-n2", "-b", "clustered", "--nodes=5000", "0", "1"], "", 1),
]


@pytest.mark.parametrize(
    ("case", "words", "message", "status"), REFUSED_CREATES, ids=[case[0] for case in REFUSED_CREATES]
)
def test_create_refuses_and_writes_nothing(
    cluster: LocalCluster, disks: list[str], case: str, words: list[str], message: str, status: int
) -> None:
    (cluster.directory / "link").symlink_to(disks[0])
    (cluster.directory / "tiny").write_bytes(bytes(8192))
    before = sums(disks)
    name = "/dev/.hidden" if case == "bad-name" else "/dev/md0"
    devices = [disks[int(word)] if word in "012" else word for word in words]
    ran = run(cluster, "-CR", name, *devices)
    assert ran.status == status, ran.err
    assert message in ran.err
    assert ran.err.startswith("clustermd: ")
    assert sums(disks) == before
    assert not cluster.processes()


def test_create_asks_before_it_takes_disks_that_carry_something(
    cluster: LocalCluster, disks: list[str]
) -> None:
    image = bytearray(Path(disks[1]).read_bytes())
    image[1024 + 56 : 1024 + 58] = b"\x53\xef"  # ext2's magic, and 4096 blocks of 1 KiB
    image[1024 + 4 : 1024 + 8] = (4096).to_bytes(4, "little")
    Path(disks[1]).write_bytes(image)
    before = sums(disks)
    words = ("-C", "md0", "-l1", "-n2", *disks[:2])
    for answer in ("n\n", "", "what\nn\n"):
        ran = run(cluster, *words, answer=answer)
        assert ran.status == 1
        assert f"{disks[1]} appears to contain an ext2fs file system\n       size=4096K" in ran.err
        assert ran.out.startswith("Continue creating array? ")
        assert ran.err.endswith("clustermd: create aborted.\n")
    assert sums(disks) == before
    ok(run(cluster, *words, answer="y\n"))
    busy = run(cluster, "-C", "md1", "-l1", "-n2", disks[2], disks[1], "-R")
    assert busy.status == 1
    assert f"{disks[1]} is a member of a running array" in busy.err
    ok(run(cluster, "-S", "md0"))
    other = run(cluster, "-C", "md1", "-l1", "-n2", disks[2], disks[1], answer="n\n")
    assert f"{disks[1]} appears to be part of a raid array:\n       level=raid1 devices=2 ctime=" in other.err
    assert other.status == 1


def test_a_name_runs_once(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-bnone", *disks[:2]))
    before = sums(disks[2:])
    again = run(cluster, "-CR", "md0", "-l1", "-n1", "--force", disks[2])
    assert again.status == 2
    again = run(cluster, "-C", "--force", "-R", "md0", "-l1", "-n1", disks[2])
    assert again.status == 1
    assert "md0 is already running on this node" in again.err
    assert sums(disks[2:]) == before
    assert "already running" in run(cluster, "-A", "md0", *disks[:2]).err


def test_a_second_array_on_disks_in_use_is_refused_at_once(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-bclustered", *disks[:2]))
    refused = run(cluster, "-A", "md1", *disks[:2])
    assert refused.status == 1
    assert "is in use by md0 on this node" in refused.err
    ok(run(cluster, "-S", "md0"))


def test_stop_is_refused_while_a_client_is_connected(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-binternal", *disks[:2]))
    with NbdClient(f"{cluster.run_directory}/node1/md0/nbd.sock") as client:
        client.call(Command.WRITE, 0, data=b"a" * 512)
        ran = run(cluster, "-S", "/dev/md0")
        assert ran.status == 1
        assert f"(pid {os.getpid()})" in ran.err
        assert "--force" in ran.err
        client.call(Command.WRITE, 0, data=b"b" * 512)
        ok(run(cluster, "-S", "--force", "/dev/md0"))
    assert "is not running on this node" in run(cluster, "-S", "/dev/md0").err


def test_assemble_refuses_what_does_not_belong_together(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-bnone", *disks[:2]))
    ok(run(cluster, "-S", "md0"))
    assert "has no superblock - assembly aborted" in run(cluster, "-A", "md0", disks[0], disks[2]).err
    ran = run(cluster, "-A", "md0", disks[0])
    assert ran.status == 1
    assert "--run" in ran.err
    ok(run(cluster, "-C", "md1", "--force", "-R", "-l1", "-n1", "-bnone", disks[2]))
    ok(run(cluster, "-S", "md1"))
    assert "doesn't match others - assembly aborted" in run(cluster, "-A", "md0", disks[0], disks[2]).err
    assert "is given twice" in run(cluster, "-A", "md0", disks[0], disks[0]).err
    wrong = run(cluster, "-A", "md0", "-u", "0" * 32, *disks)
    assert (wrong.status, wrong.err) == (1, "clustermd: no devices found for md0\n")
    assert not cluster.processes(role="array")
    # With an identity, devices that do not belong are left aside.
    uuid = run(cluster, "-E", "--json", disks[0]).json["members"][0]["set_uuid"]
    assert "started with 2 drives" in ok(run(cluster, "-A", "md0", "-u", uuid, *disks)).err
    ok(run(cluster, "-S", "md0"))
    assert "started with 2 drives" in ok(run(cluster, "-A", "md0", "-N", "0", *disks)).err


def test_assemble_scan_starts_every_array_on_the_devices_given(
    cluster: LocalCluster, disks: list[str]
) -> None:
    ok(run(cluster, *NEW, "-bnone", *disks[:2]))
    ok(run(cluster, "-C", "home", "--force", "-R", "-l1", "-n1", "-bnone", disks[2]))
    ok(run(cluster, "-S", "--scan"))
    assert run(cluster, "-A", "--scan").status == 2
    ok(run(cluster, "-A", "--scan", *disks))
    lines = ok(run(cluster, "-D", "--scan")).out.splitlines()
    assert [line.split()[:3] for line in sorted(lines)] == [
        ["ARRAY", "/dev/md/home", "metadata=1.2"],
        ["ARRAY", "/dev/md0", "metadata=1.2"],
    ]
    facts = ok(run(cluster, "-D", "--scan", "--json")).json
    assert {array["name"] for array in facts["arrays"]} == {"home", "md0"}
    ok(run(cluster, "-Ss"))


def test_an_array_of_another_cluster_needs_its_name_by_hand(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-bclustered", "--home-cluster=east", *disks[:2]))
    ok(run(cluster, "-S", "md0"))
    ran = run(cluster, "-A", "md0", *disks[:2], CLUSTERMD_CLUSTER="west")
    assert ran.status == 1
    assert "belongs to the cluster 'east', but this node to 'west'" in ran.err
    ok(run(cluster, "-A", "md0", *disks[:2], "--home-cluster=east", CLUSTERMD_CLUSTER="west"))
    ok(run(cluster, "-S", "md0"))
    ok(run(cluster, "-A", "md0", *disks[:2], CLUSTERMD_CLUSTER="east"))


def test_readonly_assembly_writes_nothing_and_needs_no_cluster(
    cluster: LocalCluster, disks: list[str]
) -> None:
    ok(run(cluster, *NEW, "-bclustered", *disks[:2]))
    run(cluster, "-W", "md0")
    ok(run(cluster, "-S", "md0"))
    before = sums(disks)
    ok(run(cluster, "-A", "--readonly", "md0", *disks[:2], node="node3"))
    assert "md0 : active (read-only) raid1" in mdstat(cluster, "node3")
    assert not cluster.processes("node3", "lockd")
    ok(run(cluster, "-S", "md0", node="node3"))
    assert sums(disks) == before


def test_a_killed_array_is_gone_from_mdstat_and_starts_again(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-binternal", *disks[:2]))
    cluster.kill(cluster.processes("node1", "array"))
    dead = run(cluster, "-D", "-t", "md0")
    assert dead.status == 4
    assert "md0 is not running on this node (node1)" in dead.err
    assert "md0" not in mdstat(cluster)
    ok(run(cluster, "-A", "md0", *disks[:2]))
    assert run(cluster, "-D", "-t", "md0").status == 0


def test_a_process_that_does_not_answer_is_named(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-binternal", *disks[:2]))
    (process,) = cluster.processes("node1", "array")
    process.send(signal.SIGSTOP)
    ran = run(cluster, "-D", "md0")
    process.send(signal.SIGCONT)
    assert ran.status == 1
    assert f"the process {process.pid} that runs md0 does not answer (it is stopped by a signal)" in ran.err


def test_sigterm_stops_an_array_in_order(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-bnone", "--assume-clean", *disks[:2]))
    (process,) = cluster.processes("node1", "array")
    pidfd = os.pidfd_open(process.pid)
    process.send(signal.SIGTERM)
    assert _ended(pidfd)
    assert "State : clean" in run(cluster, "-E", disks[0]).out
    assert "md0" not in mdstat(cluster)


def _ended(pidfd: int) -> bool:
    import select

    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


def test_query_and_zero_superblock(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-binternal", *disks[:2]))
    said = ok(run(cluster, "-Q", "md0", disks[1], disks[2])).out.splitlines()
    assert said[0].startswith("md0: 63.00MiB raid1 2 devices, 0 spares. Use clustermd --detail")
    assert said[2].startswith(f"{disks[1]}: device 1 in 2 device active raid1 /dev/md0.")
    assert said[3] == f"{disks[2]}: is not an md array"
    assert len(said) == 4
    busy = run(cluster, "--zero-superblock", disks[0])
    assert busy.status == 2
    assert f"Couldn't open {disks[0]} for write - not zeroing" in busy.err
    ok(run(cluster, "-S", "md0"))
    assert f"{disks[0]}: device 0 in 2 device inactive raid1 array." in run(cluster, "-Q", disks[0]).out
    ok(run(cluster, "--zero-superblock", disks[0]))
    gone = run(cluster, "-E", disks[0])
    assert (gone.status, gone.err) == (1, f"clustermd: No md superblock detected on {disks[0]}.\n")
    assert (
        f"Unrecognised md component device - {disks[0]}"
        in ok(run(cluster, "--zero-superblock", disks[0])).err
    )
    ok(run(cluster, "-E", disks[1]))


def test_refusals_are_json_too(cluster: LocalCluster) -> None:
    ran = run(cluster, "-A", "--json", "md0", "absent")
    assert ran.status == 1
    assert ran.json["error"]["code"] == "cannot-open"
    assert ran.json["error"]["data"] == {"path": "absent"}


def test_help_and_version_go_to_standard_output(cluster: LocalCluster) -> None:
    for words, text in (
        ("--help", "Usage: clustermd --create"),
        ("-C -h", "--raid-devices="),
        ("-V", "clustermd - v"),
    ):
        ran = ok(run(cluster, *words.split()))
        assert text in ran.out
        assert ran.err == ""
    bad = run(cluster, "--nonsense")
    assert (bad.status, bad.out) == (2, "")
    assert bad.err.splitlines()[0] == "clustermd: unrecognized option '--nonsense'"


@pytest.mark.needs("root", "loop")
def test_a_file_with_a_loop_device_over_it_is_refused(cluster: LocalCluster, disks: list[str]) -> None:
    made = subprocess.run(["losetup", "-f", "--show", disks[0]], capture_output=True, text=True, check=True)
    loop = made.stdout.strip()
    try:
        ran = run(cluster, *NEW, "-bnone", *disks[:2])
        assert ran.status == 1
        assert f"{disks[0]} is the backing file of {loop}" in ran.err
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def test_nodes_that_would_use_other_files_are_refused(cluster: LocalCluster, disks: list[str]) -> None:
    ok(run(cluster, *NEW, "-bclustered", "--assume-clean", *disks[:2]))
    shutil.copyfile(disks[0], disks[2])
    before = sums(disks)
    ran = run(cluster, "-A", "md0", disks[2], disks[1], node="node2")
    assert ran.status == 1
    assert f"{disks[2]} is not what node1 uses for this array" in ran.err
    assert sums(disks)[2] == before[2]
    ran = run(cluster, "-A", "md0", *disks, node="node2")
    assert "appear to have very similar superblocks" in ran.err
    # A hard link is another path to the same file.
    (cluster.directory / "link.img").hardlink_to(disks[0])
    ok(run(cluster, "-A", "md0", "link.img", disks[1], node="node2"))
