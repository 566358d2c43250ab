"""Whole arrays on real corosync: machines in network namespaces, each with its own lockd and array process.

A `Machine` is a corosync node of `corosync_kit` and, in the same namespaces, a node of `LocalCluster`: its
commands, lockd and array processes see its own network, host name and boot. Disk images and run directories lie
in one directory, as on shared storage. Loads and judges are outside, for they have to live on.

A machine that lost its power (`off`) and boots has an empty run directory and another boot id, as it would have.
`agent` is a fence agent that ends every process of a machine, and says "off" only when they are gone.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import corosync_kit
import pytest
from cluster_kit import CREATE, DISK_BYTES, LOAD
from corosync_kit import Options
from netns_kit import refused

from clustermd.errors import Refused
from clustermd.group.process import boot_id
from clustermd.lockd.client import lockd_status
from clustermd.testing.blocks import BLOCK_BYTES, ZEROES, parse
from clustermd.testing.disks import all_clear, differing_blocks, dirty_chunks, look
from clustermd.testing.exerciser import DISCONNECTED
from clustermd.testing.judge import judge, nbd_reader
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.nbd_client import NbdClient
from clustermd.testing.waiting import wait_until
from clustermd.testing.write_log import Kind, read_log

TOKEN_MS = 500
DETECTION_S = 2.2 * TOKEN_MS / 1000
PATIENCE_S = 30.0
NONE = 'fence = "none"\n'
LEASE = 'fence = "lease"\nlease_s = 2.0\ndevice_bound_s = 1.0\n'
LEASE_S, LEASE_FENCE_S = 2.0, 2.0 * 1.01 + 1.0
_ENTER = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'
_AGENT = Path(__file__).with_name("fence_namespace.py")


class Machine:
    """One machine. `corosync` and `node` are its two sides, `load` an exerciser on its array."""

    def __init__(self, cluster: ArrayCluster, corosync: corosync_kit.Node, load: Load) -> None:
        self.cluster = cluster
        self.corosync = corosync
        self.number, self.name = corosync.number, corosync.name
        self.node = load.node
        self.load = load
        self.boot_id = cluster.local.directory / f"boot_id{self.number}"
        self.boot_id.write_text(f"{boot_id()}\n")

    def words(self, command: list[str]) -> list[str]:
        """`command` as one that runs on this machine."""
        return self.corosync.words("sh", "-c", _ENTER, "sh", str(self.boot_id), *command)

    def assemble(self) -> str:
        return self.node.run("-A", "md0", *self.cluster.disks)

    # lockd

    @property
    def log(self) -> str:
        """What its lockd has said so far."""
        path = self.node.rundir.node_dir / "lockd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def array_log(self) -> str:
        path = self.node.files().log
        return path.read_text(errors="replace") if path.exists() else ""

    def status(self) -> dict[str, Any]:
        """What its lockd says now; {} when none answers."""
        try:
            return asyncio.run(lockd_status(self.node.rundir))
        except Refused:
            return {}

    @property
    def members(self) -> tuple[int, ...]:
        """Who takes part, as its lockd sees it; nobody unless it has quorum, its state, and all is proved."""
        state = self.status()
        group = state.get("group", {})
        if not state.get("installed") or group.get("frozen") or group.get("lost"):
            return ()
        return tuple(node for node, _, _ in group["members"])

    def said(self, words: str, since: int = 0) -> float | None:
        """When, in seconds of the wall clock, its lockd first said this after `since` characters of its log."""
        for line in self.log[since:].splitlines():
            if words in line:
                return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        return None

    def stop_lockd(self) -> None:
        """Ask its lockd to end, and wait until it has said goodbye."""
        processes = self.cluster.local.processes(node=self.name, role="lockd")
        for process in processes:
            process.send(signal.SIGTERM)
        wait_until(
            lambda: not any(process.alive for process in processes),
            f"the goodbye of {self.name}",
            PATIENCE_S,
            self.cluster.logs,
        )

    def kill_lockd(self) -> None:
        local = self.cluster.local
        local.kill(local.processes(node=self.name, role="lockd"))

    # power

    def off(self) -> None:
        """Everything on it ends at once."""
        self.corosync.power_off()

    def boot(self) -> None:
        """After `off`: as a machine that was started, with corosync and lockd."""
        shutil.rmtree(self.node.rundir.node_dir, ignore_errors=True)
        self.boot_id.write_text(f"{uuid.uuid4()}\n")
        self.corosync.boot()
        self.cluster.machines.wait_until(lambda: self.corosync.look() is not None, f"corosync of {self.name}")
        self.node.start_lockd()


@dataclass(frozen=True, slots=True)
class Loss:
    """How a machine was given up: its life then; seconds until the others had their right, and until its last
    acknowledged write (negative: before)."""

    life: str
    right_s: float
    wrote_s: float


class ArrayCluster:
    """`count` machines and the images of one array. `conf` is what clustermd.conf says besides the engine."""

    def __init__(
        self, count: int, conf: str, options: Options | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.machines = corosync_kit.CorosyncCluster(count, options or Options(token_ms=TOKEN_MS))
        try:
            self.local = LocalCluster(environment, enter=lambda name, words: self.of(name).words(words))
        except BaseException:
            self.machines.close()
            raise
        self.conf = self.local.directory / "clustermd.conf"
        self.local.environment |= {"CLUSTERMD_CONF": str(self.conf)}
        self.conf.write_text('engine = "corosync"\n' + conf)
        self.journal = self.local.directory / "fenced"
        self.disks = self.local.images(2, DISK_BYTES)
        share = DISK_BYTES // 2 // 4096 // count
        self._load_options: Sequence[str] = LOAD
        self.nodes = []
        for corosync in self.machines.nodes:
            number = corosync.number
            load = Load(self.local.node(corosync.name), number, (number - 1) * share, number * share)
            self.nodes.append(Machine(self, corosync, load))

    def of(self, name: str) -> Machine:
        return next(machine for machine in self.nodes if machine.name == name)

    def __getitem__(self, number: int) -> Machine:
        """By its number, from 1."""
        return self.nodes[number - 1]

    def others(self, machine: Machine) -> list[Machine]:
        return [other for other in self.nodes if other is not machine]

    @property
    def fenced(self) -> list[str]:
        """What the agent did: "off node1 0", in order."""
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def fence_with_agent(self, more: str = "") -> None:
        """Let `fence_namespace.py` fence; a machine's plug is its network namespace."""
        lines = ['engine = "corosync"', 'fence = "agent"', more, "[fence_agent]", f'agent = "{_AGENT}"']
        lines += [f'journal = "{self.journal}"']
        for machine in self.nodes:
            space = os.stat(f"/run/netns/{self.machines.network.namespace(machine.number)}").st_ino
            lines += [f"[fence_agent.nodes.{machine.name}]", f'plug = "{space}"']
        self.conf.write_text("\n".join(lines) + "\n")

    # beginning

    def start(self, *numbers: int) -> None:
        """corosync and lockd on those machines (all, if none is named)."""
        self.machines.start(*numbers)
        self.start_lockds(*numbers)

    def start_lockds(self, *numbers: int) -> None:
        for number in numbers or range(1, len(self.nodes) + 1):
            self[number].node.start_lockd()

    def make_array(self) -> None:
        """Create on the first machine, assemble on the others."""
        self.wait_for_members(*self.nodes)
        self[1].node.run("-CR", "md0", *CREATE, "--assume-clean", *self.disks)
        for machine in self.nodes[1:]:
            machine.assemble()
        wait_until(lambda: all_clear(self.disks), "the bits of creation to be cleared", PATIENCE_S, self.logs)

    def put_load(self, *machines: Machine, options: Sequence[str] = LOAD) -> None:
        self._load_options = options
        for machine in machines or self.nodes:
            machine.load.start(*options)

    # waiting

    def wait_for_members(self, *machines: Machine, timeout_s: float = PATIENCE_S) -> None:
        """Wait until these machines' lockds are exactly the members, and nobody's end is waited for."""
        expected = tuple(machine.number for machine in machines)
        wait_until(
            lambda: all(machine.members == expected for machine in machines),
            f"nodes {expected} to be the members",
            timeout_s,
            self.logs,
        )

    def wait_for_log(
        self, machine: Machine, words: str, since: int = 0, timeout_s: float = PATIENCE_S
    ) -> float:
        """Wait until its lockd says `words`, after `since` characters of its log. When it did (`Machine.said`)."""
        return wait_until(
            lambda: machine.said(words, since), f"{machine.name} to say {words!r}", timeout_s, self.logs
        )

    def wait_for_takeover(self, slot: int, timeout_s: float = PATIENCE_S) -> float:
        """Wait until the bits of a dead node's slot are gone from all disks. The wall clock of then."""
        wait_until(
            lambda: not dirty_chunks(self.disks, slot), f"slot {slot} to be taken over", timeout_s, self.logs
        )
        return time.time()

    def wait_for_writes(self, *machines: Machine, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the loads of these machines get answers."""
        before = [machine.load.records for machine in machines]
        wait_until(
            lambda: all(each.load.records > old + 50 for each, old in zip(machines, before, strict=True)),
            f"writes of {[machine.name for machine in machines]}",
            timeout_s,
            self.logs,
        )

    # a node that is given up, and comes back

    def lose(self, lost: Machine, cut: Callable[[], object], right: str = "fenced {name} (") -> Loss:
        """Do what `cut` does to a machine that writes, and wait until the others have taken over from it.

        When these have their right (their lockds say so) it is noted what the halves hold of the lost one's blocks:
        from then on no half may hold anything else.
        """
        others = self.others(lost)
        life, slot = lost.status()["incarnation"], lost.node.slot()
        marks = [len(machine.log) for machine in others]
        self.wait_for_writes(*self.nodes)
        cut()
        cut_ns, cut_s = time.monotonic_ns(), time.time()
        words = right.format(name=lost.name)
        right_s = max(self.wait_for_log(each, words, mark) for each, mark in zip(others, marks, strict=True))
        held = self.generations(lost)
        self.wait_for_writes(*others)
        self._check_unchanged(lost, held)
        self.wait_for_takeover(slot)
        self._check_unchanged(lost, held)
        acknowledged = (each.time_ns for each in read_log(lost.load.log) if each.kind is Kind.ACKNOWLEDGED)
        return Loss(life, right_s - cut_s, (max(acknowledged, default=cut_ns) - cut_ns) / 1e9)

    def regain(self, lost: Machine, loss: Loss, heal: Callable[[], object]) -> float:
        """Undo it, and wait until the lost machine has joined again by itself and writes. The seconds that took.

        Its clients hear that the others may have gone on without it: they lose their connection, and make a new one.
        """
        began_s = time.time()
        heal()
        self.wait_for_members(*self.nodes)
        assert lost.status()["incarnation"] != loss.life
        assert lost.load.report().ended == DISCONNECTED
        lost.load.start(*self._load_options)
        took_s = time.time() - began_s
        self.wait_for_writes(*self.nodes)
        return took_s

    def generations(self, machine: Machine) -> dict[int, set[int]]:
        """Of each block of that machine, the generations that the halves hold. A torn block counts as -1."""
        first, end = machine.load.blocks
        found: dict[int, set[int]] = {block: set() for block in range(first, end)}
        for disk in self.disks:
            with open(disk, "rb") as image:
                image.seek(look(disk).data_offset_bytes + first * BLOCK_BYTES)
                for held in found.values():
                    data = image.read(BLOCK_BYTES)
                    identity = parse(data)
                    held.add(identity.generation if identity is not None else 0 if data == ZEROES else -1)
        return found

    def _check_unchanged(self, lost: Machine, held: dict[int, set[int]]) -> None:
        changed = [block for block, found in self.generations(lost).items() if not found <= held[block]]
        assert not changed, f"{lost.name} wrote {changed} after the others had their right\n{self.logs()}"

    # the end of every story

    def settle(self, *machines: Machine) -> None:
        """No load runs any more: every bit gets clear, halves are equal, the judge is content with each node."""
        self.wait_for_members(*machines)
        wait_until(
            lambda: all_clear(self.disks),
            "every bit to be clear",
            PATIENCE_S,
            lambda: f"dirty: {[look(disk).dirty for disk in self.disks]}\n{self.logs()}",
        )
        assert differing_blocks(self.disks) == []
        for machine in machines:
            with NbdClient(machine.node.socket()) as client:
                verdict = judge([each.load.log for each in self.nodes], nbd_reader(client))
            assert verdict.good, verdict
            assert verdict.acknowledged > 0

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        return "\n".join([self.local.logs(), *(machine.corosync.last_words() for machine in self.nodes)])

    def close(self) -> None:
        try:
            self.machines.close()
        finally:
            self.local.close()

    def leftovers(self) -> list[str]:
        return [*self.machines.leftovers(), *self.local.leftovers()]


@contextmanager
def array_cluster(
    count: int = 3,
    conf: str = NONE,
    options: Options | None = None,
    environment: dict[str, str] | None = None,
    *,
    start: bool = True,
    agent: bool = False,
) -> Iterator[ArrayCluster]:
    """A cluster for one test, with corosync and lockds started and the array on all, unless `start` is False."""
    reason = refused()
    if reason is not None:
        if os.environ.get("CLUSTERMD_TESTS_MUST_RUN"):
            pytest.fail(f"cannot run here, and CI is set: {reason}", pytrace=False)
        pytest.skip(reason)
    cluster = ArrayCluster(count, conf, options, environment)
    try:
        if agent:
            cluster.fence_with_agent()
        if start:
            cluster.start()
            cluster.make_array()
        yield cluster
    finally:
        cluster.close()
    assert not cluster.leftovers(), f"left behind: {cluster.leftovers()}"
