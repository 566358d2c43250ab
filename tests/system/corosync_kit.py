"""Real clusters of corosync daemons on one machine, one network namespace a node.

Each node has a namespace, a host name and a /run of its own (corosync's lock file and its abstract sockets
would collide otherwise), and a directory for state and log. A test makes a `CorosyncCluster`, lets things
happen to nodes and links, and waits for what corosync says: `wait` looks through the quorum service of every
node that runs. A fixture of its own kind:

    @pytest.fixture
    def cluster():
        with corosync_cluster(3) as cluster:
            yield cluster

Detection takes token + consensus, 2.2 times `token_ms`; the kernel's clocks of all nodes are one.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from netns_kit import Network, environment, refused

from clustermd.group.corosync.errors import CorosyncRefused
from clustermd.group.corosync.quorum import Quorum
from clustermd.testing.waiting import TimedOut

PATIENCE_S = 30.0
_LOOK_AGAIN_S = 0.02
_KEY_BYTES = 256
_ENTER = 'hostname "$1" && mount --bind "$2" /run && shift 2 && exec "$@"'
_CRYPTO = "crypto_model: openssl\n  crypto_cipher: aes256\n  crypto_hash: sha256\n  keyfile: {key}"


@dataclass(frozen=True)
class Options:
    """What corosync.conf says. `token_ms` is in force as it is (no coefficient); None leaves a line out."""

    transport: str = "knet"
    """`knet`, encrypted, or `udpu`."""
    token_ms: int = 1000
    consensus_ms: int | None = None
    two_node: bool = False
    wait_for_all: bool | None = None
    expected_votes: int | None = None
    auto_tie_breaker: bool = False
    last_man_standing: bool = False
    votes: dict[int, int] = field(default_factory=dict)
    """Votes of nodes that have not just one."""
    cluster_name: str = "bench"


@dataclass(frozen=True)
class Seen:
    """What a node's corosync says: has it quorum, in which ring (sequence, lowest node), with whom."""

    quorate: bool
    ring: tuple[int, int]
    nodes: tuple[int, ...]


