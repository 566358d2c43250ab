"""Traps of a daemon that must never stand still, nor go without a word (dlm.md 6.8), each put back once."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lockds_kit import SPACE, Program, holders, lockds, start
from traps_kit import Traps

import clustermd
from clustermd.conf import Conf
from clustermd.dlm import outbox, replica
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import Flag, Mode
from clustermd.dlm.outbox import Outbox
from clustermd.errors import Refused
from clustermd.group.agreed import group as agreed
from clustermd.group.agreed.change import Configured
from clustermd.group.agreed.group import AgreedGroup
from clustermd.group.corosync import group as corosync

Patch = pytest.MonkeyPatch
trap = Traps()


def test_nothing_that_hears_the_order_can_wait_for_anything_trap_30() -> None:
    """What is called for each delivery imports nothing that blocks: no files, sockets, processes, threads or sleep."""
    source = Path(clustermd.__file__).parent
    blocking = {"asyncio", "os", "pathlib", "queue", "select", "socket", "subprocess", "threading", "time"}
    clients = {"session.py", "session_lock.py", "session_lockspace.py"}
    looked = 0
    for path in [*(source / "dlm").glob("*.py"), *(source / "group" / "agreed").glob("*.py")]:
        if path.name in clients:
            continue
        looked += 1
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & blocking, f"{path.name}: {names}"
    assert looked > 15


def _deaf_while_it_wants_to_speak(patch: Patch) -> None:
    really = AgreedGroup.on_message

    def on_message(self: AgreedGroup, peer: Any, data: bytes) -> None:
        if not self._outgoing:
            really(self, peer, data)

    patch.setattr(AgreedGroup, "on_message", on_message)


@trap(_deaf_while_it_wants_to_speak)
def test_who_must_try_again_hears_on_meanwhile_trap_31() -> None:
    ring, (one, two, _) = lockds(3)
    a, b = Program(one), Program(two)
    one.node.full = True
    mine = [a.ask(Mode.PR) for _ in range(50)]
    theirs = b.ask(Mode.PR)
    ring.tick(1)
    assert b.has(theirs) and holders(one) == [("node2", "PR", False)]
    one.node.full = False
    ring.tick(1)
    assert all(map(a.has, mine)), "and loses nothing of what it wanted to say"


def _goes_without_a_word(patch: Patch) -> None:
    patch.setattr(AgreedGroup, "leave", lambda self, done: done())


@trap(_goes_without_a_word)
def test_a_lockd_that_stops_in_order_says_goodbye_first_and_nobody_is_fenced_trap_34() -> None:
    ring, (one, two, three) = lockds(3)
    a, c = Program(one), Program(three)
    c.send("leave", SPACE)
    ring.run()
    three.replica.session_end(c.number, "it said goodbye", clean=True)
    ring.run()
    gone: list[bool] = []
    three.node.group.leave(lambda: gone.append(True))
    ring.run()
    assert gone
    ring.end(three.node)  # PROCDOWN, as it looks when corosync itself is stopped
    ring.run()
    ring.form((1, 2), gone=(3,))
    ring.run()
    ring.tick(60)
    assert not one.node.fencing and not two.node.fencing
    assert not one.node.group.status()["lost"] and len(one.replica.status()["nodes"]) == 2
    got = a.ask(Mode.EX)
    ring.run()
    assert a.has(got)


def _votes_are_no_matter(patch: Patch) -> None:
    really = corosync.common_configuration
    patch.setattr(
        corosync,
        "common_configuration",
        lambda cluster, nodes, conf: really(cluster, tuple(replace(node, votes=1) for node in nodes), conf),
    )


@trap(_votes_are_no_matter)
def test_a_node_whose_votes_were_edited_alone_is_sent_away_trap_35() -> None:
    nodes = (Configured(1, "node1", 1), Configured(2, "node2", 1), Configured(3, "node3", 1))
    more = (*nodes[:2], replace(nodes[2], votes=3))
    ours, theirs = (corosync.common_configuration("c", some, Conf()) for some in (nodes, more))
    ring, (one, two, three) = lockds(3, config=ours)
    ring.end(three.node)
    again = start(ring, 3, 2, config=theirs)
    assert "configuration" in again.node.expelled and "node3 (3)" in again.node.expelled
    assert not one.node.expelled and two.installed
    for changed in (
        replace(Conf(), fence="lease"),
        replace(Conf(), fence="lease", lease_s=20.0),
        replace(Conf(), device_bound_s=1.0),
    ):
        assert corosync.common_configuration("c", nodes, changed) != ours


def _no_bound(patch: Patch) -> None:
    patch.setattr(Outbox, "check_room", lambda self, session, word: None)


@trap(_no_bound)
def test_what_waits_to_be_ordered_is_bounded_and_the_refusal_says_so_trap_39() -> None:
    ring, (one, *_) = lockds(3)
    a, other = Program(one), Program(one)
    held = a.ask(Mode.EX)
    ring.run()
    ring.split((1,), (2,), (3,))
    ring.run()
    asked = [a.ask(Mode.NL, flags=Flag.EXPEDITE) for _ in range(outbox.OF_A_SESSION)]
    a.ask(Mode.PR)
    assert len(a.heard("refused")) == 1
    refused = a.heard("refused")[0]
    assert refused[2] == "too-many-operations" and "clustermd cluster status" in refused[3]
    freed = a.free(held)
    fits = other.ask(Mode.NL, flags=Flag.EXPEDITE)
    assert len(a.heard("refused")) == 1 and not other.heard("refused"), "giving back is always taken"
    ring.form((1, 2, 3))
    ring.run()
    ring.tick(1)
    assert all(map(a.has, asked)) and other.has(fits)
    assert any(frame[1] == freed for frame in a.heard("cast"))
    more = a.ask(Mode.PR)
    ring.run()
    assert a.has(more), "there is room again"


def test_all_sessions_of_a_node_together_are_bounded_too_trap_39(monkeypatch: Patch) -> None:
    monkeypatch.setattr(outbox, "OF_A_NODE", 10)
    box = Outbox()
    for session in range(10):
        box.check_room(session, "request")
        box.add([session, "request"])
    with pytest.raises(Refused, match="10 lock operations of this node"):
        box.check_room(77, "join")
    box.check_room(77, "unlock")
    box.applied(1)
    box.check_room(77, "join")


def test_nothing_piles_up_while_the_medium_takes_nothing_trap_39() -> None:
    ring, (one, *_) = lockds(3, lease_s=10.0)
    ring.tick(5)
    one.node.full = True
    ring.tick(600)
    assert len(one.node.group._outgoing) < 10
    assert one.node.leases[-1] < ring.clock.at_s


def _texts_of_any_length(patch: Patch) -> None:
    patch.setattr(replica, "TEXT_MOST", 1 << 20)


@trap(_texts_of_any_length)
def test_no_message_is_larger_than_what_is_carried_in_one_piece_trap_40() -> None:
    ring, (one, two, three) = lockds(3)
    a = Program(one)
    group = one.node.group
    with pytest.raises(Refused, match="carries"):
        group.multicast(bytes(group.max_payload + 1))
    number = one.replica.open_session("x" * 200_000, 1)
    one.replica.session_lost(number)
    one.replica.session_end(number, "y" * 200_000, clean=False)
    got = [a.ask(Mode.PR, b"resource%d" % which) for which in range(3000)]
    sizes = []
    while ring.under_way:
        sizes += [len(data) for _, data in ring.under_way]
        ring.run()
    assert all(map(a.has, got)), "nothing that a person wrote stops the others"
    assert len(Machine.dump(one.replica._machine)) > 2 * agreed.MAX_PAYLOAD_BYTES
    ring.end(three.node)
    again = start(ring, 3, 2)
    assert again.installed and max(sizes) <= agreed.MAX_PAYLOAD_BYTES + 64
    assert holders(two, "resource7") == [("node1", "PR", False)]


test_a_story_fails_with_its_trap_put_back = trap.test()
