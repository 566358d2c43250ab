"""Bugs of our own in the lock manager that simulated runs found, as stories: each right, and with the bug back.

As `test_cluster_bugs_found.py`, over lock daemons on a medium in memory.
"""

from __future__ import annotations

from flaws import both_ways, flaw, patches_of
from lockds_kit import Lockd, Program, holders, lockds
from medium_kit import Ring

from clustermd.dlm.modes import Mode


def _without_quorum_before_it_hears_itself(ring: Ring, two: Lockd, three: Lockd) -> None:
    """What node 2 has said reaches node 3 alone; it hears of the loss of quorum first, and then of what it said."""
    said = [data for node, data in ring.under_way if node is two.node]
    for data in said:
        three.node.group.on_message((2, two.node.pid), data)
    three.node.group.swept()
    two.node.group.on_quorum(False, (ring.sequence + 4, 2))
    for data in said:
        two.node.group.on_message((2, two.node.pid), data)
    ring.split((1,), (2,), (3,))
    ring.run()


@both_ways
def test_who_lost_quorum_before_it_heard_its_own_word_goes_on_with_it(flawed: bool) -> None:
    """The others count on whoever sends something to have it: by that the right of a node that is cut off was shown."""
    with flaw(flawed, "one history", *patches_of("own-word-lost-with-quorum")):
        ring, (one, two, three) = lockds(3)
        a, b, c = Program(one), Program(two), Program(three)
        first = b.ask(Mode.EX)
        ring.run()
        wanted = c.ask(Mode.EX)
        ring.run()
        last = a.ask(Mode.EX)
        ring.run()
        b.free(first)
        _without_quorum_before_it_hears_itself(ring, two, three)
        assert c.has(wanted), "node 2 and node 3 are a majority, and it is alive"
        before = two.applied
        ring.form((1, 2))
        ring.run()
        assert two.installed and one.installed
        assert not a.has(last), "two programs have EX at once: what was shown is not part of one history"
        assert two.applied > before and holders(one) == holders(two) == [("node3", "EX", True)]
        assert one.node.fencing or two.node.fencing
        for lockd in (one, two):
            lockd.node.group.fence_done(3, "off")
        ring.run()
        assert a.has(last) and holders(two) == [("node1", "EX", False)]


def test_what_was_proved_meanwhile_is_heard_late_as_well() -> None:
    """An end that is told in the view that a loss of quorum has ended on one node: it is the same entry for all."""
    ring, daemons = lockds(5)
    one, two, three, four, five = daemons
    ring.lose(five.node)
    ring.run()
    one.node.group.fence_done(5, "off")
    said = [data for node, data in ring.under_way if node is one.node]
    for lockd in (one, two, three):
        for data in said:
            lockd.node.group.on_message((1, one.node.pid), data)
    four.node.group.on_quorum(False, (ring.sequence + 4, 4))
    before = four.applied
    for data in said:
        four.node.group.on_message((1, one.node.pid), data)
    assert four.applied == before, "without quorum nothing is applied"
    ring.split((1, 2, 3), (4,))
    ring.under_way.clear()
    ring.form((1, 2, 3, 4))
    ring.run()
    assert all(lockd.installed for lockd in (one, two, three, four))
    assert len({lockd.applied for lockd in (one, two, three, four)}) == 1
    assert not four.restart
    (late,) = [view.late for (view,) in four.node.of("view") if view.late]
    assert late == ((five.node.group.me, "off"),)
