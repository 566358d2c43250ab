"""Traps of who is a member, who is dead, and what a majority knows (dlm.md 6.8), each put back once (`traps_kit`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from lockds_kit import Lockd, Program, holders, lockds, start
from medium_kit import Ring
from traps_kit import Traps

from clustermd.dlm import replica
from clustermd.dlm.engine import Engine
from clustermd.dlm.install import plan_install
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import Mode
from clustermd.dlm.replica import Replica
from clustermd.dlm.shown import AT_ONCE, Shown
from clustermd.group.agreed import change
from clustermd.group.agreed.fencing import Fencing
from clustermd.group.agreed.group import AgreedGroup
from clustermd.group.agreed.hello import Life, tagged
from clustermd.group.process_group import Left

Patch = pytest.MonkeyPatch
trap = Traps()


def test_the_tag_of_a_message_counts_whole_trap_3() -> None:
    """Both sides of a cut may have the same ring sequence: the lowest node of the ring tells them apart."""
    ring, (one, _, three) = lockds(3)
    ring.split((1, 2), (3,))
    ring.run()
    number, sequence, lowest = one.node.view.ring
    before = one.applied
    one.node.group.on_message((2, 201), tagged((number, sequence, lowest + 2), 0, True, b"other side"))
    assert one.applied == before and not [
        heard for heard in one.node.of("message") if heard[2] == b"other side"
    ]
    assert not three.node.view.quorate


def _shown_at_once(patch: Patch) -> None:
    really = Shown.put
    patch.setattr(Shown, "put", lambda self, number, after, frame: really(self, number, AT_ONCE, frame))


@trap(_shown_at_once)
def test_a_grant_that_only_its_own_node_heard_is_shown_to_nobody_trap_1() -> None:
    ring, (one, two, _) = lockds(3)
    a, b = Program(one), Program(two)
    mine = a.ask(Mode.EX)
    (message,) = [data for node, data in ring.under_way if node is one.node]
    one.node.group.on_message(
        (1, one.node.pid), message
    )  # its own message comes to it first, and to nobody else
    one.node.group.swept()
    assert holders(one) == [("node1", "EX", False)], "granted in its own state"
    ring.split((1,), (2, 3))
    ring.run()
    theirs = b.ask(Mode.EX)
    ring.run()
    assert not a.has(mine) and b.has(theirs)


def _quorum_means_nothing(patch: Patch) -> None:
    really = Replica.on_view
    patch.setattr(AgreedGroup, "_pause", lambda self, reason: None)
    patch.setattr(Replica, "on_view", lambda self, view: really(self, view) if view.quorate else None)


@trap(_quorum_means_nothing)
def test_what_is_delivered_without_quorum_is_not_applied_trap_2() -> None:
    ring, (_, _, three) = lockds(3)
    c = Program(three)
    c.ask(Mode.EX)
    late = [data for node, data in ring.under_way if node is three.node]
    ring.split((1, 2), (3,))
    before = three.applied
    for data in late:
        three.node.group.on_message((3, three.node.pid), data)
    assert three.applied == before
    ring.run()
    assert three.applied == before and not holders(three)
    assert three.fates[-1] == "suspended"


def _any_quorum_will_do(patch: Patch) -> None:
    really = AgreedGroup.on_quorum
    patch.setattr(AgreedGroup, "on_quorum", lambda self, quorate, ring: really(self, quorate, self._ring))


@trap(_any_quorum_will_do)
def test_quorum_counts_for_the_ring_that_it_was_told_of_however_late_it_comes_trap_4() -> None:
    ring, (one, *_) = lockds(3)
    group, old = one.node.group, (ring.sequence, 1)
    views = len(one.node.of("view"))
    one.node.side = frozenset((1,))
    group.on_change(((1, one.node.pid),), (2, 3), ())
    group.on_ring((ring.sequence + 4, 1), (1,))
    group.on_quorum(True, old)  # the service has not heard of the new ring yet
    ring.run()
    assert len(one.node.of("view")) == views, "no view before the quorum of this very ring is known"
    group.on_quorum(False, (ring.sequence + 4, 1))
    ring.run()
    assert not one.node.view.quorate


def _two_histories_are_merged(patch: Patch) -> None:
    def plan(*args: Any) -> Any:
        really = plan_install(*args)
        if isinstance(really, str) or really.authority is None:
            return really
        applied = really.applied | {key: args[1][key].applied for key in really.foreign}
        return dataclasses.replace(
            really,
            foreign={},
            behind=(*really.behind, *really.foreign),
            members=tuple(sorted((*really.members, *really.foreign))),
            applied=applied,
        )

    patch.setattr(replica, "plan_install", plan)


@trap(_two_histories_are_merged)
def test_a_node_that_is_up_again_is_not_merged_into_a_history_that_went_on_without_it_trap_5() -> None:
    ring, (one, two, three) = lockds(3)
    b, c = Program(two), Program(three)
    held = c.ask(Mode.PR)
    ring.run()
    assert c.has(held)
    ring.split((1, 2), (3,))
    ring.run()
    b.ask(Mode.PR, b"another")
    ring.run()
    ring.form((1, 2, 3))  # NODEUP: the medium brings both sides together, and says nothing of what each did
    ring.run()
    assert "went on without this node" in three.restart
    assert not one.restart and not two.restart
    assert holders(one) == [("node3", "PR", True)], "until its end is proved"


def _fencing_counts_before_it_succeeds(patch: Patch) -> None:
    really = Fencing.view

    def view(self: Fencing, lost: list[Life], *rest: Any, **more: Any) -> None:
        really(self, lost, *rest, **more)
        self._proofs.update((life.key, "it will surely be fenced") for life in lost)

    patch.setattr(Fencing, "view", view)


@trap(_fencing_counts_before_it_succeeds)
def test_of_two_nodes_that_are_both_quorate_none_goes_on_before_the_other_is_fenced_trap_8() -> None:
    ring, (one, two) = lockds(2, quorate=lambda side: True)
    a, b = Program(one), Program(two)
    ring.split((1,), (2,))
    ring.run()
    ours, theirs = a.ask(Mode.EX), b.ask(Mode.EX)
    ring.run()
    assert one.node.view.quorate and two.node.view.quorate
    assert not a.has(ours) and not b.has(theirs)
    assert "node 2" in one.replica.status()["waits"]
    ring.nodes.remove(two.node)
    one.node.group.fence_done(2, "its power is off")
    ring.run()
    assert a.has(ours)


def _the_next_lockd_is_a_proof(patch: Patch) -> None:
    patch.setattr(change, "_proof_by_presence", lambda life, now: "it is back" if now is not None else "")


@trap(_the_next_lockd_is_a_proof)
def test_a_lockd_that_is_back_does_not_prove_that_its_old_programs_ended_trap_9() -> None:
    ring, (one, _, three) = lockds(3)
    a, c = Program(one), Program(three)
    held = c.ask(Mode.EX)
    ring.run()
    ring.end(three.node)
    again = start(ring, 3, 2)
    waits = a.ask(Mode.EX)
    new = Program(again)
    also = new.ask(Mode.EX)
    ring.run()
    assert c.has(held) and not a.has(waits) and not new.has(also)
    assert holders(one) == [("node3", "EX", True)]
    ring.end(again.node)
    start(ring, 3, 3, ended=[(1, "its programs have ended"), (2, "its programs have ended")])
    assert a.has(waits)


def _a_proof_is_for_the_node(patch: Patch) -> None:
    really = Machine._fenced

    def fenced(self: Machine, node: int, incarnation: int) -> None:
        for key in [key for key in self.nodes if key[0] == node]:
            self.nodes[key].lost = True
            really(self, *key)

    patch.setattr(Machine, "_fenced", fenced)


@trap(_a_proof_is_for_the_node)
def test_a_proof_of_a_former_life_leaves_the_new_one_alone_trap_10() -> None:
    ring, (one, _, three) = lockds(3)
    ring.end(three.node)
    again = start(ring, 3, 2)
    c = Program(again)
    held = c.ask(Mode.EX)
    ring.run()
    one.node.group.vouch("node3", "its old programs were killed by hand")
    ring.run()
    assert c.has(held) and holders(one) == [("node3", "EX", False)]


def _the_fencer_does_not_look_again(patch: Patch) -> None:
    patch.setattr(Fencing, "_stop", lambda self, node: None)


@trap(_the_fencer_does_not_look_again)
def test_a_node_that_came_back_is_not_fenced_any_more_trap_11() -> None:
    ring, (one, two, three) = lockds(3)
    ring.lose(three.node)
    ring.run()
    assert [victim.incarnation for victim in one.node.fencing] == [1]
    again = start(ring, 3, 2, boot="the next boot")
    assert one.node.cancelled == [3], "the agent that is under way is stopped"
    one.node.group.fence_done(3, "too late")
    ring.tick(60)
    assert not again.node.expelled and again.installed
    assert len(one.node.fencing) == 1 and not two.node.fencing


def _lost_is_dead(patch: Patch) -> None:
    really = Machine._install

    def install(self: Machine, *args: Any) -> None:
        really(self, *args)
        for node, incarnation in [key for key, state in self.nodes.items() if state.lost]:
            self._fenced(node, incarnation)

    patch.setattr(Machine, "_install", install)


@trap(_lost_is_dead)
def test_what_a_lost_node_held_is_freed_when_it_is_fenced_and_not_before_trap_12() -> None:
    ring, (one, _, three) = lockds(3)
    a, c = Program(one), Program(three)
    c.ask(Mode.EX)
    ring.run()
    waits = a.ask(Mode.EX)
    ring.lose(three.node)
    ring.run()
    assert one.installed and not a.has(waits)
    other = a.ask(Mode.EX, b"another")
    ring.run()
    assert a.has(other), "what it does not hold is given as ever"
    one.node.group.fence_done(3, "off")
    ring.run()
    assert a.has(waits)


def _a_converter_loses_all(patch: Patch) -> None:
    really = Engine.lose_sessions

    def lose(self: Engine, keys: Any) -> None:
        keys = list(keys)
        for place in list(self.locks.values()):
            if place.lock.session in keys and place.lock in place.resource.converting:
                self._forget(place.resource, place.lock)
        really(self, keys)

    patch.setattr(Engine, "lose_sessions", lose)


@trap(_a_converter_loses_all)
def test_a_lost_converter_keeps_what_it_was_granted_trap_13() -> None:
    ring, (one, two, three) = lockds(3)
    a, b, c = Program(one), Program(two), Program(three)
    first, second = a.ask(Mode.PR), c.ask(Mode.PR)
    ring.run()
    c.send("convert", c.lock(second), int(Mode.EX), 0, None)
    ring.run()
    ring.lose(three.node)
    ring.run()
    a.free(first)
    writes = b.ask(Mode.EX)
    ring.run()
    assert not b.has(writes) and holders(two) == [("node3", "PR", True)]


def _each_word_of_the_medium_is_a_view(patch: Patch) -> None:
    really = AgreedGroup.on_change

    def on_change(self: AgreedGroup, *change: Any) -> None:
        really(self, *change)
        if self._events is not None:
            self._events.on_view(self.view)

    patch.setattr(AgreedGroup, "on_change", on_change)


@trap(_each_word_of_the_medium_is_a_view)
def test_one_change_that_comes_as_two_is_one_view_trap_19() -> None:
    ring, (one, two, three) = lockds(3)
    views = len(one.node.of("view"))
    ring.end(three.node)  # who left ...
    again = Lockd(ring, 3, 2)
    ring.form(
        (1, 2, 3), joined=[again.node]
    )  # ... and in the same breath who joined: two words are said on the way
    again.join()
    ring.run()
    assert again.installed
    for daemon in (one, two):
        assert len(daemon.node.of("view")) == views + 1
        assert daemon.node.view.left == ((three.node.group.me, Left.LOST),)
        assert daemon.node.view.joined == (again.node.group.me,)


def start_with_pid(ring: Ring, pid: int) -> int:
    """Node 3's next lockd, which happens to be process `pid` again. Returns its incarnation."""
    again = Lockd(ring, 3, 2)
    again.node.pid = again.node.group._pid = pid
    ring.form([node.number for node in ring.nodes], joined=[again.node])
    again.join()
    ring.run()
    return again.node.group.me.incarnation


def _a_pid_is_a_process(patch: Patch) -> None:
    patch.setattr(Life, "key", property(lambda self: (self.member.node, 1)))


@trap(_a_pid_is_a_process)
def test_another_process_with_the_same_pid_is_another_life_trap_21() -> None:
    ring, (one, _, three) = lockds(3)
    Program(three).ask(Mode.EX)
    ring.run()
    ring.end(three.node)
    number = start_with_pid(ring, three.node.pid)
    assert [member.incarnation for member, _ in one.node.view.left] == [1]
    assert [member.incarnation for member in one.node.view.members if member.node == 3] == [number]
    assert holders(one) == [("node3", "EX", True)]


test_a_story_fails_with_its_trap_put_back = trap.test()
