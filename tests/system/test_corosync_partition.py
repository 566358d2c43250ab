"""A cluster of three is cut in two under load, twenty times in a row, with leases: one side writes, never both.

Each block says who wrote it and for the how manieth time, so a write after the majority got its right shows
(`ArrayCluster.lose`). All along every node records what it does, and `clustermd trace` judges that too.
"""

from __future__ import annotations

from functools import partial

import pytest
from corosync_arrays import PATIENCE_S, array_cluster
from corosync_kit import Options

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
            if number % 2:
                sides = [machine.number for machine in cluster.others(minority)], [minority.number]
                cut = partial(cluster.machines.network.split, *sides)
            else:
                cut = partial(cluster.machines.network.cut, minority.number)
            loss = cluster.lose(minority, cut)
            assert loss.wrote_s < LEASE_S + BOUND_S, (
                f"{minority.name} wrote {loss.wrote_s:.2f} s after the cut"
            )
            stops.append(loss.wrote_s)
            rights.append(loss.right_s)
            rejoins.append(cluster.regain(minority, loss, cluster.machines.network.heal))
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
