"""A cluster of three is cut in two under load, twenty times in a row, with leases: one side writes, never both.

Each block says who wrote it and for the how manieth time. When the majority has its right (the minority's lease is
waited out) what the halves hold of the minority's blocks is noted: from then on, until it has rejoined, no half may
hold anything else. All along every node records what it does, and `clustermd trace` judges that too.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from corosync_arrays import PATIENCE_S, ArrayCluster, Machine, array_cluster
from corosync_kit import Options

from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, parse
from clustermd.testing.disks import look
from clustermd.testing.waiting import wait_until
from clustermd.testing.write_log import Kind, read_log

pytestmark = pytest.mark.system

TIMES = 20
TOKEN_MS = 400
LEASE_S, DRIFT, BOUND_S = 1.2, 0.01, 0.5
CONF = f'fence = "lease"\nlease_s = {LEASE_S}\ndrift = {DRIFT}\ndevice_bound_s = {BOUND_S}\n'
LOAD = ("--rate", "150", "--depth", "8", "--hot-blocks", "256")


def test_one_side_of_a_partition_writes_and_never_both() -> None:
    with array_cluster(3, CONF, Options(token_ms=TOKEN_MS), {"CLUSTERMD_TRACE": "md0"}) as cluster:
        cluster.put_load(options=LOAD)
        stops, rights, rejoins = [], [], []
        for number in range(TIMES):
            minority = cluster[number % 3 + 1]
            stopped_s, right_s, rejoined_s = cut_in_two(cluster, minority, by_switch=number % 2 == 1)
            stops.append(stopped_s)
            rights.append(right_s)
            rejoins.append(rejoined_s)
        for machine in cluster.nodes:
            machine.load.stop()
        cluster.settle(*cluster.nodes)
        traces = [str(machine.node.files().trace) for machine in cluster.nodes]
        verdict = cluster[1].node.run("trace", *traces, timeout_s=4 * PATIENCE_S)
        print(verdict.splitlines()[-1])
    print(
        f"{TIMES} partitions: the minority's last write was acknowledged at most {max(stops):.2f} s after the cut"
        f" (lease {LEASE_S:g} s); the majority had its right after {min(rights):.2f} to {max(rights):.2f} s"
        f" (2.2 x token {2.2 * TOKEN_MS / 1000:.2f} s + lease {LEASE_S * (1 + DRIFT):.2f} s + {BOUND_S:g} s);"
        f" healed nodes wrote again after {min(rejoins):.2f} to {max(rejoins):.2f} s"
    )


def cut_in_two(cluster: ArrayCluster, minority: Machine, by_switch: bool) -> tuple[float, float, float]:
    """One partition. Seconds: from cut to the minority's last write, to the majority's right; from heal to rejoin."""
    majority = cluster.others(minority)
    life, slot = minority.status()["incarnation"], minority.node.slot()
    marks = {machine.name: len(machine.log) for machine in majority}
    cluster.wait_for_writes(*cluster.nodes)

    cut_ns, cut_s = time.monotonic_ns(), time.time()
    if by_switch:
        cluster.machines.network.split([machine.number for machine in majority], [minority.number])
    else:
        cluster.machines.network.cut(minority.number)
    right_s = max(
        cluster.wait_for_log(machine, f"fenced {minority.name} (", marks[machine.name])
        for machine in majority
    )
    held = generations(cluster, minority)
    cluster.wait_for_takeover(slot)
    cluster.wait_for_writes(*majority)
    now = generations(cluster, minority)
    changed = [block for block, found in now.items() if not found <= held[block]]
    assert not changed, f"{minority.name} wrote {changed} after the majority had its right\n{cluster.logs()}"
    last_ns = max(
        (record.time_ns for record in read_log(minority.load.log) if record.kind is Kind.ACKNOWLEDGED),
        default=cut_ns,
    )
    stopped_s = (last_ns - cut_ns) / 1e9
    assert stopped_s < LEASE_S + BOUND_S, f"{minority.name} wrote {stopped_s:.2f} s after the cut"

    heal_s = time.time()
    cluster.machines.network.heal()
    cluster.wait_for_members(*cluster.nodes)
    assert minority.status()["incarnation"] != life
    cluster.wait_for_writes(*cluster.nodes)
    wait_until(lambda: all(machine.load.running for machine in cluster.nodes), "all loads", 0)
    return stopped_s, right_s - cut_s, time.time() - heal_s


def generations(cluster: ArrayCluster, machine: Machine) -> dict[int, set[int]]:
    """Of each block of that machine, the generations that the halves hold. A torn block counts as -1."""
    first, end = machine.load.blocks
    found: dict[int, set[int]] = {block: set() for block in range(first, end)}
    for disk in cluster.disks:
        start = look(disk).data_offset_bytes + first * BLOCK_BYTES
        with Path(disk).open("rb") as image:
            image.seek(start)
            for block in found:
                data = image.read(BLOCK_BYTES)
                identity = parse(data)
                found[block].add(identity.generation if identity is not None else 0 if data == ZEROES else -1)
    return found
