"""Real NBD clients against a server process that serves memory: what experts will try first (conventions 3.6)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).resolve().parents[2]
SERVER = REPOSITORY / "tests" / "unit" / "memory_volume.py"
MIB = 1 << 20
CLIENT_S = 40


class Server:
    """A `memory_volume.py` process. `stop` ends it with SIGTERM; it exits with 0 only if no buffer was lost."""

    def __init__(self, socket: str, *options: str) -> None:
        self.socket = socket
        self.uri = f"nbd+unix:///?socket={socket}"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), "--socket", socket, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(CLIENT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers; each must end well."""
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="nbd") as directory:

        def start(*options: str) -> Server:
            servers.append(Server(f"{directory}/{len(servers)}.sock", *options))
            return servers[-1]

        try:
            yield start
        finally:
            codes = [server.stop() for server in servers]
        assert codes == [0] * len(codes)


def run(*command: str | Path, fails: bool = False) -> str:
    """What a client printed. It must succeed, or fail, within CLIENT_S."""
    done = subprocess.run(
        ["timeout", "-k", "1", str(CLIENT_S), *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode not in (124, 137), f"{command[0]} hangs: {done.stdout}{done.stderr}"
    assert (done.returncode != 0) == fails, f"{command}: {done.returncode} {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def libnbd(script: str) -> None:
    """Run Python with `nbd` imported; python3-libnbd is made for Debian's python only."""
    assert "all well" in run("/usr/bin/python3", "-c", f"import errno, nbd, os\n{script}\nprint('all well')")


def connected(server: Server) -> str:
    return f"h = nbd.NBD()\nh.connect_uri({server.uri!r})\n"


@pytest.mark.needs("nbdinfo")
def test_nbdinfo_shows_the_export_under_both_names(serve: Serve) -> None:
    server = serve("--size", "64M", "--name", "data")
    for uri in (server.uri, server.uri.replace("///?", "///data?")):
        (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
        assert export["export-size"] == 64 * MIB
        assert export["description"] == "clustermd array data"
        blocks = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
        assert blocks == [512, 4096, 32 * MIB]
        can = {key for key, value in export.items() if key.startswith("can_") and value}
        assert can == {"can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df"}
        assert not export["is_read_only"]
    (listed,) = json.loads(run("nbdinfo", "--list", "--json", server.uri))["exports"]
    assert listed["export-name"] == "data"
    assert "md9" in run("nbdinfo", server.uri.replace("///?", "///md9?"), fails=True)


@pytest.mark.needs("nbdcopy")
@pytest.mark.parametrize("options", [(), ("--delay-s", "0.0005", "--shuffle")])
def test_nbdcopy_both_ways_over_four_connections(
    serve: Serve, tmp_path: Path, options: tuple[str, ...]
) -> None:
    server = serve("--size", "40M", *options)
    there, back = tmp_path / "there", tmp_path / "back"
    data = random.Random(5).randbytes(30 * MIB) + bytes(10 * MIB)
    there.write_bytes(data)
    run("nbdcopy", "--connections=4", "--threads=2", "--flush", there, server.uri)
    run("nbdcopy", "--connections=4", "--request-size=1048576", server.uri, back)
    assert back.read_bytes() == data
    other = serve("--size", "40M", *options)
    run("nbdcopy", server.uri, other.uri)
    run("nbdcopy", "--synchronous", other.uri, back)
    assert back.read_bytes() == data


@pytest.mark.needs("qemu-img")
def test_qemu_img_converts_and_compares(serve: Serve, tmp_path: Path) -> None:
    server = serve("--size", "48M")
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * MIB) + random.Random(6).randbytes(36 * MIB) + bytes(8 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, server.uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, server.uri)
    back = tmp_path / "back"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", "-W", "-m", "8", server.uri, back)
    assert back.read_bytes() == image.read_bytes()


@pytest.mark.needs("fio")
def test_fio_reads_back_what_it_wrote_at_depth_on_two_connections(serve: Serve) -> None:
    server = serve("--size", "32M", "--delay-s", "0", "--shuffle")
    output = run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={server.uri}",
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=0",
        "--iodepth=32",
        "--numjobs=2",
        "--size=16M",
        "--offset_increment=16M",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
        "--end_fsync=1",
    )
    assert "err= 0" in output and "READ:" in output


@pytest.mark.needs("fuse", "nbdfuse")
def test_nbdfuse_makes_a_file_of_it(serve: Serve, tmp_path: Path) -> None:
    server = serve("--size", "8M")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    pid_file = tmp_path / "pid"
    data = random.Random(7).randbytes(3 * MIB)
    mounted = subprocess.Popen(["nbdfuse", "-P", str(pid_file), str(mountpoint), server.uri])
    try:
        while not pid_file.exists():
            assert mounted.poll() is None, "nbdfuse ended"
            os.sched_yield()
        disk = mountpoint / "nbd"
        assert disk.stat().st_size == 8 * MIB
        with disk.open("r+b") as file:
            file.seek(MIB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        assert disk.read_bytes() == bytes(MIB) + data + bytes(4 * MIB)
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
        mounted.wait(CLIENT_S)
    run("nbdcopy", server.uri, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(MIB) + data + bytes(4 * MIB)


@pytest.mark.needs("nbdsh")
@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_uses_all_commands_and_flags(serve: Serve, structured: bool) -> None:
    server = serve("--size", "64M")
    script = f"""
h = nbd.NBD()
h.set_request_structured_replies({structured})
h.connect_uri({server.uri!r})
assert h.get_structured_replies_negotiated() == {structured}
assert h.can_df() == {structured}
data = os.urandom(33554432)
h.pwrite(data, 512, nbd.CMD_FLAG_FUA)
assert h.pread(33554432, 512) == data
if {structured}:
    chunks = []
    def chunk(part, offset, status, error):
        chunks.append((offset, status))
    got = h.pread_structured(8192, 1024, chunk, nbd.CMD_FLAG_DF)
    assert got == data[512:8704] and chunks == [(1024, nbd.READ_DATA)], chunks
h.flush()
h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
h.zero(4096, 16384, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == h.pread(4096, 16384) == bytes(4096)
assert h.pread(512, 3584) == data[3072:3584]
h.shutdown()
"""
    libnbd(script)


@pytest.mark.needs("nbdsh")
def test_libnbd_gets_the_protocols_error_for_each_illegal_request_and_goes_on(serve: Serve) -> None:
    server = serve("--size", "64M", "--bad", "1M-2M")
    script = """
h.set_strict_mode(0)
size = 64 << 20
def refused(expected, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == expected, (call, arguments[1:], error)
    else:
        raise AssertionError((call, arguments[1:]))
    assert h.pread(512, 0) == bytes(512)
refused(errno.EINVAL, h.pread, 512, 100)
refused(errno.EINVAL, h.pread, 100, 512)
refused(errno.EINVAL, h.pread, 1024, size - 512)
refused(errno.EINVAL, h.pread, (32 << 20) + 512, 0)
refused(errno.EINVAL, h.pwrite, bytes(100), 0)
refused(errno.ENOSPC, h.pwrite, bytes(1024), size - 512)
refused(errno.EINVAL, h.pwrite, bytes((32 << 20) + 512), 0)
refused(errno.EINVAL, h.trim, 512, size)
refused(errno.ENOSPC, h.zero, 1024, size - 512)
refused(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
refused(errno.EINVAL, h.cache, 512, 0)
refused(errno.EIO, h.pread, 512, 1 << 20)
refused(errno.EIO, h.pwrite, bytes(4 << 20), 0)
refused(errno.EIO, h.trim, 1 << 20, 1 << 20)
"""
    libnbd(connected(server) + script)


@pytest.mark.needs("nbdsh")
def test_a_read_only_volume_permits_no_write(serve: Serve) -> None:
    server = serve("--size", "1M", "--read-only")
    script = """
h.set_strict_mode(0)
assert h.is_read_only() and not h.can_trim() and not h.can_zero()
for call in (lambda: h.pwrite(bytes(512), 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM
    else:
        raise AssertionError
assert h.pread(512, 0) == bytes(512)
"""
    libnbd(connected(server) + script)


def fio_load(server: Server) -> subprocess.Popen[str]:
    """fio under way: it has completed requests."""
    fio = subprocess.Popen(
        [
            *("timeout", "-k", "1", str(CLIENT_S)),
            *("fio", "--name=load", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw", "--bs=64k"),
            *("--iodepth=32", "--size=32M", "--time_based", f"--runtime={CLIENT_S}", "--thread"),
            *("--status-interval=1", "--output-format=terse"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert fio.stdout is not None
    for line in fio.stdout:
        if line.startswith("3;"):  # a line of status
            return fio
    raise AssertionError("fio ended")


def end(fio: subprocess.Popen[str]) -> None:
    """Kill fio with its `timeout`; they are a process group of their own."""
    os.killpg(fio.pid, 9)
    fio.wait(CLIENT_S)
    assert fio.stdout is not None
    fio.stdout.close()


@pytest.mark.needs("fio", "nbdsh")
def test_a_client_killed_under_load_leaves_a_server_that_serves_others(serve: Serve) -> None:
    server = serve("--size", "32M", "--delay-s", "0.002")
    for _ in range(2):
        end(fio_load(server))
        libnbd(connected(server) + "h.pwrite(bytes(4096), 0, nbd.CMD_FLAG_FUA)")


@pytest.mark.needs("fio")
def test_a_server_told_to_end_under_load_ends_at_once(serve: Serve) -> None:
    server = serve("--size", "32M", "--delay-s", "0.002")
    fio = fio_load(server)
    try:
        assert server.stop() == 0
        assert not Path(server.socket).exists()
    finally:
        end(fio)
