"""The agreed group on a medium in memory: views, stability, fencing, leases, and who is sent away."""

from __future__ import annotations

import pytest
from medium_kit import Ring

from clustermd.errors import Refused
from clustermd.group.agreed.group import WINDOW
from clustermd.group.agreed.hello import control, read_control
from clustermd.group.process_group import Busy, Left


def three() -> tuple[Ring, list]:
    ring = Ring(3)
    nodes = ring.start(1, 2, 3)
    ring.run()
    return ring, nodes


def test_all_hear_the_same_view_and_the_same_messages_in_order() -> None:
    ring, nodes = three()
    assert {node.view.ring for node in nodes} == {nodes[0].view.ring}
    assert all(
        [member.node for member in node.view.members] == [1, 2, 3] and node.view.quorate for node in nodes
    )
    for node in nodes:
        node.group.multicast(b"from %d" % node.number)
    ring.run()
    assert nodes[0].of("message") == [(1, 1, b"from 1"), (2, 2, b"from 2"), (3, 3, b"from 3")]
    assert all(node.of("message") == nodes[0].of("message") and node.stable == 3 for node in nodes)


def test_a_message_is_stable_only_when_a_majority_of_votes_keeps_it() -> None:
    ring, (one, two, three_) = three()
    for node in (two, three_):
        node.installed = False
    ring.split((1, 2), (3,))
    ring.run()
    one.group.multicast(b"x")
    ring.run()
    assert one.of("message")[-1][2] == b"x" and one.stable == 0, "node 2 has it, but keeps no state"
    two.installed = True
    two.group.swept()
    ring.run()
    assert one.stable == 1 and two.stable == 1


def test_a_message_is_acknowledged_at_once_by_the_last_before_its_sender_and_only_if_anybody_awaits_it() -> (
    None
):
    ring, nodes = three()

    def answering() -> list[int]:
        """Who sends an acknowledgement of what was delivered."""
        (payload,) = ring.under_way
        ring.under_way.clear()
        for node in nodes:
            node.group.on_message((payload[0].number, payload[0].pid), payload[1])
            node.group.swept()
        return [node.number for node, _ in ring.under_way]

    nodes[0].group.multicast(b"x")
    assert answering() == [3]
    ring.tick(0.25)
    nodes[1].group.multicast(b"y")
    assert answering() == [1]
    ring.tick(0.25)
    for node in nodes:
        node.awaited = 0
    nodes[0].group.multicast(b"z")
    assert answering() == []
    assert nodes[0].stable == 2
    ring.tick(0.25)
    assert nodes[0].stable == 3, "everybody's word comes in the end"


def test_where_votes_prove_nothing_all_is_held_until_the_lost_is_proved_dead() -> None:
    ring = Ring(2)
    ring.quorate = lambda side: True  # two_node
    one, two = ring.start(1, 2)
    ring.run()
    ring.lose(two)
    ring.run()
    one.group.multicast(b"x")
    ring.run()
    assert one.of("message")[-1][2] == b"x" and one.stable == 0
    one.group.fence_done(2, "its power is off")
    ring.run()
    assert one.of("fenced") == [(2, 1, "its power is off")] and one.stable == 2


def test_two_quorate_sides_do_not_switch_each_other_off_at_the_same_moment() -> None:
    ring = Ring(2)
    ring.quorate = lambda side: True  # two_node
    one, two = ring.start(1, 2, race_s=5.0)
    ring.run()
    ring.split((1,), (2,))
    ring.run()
    ring.tick(4)
    assert [victim.node for victim in one.fencing] == [2] and not two.fencing
    assert "1 s more" in two.group.unproved
    ring.tick(2)
    assert [victim.node for victim in two.fencing] == [1], "nobody switched it off, so the other one is dead"


