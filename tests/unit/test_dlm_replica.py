"""Replicas agree: install points, snapshots, missing tails, zombies, quorum and safe grants (dlm.md 6.2-6.6)."""

from __future__ import annotations

from typing import Any

import pytest

from clustermd.dlm.agreement import ACK_EVERY
from clustermd.dlm.machine import Machine
from clustermd.dlm.messages import CONFIG, Start, decode
from clustermd.dlm.modes import Flag, Mode
from clustermd.group.process_group import Left, Member, View
from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster, Node

SPACE = "array"


def joined(cluster: Cluster, *numbers: int) -> list[Client]:
    """One client on each of those nodes, in the lockspace."""
    cluster.settle()
    clients = []
    for number in numbers:
        client = cluster.node(number).client()
        client.send("join", SPACE, 64, 4)
        cluster.settle()
        assert client.words("done")
        clients.append(client)
    return clients


def request(client: Client, mode: Mode, flags: int = 0, name: bytes = b"token") -> int:
    """Ask for a lock; returns the operation's number."""
    return client.send("request", SPACE, name, int(mode), flags, True)


def lock_of(client: Client, op: int) -> int:
    return next(int(frame[3]) for frame in client.words("answer") if frame[1] == op)


def shown(client: Client, op: int) -> bool:
    return any(frame[1] == op for frame in client.words("cast"))


def holders(node: Node, name: str = "token") -> list[tuple[str, str, bool]]:
    """(node, mode, zombie) of the granted locks, by that node's status."""
    resources = node.replica.status()["lockspaces"][SPACE]["resources"]
    granted = resources.get(name, {"granted": []})["granted"]
    return [(lock["name"], lock["mode"], lock["zombie"]) for lock in granted]


def test_a_lock_is_granted_in_turn_across_nodes() -> None:
    cluster = Cluster(3)
    a, b, _ = joined(cluster, 1, 2, 3)
    first = request(a, Mode.EX)
    second = request(b, Mode.EX)
    cluster.settle()
    assert shown(a, first)
    assert not shown(b, second)
    assert a.words("bast") == [["bast", lock_of(a, first), Mode.EX]]
    a.send("unlock", lock_of(a, first), int(Flag.FORCEUNLOCK), None)
    cluster.settle()
    assert shown(b, second)
    cluster.check_quiet()


def test_nothing_counts_between_a_view_and_its_install_point() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    cluster.start(3)
    group = cluster.group
    op = request(a, Mode.EX)
    group.view()
    assert group.accept(a.node.member)
    before = a.node.machine.applied
    for node in cluster.nodes.values():
        while group.deliver(node.member):
            pass
    assert a.node.machine.applied == before, "held, for not all members have told what they have"
    assert not shown(a, op)
    cluster.settle()
    assert shown(a, op)
    assert holders(b.node) == [("node1", "EX", False)]
    cluster.check_quiet()


def test_a_newcomer_gets_the_state_in_parts_and_goes_on_with_it() -> None:
    cluster = Cluster(2, max_payload=1024)
    a, b = joined(cluster, 1, 2)
    for number in range(40):
        request(a, Mode.PR, int(Flag.VALBLK), b"resource%d" % number)
    cluster.settle()
    newcomer = cluster.start(3)
    cluster.group.view()
    cluster.group.accept(a.node.member)
    request(b, Mode.EX, 0, b"resource7")
    cluster.settle()
    assert newcomer.replica.installed
    assert newcomer.events == ["resumed"]
    cluster.check_quiet()
    resource = newcomer.replica.status()["lockspaces"][SPACE]["resources"]["resource7"]
    assert [lock["wants"] for lock in resource["waiting"]] == ["EX"]


def test_a_snapshot_that_was_damaged_on_its_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(2)
    a, _ = joined(cluster, 1, 2)
    request(a, Mode.EX)
    cluster.settle()
    whole = Machine.dump_sealed
    # the byte that is flipped is of a name: a state that can be read, and is another one
    monkeypatch.setattr(Machine, "dump_sealed", lambda machine: whole(machine).replace(b"token", b"tokem"))
    newcomer = cluster.start(3)
    cluster.group.view()
    cluster.settle()
    assert not newcomer.replica.installed
    assert "damaged" in newcomer.restart


