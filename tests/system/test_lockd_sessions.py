"""lockd with real processes: nodes that start by themselves, and every way in which a session can end.

A client is this file run as a program: a session of its node's lockd, with locks and a disk of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_kit import loop_device
from daemon_kit import UNRESPONSIVE_S, Machine, Process, commands, machine_of_its_own, tell, wait_for

from clustermd.device.direct import identity
from clustermd.device.witness import WITNESS_BASE, hold
from clustermd.dlm.lockspace import Lock, Slot
from clustermd.dlm.modes import Mode
from clustermd.errors import Refused
from clustermd.group.process import start_time
from clustermd.group.process_group import Witness
from clustermd.lockd.client import LockdConnection, connect
from clustermd.rundir import RunDir

pytestmark = pytest.mark.system

PIDFD_GETFD = 438


class Teller:
    """LockspaceEvents on standard output."""

    def recover_prep(self) -> None:
        tell("prep")

    def recover_slot(self, slot: Slot) -> None:
        tell("slot", slot.slot, slot.name)

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        tell("done", [slot.name for slot in slots], our_slot)

    def suspended(self, reason: str) -> None:
        tell("suspended")

    def resumed(self) -> None:
        tell("resumed")

    def lost(self, reason: str) -> None:
        tell("lost")


async def be_client() -> None:
    rundir = RunDir.from_environment()
    connection = await connect(rundir, "test")
    tell("welcome", connection.node, connection.name, connection.incarnation)
    space = await connection.session.join("space", Teller(), max_slots=4)
    tell("joined", space.our_slot)
    locks: dict[str, Lock] = {}
    tasks: set[asyncio.Task[None]] = set()
    descriptor = -1

    async def lock(name: str, mode: str) -> None:
        try:
            if name in locks:
                await locks[name].convert(Mode[mode])
            else:
                locks[name] = await space.lock(name, Mode[mode], value_block=True)
            tell("granted", name, mode)
        except Refused as error:
            tell("refused", error.code)

    async for words in commands():
        try:
            match words:
                case ["lock", name, mode]:
                    task = asyncio.create_task(lock(name, mode))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                case ["disk", path]:
                    descriptor = os.open(path, os.O_RDWR)
                    assert hold(descriptor, WITNESS_BASE + connection.node)
                    await connection.register(witness(connection, path))
                    tell("registered")
                case ["register", path]:
                    await connection.register(witness(connection, path))
                case ["close"]:
                    os.close(descriptor)
                case ["status"]:
                    tell("status", await connection.status())
                case ["hang"]:
                    connection.abort()
                    tell("hanging")
                    time.sleep(1000)
                case ["leave"]:
                    await space.leave()
                    tell("left")
                case ["goodbye"]:
                    await connection.close()
                    tell("bye")
                    return
                case []:
                    return
        except Refused as error:
            tell("refused", error.code)


def witness(connection: LockdConnection, path: str) -> Witness:
    started = start_time(os.getpid())
    assert started is not None
    return Witness("disk", os.getpid(), started, WITNESS_BASE + connection.node, ((path, *identity(path)),))


class Cluster:
    """Nodes with one client each, and a disk that they share."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.root.mkdir(parents=True)
        self.disk = machine.root / "disk"
        self.disk.write_bytes(bytes(4096))

    def client(self, node: str) -> Process:
        client = self.machine.start(__file__, node)
        client.wait(lambda e: e[0] == "joined", "lockspace")
        return client

    def log(self, node: str) -> str:
        return (self.machine.root / node / "lockd.log").read_text()

    def lockd_pid(self, client: Process) -> int:
        return int(client.wait_status(lambda state: True, "status")["pid"])