class Node:
    """One machine: its number, name, directories, and its corosync when that runs."""

    def __init__(self, network: Network, number: int, base: Path) -> None:
        self.network, self.number, self.name = network, number, f"node{number}"
        self.base = base / str(number)
        self.run_dir, self.state_dir = self.base / "run", self.base / "state"
        self.conf, self.log = self.base / "corosync.conf", self.base / "corosync.log"
        for directory in (self.run_dir / "lock", self.state_dir):
            directory.mkdir(parents=True)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.paused = False
        self.seen: Seen | None = None
        self._quorum: Quorum | None = None

    @property
    def address(self) -> str:
        return self.network.address(self.number)

    @property
    def environment(self) -> dict[str, str]:
        """For programs of this node. CLUSTERMD_RUN is short, and the same path inside and outside of the
        namespace.
        """
        return {
            **environment(),
            "CLUSTERMD_RUN": str(self.run_dir / "clustermd"),
            "CLUSTERMD_NODE": self.name,
        }

    def words(self, *command: str) -> list[str]:
        """`command` as a command line that enters this node's namespaces; it keeps its process id."""
        enter = ("ip", "netns", "exec", self.network.namespace(self.number), "unshare", "--uts")
        return [*enter, "sh", "-c", _ENTER, "sh", self.name, str(self.run_dir), *command]

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this node. The network ends it if the test does not."""
        options.setdefault("env", self.environment)
        return subprocess.Popen(self.words(*command), **options)

    def run(
        self, *command: str, timeout_s: float = PATIENCE_S, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this node to its end."""
        options.setdefault("env", self.environment)
        options.setdefault("check", False)
        words = self.words(*command)
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, **options)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread on this node, to connect to its corosync; the connection is good afterwards, too."""
        with self.network.inside(self.number):
            yield

    # corosync

    @property
    def running(self) -> bool:
        return self.daemon is not None and self.daemon.poll() is None

    def start(self) -> None:
        """Start corosync; `CorosyncCluster.wait` tells when it has come up."""
        assert not self.running, f"corosync of {self.name} runs already"
        out = self.base / "corosync.out"
        with out.open("ab") as output:
            self.daemon = self.popen(
                "corosync",
                "-f",
                "-c",
                str(self.conf),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End corosync cleanly (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to corosync only: the machine lives on."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP to corosync only."""
        assert self.daemon is not None
        self.paused = True
        self.daemon.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.daemon.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT to corosync."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGCONT)
        self.paused = False

    # The whole machine

    def pause_machine(self) -> None:
        """SIGSTOP to every process of the node, as when a virtual machine is paused."""
        self.paused = True
        self.network.signal_all(self.number, signal.SIGSTOP)

    def resume_machine(self) -> None:
        self.network.signal_all(self.number, signal.SIGCONT)
        self.paused = False

    def boot(self) -> None:
        """Start corosync after `power_off`, with an empty /run, as after a boot. The kernel's boot_id stays
        what it was.
        """
        for path in self.run_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        (self.run_dir / "lock").mkdir()
        self.start()

    def power_off(self) -> None:
        """SIGKILL to every process of the node, corosync too. Its /run can be read until it boots."""
        self.network.signal_all(self.number, signal.SIGKILL)
        self._ended()

    def _end(self, number: signal.Signals) -> None:
        assert self.daemon is not None
        self.daemon.send_signal(number)
        self._ended()

    def _ended(self) -> None:
        if self.daemon is None:
            return
        try:
            self.daemon.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"corosync of {self.name} does not end\n{self.last_words()}") from None
        self.paused = False
        self.forget()
        clear_shared_memory(self.daemon.pid)
        self.daemon = None

    def look(self) -> Seen | None:
        """What corosync says now; None while it does not run. Of a paused one, the last that was heard."""
        if not self.running:
            self.forget()
            return None
        if self._quorum is None and not self.paused:
            try:
                with self.inside():
                    self._quorum = Quorum(self._hear)
            except CorosyncRefused:
                return None
        if self._quorum is not None:
            try:
                self._quorum.dispatch()
            except CorosyncRefused:
                self.forget()
        return self.seen

    def fileno(self) -> int:
        """Readable when there is something to `look` at; -1 without a connection."""
        return -1 if self._quorum is None else self._quorum.fileno()

    def forget(self) -> None:
        """Close our own connection."""
        if self._quorum is not None:
            self._quorum.close()
        self._quorum, self.seen = None, None

    def _hear(self, quorate: bool, ring: tuple[int, int], nodes: tuple[int, ...]) -> None:
        self.seen = Seen(quorate, ring, nodes)

    def last_words(self) -> str:
        """The end of its log, for a person who wonders."""
        texts = [
            path.read_text(errors="replace")
            for path in (self.base / "corosync.out", self.log)
            if path.exists()
        ]
        return f"--- {self.name}: {self.look() if not self.paused else 'paused'}\n" + "\n".join(
            "".join(texts).splitlines()[-12:]
        )


class CorosyncCluster:
    """`count` nodes with corosync.conf written and, unless told otherwise, all started and quorate."""

    def __init__(self, count: int, options: Options | None = None) -> None:
        self.options = options or Options()
        self.base = Path(tempfile.mkdtemp(prefix="cs-", dir="/tmp"))
        self.authkey = self.base / "authkey"
        self.authkey.write_bytes(os.urandom(_KEY_BYTES))
        self.authkey.chmod(0o400)
        self.network = Network(count)
        self.nodes = [Node(self.network, number, self.base) for number in self.network.nodes]
        for node in self.nodes:
            node.conf.write_text(conf_text(self.options, self.nodes, self.authkey) + machine_text(node))

    def node(self, number: int) -> Node:
        return self.nodes[number - 1]

    def start(self, *numbers: int) -> None:
        """Start corosync on those nodes (all, if none is named) and wait until they are quorate together."""
        nodes = [self.node(number) for number in numbers] or self.nodes
        for node in nodes:
            node.start()
        self.wait(*numbers)

    def wait(
        self,
        *numbers: int,
        members: Sequence[int] | None = None,
        quorate: bool = True,
        timeout_s: float = PATIENCE_S,
    ) -> float:
        """Wait until each of the nodes `numbers` (all, if none is named) sees exactly `members` (the same
        nodes, unless given) in one ring, with or without quorum. The seconds that took. Raises TimedOut with
        what each saw.
        """
        at = numbers or tuple(self.network.nodes)
        expected = tuple(sorted(members if members is not None else at))

        def as_awaited() -> bool:
            views = [self.node(number).look() for number in at]
            rings = {view.ring for view in views if view is not None}
            return len(rings) == 1 and all(
                view is not None and view.quorate == quorate and tuple(sorted(view.nodes)) == expected
                for view in views
            )

        what = f"{'' if quorate else 'no '}quorum of nodes {expected} as nodes {at} see it"
        return self.wait_until(as_awaited, what, timeout_s)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> float:
        """Wait for a condition on what nodes see; looked at after each event of any corosync. The seconds it
        took.
        """
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                raise TimedOut(
                    f"waited {timeout_s:g} s for {what}\n"
                    + "\n".join(node.last_words() for node in self.nodes)
                )
            descriptors = [node.fileno() for node in self.nodes if node.fileno() >= 0 and not node.paused]
            select.select(descriptors, [], [], _LOOK_AGAIN_S)
        return time.monotonic() - began

    def close(self) -> None:
        """End everything, also after a failure in the middle."""
        pids = [node.daemon.pid for node in self.nodes if node.daemon is not None]
        for node in self.nodes:
            if node.daemon is not None:
                node.daemon.kill()
                node.daemon.wait()
            node.forget()
        self.network.close()
        for pid in pids:
            clear_shared_memory(pid)
        shutil.rmtree(self.base)

    def leftovers(self) -> list[str]:
        return [*self.network.leftovers(), *([str(self.base)] if self.base.exists() else [])]


