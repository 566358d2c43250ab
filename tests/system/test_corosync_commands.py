"""`clustermd cluster start`, `status` and `stop` on real corosync: a cluster's states as a person sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from corosync_arrays import PATIENCE_S, ArrayCluster
from corosync_words import UNRESPONSIVE_S, come_back, hold_lockd, status, tell, told, wait_for_status
from lock_kit import Locks

from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

GUIDE = Path(__file__).parents[2] / "docs" / "cluster.md"
HEALTHY = """\
cluster mirror: node2 (node 2) may act

  ring      9.9: node1, node2, node3
  quorum    yes, 9 of 9 votes, a majority is 9
  view      9.9.9
  members   node1, node2, node3
  phase     live
  fencing   agent
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[ArrayCluster]:
    """Three machines; each test leaves all of them in their cluster."""
    with told(start=False, name="mirror") as cluster:
        yield cluster


def counts(text: str) -> str:
    """A status with numbers that a test need not know as 9."""
    text = re.sub(
        r"(?m)^(  (?:ring|view) +)[\d.]+",
        lambda line: line[1] + re.sub(r"\d+", "9", line[0][len(line[1]) :]),
        text,
    )
    return re.sub(r"\d+ of \d+ votes, a majority is \d+", "9 of 9 votes, a majority is 9", text)


def test_a_cluster_that_starts_says_whom_it_waits_for(cluster: ArrayCluster) -> None:
    one, two, three = cluster.nodes
    assert "corosync is not running on this node: systemctl start corosync" in one.node.run(
        "cluster", "start", expect=1
    )
    assert "start it with clustermd cluster start" in status(one, expect=1)
    one.corosync.start()
    cluster.machines.wait(1, members=[1], quorate=False)
    text = one.node.run("cluster", "start")
    assert (
        text.startswith("started; node1 is not in its cluster yet")
        and "quorum: node2, node3 must come" in text
    )
    status(one, expect=1)
    for machine in (two, three):
        machine.corosync.start()
    cluster.machines.wait()
    wait_for_status(
        one, "node2 is lost for", "no lockd of clustermd runs there: start it (clustermd cluster start)"
    )
    assert "node2 is lost" not in two.node.run("cluster", "start")
    wait_for_status(two, "node3 is lost for", "the lock manager: the end of node 3 is not proved")
    assert three.node.run("cluster", "start") == "node3 is in its cluster\n"
    cluster.wait_for_members(*cluster.nodes)
    assert counts(status(two, expect=0)) == HEALTHY
    state = json.loads(two.node.run("cluster", "status", "--json"))
    assert state["schema"] == 1 and state["cluster"]["group"]["cluster"] == "mirror"
    assert two.node.run("cluster", "start") == "node2 is in its cluster\n"
    assert cluster.fenced == [], "nobody whose corosync runs is fenced for a lockd that does not"


def test_the_guide_shows_what_is_printed(cluster: ArrayCluster) -> None:
    sample = GUIDE.read_text().split("$ clustermd cluster status\n")[1].split("\n\n*ring*")[0]
    one = cluster[1]
    tell(cluster, node2="stay", node3="stay")
    life, since = one.status()["incarnation"], len(cluster[2].log)
    cluster.machines.network.split([2, 3], [1])
    wanted = counts("".join(line[4:] + "\n" for line in sample.splitlines()))
    wait_until(lambda: counts(status(one)) == wanted, wanted, PATIENCE_S, lambda: status(one))
    status(one, expect=1)
    cluster.wait_for_log(cluster[2], "fenced node1 (", since)
    cluster.machines.network.heal()
    cluster.wait_for_members(*cluster.nodes)
    assert one.status()["incarnation"] != life, "it came back by itself, with a new life"


def test_a_lockd_that_is_missing_is_named_and_its_successor_ends_the_wait(cluster: ArrayCluster) -> None:
    one, _, three = cluster.nodes
    tell(cluster)
    three.kill_lockd()
    text = wait_for_status(one, "node3 is lost for", "start it (clustermd cluster start)", "zombies   node3")
    assert "node1 (node 1) may act" in text
    assert three.node.run("cluster", "start") == "node3 is in its cluster\n"
    wait_until(
        lambda: "waits:" not in status(one), "nobody to be waited for", PATIENCE_S, lambda: status(one)
    )
    status(one, expect=0)
    assert cluster.fenced == []


def test_it_is_not_stopped_under_those_who_use_it(cluster: ArrayCluster) -> None:
    one, two, three = cluster.nodes
    locks = Locks(cluster.local)
    first, _ = locks.hold("node3", "echo $$; exec sleep 1000")
    refused = three.node.run("cluster", "stop", expect=1)
    assert f"lock r: sh (pid {first.pid})" in refused and "--force" in refused
    assert first.popen.poll() is None
    three.node.run("-CR", "md0", "-l1", "-n2", "-b", "clustered", "--assume-clean", *cluster.disks)
    assert "array md0" in three.node.run("cluster", "stop", expect=1)
    three.node.run("-S", "md0")
    assert three.node.run("cluster", "stop", "--force") == "node3 has left its cluster\n"
    assert first.end() == 75
    cluster.wait_for_members(one, two)
    assert status(one, expect=0).count("node3") == 1, "corosync's ring has it, nobody waits for it"
    assert "no lockd runs for node3" in three.node.run("cluster", "stop", expect=1)
    assert three.node.run("cluster", "start") == "node3 is in its cluster\n"
    cluster.wait_for_members(*cluster.nodes)
    assert cluster.fenced == []


def test_a_lockd_that_stands_still_is_named_then_it_has_to_leave(cluster: ArrayCluster) -> None:
    """Once as one that does not answer messages, once as one whose hello is awaited."""
    one, two, three = cluster.nodes
    locks = Locks(cluster.local)
    hold_lockd(three)
    assert locks.run("node1", "lock", "r", "--", "true").popen.returncode == 0
    wait_for_status(one, "node3 does not answer for")
    cluster.wait_for_log(one, "node 3 does not do its part for 3 s: its corosync is ended")
    wait_until(lambda: cluster.fenced, "node3 to be fenced", PATIENCE_S, cluster.logs)
    come_back(cluster, three)

    tell(cluster)
    hold_lockd(three)
    two.stop_lockd()
    wait_for_status(one, "the group stands still", "node3 has not said hello in the new membership")
    wait_until(lambda: cluster.fenced, "node3 to be fenced", UNRESPONSIVE_S + PATIENCE_S, cluster.logs)
    two.node.run("cluster", "start")
    come_back(cluster, three)


def test_who_is_lost_is_named_with_who_fences_it_and_what_failed(cluster: ArrayCluster) -> None:
    one, two, three = cluster.nodes
    tell(cluster, node1="hang", node2="fail")
    since = len(one.log)
    three.off()
    wait_for_status(two, "node3 is lost for", "node1 fences it")
    text = wait_for_status(
        one,
        "failed at node1: ",
        "did not fence node3: it did not end within 2 s and was killed",
        "failed at node2: ",
        "it ended with status 1; its last words: the power switch does not answer",
    )
    assert "zombies   node3: lost" in text
    tell(cluster, node1="fail", node2="stay")
    cluster.wait_for_log(one, "fenced node3 (", since)
    wait_until(lambda: "waits:" not in status(one), "the end of the wait", PATIENCE_S, cluster.logs)
    assert "off node3 at node2" in cluster.fenced
    tell(cluster)
    three.boot()
    cluster.wait_for_members(*cluster.nodes)
