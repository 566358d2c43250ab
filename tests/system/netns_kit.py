"""Machines on one machine: network namespaces behind one switch, with links that can be cut, lossy or slow.

A `Network` is a namespace with a bridge (the switch) and one namespace a node, joined by veth pairs. A node's
processes are those in its namespace, so a node can lose its power (SIGKILL to all of them) or be stopped for
a while (SIGSTOP, as a virtual machine that is paused). Everything bears the test process's number in its
name: what a killed test run left is removed by the next one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clustermd.testing.waiting import wait_until

CLONE_NEWNET = 0x40000000
_PREFIX = "cmdnet"
_RELAY = Path(__file__).with_name("link_relay.py")
_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> str:
    """Run ip(8); its output. What it complains of is the error."""
    return _checked("ip", *words)


def _checked(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}"
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"}


@functools.cache
def refused() -> str | None:
    """Why this machine gives us no network namespaces, or None when it does."""
    name = f"{_PREFIX}{os.getpid()}x0p"
    try:
        ip("netns", "add", name)
    except (AssertionError, OSError) as error:
        return f"no network namespaces here: {error}"
    try:
        _checked("ip", "netns", "exec", name, "unshare", "--uts", "mount", "--bind", "/tmp", "/run")
        ip("-n", name, "link", "add", "br0", "type", "bridge")
    except (AssertionError, OSError) as error:
        return f"namespaces without mounts, host names or bridges here: {error}"
    finally:
        ip("netns", "del", name)
    return None


class Network:
    """A switch and `nodes` namespaces with the addresses 10.199.0.1, .2, ...; nodes are numbered from 1."""

    def __init__(self, nodes: int) -> None:
        _sweep()
        self.name = f"{_PREFIX}{os.getpid()}x{next(_numbers)}"
        self.switch = f"{self.name}s"
        self.nodes = range(1, nodes + 1)
        self._bridges = 1
        self._relays: dict[int, subprocess.Popen[str]] = {}
        try:
            ip("netns", "add", self.switch)
            self._bridge(0)
            for node in self.nodes:
                self._plug_in(node)
        except BaseException:
            self.close()
            raise

    def namespace(self, node: int) -> str:
        return f"{self.name}n{node}"

    @staticmethod
    def address(node: int) -> str:
        return f"10.199.0.{node}"

    def _bridge(self, number: int) -> str:
        bridge = f"br{number}"
        ip("-n", self.switch, "link", "add", bridge, "type", "bridge")
        # A port forwards at once, as behind a real switch with port-fast.
        quick = ("stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
        ip("-n", self.switch, "link", "set", bridge, "type", "bridge", *quick)
        ip("-n", self.switch, "link", "set", bridge, "up")
        return bridge

    def _plug_in(self, node: int) -> None:
        space, port = self.namespace(node), f"port{node}"
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
        ip("link", "add", port, "netns", self.switch, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
        ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")

    # Links

    def cut(self, *nodes: int) -> None:
        """Pull the cables of `nodes`: each is alone, and sees no carrier."""
        for node in nodes:
            ip("-n", self.switch, "link", "set", f"port{node}", "down")

    def split(self, *sides: Sequence[int]) -> None:
        """Break the switch: nodes of one side hear each other only. Nodes not named stay with the first side."""
        for number, side in enumerate(sides):
            if number >= self._bridges:
                self._bridge(number)
                self._bridges += 1
            for node in side:
                device = f"far{node}" if node in self._relays else f"port{node}"
                ip("-n", self.switch, "link", "set", device, "master", f"br{number}")

    def heal(self) -> None:
        """All cables in, one switch, no loss, no delay."""
        for node in self.nodes:
            self._take_out_relay(node)
            ip("-n", self.switch, "link", "set", f"port{node}", "master", "br0", "up")

    def impair_to(
        self, node: int, *, loss: float = 0.0, delay_ms: float = 0.0, jitter_ms: float = 0.0
    ) -> None:
        """What the others send to `node` is lost (0 to 1) or late; nothing given: nothing of it any more."""
        self._impair(node, "to", loss, delay_ms, jitter_ms)

    def impair_from(
        self, node: int, *, loss: float = 0.0, delay_ms: float = 0.0, jitter_ms: float = 0.0
    ) -> None:
        """What `node` sends to the others is lost (0 to 1) or late."""
        self._impair(node, "from", loss, delay_ms, jitter_ms)

    def _impair(self, node: int, way: str, loss: float, delay_ms: float, jitter_ms: float) -> None:
        if node not in self._relays:
            self._put_in_relay(node)
        relay = self._relays[node]
        assert relay.stdin is not None and relay.stdout is not None
        relay.stdin.write(f"{way} {loss} {delay_ms} {jitter_ms}\n")
        relay.stdin.flush()
        assert relay.stdout.readline() == "ready\n", "the relay ended"

    def _put_in_relay(self, node: int) -> None:
        """A cable with faults between the node's port and the bridge that it is at."""
        port, near, far = f"port{node}", f"near{node}", f"far{node}"
        ip("-n", self.switch, "link", "add", near, "type", "veth", "peer", "name", far)
        ip("-n", self.switch, "link", "set", near, "up")
        words = ["ip", "netns", "exec", self.switch, sys.executable, str(_RELAY), port, near]
        pipe = subprocess.PIPE
        relay = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment())
        self._relays[node] = relay
        assert relay.stdout is not None and relay.stdout.readline() == "ready\n", "the relay did not start"
        bridge = _checked("ip", "-n", self.switch, "-o", "link", "show", port).split(" master ")[1].split()[0]
        ip("-n", self.switch, "link", "set", port, "nomaster")
        ip("-n", self.switch, "link", "set", far, "master", bridge, "up")

    def _take_out_relay(self, node: int) -> None:
        relay = self._relays.pop(node, None)
        if relay is None:
            return
        relay.communicate(timeout=10)
        ip("-n", self.switch, "link", "del", f"far{node}")

    # Processes

    @contextmanager
    def inside(self, node: int) -> Iterator[None]:
        """This thread in the namespace of `node`: sockets opened meanwhile are opened there, and stay there."""
        with (
            Path("/proc/thread-self/ns/net").open() as home,
            Path(f"/run/netns/{self.namespace(node)}").open() as there,
        ):
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def pids(self, node: int) -> list[int]:
        """The processes of that node, however they were started."""
        found = [int(pid) for pid in ip("netns", "pids", self.namespace(node)).split()]
        return [pid for pid in found if pid != os.getpid()]

    def signal_all(self, node: int, number: signal.Signals) -> None:
        """Send to every process of the node, again until no new one is found."""
        reached: set[int] = set()
        while new := set(self.pids(node)) - reached:
            for pid in new:
                _kill(pid, number)
            reached |= new

    def close(self) -> None:
        """End every process in the namespaces, and the namespaces."""
        for relay in self._relays.values():
            relay.kill()
            relay.communicate()
        self._relays.clear()
        _remove(self.name)

    def leftovers(self) -> list[str]:
        """Namespaces that are still there."""
        return _spaces(self.name)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _spaces(name: str) -> list[str]:
    found = (line.split()[0] for line in ip("netns", "list").splitlines() if line)
    return [space for space in found if re.fullmatch(rf"{name}[snp]\d*", space)]


def _remove(name: str) -> None:
    spaces = _spaces(name)
    for space in spaces:
        wait_until(lambda space=space: _emptied(space), f"the processes of {space} to end")
    for space in spaces:
        ip("netns", "del", space)


def _emptied(space: str) -> bool:
    pids = [int(pid) for pid in ip("netns", "pids", space).split()]
    pids = [pid for pid in pids if pid != os.getpid() and not _is_zombie(pid)]
    for pid in pids:
        _kill(pid, signal.SIGKILL)
    return not pids


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _sweep() -> None:
    """Remove the networks of test runs that were killed."""
    runs = {
        match[1]: match[2]
        for space in _spaces(rf"{_PREFIX}\d+x\d+")
        if (match := re.match(r"(\D+(\d+)x\d+)", space))
    }
    for name, pid in runs.items():
        if not Path(f"/proc/{pid}").exists():
            _remove(name)
