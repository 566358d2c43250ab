"""How fast locks are, beside others' recipes for a cluster-wide lock: `make bench`.

One run measures, on three nodes or servers of this machine, acquire and release of an exclusive lock that nobody
else wants (a pair):

- `corosync`: clustermd's lock manager on corosync, knet with AES, one network namespace a node;
- `local`: clustermd's lock manager on the nodes of one machine;
- `etcd`: transaction and delete, servers on a disk (`--directory`);
- `redlock`: three Redis servers that keep nothing;
- `... kept`: the same, with locks that stay with the program until somebody wants them, which here nobody does: what
  one node uses again and again, and others seldom, costs that;
- as information: `corosync udpu` (no encryption), `redlock disk` (appendfsync always), and `corosync alone`: the three
  messages that a pair takes on corosync, without any lock manager (`locks_floor`).

All clients are asyncio in this one process (`locks_clusters`, `locks_etcd`, `locks_redis`). One worker gives
the time that a pair takes, 64 workers, each with a lock of its own, what the whole carries. Then one md-cluster
broadcast (token, message, ack, answers), whose three ends all are in this process, too.

Systems take turns within each round, so that a slow moment of the machine hits all of them. Rates are medians
of the rounds; p50 and p99 are over all pairs of all rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

MANY = 64
BROADCAST_GOAL_MS = 25.0
GOALS = (("corosync", "etcd", 3.0), ("local", "redlock", 1.0))
NEEDED = {
    "etcd": ("etcd", "etcd-server"),
    "redlock": ("redis-server", "redis-server"),
    "corosync": ("corosync", "corosync"),
}
"""Programs, and the Debian packages that have them."""


class System(Protocol):
    """What is measured."""

    async def open(self) -> None: ...

    async def pair(self, number: int) -> None:
        """Acquire and release lock `number`."""

    async def close(self) -> None: ...


@dataclass
class Measured:
    """Rates by round, and all times together."""

    rates: list[float] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def percentile_ms(self, percent: int) -> float:
        ordered = sorted(self.times_s)
        return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] * 1e3


async def measure(system: System, workers: int, seconds: float, into: Measured) -> None:
    """One turn: `workers` of them repeat pairs for `seconds`."""
    times_s: list[float] = []
    began_s = time.perf_counter()
    until_s = began_s + seconds

    async def work(number: int) -> None:
        while (start_s := time.perf_counter()) < until_s:
            await system.pair(number)
            times_s.append(time.perf_counter() - start_s)

    await asyncio.gather(*(work(number) for number in range(workers)))
    into.rates.append(len(times_s) / (time.perf_counter() - began_s))
    into.times_s += times_s


async def rounds(systems: dict[str, System], workers: int, count: int, seconds: float) -> dict[str, Measured]:
    """`count` rounds, after one that does not count."""
    measured = {name: Measured() for name in systems}
    for name in systems:
        await measure(systems[name], workers, seconds / 4, Measured())
    for _ in range(count):
        for name in systems:
            await measure(systems[name], workers, seconds, measured[name])
    return measured


def print_table(title: str, measured: dict[str, Measured]) -> None:
    print(f"\n{title:34}{'per second':>12}{'lowest':>10}{'highest':>10}{'p50 ms':>10}{'p99 ms':>10}")
    for name, one in measured.items():
        rate = statistics.median(one.rates)
        print(
            f"  {name:32}{rate:>12,.0f}{min(one.rates):>10,.0f}{max(one.rates):>10,.0f}"
            f"{one.percentile_ms(50):>10.2f}{one.percentile_ms(99):>10.2f}",
            flush=True,
        )


def print_ratios(measured: dict[str, Measured]) -> None:
    for ours, theirs, goal in GOALS:
        if ours in measured and theirs in measured:
            pairs = zip(measured[ours].rates, measured[theirs].rates, strict=True)
            ratio = statistics.median(mine / other for mine, other in pairs)
            print(f"  {ours} / {theirs}: {ratio:.2f}  goal {goal:g}: {_mark(ratio >= goal)}", flush=True)


def print_broadcasts(measured: dict[str, Measured]) -> None:
    if "corosync" in measured:
        median_ms = measured["corosync"].percentile_ms(50)
        goal = f"goal below {BROADCAST_GOAL_MS:g} ms: {_mark(median_ms < BROADCAST_GOAL_MS)}"
        print(f"  corosync: {median_ms:.2f} ms at the median  {goal}", flush=True)


def _mark(reached: bool) -> str:
    return "reached" if reached else "missed"


async def benchmark(wanted: list[str], directory: Path, count: int, seconds: float) -> None:
    # only what `why_not` has looked for
    from locks_clusters import Broadcasts, Kept, Locks, nodes_of
    from locks_redis import Redlock, redis_servers

    engines = {"corosync": "knet", "local": "local", "corosync udpu": "udpu"}
    with ExitStack() as servers:
        made: dict[str, System] = {}
        for name in wanted:
            if name in engines:
                nodes = servers.enter_context(nodes_of(engines[name]))
                made[name] = Locks(nodes)
                made[f"{name} kept"] = Kept(nodes)
                if name == "corosync" and nodes.corosync is not None:
                    from locks_floor import Floor

                    made["corosync alone"] = Floor(nodes.corosync)
            elif name == "etcd":
                from locks_etcd import Etcd, etcd_servers

                made[name] = Etcd(servers.enter_context(etcd_servers(directory)))
            else:
                durable = name == "redlock disk"
                made[name] = Redlock(servers.enter_context(redis_servers(directory, durable=durable)))
        async with AsyncExitStack() as clients:

            async def opened(system: System) -> None:
                await system.open()
                clients.push_async_callback(system.close)

            for system in made.values():
                await opened(system)
            for workers in (1, MANY):
                measured = await rounds(made, workers, count, seconds)
                print_table(f"pairs, {workers} at a time", measured)
                print_ratios(measured)
            channels: dict[str, System] = {
                name: Broadcasts(system) for name, system in made.items() if isinstance(system, Locks)
            }
            for channel in channels.values():
                await opened(channel)
            if channels:
                measured = await rounds(channels, 1, count, seconds)
                print_table("broadcasts to 3 nodes", measured)
                print_broadcasts(measured)


def runnable(wanted: list[str]) -> list[str]:
    """Those of `wanted` that can run here; says why of the others."""
    kept = []
    for name in wanted:
        reason = why_not(name.split()[0])
        if reason:
            print(f"{name} is left out: {reason}")
        else:
            kept.append(name)
    return kept


def why_not(kind: str) -> str | None:
    """Why "corosync", "etcd" ... cannot run here."""
    program, package = NEEDED.get(kind, ("", ""))
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if program and shutil.which(program, path=path) is None:
        return f"no {program} here: apt-get install {package}"
    if kind == "etcd" and importlib.util.find_spec("grpc") is None:
        return "no grpcio in this environment: pip install --group bench"
    if kind == "corosync":
        from locks_clusters import namespaces_refused

        return namespaces_refused()
    return None


def file_system(directory: Path) -> str:
    """The type of the file system that `directory` is on."""
    words = ["stat", "--file-system", "--format=%T", str(directory)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    systems = ["corosync", "etcd", "local", "redlock", "corosync udpu", "redlock disk"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", default="/var/tmp", help="where servers keep their data: on a disk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each system's turn in a round")
    parser.add_argument("--systems", default=",".join(systems))
    given = parser.parse_args()
    wanted = given.systems.split(",")
    if unknown := [name for name in wanted if name not in systems]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(systems)}")
    with tempfile.TemporaryDirectory(prefix="cmd-locks-", dir=given.directory) as made:
        directory = Path(made)
        load = os.getloadavg()[0]
        print(f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}")
        print(
            f"load average before: {load:.1f}; medians of {given.rounds} rounds, {given.seconds:g} s each turn"
        )
        print(f"servers on a disk keep their data on {file_system(directory)} in {given.directory}")
        asyncio.run(benchmark(runnable(wanted), directory, given.rounds, given.seconds))
        print(f"\nload average after: {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
