"""Who does not belong to a cluster, or not so: each is told why in one line, and nobody else is harmed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corosync_arrays import NONE, PATIENCE_S, ArrayCluster, Machine
from corosync_words import UNRESPONSIVE_S, machines, status, wait_for_status
from lock_kit import Locks

from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

CONF = f"{NONE}unresponsive_s = {UNRESPONSIVE_S}\n"
_STRANGER = Path(__file__).with_name("group_stranger.py")
_OTHER_PROTOCOL = (
    "import clustermd.group.agreed.hello as hello; hello.PROTOCOL += 1;"
    "from clustermd.lockd.daemon import main; main()"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ArrayCluster]:
    with machines(CONF) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def unharmed(cluster: ArrayCluster) -> Iterator[None]:
    """The lockds of before are the members afterwards, and give locks."""
    lives = [cluster[number].status()["incarnation"] for number in (1, 2)]
    yield
    if not cluster.local.processes("node3", "lockd"):
        cluster[3].node.run("cluster", "start")
    cluster.wait_for_members(*cluster.nodes)
    assert [cluster[number].status()["incarnation"] for number in (1, 2)] == lives
    assert Locks(cluster.local).run("node1", "lock", "r", "--", "echo", "mine").out == "mine\n"


def start_elsewhere(cluster: ArrayCluster, machine: Machine, **environment: str) -> str:
    """What `cluster start` says on that machine with this in its environment. It must fail."""
    before = dict(cluster.local.environment)
    cluster.local.environment |= environment
    try:
        return machine.node.run("cluster", "start", expect=1)
    finally:
        cluster.local.environment = before


def test_a_node_with_another_configuration_is_refused_in_one_line(cluster: ArrayCluster) -> None:
    three = cluster[3]
    three.stop_lockd()
    other = cluster.local.directory / "other.conf"
    other.write_text('engine = "corosync"\nfence = "lease"\n')
    text = start_elsewhere(cluster, three, CLUSTERMD_CONF=str(other))
    assert text.startswith("clustermd: node3 cannot take part in its cluster: its configuration (")
    assert "fence lease" in text and "fence none" in text and text.endswith("make them alike\n")
    assert text.count("\n") == 1
    assert not cluster.local.processes("node3", "lockd")


def test_a_node_with_another_protocol_is_refused_and_its_lockd_ends(cluster: ArrayCluster) -> None:
    three = cluster[3]
    three.stop_lockd()
    since = len(three.log)
    log = three.node.rundir.node_dir / "lockd.log"
    newer = cluster.local.start(
        three.words([sys.executable, "-P", "-c", _OTHER_PROTOCOL]), three.node.environment, log=str(log)
    )
    assert newer.wait(PATIENCE_S) == 71
    assert "lock daemons of protocol" in three.log[since:] and "make them alike" in three.log[since:]


def test_a_second_lockd_of_a_node_is_refused_and_the_first_stays(cluster: ArrayCluster) -> None:
    three = cluster[3]
    life = three.status()["incarnation"]
    elsewhere = cluster.local.directory / "elsewhere"
    command = [str(Path(sys.executable).with_name("clustermd")), "cluster", "start"]
    log = "second.log"
    second = cluster.local.start(
        three.words(command), {**three.node.environment, "CLUSTERMD_RUN": str(elsewhere)}, log=log
    )
    assert second.wait(PATIENCE_S) == 1
    text = (cluster.local.directory / log).read_text()
    assert "node3 cannot take part in its cluster: another lock daemon of node3 takes part already" in text
    assert text.count("\n") == 1
    assert three.status()["incarnation"] == life


@pytest.mark.parametrize("kind", ["garbage", "forged"])
def test_a_stranger_in_the_group_changes_nothing_is_named_and_left_out(
    cluster: ArrayCluster, kind: str
) -> None:
    """It is on a member's node: nobody is evicted for it, and a change of membership waits for it a while only."""
    one, two, _ = cluster.nodes
    began_s = time.monotonic()
    stranger = cluster.local.start(
        two.words([sys.executable, str(_STRANGER), kind, "300"]), two.node.environment, log=f"{kind}.log"
    )
    text = wait_for_status(one, f"node2 (process {stranger.pid}) has not said hello in the new membership")
    assert "the group stands still" in text
    left_out = f"strangers process {stranger.pid} on node2"
    wait_until(lambda: left_out in status(one), "it to be left out", PATIENCE_S, lambda: status(one))
    print(f"{kind}: the group went on after {time.monotonic() - began_s:.1f} s")
    cluster.wait_for_members(*cluster.nodes)
    said = cluster.local.directory / f"{kind}.log"
    wait_until(lambda: "said" in said.read_text(), "all its noise", PATIENCE_S, said.read_text)
    assert Locks(cluster.local).run("node3", "lock", "r", "--", "echo", "mine").out == "mine\n"
    status(one, expect=0)
    assert cluster[2].corosync.running
    stranger.kill()
    stranger.wait()
    wait_until(lambda: "strangers" not in status(one), "it to be forgotten", PATIENCE_S, lambda: status(one))


def test_a_stranger_where_no_lockd_runs_keeps_nobody_waiting_for_ever(cluster: ArrayCluster) -> None:
    one, _, three = cluster.nodes
    three.node.run("cluster", "stop")
    stranger = cluster.local.start(
        three.words([sys.executable, str(_STRANGER), "none", "0"]), three.node.environment, log="none.log"
    )
    wait_for_status(one, "node3 has not said hello in the new membership")
    wait_until(
        lambda: f"strangers process {stranger.pid} on node3" in status(one), "it to be left out", PATIENCE_S
    )
    assert three.corosync.running
    assert three.node.run("cluster", "start").startswith(("started; node3", "node3 is in"))
    cluster.wait_for_members(*cluster.nodes)
    stranger.kill()
    stranger.wait()
