"""What simulated corosyncs found in the agreed group, each as the shortest story that shows it."""

from __future__ import annotations

from typing import Any

from medium_kit import Node, Ring


def test_a_purge_is_a_message_and_is_stable_like_one() -> None:
    """What a purge gives to others must not be shown while only its teller has it (dlm.md 6.2)."""
    ring = Ring(3)
    one, two, three = ring.start(1, 2, 3)
    ring.run()
    ring.lose(three)
    ring.run()
    one.group.fence_done(3, "its power is off")
    ((_, proof),) = ring.under_way
    ring.under_way.clear()
    one.group.on_message((one.number, one.pid), proof)  # its own delivery, before anybody else's
    one.group.swept()
    assert one.of("fenced") and one.stable == 0
    two.group.on_message((one.number, one.pid), proof)
    two.group.swept()
    ring.tick(0.5)
    assert one.stable == two.stable == 1


def test_who_sends_has_not_what_came_before_unless_it_said_so() -> None:
    """A node may send while a message of another is on its way to it, and never get that one (dlm.md 5.2)."""
    ring = Ring(5)
    nodes = ring.start(1, 2, 3, 4, 5)
    ring.run()
    nodes[0].group.multicast(b"may be lost")
    nodes[2].group.multicast(b"sent before that came")
    messages = ring.under_way[:]
    ring.under_way.clear()
    watcher = nodes[1]
    for sender, data in messages:
        watcher.group.on_message((sender.number, sender.pid), data)
    watcher.group.swept()
    assert watcher.stable == 0, "only two of five are known to have the first"


def test_a_node_that_came_back_without_its_lockd_keeps_nobody_from_meeting() -> None:
    ring = Ring(3)
    one, two, three = ring.start(1, 2, 3)
    ring.run()
    ring.lose(three)
    ring.run()
    ring.sequence += 4
    for node in (one, two):  # corosync runs there again, and no lockd
        node.group.on_ring((ring.sequence, 1), (1, 2, 3))
        node.group.on_quorum(True, (ring.sequence, 1))
    ring.run()
    ring.end(two)
    ring.run()
    assert [member.node for member in one.view.members] == [1] and one.view.quorate


def test_a_node_that_left_cleanly_is_not_fenced_because_another_one_was_away() -> None:
    ring = Ring(3)
    one, two, three = ring.start(1, 2, 3)
    ring.run()
    ring.split((1, 2), (3,))
    ring.run()
    two.group.leave(lambda: None)
    ring.run()
    ring.end(two)
    ring.run()
    ring.form([1, 3])
    ring.run()
    assert [member.node for member in one.view.members] == [1, 3]
    ring.form([1, 3])
    ring.run()
    assert not [victim for victim in (*one.fencing, *three.fencing) if victim.node == 2]


def test_who_is_not_counted_any_more_by_corosync_ends() -> None:
    ring = Ring(3)
    one, two, three = ring.start(1, 2, 3)
    ring.run()
    one.group.on_change(tuple((node.number, node.pid) for node in (two, three)), (), ())
    assert "does not count" in one.expelled


def test_what_a_state_proved_is_open_again_when_that_state_is_gone() -> None:
    """A member with state ends before anybody took it over: who is absent may have been anything since."""
    ring = Ring(3)
    ring.quorate = lambda side: True  # corosync runs on other nodes too

    def without_state(number: int, **options: Any) -> Node:
        (node,) = ring.start(number, **options)
        node.has_state = False
        ring.under_way.clear()
        ring.form([each.number for each in ring.nodes])
        ring.run()
        return node

    one = without_state(1)
    assert [member.node for member, _ in one.view.left] == [2, 3]
    (two,) = ring.start(2)
    ring.run()
    assert (3, 0, "the state of the cluster is known") in one.of("fenced")
    ring.end(two)
    ring.run()
    again = without_state(2, incarnation=2, ended=[(1, "nothing of it is left")])
    for node in (one, again):
        assert node.view.quorate
        assert [(member.node, member.incarnation) for member, _ in node.view.left] == [(3, 0)]