def test_members_that_missed_the_last_messages_apply_them_and_lose_no_completion() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    group = cluster.group
    op = request(b, Mode.EX)
    assert group.accept(b.node.member)
    assert group.deliver(a.node.member), "node1 sees it, node2, whose client asked, does not"
    assert a.node.machine.applied == b.node.machine.applied + 1
    group.break_sequencer()
    assert a.node.events == b.node.events == ["resumed", "suspended"]
    cluster.settle()
    assert not shown(b, op)
    group.view()
    cluster.settle()
    assert shown(b, op)
    assert a.node.events == b.node.events == ["resumed", "suspended", "resumed"]
    cluster.check_quiet()


def test_a_member_that_missed_a_whole_install_catches_up_with_it() -> None:
    cluster = Cluster(3)
    a, b, c = joined(cluster, 1, 2, 3)
    group = cluster.group
    cluster.lose(c.node)
    group.deliver(a.node.member)
    group.deliver(b.node.member)
    op = request(b, Mode.EX)
    assert group.accept(a.node.member) and group.accept(b.node.member)
    while group.deliver(a.node.member):
        pass
    assert a.node.machine.epoch == b.node.machine.epoch + 1, "node1 installed, node2 did not"
    group.break_sequencer()
    group.view()
    cluster.settle()
    cluster.check_quiet()
    assert shown(b, op)
    assert not b.node.restart


def test_what_was_asked_while_nobody_orders_is_done_after() -> None:
    cluster = Cluster(2)
    a, _ = joined(cluster, 1, 2)
    sent = request(a, Mode.EX)
    cluster.group.break_sequencer()
    later = request(a, Mode.PR, 0, b"other")
    cluster.settle()
    assert not shown(a, sent)
    cluster.group.view()
    cluster.settle()
    assert shown(a, sent)
    assert shown(a, later)
    assert [frame[1] for frame in a.words("cast")] == [sent, later]


def test_operations_delivered_twice_change_nothing_the_second_time() -> None:
    cluster = Cluster(2)
    a, _ = joined(cluster, 1, 2)
    group = cluster.group
    op = request(a, Mode.EX)
    repeated = list(a.node.port.sent)
    cluster.settle()
    applied = a.node.machine.engine.next_lock
    a.node.port.sent.extend(repeated)
    while group.accept(a.node.member):
        pass
    cluster.settle()
    assert a.node.machine.engine.next_lock == applied
    assert len([frame for frame in a.words("cast") if frame[1] == op]) == 1
    cluster.check_quiet()


def test_a_lost_node_is_a_zombie_until_it_is_fenced() -> None:
    cluster = Cluster(3)
    a, b, c = joined(cluster, 1, 2, 3)
    held, waiting = request(a, Mode.EX), request(b, Mode.EX)
    cluster.settle()
    assert shown(a, held)
    cluster.lose(a.node)
    cluster.settle()
    assert holders(b.node) == [("node1", "EX", True)]
    assert not shown(b, waiting)
    assert not c.words("slot")
    cluster.fence(a.node)
    cluster.settle()
    assert shown(b, waiting)
    assert c.words("slot") == [["slot", SPACE, 1, 1, "node1"]]
    order = [frame[0] for frame in b.got if frame[0] in ("prep", "slot", "done", "cast")][-4:]
    assert order == ["prep", "slot", "cast", "done"]


def test_a_proof_that_comes_between_view_and_install_point_is_not_lost() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    request(a, Mode.EX)
    waiting = request(b, Mode.EX)
    cluster.settle()
    cluster.lose(a.node)
    cluster.fence(a.node)
    group = cluster.group
    assert group.deliver(b.node.member)
    assert group.deliver(b.node.member)
    assert not shown(b, waiting)
    group.break_sequencer()
    group.fence_again.clear()
    group.unproved.clear()
    group.view()
    cluster.settle()
    assert shown(b, waiting)


def test_a_proof_for_another_life_of_the_node_purges_nothing() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    old = a.node
    cluster.lose(old)
    again = cluster.start(1)
    cluster.group.view()
    cluster.settle()
    client = again.client()
    client.send("join", SPACE, 64, 4)
    cluster.settle()
    assert client.words("done")[0][3] == 3, "slot 1 is kept for the dead"
    request(client, Mode.EX)
    cluster.settle()
    cluster.fence(old)
    cluster.group.order.append(lambda events: events.on_fenced(old.member, "again"))
    cluster.settle()
    assert holders(b.node) == [("node1", "EX", False)]
    cluster.check_quiet()


