"""The model of corosync does what corosync was seen to do: each sentence of dlm.md 5.2 that one may trip over."""

from __future__ import annotations

from typing import Any

from clustermd.group.agreed.hello import Peer
from clustermd.group.corosync.cpg import Reason
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop
from clustermd.testing.simulator.totem import Client, Connection, Totem


class Ear(Client):
    """What one process hears, in order; quorum comes beside it."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []
        self.over = False

    def on_confchg(
        self,
        members: tuple[Peer, ...],
        left: tuple[tuple[Peer, Reason], ...],
        joined: tuple[tuple[Peer, Reason], ...],
    ) -> None:
        self.all.append(("change", members, left, joined))

    def on_ring(self, ring: tuple[int, int], nodes: frozenset[int]) -> None:
        self.all.append(("ring", ring, nodes))

    def on_deliver(self, peer: Peer, data: bytes) -> None:
        self.all.append(("message", data))

    def on_quorum(self, quorate: bool, ring: tuple[int, int]) -> None:
        self.all.append(("quorum", quorate, ring))

    def lost(self) -> None:
        self.over = True

    def of(self, word: str) -> list[Any]:
        return [heard[1:] if len(heard) > 2 else heard[1] for heard in self.all if heard[0] == word]


class Kit:
    def __init__(self, seed: int, nodes: int, *, two_node: bool = False, wait_for_all: bool = False) -> None:
        self.failed: list[dict[str, Any]] = []
        dice = Dice(seed)
        self.loop = SimLoop(dice.stream("loop"), self.failed.append)  # type: ignore[abstract]
        self.totem = Totem(
            self.loop,
            dice,
            dict.fromkeys(range(1, nodes + 1), 1),
            two_node=two_node,
            wait_for_all=wait_for_all,
        )
        self.ears: dict[int, Ear] = {}
        self.ways: dict[int, Connection] = {}
        for node in range(1, nodes + 1):
            self.start(node)
        self.run()

    def start(self, node: int) -> None:
        self.totem.start(node)
        ear = self.ears[node] = Ear()
        self.ways[node] = self.totem.connect(node, 100, Process(f"node{node}"), ear)

    def run(self, for_s: float = 5.0) -> None:
        until_s = self.loop.time() + for_s
        self.loop.later(for_s, int)  # time goes on that far though nothing else happens
        self.loop.run(lambda: False, until_s)
        assert not self.failed

    def send(self, node: int, data: bytes) -> None:
        while not self.ways[node].send(data):
            self.run(0.002)


def test_all_hear_one_order_and_one_membership() -> None:
    for seed in range(8):
        kit = Kit(seed, 3)
        for number in range(20):
            kit.send(1 + number % 3, bytes([number]))
        kit.run()
        orders = [ear.of("message") for ear in kit.ears.values()]
        assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 20
        assert all(ear.of("change")[-1][0] == ((1, 100), (2, 100), (3, 100)) for ear in kit.ears.values())
        assert all(ear.of("quorum")[-1][0] for ear in kit.ears.values())


def test_who_is_cut_off_may_have_had_its_own_messages_alone_and_others_agree() -> None:
    alone = 0
    for seed in range(60):
        kit = Kit(seed, 3)
        for number in range(6):
            kit.send(3, bytes([number]))
            kit.send(1, bytes([100 + number]))
        kit.totem.cut({3})
        kit.run(0.3)  # nobody has noticed
        old = list(kit.ears[3].of("message"))
        kit.run()
        after = [kit.ears[node].of("message") for node in (1, 2)]
        assert after[0] == after[1]
        alone += any(data not in after[0] for data in old)
        rings = {node: ear.of("ring")[-1][0] for node, ear in kit.ears.items()}
        assert rings[1][0] == rings[3][0] and rings[1] != rings[3], "one sequence on both sides"
        assert not kit.ears[3].of("quorum")[-1][0] and kit.ears[1].of("quorum")[-1][0]
        left = [change[1] for change in kit.ears[1].of("change") if change[1]]
        assert left == [(((3, 100), Reason.NODEDOWN),)]
    assert alone > 3


def test_a_minority_goes_on_telling_itself_and_comes_back_with_its_history() -> None:
    kit = Kit(1, 3)
    kit.totem.cut({3})
    kit.run()
    kit.send(3, b"alone")
    kit.run()
    assert b"alone" in kit.ears[3].of("message") and b"alone" not in kit.ears[1].of("message")
    kit.totem.cut(())
    kit.run()
    assert kit.ears[1].of("change")[-1][2] == (((3, 100), Reason.NODEUP),)


def test_rings_changes_and_quorum_come_in_any_order_and_a_change_as_one_or_two() -> None:
    orders, halves = set(), set()
    for seed in range(40):
        kit = Kit(seed, 3)
        kit.totem.cut({3})
        kit.run()
        kit.ears[1].all.clear()
        kit.totem.cut({2})  # one goes and another one comes
        kit.run()
        words = [heard[0] for heard in kit.ears[1].all]
        halves.add(sum(bool(left) for _, left, _ in kit.ears[1].of("change")))
        halves.add(sum(bool(left) and bool(joined) for _, left, joined in kit.ears[1].of("change")) + 10)
        orders.add(tuple(dict.fromkeys(words)))
    assert len(orders) >= 4, orders
    assert {10, 11} <= halves, "told as two changes, and as one"


def test_a_process_that_ends_is_told_without_a_new_ring_and_a_clean_stop_as_well() -> None:
    kit = Kit(2, 3)
    rings = len(kit.ears[1].of("ring"))
    kit.totem.process_gone(kit.ways[2], 0.01)
    kit.run()
    assert kit.ears[1].of("change")[-1][1] == (((2, 100), Reason.PROCDOWN),)
    assert len(kit.ears[1].of("ring")) == rings
    kit.totem.stop(3)
    kit.run()
    assert kit.ears[3].over
    assert kit.ears[1].of("change")[-1][1] == (((3, 100), Reason.PROCDOWN),)


def test_who_stood_still_finds_itself_alone_first() -> None:
    kit = Kit(3, 3)
    kit.totem.pause(3)
    kit.run()
    kit.ears[3].all.clear()
    kit.totem.resume(3)
    kit.run()
    assert [nodes for _, nodes in kit.ears[3].of("ring")] == [frozenset({3}), frozenset({1, 2, 3})]
    assert [quorate for quorate, _ in kit.ears[3].of("quorum")] == [False, True]


def test_two_nodes_are_both_quorate_when_cut_and_one_that_starts_alone_is_not() -> None:
    kit = Kit(4, 2, two_node=True)
    kit.totem.cut({2})
    kit.run()
    assert all(ear.of("quorum")[-1][0] for ear in kit.ears.values())
    kit.totem.kill(2)
    kit.run()
    kit.start(2)
    kit.run()
    assert not kit.ears[2].of("quorum")[-1][0]


def test_a_dead_daemon_ends_its_clients_and_the_others_go_on() -> None:
    kit = Kit(5, 3)
    kit.totem.kill(2)
    kit.run()
    assert kit.ears[2].over
    kit.send(1, b"on")
    kit.run()
    assert kit.ears[3].of("message") == [b"on"]