def test_what_was_sent_in_a_former_view_counts_nowhere() -> None:
    ring, (one, two, three_) = three()
    one.group.multicast(b"late")
    late = ring.under_way[:]
    ring.split((1, 2), (3,))
    ring.under_way = late + ring.under_way
    ring.run()
    assert not one.of("message") and not two.of("message") and not three_.of("message")
    one.group.multicast(b"new")
    ring.run()
    assert one.of("message") == two.of("message") == [(1, 1, b"new")]


def test_a_minority_hears_at_once_that_it_may_not_act_and_nothing_after_it() -> None:
    ring, (one, _, three_) = three()
    ring.split((1, 2), (3,))
    assert not three_.view.quorate, "before any message of the new ring"
    ring.run()
    assert not three_.view.quorate and three_.leases[-1] == 0.0
    with pytest.raises(Busy):
        three_.group.multicast(b"x")
    assert one.view.quorate and one.view.left == ((three_.group.me, Left.LOST),)


def test_both_sides_may_have_the_same_ring_sequence_and_are_still_told_apart() -> None:
    ring = Ring(2)
    ring.quorate = lambda side: True
    one, two = ring.start(1, 2)
    ring.run()
    ring.split((1,), (2,))
    ring.run()
    assert one.view.ring[:2] == two.view.ring[:2] and one.view.ring != two.view.ring


def test_the_lowest_node_fences_and_the_next_when_it_fails() -> None:
    ring, (one, two, three_) = three()
    ring.lose(three_)
    ring.run()
    assert [victim.node for victim in one.fencing] == [3] and not two.fencing
    one.group.fence_failed(3, "no power switch")
    ring.run()
    assert [victim.node for victim in two.fencing] == [3]
    two.group.fence_failed(3, "nor here")
    ring.run()
    assert len(one.fencing) == 2, "all have failed: the first one again"
    assert one.group.status()["lost"][0]["failed"] == {"1": "no power switch", "2": "nor here"}
    one.group.fence_done(3, "off")
    ring.run()
    assert one.of("fenced") == two.of("fenced") == [(3, 1, "off")]
    assert not one.group.status()["lost"]


def test_a_failed_attempt_is_not_begun_again_before_the_others_have_had_their_turn() -> None:
    ring, (one, two, three_) = three()
    ring.lose(three_)
    ring.run()
    one.group.fence_failed(3, "no power switch")
    one.group.tick()
    assert len(one.fencing) == 1, "its word is not in the order yet"
    ring.run()
    assert len(two.fencing) == 1


def test_a_proof_is_of_the_lives_that_were_lost_when_fencing_began() -> None:
    ring, (one, _, three_) = three()
    ring.lose(three_)
    ring.run()
    again = ring.start(3, incarnation=2, boot="boot 2")[0]
    ring.run()
    assert one.of("fenced") == [(3, 1, "its machine was started anew")] and one.cancelled == [3]
    ring.lose(again)
    ring.run()
    one.fencing.clear()
    one.group.fence_done(3, "a late success of the first attempt")
    ring.run()
    assert [fenced[:2] for fenced in one.of("fenced")] == [(3, 1), (3, 2)], "the second attempt had begun"


def test_of_several_lives_of_a_node_the_one_lost_last_counts_for_the_wait() -> None:
    ring, (one, _, three_) = three()
    ring.end(three_)
    ring.run()
    ring.tick(100)
    again = ring.start(3, incarnation=2)[0]  # same boot, and no word of the former life's end
    ring.run()
    lost_s = ring.clock.at_s
    ring.lose(again)
    ring.run()
    (victim,) = one.fencing
    assert (victim.incarnation, victim.lost_at_boottime_s) == (2, lost_s)


def test_a_late_success_proves_nothing_of_a_life_that_began_after_it() -> None:
    ring, (one, _, three_) = three()
    ring.lose(three_)
    ring.run()
    again = ring.start(3, incarnation=2, boot="boot 2")[0]
    ring.run()
    one.group.fence_done(3, "a late success of the first attempt")
    ring.lose(again)
    ring.run()
    assert [fenced[:2] for fenced in one.of("fenced")] == [(3, 1)]


