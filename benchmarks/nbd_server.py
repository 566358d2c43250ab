"""4 KiB requests a second of the NBD server over memory, beside nbdkit's, in one run.

    .venv/bin/python benchmarks/nbd_server.py [--rounds 5] [--seconds 2] [--depths 16,32] [--json]

Servers, each over 64 MiB of memory and alone while it is measured: ours with a volume that only copies;
`nbdkit memory` (C); nbdkit's Python plugin with a bytearray. The load is fio on one connection.
"CPU" is the server's own processor time per request, which other work on the machine disturbs least. Rounds
are interleaved; what is printed are medians, and the ratios of ours to the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = "64M"
READY_S = 10

PLUGIN = """
import nbdkit
API_VERSION = 2
disk = bytearray(64 << 20)
def open(readonly):
    return 1
def get_size(h):
    return len(disk)
def pread(h, buf, offset, flags):
    buf[:] = disk[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags):
    disk[offset:offset + len(buf)] = buf
"""


@contextmanager
def running(name: str, directory: str) -> Iterator[tuple[int, str]]:
    """Start server `name`; its pid and socket."""
    path = f"{directory}/{name}.sock"
    environment = dict(os.environ)
    if name == "clustermd":
        program = REPOSITORY / "tests" / "unit" / "memory_volume.py"
        command = [sys.executable, str(program), "--socket", path, "--size", SIZE]
        environment["PYTHONPATH"] = str(REPOSITORY / "src")
    else:
        command = ["nbdkit", "--foreground", "--unix", path]
        if name == "nbdkit-memory":
            command += ["memory", SIZE]
        else:
            plugin = Path(directory) / "plugin.py"
            plugin.write_text(PLUGIN)
            command += ["python", str(plugin)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        subprocess.run(
            [
                "timeout",
                str(READY_S),
                "sh",
                "-c",
                f"until nbdinfo --size 'nbd+unix:///?socket={path}'; do :; done",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        yield server.pid, path
    finally:
        server.terminate()
        server.wait()
        Path(path).unlink(missing_ok=True)


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(path: str, pattern: str, depth: int, seconds: float) -> int:
    """Requests completed by fio."""
    done = subprocess.run(
        [
            *("timeout", "-k", "1", str(seconds + 20)),
            *("fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}", f"--rw={pattern}"),
            *("--bs=4k", f"--iodepth={depth}", f"--size={SIZE}", "--time_based", f"--runtime={seconds}"),
            *("--norandommap", "--thread", "--output-format=json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return int(job["read"]["total_ios"]) + int(job["write"]["total_ios"])


def main() -> None:
    parser = argparse.ArgumentParser(description="4 KiB requests a second of the NBD server, beside nbdkit's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--depths", default="16,32")
    parser.add_argument("--servers", default="clustermd,nbdkit-memory,nbdkit-python")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    servers = options.servers.split(",")
    cases = [
        (pattern, int(depth)) for pattern in ("randread", "randwrite") for depth in options.depths.split(",")
    ]
    rates: dict[tuple[str, str, int], list[float]] = {}
    costs: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="nbd") as directory:
        for _ in range(options.rounds):
            for pattern, depth in cases:
                for name in servers:
                    with running(name, directory) as (pid, path):
                        before_s = cpu_s(pid)
                        requests = load(path, pattern, depth, options.seconds)
                        cost_us = (cpu_s(pid) - before_s) / requests * 1e6
                    rates.setdefault((name, pattern, depth), []).append(requests / options.seconds)
                    costs.setdefault((name, pattern, depth), []).append(cost_us)
    rows = [
        {
            "server": name,
            "pattern": pattern,
            "depth": depth,
            "requests_per_s": round(statistics.median(rates[name, pattern, depth])),
            "cpu_us_per_request": round(statistics.median(costs[name, pattern, depth]), 2),
            "ours_to_it": round(
                statistics.median(rates[servers[0], pattern, depth])
                / statistics.median(rates[name, pattern, depth]),
                2,
            ),
        }
        for pattern, depth in cases
        for name in servers
    ]
    if options.json:
        print(json.dumps({"schema": 1, "nbd_server": rows}, indent=2))
        return
    print(f"{'4 KiB requests':<20}{'server':<16}{'requests/s':>12}{'CPU us':>9}{'ours : it':>11}")
    for row in rows:
        case = f"{row['pattern']} depth {row['depth']}"
        print(
            f"{case:<20}{row['server']:<16}{row['requests_per_s']:>12,}"
            f"{row['cpu_us_per_request']:>9}{row['ours_to_it']:>11}"
        )


if __name__ == "__main__":
    main()
