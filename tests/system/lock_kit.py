"""What the tests of locks share: `clustermd lock` on nodes, with commands that tests can hold and follow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

CLUSTERMD = str(Path(sys.executable).with_name("clustermd"))
QUICK = {"CLUSTERMD_UNRESPONSIVE_S": "2", "CLUSTERMD_LINGER_S": "2"}
PATIENCE_S = 30.0


def runs(pid: int) -> bool:
    """Whether that process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


@dataclass
class Program:
    """A running `clustermd`, its output in files."""

    popen: subprocess.Popen[bytes]
    out_path: Path
    err_path: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def out(self) -> str:
        return self.out_path.read_text()

    @property
    def err(self) -> str:
        return self.err_path.read_text()

    def end(self) -> int:
        """Its exit status; negative for a signal."""
        return self.popen.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL to `clustermd lock` itself."""
        os.kill(self.pid, signal.SIGKILL)
        self.popen.wait(PATIENCE_S)

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


@dataclass
class Locks:
    """Nodes of one cluster that run commands under locks."""

    cluster: LocalCluster
    started: list[Program] = field(default_factory=list)

    def start(self, node: str, *words: str) -> Program:
        """`clustermd WORDS` on that node."""
        number = len(self.started)
        out, err = (self.cluster.directory / f"{kind}.{number}" for kind in ("out", "err"))
        with out.open("wb") as out_file, err.open("wb") as err_file:
            popen = subprocess.Popen(
                self.cluster.enter(node, [CLUSTERMD, *words]),
                env=os.environ | self.cluster.node(node).environment,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                cwd=self.cluster.directory,
            )
        program = Program(popen, out, err)
        self.started.append(program)
        return program

    def run(self, node: str, *words: str) -> Program:
        """The same, ended."""
        program = self.start(node, *words)
        program.end()
        return program

    def hold(self, node: str, script: str, *words: str, name: str = "r") -> tuple[Program, list[int]]:
        """A shell script under lock `name`, which has the lock and has written the pids that it tells on line one."""
        program = self.start(node, "lock", name, *words, "--", "sh", "-c", script)
        wait_until(lambda: "\n" in program.out or program.popen.poll() is not None, "the command", PATIENCE_S)
        assert program.popen.poll() is None, program.err
        return program, [int(pid) for pid in program.out.splitlines()[0].split()]

    def lockd(self, node: str) -> int:
        return next(process.pid for process in self.cluster.processes(node, "lockd"))

    def close(self) -> None:
        for program in self.started:
            if program.popen.poll() is None:
                program.kill()