def test_a_lockd_that_ended_is_waited_for_and_never_a_reason_to_fence_its_machine() -> None:
    ring, (one, two, three_) = three()
    ring.end(three_)
    ring.run()
    assert one.view.left == ((three_.group.me, Left.LOST),)
    ring.tick(60)
    assert not one.fencing and not two.fencing
    assert "no lockd" in one.group.status()["lost"][0]["waits"]
    ring.start(3, incarnation=2, ended=[(1, "its processes have ended")])
    ring.run()
    assert one.of("fenced") == two.of("fenced") == [(3, 1, "its processes have ended")]


def test_the_same_boot_without_a_word_of_the_next_lockd_proves_nothing() -> None:
    ring, (one, _, three_) = three()
    ring.end(three_)
    ring.start(3, incarnation=2)
    ring.run()
    assert not one.of("fenced") and one.group.status()["lost"]


def test_who_was_proved_dead_and_comes_back_is_sent_away() -> None:
    ring, (one, _, three_) = three()
    ring.split((1, 2), (3,))
    ring.run()
    one.group.fence_done(3, "off")
    ring.run()
    ring.form((1, 2, 3))
    ring.run()
    assert "declared dead" in three_.expelled and not one.expelled


def test_a_goodbye_is_no_loss() -> None:
    ring, (one, _, three_) = three()
    said: list[bool] = []
    three_.group.leave(lambda: said.append(True))
    ring.run()
    assert said
    ring.end(three_)
    ring.run()
    assert one.view.left == ((three_.group.me, Left.LEFT),) and not one.group.status()["lost"]


def test_a_fresh_cluster_waits_for_all_configured_nodes_and_fences_the_absent_after_their_time() -> None:
    ring = Ring(3)
    one, two = ring.start(1, 2, startup_s=30)
    for node in (one, two):
        node.has_state = False
    ring.form((1, 2))
    ring.run()
    assert [(member.node, member.incarnation) for member, _ in one.view.left] == [(3, 0)]
    ring.tick(29)
    assert not one.fencing
    assert one.group.unproved == (
        "nobody knows yet that node3 writes nothing: it has 1 s more to come before it is fenced"
    )
    ring.tick(2)
    assert [victim.node for victim in one.fencing] == [3] and not two.fencing
    one.group.fence_done(3, "off")
    ring.run()
    assert one.of("fenced") == [(3, 0, "off")]


def test_who_was_fenced_is_not_fenced_again_while_its_proof_is_on_its_way() -> None:
    ring, (one, _, three_) = three()
    ring.lose(three_)
    ring.run()
    one.group.fence_done(3, "off")
    one.group.tick()
    assert [victim.node for victim in one.fencing] == [3]
    ring.run()
    assert one.of("fenced") == [(3, 1, "off")]


def test_an_absent_node_that_comes_needs_no_fencing() -> None:
    ring = Ring(3)
    nodes = ring.start(1, 2)
    for node in nodes:
        node.has_state = False
    ring.form((1, 2))
    ring.run()
    ring.start(3)[0].has_state = False
    ring.run()
    assert nodes[0].of("fenced") == [(3, 0, "its node has joined the group")]


def test_who_is_fenced_while_the_cluster_starts_is_not_fenced_again_when_another_comes() -> None:
    ring = Ring(5)
    nodes = ring.start(1, 2, 3)
    for node in nodes:
        node.has_state = False
    ring.form((1, 2, 3))
    ring.run()
    ring.tick(31)
    nodes[0].group.fence_done(5, "off")
    ring.run()
    (four,) = ring.start(4)
    four.has_state = False
    ring.under_way.clear()
    ring.form((1, 2, 3, 4))
    ring.run()
    assert (5, 0, "off") in four.of("fenced") and not four.group.status()["lost"]
    assert nodes[0].of("fenced").count((5, 0, "off")) >= 1
    ring.split((1,), (2, 3, 4))
    ring.run()
    assert [lost["node"] for lost in four.group.status()["lost"]] == [1], "a node that is missed since"
    ring.split((1, 2, 3, 4))
    ring.run()
    assert not nodes[1].group.status()["lost"]
    for side in ((1, 2), (3, 4)):
        ring.form(side)
    ring.run()
    ring.form((1, 2, 3, 4))
    ring.run()
    assert [lost["node"] for lost in nodes[0].group.status()["lost"]] == [5], (
        "without quorum others may have had it"
    )


