"""The simulated group of one machine: one order, views, proofs, and nobody who acts while the order is frozen."""

from __future__ import annotations

from typing import Any

import pytest

from clustermd.group.process_group import Busy, Left, Member, View
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop
from clustermd.testing.simulator.order import BUSY_AT, Port, SimGroup


class Ear:
    """What one member hears. `all` is the sequence, `views`, `messages`, `stable`, `fenced` are its parts."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Any]] = []
        self.stable = 0

    def on_view(self, view: View) -> None:
        self.all.append(("view", view))
        self.stable = 0

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        self.all.append(("message", payload))

    def on_stable(self, index: int) -> None:
        assert index >= self.stable
        self.stable = index

    def on_fenced(self, member: Member, proof: str) -> None:
        self.all.append(("fenced", member))

    @property
    def views(self) -> list[View]:
        return [what for word, what in self.all if word == "view"]

    @property
    def messages(self) -> list[bytes]:
        return [what for word, what in self.all if word == "message"]

    @property
    def fenced(self) -> list[Member]:
        return [what for word, what in self.all if word == "fenced"]


class Kit:
    def __init__(self, seed: int, nodes: int) -> None:
        self.failed: list[dict[str, Any]] = []
        dice = Dice(seed)
        self.loop = SimLoop(dice.stream("loop"), self.failed.append)  # type: ignore[abstract]
        self.group = SimGroup(self.loop, dice)
        self.ports: dict[int, Port] = {}
        self.ears: dict[int, Ear] = {}
        for node in range(1, nodes + 1):
            self.join(node)
        self.run()

    def join(self, node: int, incarnation: int = 1) -> None:
        ear = self.ears[node] = Ear()
        port = self.ports[node] = self.group.port(node, incarnation, Process(f"node{node}"))
        port.events = ear
        self.group.join(port)

    def run(self, for_s: float = 1.0) -> None:
        until_s = self.loop.time() + for_s
        self.loop.later(for_s, int)  # time goes on that far though nothing else happens
        self.loop.run(lambda: False, until_s)
        assert not self.failed

    def numbers(self, node: int) -> tuple[int, ...]:
        return tuple(member.node for member in self.ears[node].views[-1].members)


SEEDS = range(12)


def test_all_hear_the_same_messages_in_one_order() -> None:
    orders = set()
    for seed in SEEDS:
        kit = Kit(seed, 3)
        sent = []
        for number in range(20):
            payload = bytes([number])
            kit.ports[1 + number % 3].multicast(payload)
            sent.append(payload)
        kit.run()
        heard = [kit.ears[node].messages for node in (1, 2, 3)]
        assert heard[0] == heard[1] == heard[2]
        assert sorted(heard[0]) == sent
        for sender in range(3):
            own = [payload for payload in heard[0] if payload[0] % 3 == sender]
            assert own == sorted(own), "a sender's own messages keep their order"
        assert all(ear.stable == 20 for ear in kit.ears.values())
        orders.add(tuple(heard[0]))
    assert len(orders) > 5


def test_a_full_queue_says_busy() -> None:
    kit = Kit(1, 2)
    for _ in range(BUSY_AT):
        kit.ports[1].multicast(b"x")
    with pytest.raises(Busy):
        kit.ports[1].multicast(b"x")
    kit.run()
    kit.ports[1].multicast(b"y")
    kit.run()
    assert len(kit.ears[2].messages) == BUSY_AT + 1


def test_a_loss_is_a_view_then_a_proof_and_a_goodbye_needs_none() -> None:
    kit = Kit(2, 5)
    kit.ports[2].process.alive = False
    kit.group.lose(kit.ports[2])
    kit.group.leave(kit.ports[4])
    kit.run()
    left = dict(pair for view in kit.ears[1].views for pair in view.left)
    assert left[kit.ports[2].me] is Left.LOST and left[kit.ports[4].me] is Left.LEFT
    assert not kit.ears[1].fenced
    kit.group.fence(kit.ports[2].me, "its last request has landed")
    kit.run()
    assert kit.ears[1].fenced == kit.ears[3].fenced == [kit.ports[2].me]
    assert kit.group.lost == {}


def test_a_newcomer_hears_of_who_is_lost_and_not_proved_dead() -> None:
    kit = Kit(3, 3)
    lost = kit.ports[2].me
    kit.group.lose(kit.ports[2])
    kit.run()
    kit.join(2, incarnation=2)
    kit.run()
    assert (lost, Left.LOST) in kit.ears[2].views[0].left
    assert lost not in kit.ears[2].views[0].members


def test_what_a_durable_order_has_taken_survives_its_sender() -> None:
    for seed in SEEDS:
        kit = Kit(seed, 3)
        for number in range(10):
            kit.ports[3].multicast(bytes([number]))
        kit.run(0.001)
        heard = list(kit.ears[3].messages)
        kit.ports[3].process.alive = False
        kit.group.lose(kit.ports[3])
        kit.run()
        assert kit.ears[1].messages == kit.ears[2].messages
        assert kit.ears[1].messages[: len(heard)] == heard


def test_a_paused_member_hears_everything_when_it_goes_on() -> None:
    kit = Kit(6, 3)
    kit.loop.pause(kit.ports[2].process)
    kit.ports[1].multicast(b"one")
    kit.run(5.0)
    assert kit.ears[2].messages == [] and kit.ears[3].messages == [b"one"]
    kit.loop.resume(kit.ports[2].process)
    kit.run()
    assert kit.ears[2].messages == [b"one"]


def test_nobody_may_act_while_the_order_is_frozen() -> None:
    kit = Kit(7, 2)
    kit.ports[1].multicast(b"on its way")
    kit.group.freeze()
    kit.run()
    assert not kit.ears[1].views[-1].quorate
    kit.ports[1].multicast(b"waits")
    kit.run()
    assert kit.ears[2].messages == []
    kit.group.thaw()
    kit.run()
    assert kit.ears[2].views[-1].quorate
    kit.ports[1].multicast(b"goes")
    kit.run()
    assert kit.ears[1].messages == kit.ears[2].messages
    assert kit.ears[2].messages[-1] == b"goes"


def test_rings_only_grow() -> None:
    kit = Kit(8, 3)
    for _ in range(3):
        kit.group.freeze()
        kit.run()
        kit.group.thaw()
        kit.run()
    for ear in kit.ears.values():
        rings = [view.ring for view in ear.views]
        assert rings == sorted(set(rings)) and len(rings) >= 5
