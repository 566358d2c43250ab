"""The corosync bindings against three real daemons: order, reasons, rings, quorum, back-pressure, loss,
votes, keys.

The connections are this process's own, one into each node's namespace, so (node, this process id) is a member.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from corosync_kit import CorosyncCluster, Node, Options, corosync_cluster

from clustermd.group.corosync import cmap
from clustermd.group.corosync.cpg import Cpg, Reason
from clustermd.group.corosync.errors import CorosyncRefused, Status
from clustermd.group.corosync.quorum import Quorum
from clustermd.group.corosync.votequorum import NodeState, Rules, Votequorum

pytestmark = [pytest.mark.system, pytest.mark.needs("root", "ip", "corosync")]

PID = os.getpid()
TOKEN_MS = 500


@pytest.fixture
def cluster() -> Iterator[CorosyncCluster]:
    with corosync_cluster(3, Options(token_ms=TOKEN_MS)) as cluster:
        yield cluster


@dataclass
class Client:
    """A member of the group on one node, and all that it heard, in the order in which it heard it."""

    node: Node
    name: bytes = b"test"
    heard: list[tuple[Any, ...]] = field(default_factory=list)
    rings: list[tuple[tuple[int, int], tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with self.node.inside():
            self.cpg = Cpg(
                self.name, self.deliver, self.change, lambda ring, nodes: self.rings.append((ring, nodes))
            )

    def deliver(self, node: int, pid: int, payload: bytes) -> None:
        self.heard.append(("message", node, pid, payload))

    def change(self, members: Any, left: Any, joined: Any) -> None:
        self.heard.append(("change", sorted(members), sorted(left), sorted(joined)))

    @property
    def payloads(self) -> list[bytes]:
        return [event[3] for event in self.heard if event[0] == "message"]

    @property
    def changes(self) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.heard if event[0] == "change"]

    def reason_for(self, node: int, change: str) -> Reason | None:
        """The last reason with which `node` `left` or `joined`."""
        at = 1 if change == "left" else 2
        reasons = [one[2] for event in self.changes for one in event[at] if one[0] == node]
        return reasons[-1] if reasons else None


class Group:
    """Clients of several nodes that are dispatched together."""

    def __init__(self, cluster: CorosyncCluster, stack: ExitStack) -> None:
        self.cluster, self.stack = cluster, stack
        self.clients: dict[int, Client] = {}

    def enter(self, *numbers: int) -> None:
        """Join on those nodes, one after the other."""
        for number in numbers:
            client = Client(self.cluster.node(number))
            self.clients[number] = client
            self.stack.callback(client.cpg.close)
            self.until(client.cpg.join, f"node {number} to join")
            members = sorted((at, PID) for at in self.clients)
            self.until(
                lambda m=members: all(c.changes and c.changes[-1][0] == m for c in self.clients.values()),
                "the join",
            )

    def dispatch(self) -> None:
        for client in self.clients.values():
            client.cpg.dispatch()

    def until(self, condition: Callable[[], bool], what: str) -> float:
        def after_dispatch() -> bool:
            self.dispatch()
            return condition()

        return self.cluster.wait_until(after_dispatch, what, timeout_s=20)

    def send(self, number: int, payload: bytes) -> None:
        self.until(lambda: self.clients[number].cpg.send(payload), f"node {number} to send")


@pytest.fixture
def group(cluster: CorosyncCluster) -> Iterator[Group]:
    with ExitStack() as stack:
        yield Group(cluster, stack)


def test_all_nodes_hear_the_same_in_the_same_order(group: Group) -> None:
    group.enter(1, 2, 3)
    before = {number: len(client.heard) for number, client in group.clients.items()}
    for count in range(200):
        for number in group.clients:
            group.send(number, b"%d:%d" % (number, count))
    group.until(lambda: all(len(client.payloads) == 600 for client in group.clients.values()), "600 messages")
    told = [client.heard[before[number] :] for number, client in group.clients.items()]
    assert told[0] == told[1] == told[2]
    for number in group.clients:
        own = [event[3] for event in told[0] if event[1] == number]
        assert own == [b"%d:%d" % (number, count) for count in range(200)], (
            "of one sender in the order of sending"
        )
    assert {event[2] for event in told[0]} == {PID}


def test_a_process_can_come_back_at_once(group: Group) -> None:
    group.enter(1, 2)
    group.clients.pop(1).cpg.close()
    group.enter(1)
    assert group.clients[2].changes[-2][1] == [(1, PID, Reason.PROCDOWN)]
    assert group.clients[2].changes[-1][2] == [(1, PID, Reason.JOIN)]
    with group.cluster.node(1).inside():
        twice = Cpg(b"test", lambda *_: None, lambda *_: None, lambda *_: None)
    with closing(twice), pytest.raises(CorosyncRefused) as refused:
        twice.join()
    assert refused.value.code == "corosync-exists"


def test_payloads_come_as_they_were_sent(group: Group) -> None:
    group.enter(1, 2)
    client = group.clients[1]
    assert client.cpg.local_node == 1
    assert client.cpg.max_payload >= 1 << 16
    for payload in (b"", b"\0", b"a\0b\0", os.urandom(1 << 16), bytes(client.cpg.max_payload)):
        group.send(1, payload)
        group.until(lambda p=payload: all(p in c.payloads for c in group.clients.values()), "delivery")
    with pytest.raises(CorosyncRefused) as refused:
        client.cpg.send(bytes(client.cpg.max_payload + 1))
    assert refused.value.code == "corosync-too-big"


def test_the_length_of_a_name_belongs_to_it(cluster: CorosyncCluster, group: Group) -> None:
    group.enter(1)
    other = Client(cluster.node(1), name=b"test\0")
    with closing(other.cpg):
        group.until(other.cpg.join, "the join")
        group.until(lambda: bool(other.cpg.dispatch() or other.changes), "the other group")
        assert other.changes[0][0] == [(1, PID)]
    assert len(group.clients[1].changes) == 1


def test_reasons_of_joins_and_leaves(cluster: CorosyncCluster, group: Group) -> None:
    group.enter(1, 2, 3)
    one = group.clients[1]
    assert one.changes[-1] == ([(1, PID), (2, PID), (3, PID)], [], [(3, PID, Reason.JOIN)])
    newest = group.clients[3].changes[0]
    assert newest[2] == [(3, PID, Reason.JOIN)], "a joiner hears of itself only as of one who joined"

    group.until(group.clients[3].cpg.leave, "leave")
    group.until(lambda: one.reason_for(3, "left") is Reason.LEAVE, "LEAVE")

    group.clients.pop(2).cpg.close()
    group.until(lambda: one.reason_for(2, "left") is Reason.PROCDOWN, "PROCDOWN")

    group.clients.pop(3).cpg.close()
    group.enter(3)
    cluster.network.cut(3)
    group.until(lambda: one.reason_for(3, "left") is Reason.NODEDOWN, "NODEDOWN")
    cluster.network.heal()
    group.until(lambda: one.reason_for(3, "joined") is Reason.NODEUP, "NODEUP")
    three = group.clients[3]
    group.until(lambda: three.reason_for(1, "joined") is Reason.NODEUP, "NODEUP on the other side")

    cluster.node(3).kill()
    group.clients.pop(3)
    group.until(lambda: one.changes[-1][1] == [(3, PID, Reason.NODEDOWN)], "NODEDOWN of a killed corosync")


def test_rings_and_quorum_are_found_by_the_whole_ring(cluster: CorosyncCluster, group: Group) -> None:
    told: dict[int, list[tuple[bool, tuple[int, int], tuple[int, ...]]]] = {1: [], 3: []}
    connections = {}
    for number, events in told.items():
        with cluster.node(number).inside():
            connections[number] = Quorum(lambda *event, events=events: events.append(event))
        group.stack.callback(connections[number].close)
    group.enter(1, 2, 3)

    def both_tell(number: int, nodes: tuple[int, ...]) -> bool:
        connections[number].dispatch()
        rings = group.clients[number].rings
        return bool(told[number] and rings) and told[number][-1][1:] == rings[-1] == (rings[-1][0], nodes)

    group.until(lambda: both_tell(1, (1, 2, 3)) and both_tell(3, (1, 2, 3)), "the first ring")
    assert told[1][-1] == told[3][-1]
    assert told[1][-1][0] is True
    first = told[1][-1][1]
    assert first[1] == 1, "a ring is (sequence, lowest node)"

    cluster.network.cut(3)
    group.until(lambda: both_tell(1, (1, 2)) and both_tell(3, (3,)), "both sides of the partition")
    assert told[1][-1][0] is True
    assert told[3][-1][0] is False
    assert told[1][-1][1] > first and told[1][-1][1][1] == 1
    assert told[3][-1][1] > first and told[3][-1][1][1] == 3
    assert told[1][-1][1] != told[3][-1][1]

    cluster.network.heal()
    group.until(lambda: both_tell(1, (1, 2, 3)) and both_tell(3, (1, 2, 3)), "the ring after the heal")
    assert told[1][-1] == told[3][-1]


def test_back_pressure_says_try_again_and_loses_nothing(group: Group) -> None:
    group.enter(1, 2)
    sender = group.clients[1].cpg
    sent = 0
    refused = 0
    while refused < 20:
        if sender.send(b"%08d" % sent + bytes(32 << 10)):
            sent += 1
        else:
            refused += 1
            group.dispatch()
        assert sent < 50_000, "corosync never said TRY_AGAIN"
    group.until(
        lambda: all(len(client.payloads) == sent for client in group.clients.values()), f"{sent} messages"
    )
    for client in group.clients.values():
        assert [int(payload[:8]) for payload in client.payloads] == list(range(sent))


def test_dispatch_ends_although_messages_keep_waiting(group: Group) -> None:
    group.enter(1)
    client = group.clients[1]
    for count in range(1000):
        group.cluster.wait_until(lambda c=count: client.cpg.send(b"%d" % c), "a send")
    assert len(client.payloads) == 0
    group.until(lambda: bool(client.payloads), "the first delivery")
    assert len(client.payloads) < 1000
    group.until(lambda: len(client.payloads) == 1000, "all")


def test_an_exception_in_a_callback_comes_out_of_dispatch(cluster: CorosyncCluster, group: Group) -> None:
    group.enter(1, 2)
    heard: list[bytes] = []

    def deliver(_node: int, _pid: int, payload: bytes) -> None:
        heard.append(payload)
        raise ValueError(payload)

    with cluster.node(1).inside():
        broken = Cpg(b"broken", deliver, lambda *_: None, lambda *_: None)
    with closing(broken):
        cluster.wait_until(broken.join, "the join")
        cluster.wait_until(lambda: broken.send(b"first"), "the send")
        cluster.wait_until(lambda: broken.send(b"second"), "the send")
        with pytest.raises(ValueError, match="first"):
            cluster.wait_until(lambda: broken.dispatch() < 0, "the exception", timeout_s=10)
        assert heard == [b"first"]


def test_a_killed_corosync_ends_each_connection_with_one_clear_error(
    cluster: CorosyncCluster, group: Group
) -> None:
    group.enter(1, 2)
    node = cluster.node(1)
    with node.inside():
        quorum, votes = Quorum(lambda *_: None), Votequorum(lambda _: None)
    with closing(quorum), closing(votes):
        node.kill()
        for connection in (group.clients[1].cpg, quorum, votes):
            with pytest.raises(CorosyncRefused) as lost:
                cluster.wait_until(lambda c=connection: c.dispatch() < 0, "the error")
            assert lost.value.code == "corosync-lost"
            assert lost.value.status is Status.LIBRARY
            assert "systemctl start corosync" in lost.value.message
        with pytest.raises(CorosyncRefused) as lost:
            group.clients[1].cpg.send(b"to nobody")
        assert lost.value.code == "corosync-lost"
    group.clients.pop(1).cpg.close()
    with node.inside(), pytest.raises(CorosyncRefused) as away:
        Client(node)
    assert away.value.code == "corosync-not-running"
    with node.inside(), pytest.raises(CorosyncRefused) as away:
        cmap.cluster_name()
    assert away.value.code == "corosync-not-running"


def test_send_and_dispatch_return_while_corosync_is_stopped(group: Group) -> None:
    group.enter(1, 2)
    node = group.cluster.node(1)
    node.pause()
    try:
        signal.alarm(10)  # a call that waits would wait for ever
        client = group.clients[1]
        sent = sum(client.cpg.send(bytes(16 << 10)) for _ in range(200))
        assert 0 < sent < 200, "the queue is full one day"
        client.cpg.dispatch()
    finally:
        signal.alarm(0)
        node.resume()
    group.until(lambda: len(group.clients[2].payloads) == sent, "what was sent meanwhile")


def test_votes_and_their_rules(cluster: CorosyncCluster, group: Group) -> None:
    with cluster.node(1).inside():
        connection = Votequorum()
    with closing(connection):
        mine = connection.votes(1)
        assert mine is not None
        assert (mine.votes, mine.expected_votes, mine.total_votes, mine.quorum) == (1, 3, 3, 2)
        assert mine.rules == Rules.QUORATE
        assert mine.state is NodeState.MEMBER
        assert connection.votes(77) is None
        cluster.node(3).kill()
        cluster.wait(1, 2)
        lost = connection.votes(3)
        assert lost is not None and lost.state is NodeState.DEAD
        assert (lost.total_votes, lost.quorum) == (2, 2)


def test_what_corosync_is_configured_with(cluster: CorosyncCluster) -> None:
    with cluster.node(2).inside():
        assert cmap.nodelist() == tuple(
            cmap.ConfiguredNode(number, f"node{number}", (f"10.199.0.{number}",), 1) for number in (1, 2, 3)
        )
        assert cmap.local_number() == 2
        assert cmap.cluster_name() == "bench"
        assert cmap.timeouts() == cmap.Timeouts(TOKEN_MS, TOKEN_MS * 12 // 10)
        with closing(cmap.Cmap()) as keys:
            assert keys.uint32("no.such.key") is None
            assert keys.string("totem.transport") == "knet"
            assert keys.uint64("runtime.members.1.config_version") == 0
            assert "nodelist.node.1.name" in list(keys.keys("nodelist.node.1."))
            with pytest.raises(CorosyncRefused) as wrong:
                keys.uint32("totem.cluster_name")
            assert wrong.value.status is Status.INVALID_PARAM


def test_two_nodes_are_both_quorate_when_they_are_parted() -> None:
    options = Options(transport="udpu", token_ms=TOKEN_MS, two_node=True)
    with corosync_cluster(2, options) as cluster:
        with cluster.node(1).inside():
            connection = Votequorum()
        with closing(connection):
            votes = connection.votes(1)
            assert votes is not None
            assert votes.rules == Rules.QUORATE | Rules.TWO_NODE | Rules.WAIT_FOR_ALL
            assert votes.quorum == 1
        cluster.network.cut(2)
        cluster.wait(1)
        cluster.wait(2)


def test_a_cluster_without_votes_is_refused() -> None:
    with corosync_cluster(1, start=False) as cluster:
        node = cluster.node(1)
        node.conf.write_text(node.conf.read_text().replace("provider: corosync_votequorum", ""))
        node.start()
        refused: list[str] = []

        def look() -> bool:
            try:
                with node.inside():
                    Quorum(lambda *_: None).close()
            except CorosyncRefused as error:
                refused.append(error.code)
            return refused[-1:] not in ([], ["corosync-not-running"])

        cluster.wait_until(look, "an answer about quorum")
        assert refused[-1] == "corosync-no-quorum"


@contextmanager
def as_nobody() -> Iterator[None]:
    """This process as an ordinary user, for a while."""
    nobody, groups = 65534, os.getgroups()
    os.setgroups([])
    os.setresgid(nobody, nobody, 0)
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def test_users_without_access_are_told_how_to_get_it(cluster: CorosyncCluster) -> None:
    with cluster.node(1).inside(), as_nobody(), pytest.raises(CorosyncRefused) as refused:
        cmap.nodelist()
    assert refused.value.code == "corosync-no-access"
    assert "/etc/corosync/uidgid.d" in refused.value.message


def test_a_machine_is_paused_loses_power_and_boots(cluster: CorosyncCluster) -> None:
    node = cluster.node(3)
    beside = node.popen("sleep", "600")
    node.pause_machine()
    cluster.wait(1, 2)
    node.resume_machine()
    cluster.wait()
    node.power_off()
    assert beside.wait(10) == -signal.SIGKILL
    assert cluster.network.pids(3) == []
    cluster.wait(1, 2)
    node.boot()
    cluster.wait()


def test_nothing_of_a_cluster_remains_after_a_failure_in_the_middle() -> None:
    with pytest.raises(ZeroDivisionError), corosync_cluster(2) as cluster:  # noqa: PT012 (the middle is the point)
        pids = [node.daemon.pid for node in cluster.nodes if node.daemon is not None]
        left = cluster.node(2).popen("sleep", "600")
        cluster.network.impair_from(1, loss=0.1)
        cluster.node(1).pause()
        1 / 0  # noqa: B018
    assert len(pids) == 2
    assert left.wait(0) == -signal.SIGKILL
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not [path for pid in pids for path in Path("/dev/shm").glob(f"*{pid}*")]
    assert cluster.leftovers() == []


def test_a_side_of_a_split_switch_and_one_way_loss(cluster: CorosyncCluster) -> None:
    cluster.network.split((1,), (2, 3))
    cluster.wait(2, 3)
    cluster.wait(1, quorate=False)
    cluster.network.heal()
    cluster.wait()
    cluster.network.impair_to(1, loss=1.0)
    cluster.wait(2, 3)
    cluster.wait(1, quorate=False)
    cluster.network.heal()
    cluster.wait()
    cluster.network.impair_from(1, delay_ms=20, jitter_ms=10)
    cluster.node(3).stop()
    cluster.wait(1, 2)
