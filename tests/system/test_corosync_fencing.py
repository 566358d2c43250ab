"""The fencing policies on real corosync as an operator meets them: who acts, what fails, what helps, what is asked.

A machine is lost with a lock in its hands; the others get that lock when its end is sure, and not before.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing

import pytest
from corosync_arrays import NONE, PATIENCE_S, ArrayCluster, Machine
from corosync_words import come_back, machines, status, tell, told, wait_for_status
from lock_kit import Locks, Program, runs

from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

STARTUP_S = 3.0
WATCHDOG_S, BOUND_S = 1.5, 1.0
LOST = 75
DEVICE_BYTES = 9 << 20
STAMPS = "echo $$; while :; do echo {name} >> stamps; sleep 0.02; done"


def take_when_free(locks: Locks, machine: Machine, holder: str) -> Program:
    """The lock `r`, on its way to that machine, which waits for `holder`."""
    waiting = locks.start(machine.name, "lock", "r", "--", "sh", "-c", f"echo {machine.name} >> stamps")
    wait_until(
        lambda: f"{holder} lock r: sh" in waiting.err, "whom it waits for", PATIENCE_S, lambda: waiting.err
    )
    return waiting


def turns(cluster: ArrayCluster) -> list[str]:
    """Who stamped, one after the other."""
    found = (cluster.local.directory / "stamps").read_text().split()
    return [name for number, name in enumerate(found) if number == 0 or found[number - 1] != name]


def test_an_agent_that_fails_is_followed_by_another_node_s_and_in_the_end_by_an_operator() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(told())
        one, two, three = cluster.nodes
        locks = stack.enter_context(closing(Locks(cluster.local)))
        tell(cluster, node1="fail")
        locks.hold("node3", STAMPS.format(name="node3"))
        waiting = take_when_free(locks, one, "node3")
        cluster.machines.network.split([1, 2], [3])
        assert waiting.end() == 0, waiting.err
        assert turns(cluster) == ["node3", "node1"]
        assert cluster.fenced == ["off node3 at node1", "off node3 at node2"]
        cluster.machines.network.heal()
        come_back(cluster, three)

        tell(cluster, node1="fail", node2="fail")
        _, [pid] = locks.hold("node3", "echo $$; exec sleep 1000", name="s")
        late = locks.start("node1", "lock", "s", "--", "echo", "mine")
        wait_until(lambda: "node3 lock s: sh" in late.err, "whom it waits for", PATIENCE_S)
        cluster.machines.network.cut(3)
        wait_for_status(one, "failed at node1: ", "failed at node2: ", "the power switch does not answer")
        assert runs(pid) and late.popen.poll() is None
        wait_until(lambda: cluster.fenced.count("off node3 at node1") > 1, "another round", PATIENCE_S)
        unasked = one.node.run("cluster", "fence-ack", "node3", expect=1)
        assert "look, then say so with --yes" in unasked
        wrong = one.node.run("cluster", "fence-ack", "node2", "--yes", expect=1)
        assert "node2 is not waited for: fencing is waited for of node3" in wrong
        three.off()
        said = one.node.run("cluster", "fence-ack", "node3", "--yes")
        assert said == "node3: an operator on node1 vouches that it is off\n"
        assert late.end() == 0 and late.out == "mine\n"
        wait_until(
            lambda: "waits:" not in status(two), "the end of the wait", PATIENCE_S, lambda: status(two)
        )
        assert "nobody is" in one.node.run("cluster", "fence-ack", "node3", "--yes", expect=1)


def test_fence_test_asks_without_harm_and_fences_when_told() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(told())
        one, two, three = cluster.nodes
        text = one.node.run("cluster", "fence-test")
        assert text.startswith(f'fence = "agent" ({cluster.conf})\n')
        for machine in cluster.nodes:
            assert f"  {machine.name}: " in text
        assert text.count("succeeded: the node is on") == 3
        tell(cluster, node2="fail")
        failed = two.node.run("cluster", "fence-test", "node3", expect=1)
        assert "node3: FAILED: " in failed and "the power switch does not answer" in failed
        found = json.loads(one.node.run("cluster", "fence-test", "--json"))["fence_test"]
        assert [check["good"] for check in found["checks"]] == [True] * 4
        assert "says nothing of how node9 is fenced" in one.node.run(
            "cluster", "fence-test", "node9", expect=1
        )
        assert "node1 is this node" in one.node.run("cluster", "fence-test", "node1", "--yes", expect=1)
        cluster.wait_for_members(*cluster.nodes)
        assert not any(line.startswith("off") for line in cluster.fenced)
        since = len(two.log)
        assert "verified action=off for node3" in one.node.run("cluster", "fence-test", "node3", "--yes")
        assert "off node3 at node1" in cluster.fenced
        wait_until(lambda: not three.node.processes(), "the end of node3", PATIENCE_S)
        # whose loss the others find out now, and fence it in their own name
        cluster.wait_for_log(two, "fenced node3 (", since)
        tell(cluster)
        come_back(cluster, three)


def test_at_the_start_the_absent_get_time_to_come_then_they_are_fenced() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(told(f"startup_s = {STARTUP_S}", start=False))
        one, two, three = cluster.nodes
        cluster.machines.start(1, 2)
        began_s = time.monotonic()
        one.node.run("cluster", "start")
        two.node.run("cluster", "start")
        locks = stack.enter_context(closing(Locks(cluster.local)))
        first = locks.run("node2", "lock", "r", "--", "echo", "mine")
        assert first.out == "mine\n" and time.monotonic() - began_s > STARTUP_S
        assert cluster.fenced == ["off node3 at node1"]
        assert "node3 is lost" not in status(one, expect=0)
        tell(cluster)
        three.corosync.start()
        cluster.machines.wait()
        assert three.node.run("cluster", "start") == "node3 is in its cluster\n"
        cluster.wait_for_members(*cluster.nodes)
        assert cluster.fenced == []


def test_at_the_start_a_machine_that_is_there_is_waited_for_by_name_and_not_fenced() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(told(f"startup_s = {STARTUP_S}", start=False))
        one, two, three = cluster.nodes
        cluster.machines.start()
        one.node.run("cluster", "start")
        two.node.run("cluster", "start")
        locks = stack.enter_context(closing(Locks(cluster.local)))
        waiting = locks.start("node1", "lock", "r", "--", "echo", "mine")
        began_s = time.monotonic()
        wait_until(
            lambda: time.monotonic() - began_s > 2 * STARTUP_S, "the time to come to be over", PATIENCE_S
        )
        wait_for_status(
            one, "node3 is lost for", "no lockd of clustermd runs there: start it (clustermd cluster start)"
        )
        assert waiting.popen.poll() is None and cluster.fenced == []
        three.node.run("cluster", "start")
        assert waiting.end() == 0 and cluster.fenced == []


def test_a_machine_that_is_cut_off_ends_itself_when_the_fence_device_says_so() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(machines(NONE, start=False))
        one, two, three = cluster.nodes
        device = cluster.local.directory / "fence-device"
        with device.open("xb") as file:
            file.truncate(DEVICE_BYTES)
        assert "is a fence device now" in one.node.run("cluster", "fence-device", "--create", str(device))
        again = one.node.run("cluster", "fence-device", "--create", str(device), expect=1)
        assert str(device) in again
        cluster.conf.write_text(
            f'engine = "corosync"\nfence = "device"\nfence_device = "{device}"\nwatchdog_s = {WATCHDOG_S}\n'
            f"device_bound_s = {BOUND_S}\nunresponsive_s = 3.0\n"
        )
        cluster.start()
        cluster.wait_for_members(*cluster.nodes)
        assert "heartbeats of node1, node2, node3" in two.node.run("cluster", "fence-test")
        locks = stack.enter_context(closing(Locks(cluster.local)))
        first, _ = locks.hold("node3", STAMPS.format(name="node3"))
        waiting = take_when_free(locks, one, "node3")
        life = three.status()["incarnation"]
        cut_s = time.monotonic()
        cluster.machines.network.split([1, 2], [3])
        cluster.wait_for_log(three, "this node ends itself: node1 says so on")
        ended_s = time.monotonic() - cut_s
        assert waiting.popen.poll() is None
        assert waiting.end() == 0
        taken_s = time.monotonic() - cut_s
        print(
            f"fence device: node3 had ended itself after {ended_s:.1f} s, its lock went on after {taken_s:.1f} s"
        )
        assert taken_s > 2 * WATCHDOG_S + BOUND_S
        assert turns(cluster) == ["node3", "node1"]
        assert first.end() in (LOST, -9)
        cluster.machines.network.heal()
        cluster.wait_for_members(*cluster.nodes)
        assert three.status()["incarnation"] != life


def test_without_fencing_a_lost_machine_is_believed_to_be_dead_and_the_status_says_unsafe() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(machines(NONE))
        one, _, three = cluster.nodes
        assert "fencing   none; UNSAFE: nothing makes sure" in status(one, expect=0)
        assert "believed to be dead" in one.node.run("cluster", "fence-test")
        assert "nobody is ever switched off" in one.node.run(
            "cluster", "fence-test", "node3", "--yes", expect=1
        )
        locks = stack.enter_context(closing(Locks(cluster.local)))
        locks.hold("node3", STAMPS.format(name="node3"))
        waiting = take_when_free(locks, one, "node3")
        three.off()
        assert waiting.end() == 0 and turns(cluster) == ["node3", "node1"]
        cluster.wait_for_log(one, 'fence = "none", so node3 is believed to be dead')
        three.boot()
        cluster.wait_for_members(*cluster.nodes)