@contextmanager
def corosync_cluster(
    count: int, options: Options | None = None, *, start: bool = True
) -> Iterator[CorosyncCluster]:
    """A cluster for one test or one file of tests; skips where namespaces are refused, leaves nothing behind."""
    reason = refused()
    if reason is not None:
        if os.environ.get("CLUSTERMD_TESTS_MUST_RUN"):
            pytest.fail(f"cannot run here, and CI is set: {reason}", pytrace=False)
        pytest.skip(reason)
    cluster = CorosyncCluster(count, options)
    try:
        if start:
            cluster.start()
        yield cluster
    finally:
        cluster.close()
    assert not cluster.leftovers(), f"left behind: {cluster.leftovers()}"


def clear_shared_memory(pid: int) -> None:
    """A corosync that was killed leaves its rings and its flight recorder, some 8 MiB each."""
    shared = Path("/dev/shm")
    for path in (*shared.glob(f"qb-{pid}-*"), *shared.glob(f"qb-corosync-{pid}-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def conf_text(options: Options, nodes: Sequence[Node], authkey: Path) -> str:
    """corosync.conf as far as it is the same on all nodes. The parser wants one directive a line."""
    totem = [
        "version: 2",
        f"cluster_name: {options.cluster_name}",
        f"transport: {options.transport}",
        "ip_version: ipv4",
        f"token: {options.token_ms}",
        "token_coefficient: 0",
    ]
    if options.transport == "knet":
        totem.append(_CRYPTO.format(key=authkey))
    if options.consensus_ms is not None:
        totem.append(f"consensus: {options.consensus_ms}")
    members = ""
    for node in nodes:
        lines = [f"ring0_addr: {node.address}", f"nodeid: {node.number}", f"name: {node.name}"]
        if node.number in options.votes:
            lines.append(f"quorum_votes: {options.votes[node.number]}")
        members += _section("node", lines)
    rules = {
        "two_node": options.two_node or None,
        "wait_for_all": options.wait_for_all,
        "expected_votes": options.expected_votes,
        "auto_tie_breaker": options.auto_tie_breaker or None,
        "last_man_standing": options.last_man_standing or None,
    }
    quorum = ["provider: corosync_votequorum"]
    quorum += [f"{name}: {int(value)}" for name, value in rules.items() if value is not None]
    return _section("totem", totem) + f"nodelist {{\n{members}}}\n" + _section("quorum", quorum)


def machine_text(node: Node) -> str:
    """The lines that let several daemons live on one machine."""
    system = ["sched_rr: no", "priority: 0", "move_to_root_cgroup: no", "allow_knet_handle_fallback: yes"]
    logging = [
        "to_stderr: no",
        "to_syslog: no",
        "to_logfile: yes",
        f"logfile: {node.log}",
        "timestamp: hires",
    ]
    return _section("system", [*system, f"state_dir: {node.state_dir}"]) + _section("logging", logging)


def _section(name: str, lines: Sequence[str]) -> str:
    return f"{name} {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
