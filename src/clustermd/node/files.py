"""The files of a running array and of its node: who runs, what mdstat says, how fast a resync may be.

`$CLUSTERMD_RUN/$CLUSTERMD_NODE/md0/pid` is locked by the array process for as long as it lives (an open file
description lock, which can be looked at without taking it), so one name runs once on a node, and a lock that
is free means that what else lies there is left from a dead process. `status.json` beside it is that process's
word for the node's `mdstat`: whoever changes its own rewrites mdstat from all of them, under a lock that is
never waited for (its holder may be a stopped process; the next change does it). Files are replaced by
renaming, so readers see the old one or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustermd.array.status import ArrayStatus
from clustermd.errors import Refused
from clustermd.node.mdstat import mdstat
from clustermd.rundir import RunDir

SPEED_LIMIT_MIN_KIB_S = 1000
SPEED_LIMIT_MAX_KIB_S = 200000
SOCKET_PATH_MAX = 107


@dataclass(frozen=True, slots=True)
class ArrayFiles:
    """The paths of one array's files on one node."""

    directory: Path

    @classmethod
    def of(cls, rundir: RunDir, name: str) -> ArrayFiles:
        return cls(rundir.array_dir(name))

    @property
    def pid(self) -> Path:
        return self.directory / "pid"

    @property
    def nbd_socket(self) -> Path:
        return self.directory / "nbd.sock"

    @property
    def control_socket(self) -> Path:
        return self.directory / "control.sock"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def trace(self) -> Path:
        return self.directory / "trace"

    @property
    def status(self) -> Path:
        return self.directory / "status.json"

    def check_socket_paths(self) -> None:
        """Refuse a run directory whose sockets could not be bound."""
        length = len(os.fsencode(self.control_socket))
        if length > SOCKET_PATH_MAX:
            raise Refused(
                "run-directory-too-long",
                f"{self.control_socket} is {length} bytes long, but the path of a unix socket may have"
                f" {SOCKET_PATH_MAX}: set CLUSTERMD_RUN to a shorter directory",
            )

    def remove_leftovers(self) -> None:
        """Remove what a former process left, or this one at its end. The log stays."""
        for path in (self.nbd_socket, self.control_socket, self.status):
            path.unlink(missing_ok=True)


def make_private(rundir: RunDir, files: ArrayFiles) -> None:
    """Make the directories of a cluster, a node and an array, each for this user only."""
    for directory in (rundir.root, rundir.node_dir, files.directory):
        rundir.make(directory)


def nbd_uri(path: Path, name: str) -> str:
    """How NBD clients reach an array (the NBD URI specification)."""
    return f"nbd+unix:///{name}?socket={path}"


class PidFile:
    """The locked pid file. `acquire` refuses while another process runs the array."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self) -> None:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _lock(fd):
                owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                os.close(fd)
                name = self.path.parent.name
                raise Refused(
                    "already-running",
                    f"{name} is already running on this node (process {owner or 'just starting'}):"
                    " stop it with -S first, or give the new array another name",
                    name=name,
                    pid=owner,
                )
            # The file may have been removed by its former owner between open and lock.
            if _same_file(fd, self.path):
                break
            os.close(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _same_file(fd: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def running_pid(rundir: RunDir, name: str) -> int | None:
    """The process that runs array `name` on this node, None when nobody does. May see a starting one."""
    try:
        fd = os.open(ArrayFiles.of(rundir, name).pid, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        return int(text) if _locked(fd) and text.isdigit() else None
    finally:
        os.close(fd)


_FLOCK = struct.Struct("@hhqqi")
"""struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


def _lock(fd: int) -> bool:
    """Lock the whole file for this open file description. False when another one has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _locked(fd: int) -> bool:
    """Whether another open file description holds the file. Does not take the lock."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def process_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def process_started(pid: int) -> int:
    """Start of the process in clock ticks since boot (proc(5)), 0 without one. Tells reused pids apart."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def running_arrays(rundir: RunDir) -> list[str]:
    """The names of all arrays this node runs, newest first."""
    entries = sorted(_entries(rundir), key=lambda entry: -int(entry["started"]))
    return [str(entry["name"]) for entry in entries]


def array_using(rundir: RunDir, path: str) -> str | None:
    """The name of an array this node runs on the disk or file `path`, or None."""
    for entry in _entries(rundir):
        for member in ArrayStatus.from_wire(entry["status"]).members:
            try:
                if os.path.samefile(member.path, path):
                    return str(entry["name"])
            except OSError:
                continue  # a disk that is gone is not this one
    return None


def publish(rundir: RunDir, status: ArrayStatus) -> None:
    """Say in `status.json` what this process's array looks like."""
    files = ArrayFiles.of(rundir, status.name)
    pid = os.getpid()
    entry = {"name": status.name, "pid": pid, "started": process_started(pid), "status": status.to_wire()}
    write_file(files.status, json.dumps(entry))


def rewrite_mdstat(rundir: RunDir) -> bool:
    """Write the node's mdstat from what all its arrays said. False when another process is just at it."""
    with _try_lock(rundir.node_dir / "mdstat.lock") as ours:
        if ours:
            entries = sorted(_entries(rundir), key=lambda entry: -int(entry["started"]))
            text = mdstat([ArrayStatus.from_wire(entry["status"]) for entry in entries])
            path = rundir.node_dir / "mdstat"
            if not path.exists() or path.read_text() != text:
                write_file(path, text)
        return ours


def _entries(rundir: RunDir) -> list[dict[str, Any]]:
    """What living array processes said. Leftovers of dead ones do not count."""
    found: list[dict[str, Any]] = []
    for path in sorted(rundir.node_dir.glob("*/status.json")):
        try:
            entry = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue
        if process_alive(entry["pid"]) and process_started(entry["pid"]) == entry["started"]:
            found.append(entry)
    return found


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _lock(fd)
    finally:
        os.close(fd)


def write_file(path: Path, text: str) -> None:
    """Replace a file, so that no reader sees half of it. Private to the user."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


class SpeedLimits:
    """The node's `speed_limit_min` and `speed_limit_max` (KiB/s), as /proc/sys/dev/raid has them, read live.

    Call it for both numbers: a file is read again when it changed. What is no number leaves the last good
    one, and `complain` hears of it once.
    """

    def __init__(self, rundir: RunDir, complain: Callable[[str], None]) -> None:
        self._complain = complain
        self._files = (
            _Number(rundir.node_dir / "speed_limit_min", SPEED_LIMIT_MIN_KIB_S),
            _Number(rundir.node_dir / "speed_limit_max", SPEED_LIMIT_MAX_KIB_S),
        )

    def make(self) -> None:
        """Write the defaults where there is no file yet."""
        for number in self._files:
            if not number.path.exists():
                write_file(number.path, f"{number.value}\n")

    def __call__(self) -> tuple[int, int]:
        for number in self._files:
            if number.refresh():
                continue
            self._complain(f"{number.path} is not a number of KiB/s: {number.value} stays in force")
        return self._files[0].value, self._files[1].value


class _Number:
    __slots__ = ("_seen", "path", "value")

    def __init__(self, path: Path, value: int) -> None:
        self.path = path
        self.value = value
        self._seen: tuple[int, int, int] | None = None

    def refresh(self) -> bool:
        """Take over a changed file. False when it has just become something else than a number."""
        try:
            stat = self.path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen == self._seen:
                return True
            text = self.path.read_text(errors="replace").strip()
        except OSError:
            return True
        self._seen = seen
        if text.isascii() and text.isdigit() and len(text) <= 12:
            self.value = int(text)
            return True
        return False
