"""What cannot work on corosync is refused in one clear line with its remedy, and no disk is touched."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cluster_kit import CREATE
from corosync_arrays import NONE, ArrayCluster, Machine, array_cluster

pytestmark = pytest.mark.system

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def refusal(cluster: ArrayCluster, machine: Machine, *arguments: str, prefix: Sequence[str] = ()) -> str:
    """The one line of a command that is refused on that machine. It must have changed no disk."""
    before = digests(cluster)
    command = [*prefix, str(Path(sys.executable).with_name("clustermd")), *arguments, *cluster.disks]
    other = {"CLUSTERMD_RUN": str(cluster.local.directory / "other")} if prefix else {}
    done = subprocess.run(
        machine.words(command),
        env=os.environ | machine.node.environment | other,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert digests(cluster) == before, "a refused command wrote"
    print(line)
    return line


def digests(cluster: ArrayCluster) -> list[str]:
    return [hashlib.sha256(Path(disk).read_bytes()).hexdigest() for disk in cluster.disks]


def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written() -> None:
    with array_cluster(2, NONE, start=False) as cluster:
        one = cluster[1]
        create = ("-CR", "md0", *CREATE)

        assert "systemctl start corosync" in refusal(cluster, one, *create)

        cluster.conf.write_text('engine = "corosync"\n')
        assert "write fence = with one of" in refusal(cluster, one, *create)

        cluster.conf.write_text('engine = "corosync"\nfence = "lease"\n')
        cluster.machines.start()
        assert "add a third node" in refusal(cluster, one, *create)

        cluster.conf.write_text('engine = "corosync"\n' + NONE)
        for path in (cluster.local.directory, *cluster.disks):
            os.chmod(path, 0o777)
        line = refusal(cluster, one, *create, prefix=NOBODY)
        assert "no access to corosync's sockets" in line and "uidgid" in line

        cluster.start_lockds()
        cluster.make_array()
        for machine in cluster.nodes:
            machine.node.run("-S", "md0")
        for machine in cluster.nodes:
            machine.stop_lockd()
            machine.corosync.stop()

        for machine in cluster.nodes:
            text = machine.corosync.conf.read_text()
            machine.corosync.conf.write_text(text.replace("cluster_name: bench", "cluster_name: other"))
        cluster.start()
        cluster.wait_for_members(*cluster.nodes)
        line = refusal(cluster, one, "-A", "md0")
        assert "belongs to the cluster 'bench', but this node to 'other'" in line and "--home-cluster" in line
        one.node.run("-A", "md0", "--home-cluster=bench", *cluster.disks)
