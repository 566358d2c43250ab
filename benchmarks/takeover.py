"""How long a death is felt: `.venv/bin/python benchmarks/takeover.py`.

Three nodes run one mirror of two image files, an exerciser on each. One node after the other is killed with SIGKILL
at a random moment and comes back. What dies is drawn: the array process, or all of the node (its lockd too), or
a lockd alone, or the sequencer. Times are from the kill, by the survivors' traces:

- noticed: a survivor knows that the node is dead and that its last request has landed;
- taken over: the dead node's bits are a survivor's own, and gone from the dead one's slot;
- equal: all that the dead node may have left different is copied;
- stall: the longest time any client of a survivor waited for an answer during this.

A dead lockd or sequencer takes nobody's bits with it if all goes well: of these only the stall counts, that of the
clients of the node itself included. Nothing is held and nothing slowed down: this is the load's own speed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from contextlib import suppress
from typing import Any

from clustermd.testing.disks import all_clear, look
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.waiting import wait_until

NODES = 3
DISK_BYTES = 64 << 20
KINDS = ("array", "node", "lockd", "sequencer")
LOAD = ("--rate", "500", "--depth", "16", "--hot-blocks", "512")


class Times:
    """What was measured, in seconds, by kind of death and name."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = {}

    def add(self, kind: str, name: str, seconds: float) -> None:
        self._values.setdefault((kind, name), []).append(seconds)

    def show(self) -> None:
        print(f"{'what died':<11}{'':<12}{'kills':>6}{'median':>10}{'longest':>10}")
        for (kind, name), values in sorted(self._values.items(), key=lambda item: KINDS.index(item[0][0])):
            median, longest = statistics.median(values) * 1e3, max(values) * 1e3
            print(f"{kind:<11}{name:<12}{len(values):>6}{median:>7.0f} ms{longest:>7.0f} ms")


def points_after(node: Node, moment_s: float) -> list[dict[str, Any]]:
    """The trace of a node since a moment (boot time)."""
    points = []
    for line in node.files().trace.read_text().splitlines():
        with suppress(ValueError):  # the last line may be half written
            point = json.loads(line)
            if point["at_s"] >= moment_s:
                points.append(point)
    return points


def takeover_times(survivors: list[Node], slot: int, killed_s: float) -> dict[str, float] | None:
    """When what happened after the kill; None as long as it goes on."""
    points = [point for node in survivors for point in points_after(node, killed_s)]

    def times(name: str) -> list[float]:
        wanted = [p["at_s"] for p in points if p["point"] == name and p.get("slot", slot) == slot]
        return [moment_s - killed_s for moment_s in wanted]

    noticed, done, settled = times("cluster.lost"), times("takeover.done"), times("resync.settled")
    if len(done) < len(survivors) or not any(moment_s > max(done) for moment_s in settled):
        return None
    copied = [moment_s for moment_s in times("resync.copied") if moment_s > min(noticed)]
    found = {"noticed": min(noticed), "taken over": min(times("takeover.source_cleared"))}
    return found | ({"equal": max(copied)} if copied else {})


def one_kill(kind: str, victim: Node, nodes: list[Node], loads: dict[str, Load], times: Times) -> None:
    cluster = victim.cluster
    for load in loads.values():
        load.start(*LOAD)
    dice_records = random.randrange(100, 600)
    loads[victim.name].wait_for_records(loads[victim.name].records + dice_records)
    slot = victim.slot()
    chosen = cluster.processes(role="sequencer") if kind == "sequencer" else victim.processes()
    if kind in ("array", "lockd"):
        chosen = [process for process in chosen if process.role == kind]
    killed_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    cluster.kill(chosen)
    alive = [node for node in nodes if kind not in ("array", "node") or node is not victim]
    for node in alive:
        # requests that waited for the whole affair are answered before the load is asked to stop
        loads[node.name].wait_for_records(loads[node.name].records + 500)
    stalls = [0.0]
    for node in alive:
        report = loads[node.name].stop()
        assert report.errors == [], report.errors
        stalls.append(report.longest_stall_s())
    times.add(kind, "stall", max(stalls))
    if kind in ("array", "node"):
        found = wait_until(
            lambda: takeover_times(alive, slot, killed_s) or {}, "the takeover", 60, last_words=cluster.logs
        )
        for name, seconds in found.items():
            times.add(kind, name, seconds)
    if victim not in alive:
        loads[victim.name].report()
        victim.run("-A", "md0", *disks_of(cluster))


def disks_of(cluster: LocalCluster) -> list[str]:
    return [str(path) for path in sorted(cluster.directory.glob("disk*.img"))]


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a death of a node is felt by the others.")
    parser.add_argument("--kills", type=int, default=40, help="how many (default 40)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what dies")
    parser.add_argument("--directory", default="/tmp", help="where the images are made")
    given = parser.parse_args()
    times = Times()
    with LocalCluster({"CLUSTERMD_TRACE": "1"}, given.directory) as cluster:
        disks = cluster.images(2, DISK_BYTES)
        nodes = [cluster.node(f"node{number + 1}") for number in range(NODES)]
        options = ["-l1", "-n2", "-b", "clustered", "--nodes=4", "--delay=1", "--assume-clean"]
        nodes[0].run("-CR", "md0", *options, "--bitmap-chunk=64K", *disks)
        for node in nodes[1:]:
            node.run("-A", "md0", *disks)
        wait_until(lambda: all_clear(disks), "the bits of creation to be cleared", 30)
        share = look(disks[0]).size_bytes // 4096 // NODES
        loads = {
            node.name: Load(node, number + 1, number * share, (number + 1) * share)
            for number, node in enumerate(nodes)
        }
        for number in range(given.kills):
            one_kill(given.kinds[number % len(given.kinds)], random.choice(nodes), nodes, loads, times)
            wait_until(lambda: all_clear(disks), "every bit to be clear", 60, last_words=cluster.logs)
    print(
        f"Python {platform.python_version()}, Linux {platform.release()}, {' '.join(LOAD)} on each of {NODES}"
    )
    times.show()


if __name__ == "__main__":
    main()