def test_whoever_has_another_configuration_than_most_is_sent_away() -> None:
    ring = Ring(3)
    one, two = ring.start(1, 2)
    three_ = ring.start(3, config="another")[0]
    ring.run()
    assert "configuration" in three_.expelled and "another" in three_.expelled
    assert not one.expelled and [member.node for member in one.view.members] == [1, 2]
    assert two.view == one.view


def test_a_member_whose_hello_does_not_come_is_shown_and_evicted() -> None:
    ring, (one, two, three_) = three()
    three_.full = True
    ring.split((1, 2, 3))
    ring.run()
    ring.tick(5)
    assert one.group.status()["awaiting_hello"] == ["node3"] and one.group.status()["owing"]
    assert not one.evicted
    ring.tick(6)
    assert one.evicted == [3] and not two.evicted


def test_a_newcomer_that_says_nothing_is_left_out_until_it_speaks() -> None:
    ring = Ring(3)
    one, two = ring.start(1, 2)
    ring.run()
    (three_,) = ring.start(3)
    late = [message for message in ring.under_way if message[0] is three_]
    ring.under_way = [message for message in ring.under_way if message[0] is not three_]
    ring.tick(9)
    assert one.group.status()["awaiting_hello"] == ["node3"] and one.group.frozen
    ring.tick(3)
    assert (
        [member.node for member in one.view.members] == [member.node for member in two.view.members] == [1, 2]
    )
    assert not one.evicted and not two.evicted, "it was no member, so it holds nothing"
    assert one.group.status()["strangers"] == ["process 301 on node3"] and not one.group.frozen
    assert three_.group.frozen, "it has no part in a view that was begun without it"
    one.group.multicast(b"x")
    ring.run()
    assert one.of("message") == two.of("message") == [(1, 1, b"x")] and not three_.of("message")
    ring.under_way += late
    ring.run()
    for node in (one, two, three_):
        assert [member.node for member in node.view.members] == [1, 2, 3] and not node.group.frozen
        assert not node.group.status()["strangers"] and not node.expelled
    three_.group.multicast(b"y")
    ring.run()
    assert [node.of("message")[-1] for node in (one, two, three_)] == [(1, 3, b"y")] * 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_stranger_on_a_member_s_node_is_left_out_and_the_member_stays(number: int) -> None:
    ring, nodes = three()
    (stranger,) = ring.start(number, incarnation=9)
    ring.under_way = [message for message in ring.under_way if message[0] is not stranger]
    ring.tick(9)
    assert f"node{number} (process {stranger.pid})" in nodes[2].group.status()["awaiting_hello"]
    ring.tick(3)
    for node in nodes:
        assert [member.incarnation for member in node.view.members] == [1, 1, 1] and not node.group.frozen
        assert not node.evicted and not node.expelled


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00",
        b"\x00garbage",
        control(["hello"]),
        control(
            ["hello", 1, [[float("inf"), 2]], [1, 1], True, 1, [2, 1, "x", ""], "", True, [], [], [], []]
        ),
        control(["without", [[1, 2, 3]], [7]]),
        control(["without", [], [[1, 101]]]),
        control(["fenced", [1, 1, 1], [3, 1], "believe me"]),
        control(["leave"]),
        b"\x01",
        b"\x02" + bytes(40),
        b"\xff" * 100,
    ],
)
def test_what_a_stranger_says_changes_nothing(noise: bytes) -> None:
    ring, nodes = three()
    (stranger,) = ring.start(2, incarnation=9)
    ring.under_way = [message for message in ring.under_way if message[0] is not stranger]
    ring.under_way.append((stranger, noise))
    ring.run()
    ring.tick(12)
    ring.under_way.append((stranger, noise))
    nodes[0].group.multicast(b"x")
    ring.run()
    for node in nodes:
        assert [member.node for member in node.view.members] == [1, 2, 3] and not node.expelled
        assert node.of("message")[-1][2] == b"x" and not node.group.status()["lost"]


