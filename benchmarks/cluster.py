"""How fast a clustered mirror is, beside what else serves a disk: `make bench`.

One run prints 4 KiB random writes and reads at depth 1, 16 and 32, and 256 KiB sequential ones, for

- `clustermd`: a clustered RAID1 of two image files, two nodes up, fio at one of them over NBD;
- `nbdkit file`: one image file, no mirror, nbdkit in C;
- `nbdkit python`: one image file, no mirror, nbdkit's Python plugin;
- `file`: fio straight on one image file.

All images are on the same file system (`--directory`, default /dev/shm: the disks cost nothing then, and
what is left is the cost of the software). Every number is the median of `--runs` runs, taken in turn
so that a slow moment of the machine hits all of them. What clustermd did per write (bitmap writes,
cluster messages) is counted over the random writes after the first run: the steady state.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clustermd.testing.load import fio_command
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.nbdkit import nbdkit

GOALS = {"4k randwrite depth 16": 0.5, "4k randread depth 16": 1.0}
BASELINE = "nbdkit file"
COUNTED = ("data_writes", "bitmap_writes", "messages_sent")


@dataclass(frozen=True)
class Pattern:
    """What fio does. `unit` is what is compared: requests per second, or MiB per second."""

    rw: str
    block: str
    depth: int
    unit: str

    @property
    def name(self) -> str:
        return f"{self.block} {self.rw} depth {self.depth}"


PATTERNS = [
    *(Pattern(rw, "4k", depth, "IOPS") for rw in ("randwrite", "randread") for depth in (1, 16, 32)),
    *(Pattern(rw, "256k", 16, "MiB/s") for rw in ("write", "read")),
]


@dataclass(frozen=True)
class Target:
    """Something fio can be pointed at: an NBD socket, or a file."""

    name: str
    socket: str = ""
    file: str = ""


def measure(target: Target, pattern: Pattern, size_bytes: int, seconds: float) -> float:
    """One run of fio: requests or MiB per second."""
    options = [
        f"--rw={pattern.rw}",
        f"--bs={pattern.block}",
        f"--iodepth={pattern.depth}",
        "--output-format=json",
    ]
    options += ["--randrepeat=0", "--norandommap=1"]
    if target.file:
        options += ["--ioengine=io_uring", f"--filename={target.file}", "--direct=1"]
    uri = f"nbd+unix:///?socket={target.socket}"
    command = fio_command(uri, seconds, size_bytes, options=tuple(options))
    if target.file:
        command.remove(f"--uri={uri}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fio on {target.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio on {target.name} met error {job['error']}")
    side = job["read" if "read" in pattern.rw else "write"]
    return float(side["iops"]) if pattern.unit == "IOPS" else float(side["bw_bytes"]) / (1 << 20)


def benchmark(directory: str, size_bytes: int, runs: int, seconds: float) -> None:
    with LocalCluster(base=directory) as cluster, ExitStack() as servers:
        mirror = cluster.images(2, size_bytes + (16 << 20))
        single = []
        for name in ("c", "python", "direct"):
            path = cluster.directory / f"{name}.img"
            with path.open("xb") as image:
                image.truncate(size_bytes + (16 << 20))
            single.append(str(path))
        one, two = cluster.node("node1"), cluster.node("node2")
        one.run("-CR", "md0", "-l1", "-n2", "-b", "clustered", "--nodes=4", "--assume-clean", *mirror)
        two.run("-A", "md0", *mirror)
        plugin = Path(__file__).with_name("nbdkit_plugin.py")
        targets = [
            Target("clustermd", socket=one.socket()),
            Target("nbdkit file", socket=servers.enter_context(nbdkit("file", single[0]))[0]),
            Target(
                "nbdkit python",
                socket=servers.enter_context(nbdkit("python", str(plugin), f"file={single[1]}"))[0],
            ),
            Target("file", file=single[2]),
        ]
        for target in targets:  # every block exists before it is measured
            measure(target, Pattern("write", "256k", 16, "MiB/s"), size_bytes, seconds)
        print_head(directory, size_bytes, runs, seconds, [target.name for target in targets])
        did = dict.fromkeys(COUNTED, 0)
        for pattern in PATTERNS:
            numbers: dict[str, list[float]] = {target.name: [] for target in targets}
            for run in range(runs):
                for target in targets:
                    steady = target.name == "clustermd" and pattern.rw == "randwrite" and run > 0
                    before = counters(one.status().counters)
                    numbers[target.name].append(measure(target, pattern, size_bytes, seconds))
                    if steady:
                        after = counters(one.status().counters)
                        for name in COUNTED:
                            did[name] += after[name] - before[name]
            print_row(pattern, {name: statistics.median(values) for name, values in numbers.items()})
        print_per_write(did)
        two.run("-S", "md0")
        one.run("-S", "md0")


def counters(all_of_them: dict[str, int]) -> dict[str, int]:
    return {name: all_of_them.get(name, 0) for name in COUNTED}


def print_head(directory: str, size_bytes: int, runs: int, seconds: float, names: list[str]) -> None:
    print(f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print(f"images of {size_bytes >> 20} MiB in {directory}, medians of {runs} runs of {seconds:g} s\n")
    print(f"{'':26}" + "".join(f"{name:>15}" for name in names) + f"{'ratio':>8}  (clustermd / {BASELINE})")


def print_row(pattern: Pattern, medians: dict[str, float]) -> None:
    ratio = medians["clustermd"] / medians[BASELINE]
    goal = GOALS.get(pattern.name)
    mark = "" if goal is None else f"  goal {goal:g}: {'reached' if ratio >= goal else 'missed'}"
    numbers = "".join(f"{value:>15,.0f}" for value in medians.values())
    print(f"{pattern.name:20} {pattern.unit:5}{numbers}{ratio:>8.2f}{mark}", flush=True)


def print_per_write(did: dict[str, int]) -> None:
    writes = did["data_writes"]
    if not writes:
        print("\nno steady writes were counted (one run only)")
        return
    per_write = {name: did[name] / writes for name in COUNTED[1:]}
    print(
        f"\nsteady random writes: {writes:,}; per write {per_write['bitmap_writes']:.5f} bitmap writes, "
        f"{per_write['messages_sent']:.5f} cluster messages"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", default="/dev/shm", help="where the images are")
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    benchmark(given.directory, given.size_mib << 20, given.runs, given.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