def test_a_proof_for_a_member_that_lives_purges_nothing() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    request(a, Mode.EX)
    cluster.settle()
    cluster.group.order.append(lambda events: events.on_fenced(a.node.member, "a mistake"))
    cluster.settle()
    assert holders(b.node) == [("node1", "EX", False)]
    cluster.check_quiet()


def test_a_clean_leaver_is_no_zombie() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    a.send("leave", SPACE)
    cluster.settle()
    a.node.end_client(a, clean=True)
    cluster.settle()
    cluster.lose(a.node, Left.LEFT)
    cluster.settle()
    assert [node["name"] for node in b.node.replica.status()["nodes"]] == ["node2"]
    assert not b.words("slot")


def test_who_says_goodbye_without_leaving_is_recovered() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    a.node.end_client(a, clean=True)
    cluster.settle()
    assert [frame[2] for frame in b.words("slot")] == [1]


def test_a_client_that_is_lost_blocks_until_its_end_is_proved() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    request(a, Mode.EX)
    waiting = request(b, Mode.EX)
    cluster.settle()
    a.node.lose_client(a)
    cluster.settle()
    assert holders(b.node) == [("node1", "EX", True)]
    a.held.clear()
    a.node.end_client(a)
    cluster.settle()
    assert shown(b, waiting)
    assert b.words("slot") == [["slot", SPACE, 1, 1, "node1"]]


def test_without_quorum_nothing_is_applied() -> None:
    cluster = Cluster(2)
    a, _ = joined(cluster, 1, 2)
    cluster.group.view(quorate=False)
    op = request(a, Mode.EX)
    cluster.settle()
    assert a.node.events == ["resumed", "suspended"]
    assert not shown(a, op)
    assert a.node.replica.status()["suspended"]
    cluster.group.view()
    cluster.settle()
    assert shown(a, op)
    cluster.check_quiet()


def test_a_right_is_shown_only_when_its_message_is_stable() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    group = cluster.group
    group.stable = False
    op = request(a, Mode.EX)
    cluster.settle()
    assert holders(b.node) == [("node1", "EX", False)], "granted in the order, not yet shown"
    assert not shown(a, op)
    a.node.on_stable(group.index)
    assert shown(a, op)
    lock = lock_of(a, op)
    down = a.send("convert", lock, int(Mode.NL), 0, None)
    refused = request(b, Mode.EX, 0)
    failed = request(b, Mode.EX, int(Flag.NOQUEUE))
    cluster.settle()
    assert shown(a, down), "giving up a right waits for nothing"
    assert not shown(b, failed), "but what follows an unstable grant to the same client keeps its place"
    b.node.on_stable(group.index)
    assert [frame[1] for frame in b.words("cast")] == [refused, failed]


def test_the_answer_to_a_request_comes_with_its_grant_or_at_once() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    cluster.group.stable = False
    granted = request(a, Mode.EX)
    waits = request(b, Mode.EX)
    cluster.settle()
    assert granted not in [frame[1] for frame in a.words("answer")], "nobody is woken for half of it"
    assert lock_of(b, waits), "who waits may cancel"
    a.node.on_stable(cluster.group.index)
    assert lock_of(a, granted) and shown(a, granted)


def test_only_messages_that_give_a_right_are_awaited() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    op = request(a, Mode.EX)
    cluster.settle()
    given = cluster.group.index
    assert [node.replica.awaited for node in (a.node, b.node)] == [given, given], "wherever the client is"
    a.send("unlock", lock_of(a, op), int(Flag.FORCEUNLOCK), None)
    cluster.settle()
    assert cluster.group.index > given
    assert [node.replica.awaited for node in (a.node, b.node)] == [given, given]


def test_an_unstable_grant_becomes_stable_with_the_next_install() -> None:
    cluster = Cluster(2)
    a, _ = joined(cluster, 1, 2)
    group = cluster.group
    group.stable = False
    op = request(a, Mode.EX)
    cluster.settle()
    group.break_sequencer()
    group.index = 0  # a new ring may count its messages anew: what was stable in the old one says nothing
    group.view()
    cluster.settle()
    assert a.node.replica.installed
    assert not shown(a, op)
    a.node.on_stable(group.index)
    assert shown(a, op)


