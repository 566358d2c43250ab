"""Bad links and machines that stand still, with leases: whoever is out of touch stops, and comes back by itself.

What `ArrayCluster.lose` and `regain` check holds in each of these: no write of the lost node lands once the others have
their right, and it joins again in a new life without anybody's help.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from corosync_arrays import DETECTION_S, LEASE, LEASE_FENCE_S, PATIENCE_S, ArrayCluster, array_cluster

from clustermd.testing.load import fio_command
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

LOAD = ("--rate", "300", "--depth", "8", "--hot-blocks", "512")
MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[ArrayCluster]:
    """Three machines with an array on each, for all tests of this file; the traces of all are judged at the end."""
    with array_cluster(3, LEASE, environment={"CLUSTERMD_TRACE": "md0"}) as cluster:
        yield cluster
        traces = [str(machine.node.files().trace) for machine in cluster.nodes]
        print(cluster[1].node.run("trace", *traces, timeout_s=4 * PATIENCE_S).splitlines()[-1])


@pytest.fixture(autouse=True)
def story(cluster: ArrayCluster) -> Iterator[None]:
    cluster.put_load(options=LOAD)
    yield
    for machine in cluster.nodes:
        machine.load.stop()
    cluster.settle(*cluster.nodes)


def tell(what: str, right_s: float, rejoined_s: float) -> None:
    bound_s = DETECTION_S + LEASE_FENCE_S
    print(
        f"{what}: the others had their right after {right_s:.2f} s (2.2 x token + lease + bound: {bound_s:.2f} s);"
        f" it wrote again {rejoined_s:.2f} s after the end of that"
    )


@pytest.mark.parametrize("way", ["to", "from"])
def test_a_node_that_hears_nothing_or_is_not_heard_is_given_up(cluster: ArrayCluster, way: str) -> None:
    network, lost = cluster.machines.network, cluster[3]
    impair = network.impair_to if way == "to" else network.impair_from
    loss = cluster.lose(lost, lambda: impair(lost.number, loss=1.0))
    assert loss.wrote_s < LEASE_FENCE_S
    tell(f"nothing came {way} node3", loss.right_s, cluster.regain(lost, loss, network.heal))


def test_loss_and_delay_on_one_way_cost_time_and_nothing_else(cluster: ArrayCluster) -> None:
    network = cluster.machines.network
    network.impair_from(2, loss=0.05, delay_ms=20, jitter_ms=10)
    for _ in range(20):
        cluster.wait_for_writes(*cluster.nodes)
    views = [machine.log.count("view (") for machine in cluster.nodes]
    network.heal()
    cluster.wait_for_members(*cluster.nodes)
    cluster.wait_for_writes(*cluster.nodes)
    print(f"5 % loss and 20 ms from node2: views of the nodes so far {views}")


def test_a_corosync_that_stands_still_costs_its_node_its_lease(cluster: ArrayCluster) -> None:
    lost = cluster[1]
    loss = cluster.lose(lost, lost.corosync.pause)
    assert loss.wrote_s < LEASE_FENCE_S
    tell("corosync of node1 stood still", loss.right_s, cluster.regain(lost, loss, lost.corosync.resume))


def test_a_machine_that_stands_still_past_its_lease_wakes_up_without_rights(cluster: ArrayCluster) -> None:
    lost = cluster[2]
    loss = cluster.lose(lost, lost.corosync.pause_machine)
    tell("node2 stood still", loss.right_s, cluster.regain(lost, loss, lost.corosync.resume_machine))


def test_arrays_stop_with_one_clear_message_when_corosync_is_killed(cluster: ArrayCluster) -> None:
    lost = cluster[3]
    said = len(lost.array_log)
    loss = cluster.lose(lost, lost.corosync.kill)
    assert loss.wrote_s < DETECTION_S
    lines = lost.array_log[said:].splitlines()
    assert "systemctl start corosync" in lines[0] and len(lines) <= 3, lines
    print(lines[0])

    def heal() -> None:
        lost.corosync.start()
        cluster.machines.wait()

    tell("corosync of node3 was killed", loss.right_s, cluster.regain(lost, loss, heal))


def test_fio_verifies_what_it_wrote_while_a_node_is_lost_and_comes_back(cluster: ArrayCluster) -> None:
    network, lost = cluster.machines.network, cluster[3]
    verify = ("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--time_based=0", "--rate_iops=200")
    jobs: list[subprocess.Popen[bytes]] = []

    def cut() -> None:
        for machine in cluster.nodes[:2]:
            uri, at = f"nbd+unix:///?socket={machine.node.socket()}", (24 + 8 * machine.number) * MIB
            command = fio_command(uri, 40, 8 * MIB, at, machine.name, verify)
            jobs.append(cluster.local.start(command, log=f"fio{machine.number}.log"))
        network.cut(lost.number)

    loss = cluster.lose(lost, cut)
    assert any(job.poll() is None for job in jobs), "fio was to write meanwhile"
    cluster.regain(lost, loss, network.heal)
    wait_until(lambda: all(job.poll() is not None for job in jobs), "fio to end", 60, cluster.logs)
    assert [job.returncode for job in jobs] == [0, 0], cluster.logs()
