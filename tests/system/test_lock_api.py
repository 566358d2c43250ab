"""Locks for programs, with asyncio and without, through real lockds of two nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from lock_kit import PATIENCE_S, runs

from clustermd.dlm.modes import Flag, Mode
from clustermd.errors import ClusterLost, LockRefused, Refused
from clustermd.lockd.api import HeldLock, connect_lockspace
from clustermd.lockd.client import lockd_status
from clustermd.lockd.plain import PlainLock, PlainLockspace
from clustermd.rundir import RunDir
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

HOLDER = """
import sys, time
from clustermd.dlm.modes import Flag, Mode
from clustermd.lockd.plain import PlainLockspace
with PlainLockspace("space") as space:
    lock = space.lock("r", Mode[sys.argv[1]], value_block=True)
    if lock.mode is Mode.EX:
        lock.value = b"first"
        lock.convert(Mode.NL)
        lock.convert(Mode.EX)
        lock.value = b"second, never told"
    print("has it", flush=True)
    time.sleep(1000)
"""


class Nodes:
    """Lockspaces on the nodes of one cluster, all of this process."""

    def __init__(self, cluster: LocalCluster, stack: ExitStack) -> None:
        self.cluster = cluster
        self.stack = stack

    def rundir(self, node: str) -> RunDir:
        return self.cluster.node(node).rundir

    def join(self, node: str, **arguments: Any) -> PlainLockspace:
        space = PlainLockspace("space", label=f"test on {node}", rundir=self.rundir(node), **arguments)
        return self.stack.enter_context(space)

    def holder(self, node: str, mode: str) -> subprocess.Popen[str]:
        """Another process, which has lock r."""
        environment = os.environ | self.cluster.node(node).environment
        command = [sys.executable, "-c", HOLDER, mode]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self.stack.callback(end, process)
        assert process.stdout is not None and process.stdout.readline() == "has it\n"
        return process

    def kill_lockd(self, node: str) -> None:
        self.cluster.kill(self.cluster.processes(node, "lockd"))


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(PATIENCE_S)
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("CLUSTERMD_LINGER_S", "2")
    with LocalCluster() as cluster, ExitStack() as stack:
        yield Nodes(cluster, stack)


def test_a_value_goes_from_node_to_node(nodes: Nodes) -> None:
    one, two = nodes.join("n1"), nodes.join("n2")
    with one.lock("r", Mode.EX, value_block=True) as lock:
        assert lock.value == bytes(64) and lock.value_valid
        lock.value = b"from n1"
        lock.convert(Mode.NL)
        with two.lock("r", Mode.PW, value_block=True) as other:
            assert other.value == b"from n1".ljust(64, b"\0")
            other.value = b"from n2"
        lock.convert(Mode.PR)
        assert lock.value.rstrip(b"\0") == b"from n2" and lock.value_valid
        with pytest.raises(ValueError, match="65 bytes do not fit"):
            lock.value = bytes(65)
    with one.lock("r") as bare, pytest.raises(ValueError, match="value_block=True"):
        assert bare.value


def test_a_dead_writer_leaves_a_value_that_is_marked(nodes: Nodes) -> None:
    one = nodes.join("n1")
    keeps = one.lock("r", Mode.NL, value_block=True)
    writer = nodes.holder("n2", "EX")
    with pytest.raises(LockRefused) as refused:
        keeps.convert(Mode.PR, noqueue=True)
    assert refused.value.code == "would-block" and keeps.mode is Mode.NL
    assert [(who["name"], who["pid"]) for who in refused.value.data["holders"]] == [("n2", writer.pid)]
    end(writer)
    keeps.convert(Mode.EX)
    assert keeps.value.rstrip(b"\0") == b"first" and not keeps.value_valid
    keeps.value = b"repaired"
    keeps.convert(Mode.NL)
    keeps.convert(Mode.CR)
    assert keeps.value.rstrip(b"\0") == b"repaired" and keeps.value_valid


def test_threads_of_two_nodes_never_work_at_once(nodes: Nodes) -> None:
    spaces = [nodes.join("n1"), nodes.join("n2")]
    counter = 0
    failed: list[BaseException] = []

    def work(space: PlainLockspace) -> None:
        nonlocal counter
        try:
            for _ in range(20):
                with space.lock("counter"):
                    seen = counter
                    time.sleep(0.0005)
                    counter = seen + 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(space,)) for space in spaces for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failed and counter == 160


def test_a_holder_is_told_that_somebody_waits_and_may_use_its_lock_then(nodes: Nodes) -> None:
    told: list[tuple[str, Mode]] = []

    def give_way(lock: PlainLock, mode: Mode) -> None:
        told.append((lock.name, mode))
        lock.convert(Mode.NL)

    one, two = nodes.join("n1"), nodes.join("n2")
    lock = one.lock("r", Mode.PR, blocking=give_way)
    with two.lock("r", Mode.CR), two.lock("r", Mode.PR):
        assert told == [], "these go together with it"
    with two.lock("r", Mode.EX, timeout_s=PATIENCE_S):
        assert told == [("r", Mode.EX)] and lock.mode is Mode.NL
    lock.unlock()
    lock.unlock()
    with pytest.raises(LockRefused, match="has been freed"):
        lock.convert(Mode.PR)


def test_a_request_that_came_too_late_is_taken_back(nodes: Nodes) -> None:
    one, two = nodes.join("n1"), nodes.join("n2")
    with one.lock("r", Mode.EX) as held:
        with pytest.raises(LockRefused) as late:
            two.lock("r", Mode.EX, timeout_s=0.3)
        assert (
            late.value.code == "timed-out" and f"test on n1 (pid {os.getpid()}) in EX" in late.value.message
        )
        waiting = two.lock("r", Mode.NL)
        with pytest.raises(LockRefused) as late:
            waiting.convert(Mode.PR, timeout_s=0.3)
        assert late.value.code == "timed-out" and waiting.mode is Mode.NL
        held.convert(Mode.NL)
        held.convert(Mode.EX, noqueue=True)
    two.lock("r", Mode.EX, noqueue=True).unlock()
    waiting.convert(Mode.EX, timeout_s=PATIENCE_S)


def test_a_lost_lock_goes_on_only_when_its_holder_has_let_go(nodes: Nodes) -> None:
    told = threading.Event()
    two = nodes.join("n2")
    one = PlainLockspace("space", rundir=nodes.rundir("n1"), on_lost=lambda reason: told.set())
    with one:
        lock = one.lock("r").__enter__()
        nodes.kill_lockd("n1")
        assert told.wait(PATIENCE_S) and one.lost and lock.mode is Mode.IV
        with pytest.raises(ClusterLost):
            one.lock("s")
        with pytest.raises(LockRefused, match="n1"):
            two.lock("r", timeout_s=1.5)
        # the end of its block says that it was not held to the end, and lets it go
        with pytest.raises(ClusterLost):
            lock.__exit__(None, None, None)
        two.lock("r", timeout_s=5.0).unlock()


def test_a_lost_session_without_locks_keeps_nobody_waiting(nodes: Nodes) -> None:
    two = nodes.join("n2")
    told = threading.Event()
    with PlainLockspace("space", rundir=nodes.rundir("n1"), on_lost=lambda reason: told.set()) as one:
        one.lock("r").unlock()
        nodes.kill_lockd("n1")
        assert told.wait(PATIENCE_S)
        wait_until(lambda: [slot.name for slot in two.members] == ["n2"], "the end of n1", 8.0)


def test_slots_of_the_dead_are_free_again(nodes: Nodes) -> None:
    one = nodes.join("n1")
    for _ in range(3):
        end(nodes.holder("n2", "PR"))
        wait_until(lambda: len(one.members) == 1, "the departure of the dead one", PATIENCE_S)
    assert [slot.slot for slot in nodes.join("n2").members] == [1, 2]
    with pytest.raises(RuntimeError, match="open already"):
        one.__enter__()


def test_a_forked_child_has_nothing_of_its_parent_s(nodes: Nodes) -> None:
    one = nodes.join("n1")
    one.lock("r")
    pid = os.fork()
    if pid == 0:
        try:
            one.lock("s")
        except ClusterLost as error:
            os._exit(0 if error.code == "not-open" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with pytest.raises(ClusterLost, match="not open"):
        PlainLockspace("space").lock("r")


def test_members_must_agree_on_the_size_of_values(nodes: Nodes) -> None:
    nodes.join("n1", value_block_bytes=32)
    with pytest.raises(LockRefused) as refused:
        nodes.join("n2")
    assert refused.value.code == "value-block-size"
    with pytest.raises(Refused) as lonely:
        PlainLockspace("space", rundir=nodes.rundir("n3"), start=False).__enter__()
    assert lonely.value.code == "not-running"


def test_the_same_with_asyncio(nodes: Nodes) -> None:
    async def story() -> None:
        told: list[str] = []

        def give_way(lock: HeldLock, mode: Mode) -> None:
            told.append(f"{lock.name} {mode.name}")
            tasks.append(asyncio.create_task(lock.unlock()))

        tasks: list[asyncio.Task[None]] = []
        async with (
            connect_lockspace("space", rundir=nodes.rundir("n1")) as one,
            connect_lockspace("space", rundir=nodes.rundir("n2")) as two,
        ):
            async with await one.lock("a", Mode.PW, value_block=True) as lock:
                lock.value = b"x"
                with pytest.raises(LockRefused) as refused:
                    await two.lock("a", Mode.PW, noqueue=True)
                assert refused.value.data["holders"][0]["name"] == "n1"
                assert await one.holders("a", Mode.CR) == []
            await one.lock("b", Mode.EX, blocking=give_way)
            async with await two.lock("b", Mode.EX):
                assert told == ["b EX"]
            # a task that is cancelled while it waits leaves no request behind
            held = await one.lock("c")
            task = asyncio.create_task(two.lock("c"))
            await asyncio.wait((task,), timeout=0.2)
            task.cancel()
            await asyncio.wait((task,))
            await held.unlock()
            await one.lock("c", noqueue=True)
            nodes.kill_lockd("n1")
            with pytest.raises(ClusterLost):
                await one.lock("d")
            assert one.lost and not two.lost

    asyncio.run(story())


def test_a_process_that_stands_still_is_killed_before_its_lock_goes_on(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTERMD_UNRESPONSIVE_S", "2")
    holder = nodes.holder("n2", "EX")
    one = nodes.join("n1")
    os.kill(holder.pid, signal.SIGSTOP)
    with one.lock("r", timeout_s=PATIENCE_S):
        assert not runs(holder.pid)


def test_a_circle_of_waits_is_refused_where_members_want_that(nodes: Nodes) -> None:
    one, two = nodes.join("n1", deadlocks=True), nodes.join("n2", deadlocks=True)
    with one.lock("a"), two.lock("b"):
        taking = threading.Thread(target=lambda: one.lock("b", timeout_s=PATIENCE_S).unlock())
        taking.start()
        wait_until(lambda: queued(nodes, "b"), "n1 to wait", PATIENCE_S)
        with pytest.raises(LockRefused) as refused:
            two.lock("a", timeout_s=PATIENCE_S)
        assert refused.value.code == "deadlock"
    taking.join(PATIENCE_S)
    with pytest.raises(LockRefused) as refused:
        nodes.join("n3")
    assert refused.value.code == "deadlock-detection"


def queued(nodes: Nodes, name: str) -> list[Any]:
    state = asyncio.run(lockd_status(nodes.rundir("n1")))
    resources = state["replica"]["lockspaces"]["space"]["resources"]
    waiting: list[Any] = resources[name]["waiting"]
    return waiting


def test_flags_of_the_lock_manager(nodes: Nodes) -> None:
    one, two = nodes.join("n1"), nodes.join("n2")
    with one.lock("r", Mode.PR), two.lock("r", Mode.EX, flags=Flag.ALTPR) as lock:
        assert lock.mode is Mode.PR, "the alternative"
        with pytest.raises(LockRefused) as refused:
            lock.convert(Mode.EX, noqueue=True, flags=Flag.NOQUEUEBAST)
        assert refused.value.code == "would-block"