def test_nobody_speaks_for_another_node() -> None:
    ring, nodes = three()
    (stranger,) = ring.start(2, incarnation=9)
    (hello,) = [data for sender, data in ring.under_way if sender is stranger]
    message = read_control(hello)
    message[6] = [3, 9, "node3", "another boot"]
    ring.under_way = [pair for pair in ring.under_way if pair[0] is not stranger]
    ring.under_way.append((stranger, control(message)))
    ring.tick(12)
    assert not nodes[0].of("fenced"), "it would have proved the end of node 3's life"
    assert [(member.node, member.incarnation) for member in nodes[0].view.members] == [(1, 1), (2, 1), (3, 1)]


def test_a_node_takes_part_once() -> None:
    ring, nodes = three()
    (second,) = ring.start(2, incarnation=9)
    ring.run()
    assert "another lock daemon of node2 takes part already (process 201)" in second.expelled
    assert not any(node.expelled for node in nodes)
    assert [member.incarnation for member in nodes[0].view.members] == [1, 1, 1]


def test_a_node_that_is_too_slow_for_its_cluster_leaves_by_itself() -> None:
    ring, (one, _, _) = three()
    one.group.multicast(b"x")
    ring.under_way.clear()
    ring.tick(11)
    assert "too slow" in one.expelled


def test_time_in_which_the_process_itself_stood_still_counts_little() -> None:
    ring, (one, _, _) = three()
    one.group.multicast(b"x")
    ring.clock.at_s += 60
    one.group.tick()
    assert not one.expelled


def test_own_messages_under_way_are_bounded() -> None:
    ring, (one, _, _) = three()
    for number in range(WINDOW):
        one.group.multicast(b"%d" % number)
    with pytest.raises(Busy):
        one.group.multicast(b"one too many")
    ring.run()
    one.group.multicast(b"again")


def test_a_new_view_makes_leases_longer_at_once() -> None:
    ring = Ring(3)
    one, two, _ = ring.start(1, 2, 3, lease_s=10.0)
    ring.run()
    ring.tick(21)
    ring.split((1, 2), (3,))
    ring.run()
    assert one.leases[-1] == two.leases[-1] == ring.clock.at_s + 10.0


def test_a_lease_lasts_while_a_majority_answers_and_from_the_moment_of_the_beat() -> None:
    ring = Ring(3)
    one, _, three_ = ring.start(1, 2, 3, lease_s=10.0)
    ring.run()
    ring.tick(5)
    assert one.leases[-1] > ring.clock.at_s + 5
    cut_s = ring.clock.at_s
    three_.side = frozenset((3,))  # nobody hears it, and nobody has noticed
    for node in ring.nodes[:2]:
        node.side = frozenset((1, 2))
    ring.tick(12)
    assert three_.leases[-1] <= cut_s + 10.0 < ring.clock.at_s
    assert one.leases[-1] > ring.clock.at_s


def test_a_node_without_votes_has_a_lease_while_a_majority_answers_it() -> None:
    ring = Ring(3, votes=(1, 1, 0))
    one, two, three_ = ring.start(1, 2, 3, lease_s=10.0)
    ring.run()
    ring.tick(5)
    assert three_.leases[-1] > ring.clock.at_s + 5
    three_.side = frozenset((3,))  # nobody hears it, and nobody has noticed
    for node in (one, two):
        node.side = frozenset((1, 2))
    ring.tick(12)
    assert three_.leases[-1] < ring.clock.at_s < one.leases[-1]


