"""Load on an array: exercisers that account for what they write, and fio beside them.

fio always runs under a time-out: its nbd engine can hang when the server dies.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from clustermd.testing.exerciser import DISCONNECTED, Report
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.waiting import wait_until
from clustermd.testing.write_log import RECORD_BYTES

_SETTLE_S = 30.0
_FIO_KILL_S = 5


class Load:
    """One exerciser on one node's array, with a log that is kept from run to run.

    `number` goes into each block; the blocks are `first_block` to `end_block - 1` and nobody else's.
    """

    def __init__(self, node: Node, number: int, first_block: int, end_block: int) -> None:
        directory = node.cluster.directory
        self.node = node
        self.number = number
        self.blocks = (first_block, end_block)
        self.log = directory / f"exerciser{number}.records"
        self.report_path = directory / f"exerciser{number}.report"
        self._options: tuple[str, ...] = ()
        self._program: subprocess.Popen[bytes] | None = None

    @property
    def records(self) -> int:
        """How much it has logged: grows while requests are answered."""
        return self.log.stat().st_size // RECORD_BYTES if self.log.exists() else 0

    def start(self, *options: str) -> None:
        """Start it and wait until its first requests are answered. `options` as the exerciser has them."""
        before = self.records
        self.launch(*options)
        self.wait_for_records(before + 50)

    def launch(self, *options: str) -> None:
        """Start it and wait for nothing."""
        self.report_path.unlink(missing_ok=True)
        self._options = options
        before = self.records
        first, end = self.blocks
        command = [sys.executable, "-m", "clustermd.testing.exerciser", "--socket", self.node.socket()]
        command += ["--log", str(self.log), "--report", str(self.report_path), "--node", str(self.number)]
        command += ["--blocks", f"{first}..{end}", "--seed", str(before), *options]
        self._program = self.node.cluster.start(command, log=f"exerciser{self.number}.log")

    def connect_anew(self) -> Report:
        """Start it as it was: its node was excluded, so its server ended the connection. The report until then."""
        report = self.report()
        assert report.ended == DISCONNECTED, f"exerciser {self.number} went on as if nothing had happened"
        self.start(*self._options)
        return report

    def wait_for_records(self, count: int) -> None:
        wait_until(
            lambda: self.records >= count or not self.running,
            f"exerciser {self.number} to log {count} records",
            last_words=self.node.cluster.logs,
        )

    @property
    def running(self) -> bool:
        return self._program is not None and self._program.poll() is None

    def stop(self) -> Report:
        """Let it finish what is in flight and return its report."""
        self.ask_to_stop()
        return self.report()

    def ask_to_stop(self) -> None:
        """Have it finish what is in flight and end; wait for nothing."""
        assert self._program is not None
        self._program.send_signal(signal.SIGTERM)

    def report(self) -> Report:
        """Its report, once it has ended: by itself, or because its server died."""
        assert self._program is not None
        wait_until(
            lambda: not self.running,
            f"the end of exerciser {self.number}",
            _SETTLE_S,
            last_words=self.node.cluster.logs,
        )
        if not self.report_path.exists():
            raise AssertionError(f"exerciser {self.number} left no report\n{self.node.cluster.logs()}")
        return Report.load(self.report_path)


def fio_command(
    uri: str,
    seconds: float,
    size_bytes: int,
    offset_bytes: int = 0,
    name: str = "load",
    options: tuple[str, ...] = (),
) -> list[str]:
    """fio over NBD for `seconds` on part of an export, ended by `timeout` when it does not end by itself."""
    return [
        "timeout",
        "--kill-after=2",
        str(int(seconds) + _FIO_KILL_S),
        "fio",
        f"--name={name}",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=16",
        f"--offset={offset_bytes}",
        f"--size={size_bytes}",
        "--time_based=1",
        "--thread=1",  # a forked job survives the end of its timeout, spinning
        f"--runtime={seconds:g}",
        *options,
    ]


def start_fio(
    cluster: LocalCluster,
    socket: str | Path,
    seconds: float,
    size_bytes: int,
    offset_bytes: int,
    rate_iops: int = 0,
) -> subprocess.Popen[bytes]:
    """fio as load beside the exercisers; what it writes is not judged."""
    options = (f"--rate_iops={rate_iops}",) if rate_iops else ()
    uri = f"nbd+unix:///?socket={socket}"
    return cluster.start(fio_command(uri, seconds, size_bytes, offset_bytes, options=options), log="fio.log")