def test_a_state_that_the_cluster_left_behind_must_start_anew() -> None:
    cluster = Cluster(3)
    a, b, c = joined(cluster, 1, 2, 3)
    port, cut_off = c.node.port, c.node
    cluster.lose(cut_off)
    cluster.settle()
    cluster.gone.clear()
    cluster.group.unproved.clear()
    cluster.group.ports[port.me] = port
    cluster.nodes[port.me] = cut_off
    port.read = len(cluster.group.order)
    cluster.group.view()
    cluster.settle()
    assert "went on without this node" in cut_off.restart
    assert not a.node.restart
    op = request(b, Mode.EX)
    cluster.settle()
    assert shown(b, op)


def test_a_history_that_is_no_part_of_the_others_starts_anew() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    group = cluster.group
    request(a, Mode.EX)
    group.accept(a.node.member)
    group.deliver(a.node.member)
    group.break_sequencer()
    b.node.machine.chain = bytes(16)
    group.view()
    cluster.settle()
    assert "not a part of the one" in b.node.restart
    assert not a.node.restart


def test_a_differing_state_is_found_and_starts_anew() -> None:
    cluster = Cluster(3)
    a, b, c = joined(cluster, 1, 2, 3)
    cluster.judged = False
    c.node.machine.engine.next_lock += 1
    cluster.group.view()
    cluster.settle()
    assert "differs" in c.node.restart
    assert not a.node.restart and not b.node.restart


def test_a_state_that_differs_is_found_without_a_view_too() -> None:
    cluster = Cluster(3)
    a, b, c = joined(cluster, 1, 2, 3)
    cluster.judged = False
    lock_op = request(a, Mode.NL, int(Flag.EXPEDITE))
    cluster.settle()
    lock = lock_of(a, lock_op)
    c.node.machine.engine.next_lock += 1
    for _ in range(1100):
        a.send("cancel", lock)
        cluster.group.accept(a.node.member)
    cluster.settle()
    assert "differs" in c.node.restart
    assert not a.node.restart and not b.node.restart


def test_nobody_with_state_begins_only_when_the_dead_are_proved_dead() -> None:
    cluster = Cluster(1)
    (a,) = joined(cluster, 1)
    request(a, Mode.EX)
    cluster.settle()
    newcomer = cluster.start(2)
    cluster.lose(a.node)
    cluster.settle()
    assert not newcomer.replica.installed
    cluster.fence(a.node)
    cluster.settle()
    assert newcomer.replica.installed
    (b,) = joined(cluster, 2)
    op = request(b, Mode.EX)
    cluster.settle()
    assert shown(b, op)


def test_another_version_is_told_to_start_anew() -> None:
    cluster = Cluster(3)
    joined(cluster, 1, 2)
    old = cluster.start(4)
    payloads: list[bytes] = []
    really_send, old.port.multicast = old.port.multicast, payloads.append  # type: ignore[method-assign]
    cluster.group.view()
    while cluster.group.deliver(old.member):
        pass
    (start,) = payloads
    really_send(start.replace(CONFIG, bytes(len(CONFIG))))
    cluster.settle()
    assert "another version" in old.restart
    assert all(node.replica.installed for node in cluster.nodes.values() if node is not old)


def test_malformed_frames_are_refused_and_never_raise() -> None:
    cluster = Cluster(1)
    (a,) = joined(cluster, 1)
    before = a.node.machine.applied
    bad: list[Any] = [
        [],
        None,
        ["nonsense", 1],
        ["join", 1],
        ["join", -1, SPACE, 64, 4],
        ["join", 9, "", 64, 4],
        ["join", 9, SPACE, 64, 0],
        ["request", 9, SPACE, "text", 0, 0, True],
        ["request", 9, SPACE, b"", 0, 0, True],
        ["request", 9, SPACE, b"x" * 65, 0, 0, True],
        ["request", 9, SPACE, b"x", 6, 0, True],
        ["request", 9, SPACE, b"x", True, 0, True],
        ["convert", 9, 1, 0, -1, None],
        ["unlock", 9, 1, 0, "text"],
        ["cancel", 9, 1 << 64],
        ["open", 9, "label", 1],
        ["end", 9, "proof", True],
    ]
    frames: list[list[Any]] = []
    a.node.to_session = lambda session, frame: frames.append(frame)  # type: ignore[method-assign]
    for frame in bad:
        a.node.replica.session_frame(a.number, frame)
    a.node.replica.session_frame(999, ["cancel", 9, 1])
    assert [frame[0] for frame in frames] == ["refused"] * (len(bad) + 1)
    assert {frame[2] for frame in frames} == {"bad-frame", "no-session"}
    cluster.settle()
    assert a.node.machine.applied == before


