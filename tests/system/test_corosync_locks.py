"""`clustermd lock` and `clustermd locks` on three machines: exclusive among them, also when one is cut off."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corosync_arrays import PATIENCE_S, ArrayCluster
from corosync_words import machines, status
from lock_kit import Locks, runs

from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

LEASE_S, BOUND_S = 2.0, 3.0
CONF = f'fence = "lease"\nlease_s = {LEASE_S}\ndevice_bound_s = {BOUND_S}\nunresponsive_s = 5.0\n'
LOST = 75
KILLS = 10
# says who it is, then stamps a shared file with its name for as long as it lives; SIGTERM does not impress it
STAMPS = 'trap "" TERM; echo $$; while :; do echo {name} >> stamps; sleep 0.02; done'
_TRAFFIC = Path(__file__).with_name("lock_traffic.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[ArrayCluster]:
    """Three machines; each test leaves all of them in their cluster, and no lock held."""
    with machines(CONF) as cluster:
        yield cluster


@pytest.fixture
def locks(cluster: ArrayCluster) -> Iterator[Locks]:
    locks = Locks(cluster.local)
    yield locks
    locks.close()
    cluster.machines.network.heal()
    (cluster.local.directory / "stamps").unlink(missing_ok=True)
    cluster.wait_for_members(*cluster.nodes)


def stamps(locks: Locks) -> list[str]:
    path = locks.cluster.directory / "stamps"
    return path.read_text().split() if path.exists() else []


def check_turns(locks: Locks, *names: str) -> None:
    """The stamps are those of `names` one after the other, and never again of a former one."""
    found = stamps(locks)
    turns = [name for number, name in enumerate(found) if number == 0 or found[number - 1] != name]
    assert tuple(turns) == names, turns


def test_a_lockd_runs_before_ordinary_processes(cluster: ArrayCluster) -> None:
    """A busy host must not make its node late: corosync would count it as a machine that hangs."""
    for machine in cluster.nodes:
        [lockd] = cluster.local.processes(node=machine.name, role="lockd")
        assert os.sched_getscheduler(lockd.pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR


def test_one_machine_at_a_time_and_all_know_whose_turn_it_is(cluster: ArrayCluster, locks: Locks) -> None:
    first, [pid] = locks.hold("node1", "echo $$; exec sleep 1000", name="backup")
    refused = locks.run("node3", "lock", "backup", "--nonblock", "--", "true")
    assert refused.popen.returncode == 1
    holder = f"node1 lock backup: sh (pid {first.pid}) in EX for "
    assert f"backup was not granted in EX: it is held by {holder}" in refused.err
    second = locks.start("node2", "lock", "backup", "--", "sh", "-c", "hostname")
    wait_until(lambda: second.err, "what node2 waits for", PATIENCE_S)
    assert second.err.startswith(f"clustermd: waiting for backup in EX: {holder}")
    shared = locks.run("node3", "lock", "other", "--mode", "PR", "--", "hostname")
    assert shared.out == "node3\n"

    waits = f"clustermd-lock backup: node2 lock backup: sh (pid {second.pid}) wants EX, waits"
    for machine in cluster.nodes:
        text = machine.node.run("locks")
        assert waits in text and f"EX node1 lock backup: sh (pid {first.pid}) for " in text
        assert machine.node.run("locks", "--check", "--over", "0.1", expect=1).startswith(waits)
        assert machine.node.run("locks", "--check", "--over", "1000") == ""
    (wait,) = json.loads(cluster[3].node.run("locks", "--json"))["waits"]
    assert [wait["lock"]["name"], wait["blockers"][0]["name"]] == ["node2", "node1"]
    debug = cluster[3].node.run("locks", "--dlm-format", "--lockspace", "clustermd-lock")
    assert '"backup"' in debug and "Remote:" in debug

    os.kill(pid, signal.SIGTERM)
    assert (first.end(), second.end()) == (128 + signal.SIGTERM, 0)
    assert second.out == "node2\n"


def test_a_command_whose_machine_is_cut_off_is_gone_before_another_gets_the_lock(
    cluster: ArrayCluster, locks: Locks
) -> None:
    first, [pid] = locks.hold("node3", STAMPS.format(name="node3"))
    second = locks.start("node1", "lock", "r", "--", "sh", "-c", "echo node1 >> stamps")
    wait_until(lambda: "node3 lock r: sh" in second.err, "node1 to wait", PATIENCE_S)
    cut_s = time.monotonic()
    cluster.machines.network.split([1, 2], [3])
    text = ""
    while not text:
        text = status(cluster[1]) if "node3 is lost" in status(cluster[1]) else ""
    assert "node1 fences it" in text and "UNSAFE" in text
    assert first.end() == LOST
    ended_s = time.monotonic() - cut_s
    assert second.popen.poll() is None and not runs(pid)
    assert "is lost: " in first.err and "SIGTERM" in first.err
    assert second.end() == 0
    taken_s = time.monotonic() - cut_s
    print(f"cut off: the command had ended after {ended_s:.1f} s, another got the lock after {taken_s:.1f} s")
    check_turns(locks, "node3", "node1")
    state = status(cluster[3], expect=1)
    assert "the group stands still: " in state and "quorum: node1, node2 must come" in state
    waiting = locks.run("node3", "lock", "r", "--timeout", "2", "--", "true")
    assert waiting.popen.returncode == 1 and "quorum" in waiting.err, waiting.err
    cluster.machines.network.heal()
    cluster.machines.wait()
    again = locks.run("node3", "lock", "r", "--", "sh", "-c", "echo node3 >> stamps")
    assert again.popen.returncode == 0, again.err


def test_a_lockd_that_dies_takes_the_command_along_before_another_gets_the_lock(
    cluster: ArrayCluster, locks: Locks
) -> None:
    first, [pid] = locks.hold("node2", STAMPS.format(name="node2"))
    second = locks.start("node1", "lock", "r", "--", "sh", "-c", "echo node1 >> stamps")
    wait_until(lambda: "node2 lock r: sh" in second.err, "node1 to wait", PATIENCE_S)
    cluster[2].kill_lockd()
    assert first.end() == LOST
    assert not runs(pid)
    wait_until(
        lambda: "node2" in second.err.splitlines()[-1] or second.popen.poll() is not None, "whom it waits for"
    )
    assert cluster[2].node.run("cluster", "start") == "node2 is in its cluster\n"
    assert second.end() == 0, second.err
    check_turns(locks, "node2", "node1")


def test_a_lockd_that_dies_again_and_again_loses_no_count_and_fences_nobody(
    cluster: ArrayCluster, locks: Locks
) -> None:
    counter, stop = (cluster.local.directory / name for name in ("counter", "stop"))
    counter.write_text("0\n")
    programs = {}
    for machine in cluster.nodes:
        words = machine.words([sys.executable, str(_TRAFFIC), str(counter), str(stop)])
        programs[machine.name] = cluster.local.start(
            words, machine.node.environment, log=f"traffic.{machine.name}"
        )
    marks = {machine.name: len(machine.log) for machine in cluster.nodes}
    victim = cluster[3]
    for _ in range(KILLS):
        before = int(counter.read_text() or 0)
        victim.kill_lockd()
        cluster.wait_for_members(*cluster.nodes)
        wait_until(lambda: int(counter.read_text() or 0) > before + 5, "counts", PATIENCE_S, cluster.logs)  # noqa: B023
    stop.touch()
    counted = lost = 0
    for name, program in programs.items():
        assert program.wait(PATIENCE_S) == 0, cluster.logs()
        words = (cluster.local.directory / f"traffic.{name}").read_text().splitlines()[-1].split()
        counted, lost = counted + int(words[0]), lost + int(words[1])
    print(f"{KILLS} lock daemons died: {counted} counts, {lost} sessions lost")
    assert counted == int(counter.read_text()) and 0 < lost <= KILLS
    for machine in cluster.nodes:
        assert "fencing node" not in machine.log[marks[machine.name] :]