def descriptor_of(process: Process, path: Path) -> int:
    """A second descriptor of the open file that `process` has of `path` (pidfd_getfd(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(process.pid)
    try:
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            if os.path.realpath(entry) == os.path.realpath(path):
                descriptor: int = libc.syscall(PIDFD_GETFD, pidfd, int(entry.name), 0)
                assert descriptor >= 0, os.strerror(ctypes.get_errno())
                return descriptor
    finally:
        os.close(pidfd)
    raise AssertionError(f"process {process.pid} has not opened {path}")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with machine_of_its_own() as machine:
        yield Cluster(machine)


def granted(client: Process, name: str, mode: str) -> None:
    client.wait(lambda e: e == ["granted", name, mode], f"{name} {mode}")


def unproved(state: dict[str, Any]) -> list[Any]:
    sequencer = state["group"]["sequencer"]
    return sequencer["unproved"] if sequencer else []


def forget(client: Process) -> None:
    client.read()
    client.events.clear()


def test_locks_of_two_nodes_and_a_clean_end_of_everything(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    assert (cluster.machine.root / "n1" / "lockd.sock").stat().st_mode & 0o077 == 0
    one.say("lock", "r", "EX")
    granted(one, "r", "EX")
    two.say("lock", "r", "EX")
    state = one.wait_status(lambda s: "r" in str(s["replica"]) and len(s["group"]["members"]) == 2, "status")
    assert state["name"] == "n1" and [session["label"] for session in state["sessions"]] == ["test"]
    assert not [e for e in two.events if e[0] == "granted"]
    one.say("lock", "r", "NL")
    granted(two, "r", "EX")
    two.say("disk", cluster.disk)
    two.wait(lambda e: e == ["registered"], "registration")
    two.say("goodbye")
    two.wait(lambda e: e == ["refused", "witness-held"], "refusal while the disk is open")
    two.say("close")
    two.say("leave")
    two.wait(lambda e: e == ["left"], "leaving the lockspace")
    two.say("goodbye")
    two.wait(lambda e: e == ["bye"], "end")
    one.wait(lambda e: e == ["done", ["n1"], 1], "departure of n2")
    assert not [e for e in one.events if e[0] == "slot"], "who leaves and says goodbye fails nobody"
    wait_for(lambda: cluster.log("n2").rstrip().endswith("] ended"), lambda: cluster.log("n2"))
    one.say("goodbye")
    one.wait(lambda e: e == ["bye"], "end")
    wait_for(lambda: cluster.machine.log().rstrip().endswith("] ended"), cluster.machine.log)
    assert not [path for path in cluster.machine.root.rglob("*") if path.is_socket()], "no socket is left"


def test_a_killed_session_keeps_its_locks_until_its_disk_is_free(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    two.say("disk", cluster.disk)
    two.wait(lambda e: e == ["registered"], "registration")
    two.say("lock", "r", "EX")
    granted(two, "r", "EX")
    # a request in flight keeps the open file alive after its process; so does a descriptor passed on
    kept = descriptor_of(two, cluster.disk)
    one.say("lock", "r", "EX")
    two.popen.kill()
    other = cluster.client("n2")
    other.wait_status(
        lambda s: any(x["lost_for_s"] is not None and str(cluster.disk) in str(x) for x in s["sessions"]),
        "lost session and its disk in the status",
    )
    one.read()
    assert not [e for e in one.events if e[0] == "granted"], "its last write may still be on its way"
    os.close(kept)
    granted(one, "r", "EX")
    one.wait(lambda e: e[0] == "slot" and e[2] == "n2", "recovery of the dead slot")
    assert "still runs" not in cluster.log("n2")


def test_a_stopped_session_is_shown_killed_and_proved(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    third = cluster.client("n2")
    two.say("disk", cluster.disk)
    two.wait(lambda e: e == ["registered"], "registration")
    two.say("lock", "r", "EX")
    granted(two, "r", "EX")
    one.say("lock", "r", "EX")
    stopped_s = time.monotonic()
    os.kill(two.pid, signal.SIGSTOP)
    third.wait_status(lambda s: any(x["silent_s"] >= 1 for x in s["sessions"]), "silence in the status")
    granted(one, "r", "EX")
    assert UNRESPONSIVE_S * 0.9 <= time.monotonic() - stopped_s < UNRESPONSIVE_S + 3
    assert two.popen.wait() == -signal.SIGKILL


def test_a_session_that_hangs_without_its_socket_is_killed(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    two.say("disk", cluster.disk)
    two.wait(lambda e: e == ["registered"], "registration")
    two.say("lock", "r", "EX")
    granted(two, "r", "EX")
    one.say("lock", "r", "EX")
    two.say("hang")
    two.wait(lambda e: e == ["hanging"], "closed socket")
    granted(one, "r", "EX")
    assert two.popen.wait() == -signal.SIGKILL


def test_a_killed_lockd_loses_its_sessions_and_is_fenced_when_their_disks_are_free(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    two.say("disk", cluster.disk)
    two.wait(lambda e: e == ["registered"], "registration")
    two.say("lock", "r", "EX")
    granted(two, "r", "EX")
    one.say("lock", "r", "EX")
    os.kill(cluster.lockd_pid(two), signal.SIGKILL)
    two.wait(lambda e: e == ["lost"], "loss of the session")
    one.wait_status(lambda s: str(cluster.disk) in str(unproved(s)), "what the end waits for, in the status")
    assert not [e for e in one.events if e[0] == "granted"]
    two.say("close")  # it drains and lets go by itself
    granted(one, "r", "EX")
    one.wait(lambda e: e[0] == "slot" and e[2] == "n2", "recovery of the dead slot")
    assert two.popen.poll() is None, "it needed no killing"
    again = cluster.client("n2")
    one.wait(lambda e: e[0] == "done" and e[1] == ["n1", "n2"], "return of n2")
    before, after = (p.wait(lambda e: e[0] == "welcome", "welcome") for p in (two, again))
    assert before[1] == after[1] and before[3] != after[3], "the same node in another life"


def test_a_stopped_lockd_is_killed_and_its_node_fenced(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    two.say("lock", "r", "EX")
    granted(two, "r", "EX")
    one.say("lock", "r", "EX")
    os.kill(cluster.lockd_pid(two), signal.SIGSTOP)
    stopped_s = time.monotonic()
    granted(one, "r", "EX")
    assert time.monotonic() - stopped_s < UNRESPONSIVE_S + 3
    two.wait(lambda e: e == ["lost"], "loss of the session")


def test_locks_live_through_dead_sequencers(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    two.say("lock", "r", "EX")
    granted(two, "r", "EX")
    for _ in range(3):
        forget(one)
        pid = one.wait_status(lambda s: bool(s["group"]["sequencer"]), "sequencer")["group"]["sequencer"][
            "pid"
        ]
        one.say("lock", "r", "EX")
        os.kill(pid, signal.SIGKILL)
        one.wait(lambda e: e == ["suspended"], "suspension")
        one.wait(lambda e: e == ["resumed"], "resumption")
        assert not [e for e in one.events if e[0] in ("granted", "lost")]
        two.say("lock", "r", "NL")
        granted(two, "r", "NL")
        granted(one, "r", "EX")
        forget(two)
        two.say("lock", "r", "EX")
        one.say("lock", "r", "NL")
        granted(one, "r", "NL")
        granted(two, "r", "EX")


def test_a_told_lockd_ends_after_its_sessions_are_proved(cluster: Cluster) -> None:
    one, two = cluster.client("n1"), cluster.client("n2")
    two.say("disk", cluster.disk)
    two.wait(lambda e: e == ["registered"], "registration")
    os.kill(cluster.lockd_pid(two), signal.SIGTERM)
    two.wait(lambda e: e == ["lost"], "loss of the session")
    two.say("close")
    wait_for(lambda: cluster.log("n2").rstrip().endswith("] ended"), lambda: cluster.log("n2"))
    one.wait(lambda e: e[0] == "slot" and e[2] == "n2", "recovery of the lost session's slot")
    assert "fenced" not in cluster.log("n1"), "the node itself left cleanly"


def test_refused_witnesses(cluster: Cluster) -> None:
    one = cluster.client("n1")
    one.say("register", cluster.disk)
    one.wait(lambda e: e == ["refused", "witness-not-held"], "refusal of a lock that nobody holds")


@pytest.mark.needs("root", "loop")
def test_a_disk_in_use_by_the_kernel_is_refused_and_one_in_use_by_us_is_kept_from_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    one, two = cluster.client("n1"), cluster.client("n2")
    with loop_device(image) as device:
        one.say("disk", image)
        one.wait(lambda e: e[0] == "refused", "refusal of a loop device's backing file")
        one.say("close")
        taken = os.open(device, os.O_RDONLY | os.O_EXCL)
        one.say("disk", device)
        one.wait(lambda e: e[0] == "refused" and len(refusals(one)) == 2, "refusal of a claimed device")
        one.say("close")
        os.close(taken)
        for client in (one, two):
            client.say("disk", device)
            client.wait(lambda e: e == ["registered"], "registration")
        for client in (one, two):
            with pytest.raises(OSError, match="busy"):
                os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
            client.say("close")
            client.say("goodbye")
            client.wait(lambda e: e == ["bye"], "end")
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    assert {code for _, code in refusals(one)} == {"device-busy"}


def refusals(client: Process) -> list[list[Any]]:
    return [event for event in client.events if event[0] == "refused"]


if __name__ == "__main__":
    asyncio.run(be_client())
