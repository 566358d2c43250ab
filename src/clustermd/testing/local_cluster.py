"""A whole cluster on this machine, in a directory of its own: what tests, demo and benchmarks run.

    with LocalCluster() as cluster:
        disks = cluster.images(2, 64 << 20)
        one, two = cluster.node("node1"), cluster.node("node2")
        one.run("-CR", "md0", "-l1", "-n2", "-b", "clustered", "--assume-clean", *disks)
        two.run("-A", "md0", *disks)

Nodes are real: each `run` is the installed command with `CLUSTERMD_NODE` set, and starts what it
starts by itself. Nothing is simulated and nothing shared with a cluster that runs otherwise:
`CLUSTERMD_RUN` is in the directory, which has a short name because sockets live there.

Whoever started it ends it: at the end every process that carries this `CLUSTERMD_RUN` and every
program started through it is killed, by pid. `leftovers()` says what a test did not stop itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clustermd.array.status import ArrayStatus
from clustermd.node.control import ControlClient
from clustermd.node.files import ArrayFiles
from clustermd.rundir import RunDir
from clustermd.testing.waiting import wait_until

COMMAND_TIMEOUT_S = 60.0
_LOG_LINES = 25


class CommandFailed(AssertionError):
    """A command ended otherwise than expected; says what it printed and what the logs say."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the cluster. `role` is "sequencer", "lockd", "array" or another module's name."""

    pid: int
    role: str
    node: str

    @property
    def alive(self) -> bool:
        """Whether it runs: gone and zombie both count as dead."""
        return _state(self.pid) not in ("", "Z", "X")

    @property
    def still(self) -> bool:
        """Whether it does nothing more for now: held by SIGSTOP, or dead."""
        return _state(self.pid) in ("T", "", "Z", "X")

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended by itself."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass


class LocalCluster:
    """Several nodes in one directory. `environment` is added to that of every command.

    `enter(node, command)` is the command line that runs `command` where that node is, for nodes that are more than
    a name: in a network namespace, say. It must keep the process id.
    """

    def __init__(
        self,
        environment: dict[str, str] | None = None,
        base: str = "/tmp",
        enter: Callable[[str, list[str]], list[str]] = lambda node, command: command,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cmd-", dir=base))
        self.run_directory = self.directory / "run"
        self.environment = environment or {}
        self.enter = enter
        self._started: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, Node] = {}

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs, then remove the directory."""
        for program in self._started:
            if program.poll() is None:
                program.kill()
            program.wait()
        while processes := self.processes():
            self.kill(processes)
        shutil.rmtree(self.directory, ignore_errors=True)

    def images(self, count: int, size_bytes: int) -> list[str]:
        """New sparse disk images, as paths."""
        paths = [self.directory / f"disk{number}.img" for number in range(count)]
        for path in paths:
            with path.open("xb") as image:
                image.truncate(size_bytes)
        return [str(path) for path in paths]

    def node(self, name: str) -> Node:
        """The node of that name; it need not have run anything yet."""
        return self._nodes.setdefault(name, Node(self, name))

    def start(
        self, command: Sequence[str], environment: dict[str, str] | None = None, log: str = ""
    ) -> subprocess.Popen[bytes]:
        """Start a program that ends with the cluster. Its output goes to `log` in the directory, if named."""
        output: IO[bytes] | int = subprocess.DEVNULL
        if log:
            output = (self.directory / log).open("ab")
        program = subprocess.Popen(
            list(command),
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=self.directory,
        )
        if not isinstance(output, int):
            output.close()
        self._started.append(program)
        return program

    def processes(self, node: str | None = None, role: str | None = None) -> list[Process]:
        """The daemons that run now, of one node and role if given. The sequencer belongs to no node."""
        return [
            process
            for process in _processes_of(self.run_directory)
            if node in (None, process.node) and role in (None, process.role)
        ]

    def kill(self, processes: Sequence[Process], timeout_s: float = 30.0) -> None:
        """SIGKILL to all of them at once; returns when they are gone."""
        for process in processes:
            process.send(signal.SIGKILL)
        wait_until(
            lambda: not any(process.alive for process in processes), f"the end of {processes}", timeout_s
        )

    def leftovers(self) -> list[str]:
        """Daemons that still run and loop devices that still lie on files of this cluster."""
        found = [f"{process.role} of {process.node} (pid {process.pid})" for process in self.processes()]
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                text = backing.read_text()
            except OSError:
                continue  # went away while we looked
            if text.startswith(f"{self.directory}/"):
                found.append(f"{backing.parent.parent.name} on {text.strip()}")
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return found + [line for line in mounts if f" {self.directory}/" in line]

    def logs(self) -> str:
        """The ends of all logs of the cluster, for the message of a failed test."""
        parts = []
        for path in sorted([*self.run_directory.rglob("*log*"), *self.directory.glob("*.log")]):
            if path.is_file() and path.name != "order.log":  # that one is for machines
                lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                parts.append(f"--- {path.relative_to(self.directory)}\n" + "\n".join(lines))
        return "\n".join(parts)


class Node:
    """One node of the cluster, and array `md0` on it unless another name is given."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.rundir = RunDir(cluster.run_directory, name)

    @property
    def environment(self) -> dict[str, str]:
        own = {"CLUSTERMD_RUN": str(self.cluster.run_directory), "CLUSTERMD_NODE": self.name}
        return self.cluster.environment | own

    def run(self, *arguments: str, expect: int | None = 0, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run `clustermd` as this node and return what it printed (both streams).

        Raises CommandFailed for another exit status than `expect` (None: any) or after `timeout_s`.
        """
        command = [str(Path(sys.executable).with_name("clustermd")), *arguments]
        # A file, not a pipe: daemons that inherit the stream must not keep us waiting for its end.
        with tempfile.TemporaryFile() as output:
            program = subprocess.Popen(
                self.cluster.enter(self.name, command),
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                status: int | str = program.wait(timeout_s)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
                status = f"nothing for {timeout_s:g} s"
            output.seek(0)
            text = output.read().decode(errors="replace")
        if isinstance(status, str) or expect not in (None, status):
            raise CommandFailed(
                f"{self.name}: clustermd {' '.join(arguments)} ended with {status}, not {expect}:\n{text}\n"
                f"{self.cluster.logs()}"
            )
        return text

    def start_lockd(self) -> subprocess.Popen[bytes]:
        """Start this node's lockd, as an init system does where nobody who needs one starts it."""
        log = self.rundir.make() / "lockd.log"
        command = [sys.executable, "-P", "-m", "clustermd.lockd"]
        return self.cluster.start(self.cluster.enter(self.name, command), self.environment, log=str(log))

    def files(self, array: str = "md0") -> ArrayFiles:
        return ArrayFiles.of(self.rundir, array)

    def socket(self, array: str = "md0") -> str:
        return str(self.files(array).nbd_socket)

    def pid(self, array: str = "md0") -> int:
        return int(self.files(array).pid.read_text())

    def status(self, array: str = "md0") -> ArrayStatus:
        """What the array process says of itself now. Raises Refused when it does not run or answer."""
        with ControlClient(self.rundir, array) as client:
            return ArrayStatus.from_wire(client.ask("status")["status"])

    def slot(self, array: str = "md0") -> int:
        """The slot of this node's bitmap."""
        bitmap = self.status(array).bitmap
        assert bitmap is not None
        return bitmap.slot

    def mdstat(self) -> str:
        return (self.rundir.node_dir / "mdstat").read_text()

    def processes(self) -> list[Process]:
        """The array processes and the lockd of this node."""
        return self.cluster.processes(node=self.name)

    def kill(self) -> list[Process]:
        """SIGKILL to everything of this node at once: the node dies. Returns what was killed."""
        processes = self.processes()
        self.cluster.kill(processes)
        return processes

    def kill_array(self) -> None:
        """SIGKILL to the array processes only: lockd lives and is their witness."""
        self.cluster.kill([process for process in self.processes() if process.role == "array"])

    @contextmanager
    def held(self) -> Iterator[None]:
        """SIGSTOP to everything of this node, until the end of the block."""
        processes = self.processes()
        for process in processes:
            process.send(signal.SIGSTOP)
        wait_until(lambda: all(process.still for process in processes), f"{self.name} to stand still")
        try:
            yield
        finally:
            for process in processes:
                process.send(signal.SIGCONT)


def _processes_of(run_directory: Path) -> list[Process]:
    wanted = f"CLUSTERMD_RUN={run_directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if wanted not in variables:
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended while we looked, or not ours to look at
        role = _role(words)
        if role is not None:
            pairs = dict(variable.partition(b"=")[::2] for variable in variables)
            node = "" if role == "sequencer" else pairs.get(b"CLUSTERMD_NODE", b"").decode()
            process = Process(int(entry.name), role, node)
            if process.alive:
                found.append(process)
    return found


def _role(words: list[str]) -> str | None:
    """What a daemon is, from `python -m clustermd.<floor>.<module>`; None for what is no daemon of ours."""
    if "-m" not in words[:-1]:
        return None
    module = words[words.index("-m") + 1]
    if not module.startswith("clustermd.") or module.startswith("clustermd.testing"):
        return None
    if "sequencer" in module:
        return "sequencer"
    if module.startswith("clustermd.lockd"):
        return "lockd"
    return "array" if module.startswith("clustermd.node") else module


def _state(pid: int) -> str:
    """The letter of proc(5): R, S, D, T, Z ...; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