def test_messages_that_are_none_are_ignored() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    for junk in (b"", b"\xc1", b"\x93\xa3ops\x01\x02", b"\x91\x01" * 9):
        a.node.port.sent.append(junk)
    op = request(b, Mode.EX)
    cluster.settle()
    assert shown(b, op)
    cluster.check_quiet()


def test_a_busy_group_delays_but_loses_nothing() -> None:
    cluster = Cluster(2)
    a, _ = joined(cluster, 1, 2)
    a.node.port.limit = 1
    ops = [request(a, Mode.PR, 0, b"r%d" % number) for number in range(30)]
    assert len(a.node.port.sent) == 1
    cluster.settle()
    assert [frame[1] for frame in a.words("cast")] == ops
    cluster.check_quiet()


def test_the_history_kept_for_those_behind_is_bounded() -> None:
    cluster = Cluster(2)
    a, b = joined(cluster, 1, 2)
    op = request(a, Mode.NL, int(Flag.EXPEDITE))
    cluster.settle()
    for _ in range(10 * ACK_EVERY):
        a.send("cancel", lock_of(a, op))
        cluster.group.accept(a.node.member)
    cluster.settle()
    for client in (a, b):
        machine = client.node.machine
        assert machine.applied > 10 * ACK_EVERY
        assert machine.applied - machine.log_start < 4 * ACK_EVERY


class _Said:
    """A group with one replica, which keeps what that multicasts."""

    max_payload = 1 << 16

    def __init__(self, me: Member) -> None:
        self.me = me
        self.payloads: list[bytes] = []
        self.replica = Cluster(1).node(1).replica
        self.replica.attach(self)  # type: ignore[arg-type]

    def start(self, view: View) -> Start:
        """What the replica says to `view`."""
        self.replica.on_view(view)
        (_, _, _, start) = decode(self.payloads[-1])
        return Start.from_wire(start)

    def multicast(self, payload: bytes) -> None:
        self.payloads.append(payload)


def test_who_was_missed_and_is_back_needs_no_proof_when_it_leaves_in_peace() -> None:
    one, two, three = (Member(number, 1, f"node{number}") for number in (1, 2, 3))
    said = _Said(one)

    def unfenced(number: int, members: tuple[Member, ...], left: tuple[tuple[Member, Left], ...]) -> object:
        return said.start(View((9, number), members, (), left, True, (1,) * len(members), 2)).unfenced

    assert unfenced(1, (one, two), ((three, Left.LOST),)) == ((3, 1),)
    assert unfenced(2, (one, two), ()) == ((3, 1),), "nobody has proved it yet"
    assert unfenced(3, (one, two, three), ()) == ()
    assert unfenced(4, (one, two), ((three, Left.LEFT),)) == ()


def test_a_proof_that_the_group_knows_no_more_is_none() -> None:
    one, absent = Member(1, 1, "node1"), Member(2, 0, "node2")
    said = _Said(one)

    def lost(number: int) -> View:
        return View((9, number), (one,), (), ((absent, Left.LOST),), True, (1,), 2)

    assert said.start(lost(1)).unfenced == ((2, 0),)
    said.replica.on_fenced(absent, "off")
    again = said.start(View((9, 2), (one,), (), (), True, (1,), 2))
    assert not again.unfenced and again.fenced == ((2, 0, "off"),)
    said.replica.on_view(View((9, 3), (one,), (), (), False))
    again = said.start(lost(4))
    assert again.unfenced == ((2, 0),) and not again.fenced, "without quorum nobody knows what node 2 did"
