"""What tests of commands on real corosync share: machines as commands see them, and a fence agent that obeys.

The machines are those of `corosync_arrays`, without an array. `told` makes them with the agent `fence_told`;
`tell` says what it does on which node. Locks are taken by `lock_kit` on the same machines.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corosync_arrays import PATIENCE_S, TOKEN_MS, ArrayCluster, Machine, array_cluster
from corosync_kit import Options

from clustermd.testing.local_cluster import CommandFailed
from clustermd.testing.waiting import wait_until

UNRESPONSIVE_S = 3.0
_AGENT = Path(__file__).with_name("fence_told.py")


@contextmanager
def machines(conf: str, *, start: bool = True, name: str = "bench") -> Iterator[ArrayCluster]:
    """Three machines without an array; with `start`, in their cluster."""
    with array_cluster(3, conf, Options(token_ms=TOKEN_MS, cluster_name=name), start=False) as cluster:
        if start:
            cluster.start()
            cluster.wait_for_members(*cluster.nodes)
        yield cluster


@contextmanager
def told(more: str = "", *, start: bool = True, name: str = "bench") -> Iterator[ArrayCluster]:
    """Three machines whose fence agent does as it is told; nothing yet, so it ends machines."""
    with machines("", start=False, name=name) as cluster:
        orders = cluster.local.directory / "orders"
        orders.touch()
        lines = ['engine = "corosync"', 'fence = "agent"', f"unresponsive_s = {UNRESPONSIVE_S}", more]
        lines += ["[fence_agent]", f'agent = "{_AGENT}"', "timeout_s = 2", "retries = 0"]
        lines += [f'journal = "{cluster.journal}"', f'orders = "{orders}"']
        for machine in cluster.nodes:
            space = os.stat(f"/run/netns/{cluster.machines.network.namespace(machine.number)}").st_ino
            lines += [f"[fence_agent.nodes.{machine.name}]", f'plug = "{space}"']
        cluster.conf.write_text("\n".join(lines) + "\n")
        if start:
            cluster.start()
            cluster.wait_for_members(*cluster.nodes)
        yield cluster


def tell(cluster: ArrayCluster, **orders: str) -> None:
    """What the agent does on which node: "fail", "hang", "stay"; what it does otherwise where nothing is said."""
    text = "".join(f"{node} {word}\n" for node, word in orders.items())
    (cluster.local.directory / "orders").write_text(text)
    cluster.journal.unlink(missing_ok=True)


def status(machine: Machine, expect: int | None = None) -> str:
    """`clustermd cluster status` there, as a person reads it."""
    return machine.node.run("cluster", "status", expect=expect)


def wait_for_status(machine: Machine, *words: str, timeout_s: float = PATIENCE_S) -> str:
    """Wait until the status there says all of that, and ends with 1. The status."""

    def said() -> str:
        try:
            text = status(machine, expect=1)
        except CommandFailed:
            return ""
        return text if all(word in text for word in words) else ""

    return wait_until(said, f"{words} in the status", timeout_s, lambda: f"{status(machine)}\n{machine.log}")


def hold_lockd(machine: Machine) -> None:
    """SIGSTOP to the lockd there."""
    (lockd,) = machine.cluster.local.processes(machine.name, "lockd")
    lockd.send(signal.SIGSTOP)
    wait_until(lambda: lockd.still, f"the lockd of {machine.name} to stand still")


def come_back(cluster: ArrayCluster, machine: Machine) -> None:
    """A machine that was ended boots, and all take part."""
    machine.off()
    machine.boot()
    cluster.wait_for_members(*cluster.nodes)