def test_an_operator_can_vouch_for_who_is_lost_and_for_nobody_else() -> None:
    ring, (one, two, three_) = three()
    with pytest.raises(Refused, match="nobody"):
        one.group.vouch("node3", "it burnt")
    ring.lose(three_)
    ring.run()
    two.group.vouch("node3", "it burnt")
    ring.run()
    assert one.of("fenced") == [(3, 1, "it burnt")]


def test_where_leases_are_all_quorum_without_a_majority_has_nobody_waited_out() -> None:
    ring = Ring(4)
    ring.quorate = lambda side: True  # last_man_standing
    one, two, three_, four = ring.start(1, 2, 3, 4, lease_s=2.0)
    ring.run()
    ring.tick(3)
    ring.lose(four)
    ring.run()
    assert [victim.node for victim in one.fencing] == [4], "three of four are a majority"
    ring.lose(three_)
    ring.run()
    ring.tick(60)
    assert one.cancelled == [4] and len(one.fencing) == 1 and not two.fencing
    assert "no majority of all votes" in one.group.unproved
    for node in (3, 4):
        two.group.vouch(f"node{node}", "it burnt")
    ring.run()
    assert {heard[0] for heard in one.of("fenced")} == {3, 4}


def test_a_lease_is_waited_out_anew_when_others_may_have_made_it_longer_meanwhile() -> None:
    ring = Ring(5)
    one, two, *_ = ring.start(1, 2, 3, 4, 5, lease_s=2.0)
    ring.run()
    ring.split((1, 2, 3), (4, 5))
    ring.run()
    first_s = ring.clock.at_s
    ring.split((1, 2), (3, 4, 5))
    ring.run()
    ring.tick(10)
    ring.nodes = [one, two]
    # it does not know any more that it was with 4 and 5
    ring.start(3, incarnation=2, boot="another", lease_s=2.0)
    ring.run()
    since_s = {(victim.node, victim.lost_at_boottime_s) for victim in one.fencing}
    assert since_s == {(node, at_s) for node in (4, 5) for at_s in (first_s, ring.clock.at_s)}


def test_bytes_of_strangers_change_nothing() -> None:
    _, (one, two, _) = three()
    views = len(one.of("view"))
    for data in (
        b"",
        b"\x09",
        b"\x00\xc1",
        b"\x00\x93\xa5hello\x01\x02",
        b"\x01short",
        b"\x02short",
        b"\x00\x91\x01",
    ):
        one.group.on_message((2, two.pid), data)
    assert len(one.of("view")) == views and not one.of("message") and not one.expelled


def test_a_majority_keeps_no_proofs_for_after_a_reboot() -> None:
    ring = Ring(3)
    kept: list[tuple[tuple[int, int], str]] = []
    one, _, three_ = ring.start(1, 2, 3, on_proof=lambda life, words: kept.append((life, words)))
    ring.run()
    ring.lose(three_)
    ring.run()
    one.group.fence_done(3, "off")
    ring.run()
    assert one.of("fenced") and not kept


def test_a_proof_is_kept_before_it_is_told_and_outlives_its_maker() -> None:
    ring = Ring(2)
    ring.quorate = lambda side: True  # two_node
    kept: list[tuple[tuple[int, int], str]] = []
    one, two = ring.start(1, 2, on_proof=lambda life, words: kept.append((life, words)))
    ring.run()
    ring.split((1,), (2,))
    ring.run()
    one.group.fence_done(2, "its path to the disks is cut")
    assert kept == [((2, 1), "its path to the disks is cut")] and not one.of("fenced")
    ring.run()
    assert one.of("fenced")
    # it goes on, is started anew and has forgotten everything else; the other one had quorum all the time
    ring.nodes.remove(one)
    (again,) = ring.start(1, incarnation=2, boot="boot 2", fenced=kept)
    ring.run()
    assert "declared dead" in two.expelled and not again.expelled
