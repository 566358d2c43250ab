"""Storms over replicas: clients, joins, deaths and sequencer deaths at any point between two deliveries.

Replicas agree after every entry, clients never hold what excludes each other, and when all is
quiet no operation has been lost. `Cluster` (`clustermd.testing.locks.replicas`) does the checking.
"""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.dlm.modes import Flag
from clustermd.group.process_group import Left
from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster, Node

SPACE = "array"
NAMES = (b"token", b"message", b"bitmap0000")
LVB = 64
FLAGS = (0, int(Flag.VALBLK), int(Flag.VALBLK | Flag.NOQUEUE), int(Flag.NODLCKWT), int(Flag.CONVDEADLK))


class Storm:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.cluster = Cluster(3)
        self.seen: Counter[str] = Counter()
        self.broken = False
        self.uneven = False
        for node in self.cluster.nodes.values():
            node.client().send("join", SPACE, LVB, 4)
        self.cluster.settle()

    def step(self) -> None:
        draw = self.draw
        word = draw.choices(
            ("client", "operation", "accept", "deliver", "settle", "lose", "fence", "start", "break", "busy",
             "client gone"),
            (2, 60, 50, 90, 3, 0.5, 2, 2, 1, 2, 1),
        )[0]  # fmt: skip
        self.seen[word] += 1
        cluster, group = self.cluster, self.cluster.group
        nodes = [cluster.nodes[member] for member in sorted(cluster.nodes)]
        node = draw.choice(nodes)
        if word == "client":
            if len(node.clients) < 4:
                node.client().send("join", SPACE, LVB, 4)
        elif word == "operation":
            self.operation(node)
        elif word == "accept":
            group.accept(node.member)
        elif word == "deliver":
            group.deliver(node.member)
        elif word == "settle":
            group.settle()
        elif word == "lose" and len(nodes) > 1 and not self.broken and self.even():
            cluster.lose(node, Left.LOST)
        elif word == "fence" and cluster.gone and not self.broken:
            cluster.fence(cluster.gone[0])
        elif word == "start" and len(nodes) < 4 and not self.broken:
            used = {member.node for member in cluster.nodes}
            cluster.start(min({1, 2, 3, 4} - used))
            group.view()
        elif word == "break" and not self.broken:
            group.break_sequencer()
            self.broken = self.uneven = True
        elif word == "busy":
            node.port.limit = draw.choice((1, 2, 1 << 30))
        elif word == "client gone" and node.clients:
            self.lose_client(node, draw.choice(list(node.clients.values())))
        if self.broken and draw.random() < 0.1:
            self.mend()

    def even(self) -> bool:
        """Whether nobody knows what others can only learn from him: that may not be lost (it was stable)."""
        nodes = list(self.cluster.nodes.values())
        if self.uneven and all(node.replica.installed for node in nodes):
            self.uneven = len({node.machine.epoch for node in nodes}) > 1
        return not self.uneven

    def mend(self) -> None:
        """A new sequencer takes over."""
        self.cluster.group.view()
        self.broken = False

    def operation(self, node: Node) -> None:
        draw = self.draw
        alive = [client for client in node.clients.values() if client.words("done") and not client.lost]
        if not alive:
            return
        client = draw.choice(alive)
        locks = [lock for lock in client.locks if lock in client.held or lock in client.pending]
        kind = draw.choices(
            ("request", "convert", "unlock", "cancel", "recovered", "leave"), (4, 8, 2, 2, 1, 0.1)
        )[0]
        lvb = draw.randbytes(LVB)
        if kind == "request":
            mode = draw.randrange(6)
            flags = int(Flag.EXPEDITE) if mode == 0 else draw.choice(FLAGS[:3])
            client.send("request", SPACE, draw.choice(NAMES), mode, flags, draw.random() < 0.5)
        elif kind == "recovered":
            client.send("recovered", SPACE, draw.randrange(1, 5), 1 << 40)
        elif kind == "leave":
            client.send("leave", SPACE)
        elif kind == "convert" and (idle := [lock for lock in locks if lock not in client.pending]):
            flags = draw.choice(FLAGS)
            client.send("convert", draw.choice(idle), draw.randrange(6), flags, lvb)
        elif locks and kind == "unlock":
            client.send("unlock", draw.choice(locks), int(Flag.FORCEUNLOCK), lvb)
        elif locks and kind == "cancel":
            client.send("cancel", draw.choice(locks))

    def lose_client(self, node: Node, client: Client) -> None:
        if not client.lost:
            node.lose_client(client)
        elif not client.ended:
            client.held.clear()
            node.end_client(client)

    def quiet(self) -> None:
        if self.broken:
            self.mend()
        for node in self.cluster.nodes.values():
            node.port.limit = 1 << 30
        self.cluster.settle()
        if not any(node.machine.applied for node in self.cluster.nodes.values()):
            # nobody who knew the state is left: a new one begins only when the dead are proved dead
            for node in list(self.cluster.gone):
                self.cluster.fence(node)
            self.cluster.settle()
        self.cluster.check_quiet()

    def empty(self) -> None:
        """Everybody ends: nothing is left anywhere (I27)."""
        for node in list(self.cluster.gone):
            self.cluster.fence(node)
        for node in self.cluster.nodes.values():
            for client in node.clients.values():
                if not client.ended:
                    client.lost = True
                    node.end_client(client)
        self.cluster.settle()
        for node in self.cluster.nodes.values():
            engine = node.machine.engine
            assert not engine.spaces and not engine.locks and not engine.sessions
            assert not any(state.lost for state in node.machine.nodes.values())


def run(seed: int, steps: int) -> Counter[str]:
    storm = Storm(random.Random(seed))
    for _ in range(steps):
        storm.step()
    storm.quiet()
    storm.empty()
    return storm.seen


def test_storms_of_known_seeds() -> None:
    seen: Counter[str] = Counter()
    for seed in range(20):
        seen += run(seed, 800)
    assert min(seen[word] for word in ("lose", "fence", "start", "break", "client gone")) > 20, seen


@given(st.integers(0, 1 << 40), st.integers(50, 400))
@settings(max_examples=40, deadline=None)
def test_storms_of_new_seeds(seed: int, steps: int) -> None:
    run(seed, steps)
