"""Who may go on with the lock state where memory is all there is: majorities, remainders and forked histories."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

from clustermd.dlm.install import Install, plan_install
from clustermd.dlm.messages import Start
from clustermd.group.process_group import Member, View

Key = tuple[int, int]
EPOCH = 5


def history(*entries: str) -> tuple[bytes, ...]:
    """The hashes after each entry, from the empty history on."""
    hashes = [bytes(16)]
    for entry in entries:
        hashes.append(blake2b(hashes[-1] + entry.encode(), digest_size=16).digest())
    return tuple(hashes)


def start(
    *entries: str,
    epoch: int = EPOCH,
    members: tuple[int, ...] = (1, 2, 3),
    shown: int = 0,
    unbroken: bool = True,
    unfenced: tuple[Key, ...] = (),
    has_state: bool = True,
) -> Start:
    hashes = history(*entries)
    return Start(
        has_state=has_state,
        epoch=epoch if has_state else 0,
        applied=len(entries),
        chain=hashes[-1],
        digest=b"of " + hashes[-1],
        members=tuple((node, 1) for node in members),
        left=(),
        fenced=(),
        unfenced=unfenced,
        shown=shown,
        recent=hashes[:-1],
        unbroken=unbroken,
    )


def fresh(**options: object) -> Start:
    return start(has_state=False, members=(), **options)  # type: ignore[arg-type]


def plan(starts: dict[int, Start], configured: int = 3, proved: tuple[Key, ...] = ()) -> Install | str:
    members = tuple(Member(node, 1, f"node{node}") for node in sorted(starts))
    votes = tuple((node, 1) for node in range(1, configured + 1))
    view = View((9, 8, 1), members, (), (), True, (1,) * len(members), configured // 2 + 1, votes)
    return plan_install(
        view, {(node, 1): told for node, told in starts.items()}, dict.fromkeys(proved, "off")
    )


def goes_on(outcome: Install | str) -> Install:
    assert isinstance(outcome, Install), outcome
    return outcome


def test_a_majority_that_kept_its_state_goes_on_while_a_lost_node_is_not_proved_dead() -> None:
    told = goes_on(plan({1: start("a", unfenced=((3, 1),)), 2: start("a", unfenced=((3, 1),))}))
    assert told.current == ((1, 1), (2, 1)) and not told.foreign


def test_fresh_nodes_are_no_majority_over_one_that_kept_an_older_state() -> None:
    lost = ((2, 7), (3, 7))
    waits = plan({1: start("a", unbroken=False, unfenced=lost), 2: fresh(), 3: fresh()})
    assert isinstance(waits, str) and "node 2, 3" in waits
    told = goes_on(plan({1: start("a", unbroken=False, unfenced=lost), 2: fresh(), 3: fresh()}, proved=lost))
    assert (1, 1) in told.foreign and not told.members, "it starts anew, then all are fresh"


def test_a_remainder_that_always_had_quorum_goes_on_when_the_lost_are_proved_dead() -> None:
    lost = ((2, 1),)
    assert "node 2" in str(plan({1: start("a", members=(1, 2), unfenced=lost)}, configured=2))
    told = goes_on(plan({1: start("a", members=(1, 2), unfenced=lost)}, configured=2, proved=lost))
    assert told.current == ((1, 1),)


def test_a_remainder_whose_companions_were_a_majority_by_themselves_starts_anew() -> None:
    lost = ((2, 7), (3, 7))
    one = replace(start("a", unfenced=lost), members=((1, 1), *lost))
    told = goes_on(plan({1: one, 2: fresh(), 3: fresh()}, proved=lost))
    assert (1, 1) in told.foreign, "both may have shown what it was not told, before they ended"
    two = replace(one, members=((1, 1), (2, 7)))
    told = goes_on(plan({1: two, 2: fresh(), 3: fresh()}, proved=lost))
    assert told.authority == (1, 1), "nothing could be shown in that view without it"


def test_who_had_no_state_yet_when_a_companion_ended_is_none_whose_knowledge_is_lost() -> None:
    lost = ((3, 7),)
    one = replace(start("a", unfenced=lost), members=((1, 1), (2, 1), (3, 7)))
    assert "node 3" in str(plan({1: one, 2: fresh()}))
    told = goes_on(plan({1: one, 2: fresh()}, proved=lost))
    assert told.authority == (1, 1) and told.fresh == ((2, 1),)
    told = goes_on(plan({1: replace(one, members=((1, 1), (2, 6), (3, 7))), 2: fresh()}, proved=lost))
    assert (1, 1) in told.foreign, "its former life may have had one"


def test_nobody_with_state_waits_for_whoever_may_live_and_then_begins() -> None:
    absent = ((3, 0),)
    assert "node 3" in str(plan({1: fresh(unfenced=absent), 2: fresh()}))
    told = goes_on(plan({1: fresh(unfenced=absent), 2: fresh()}, proved=absent))
    assert told.authority is None and told.current == ((1, 1), (2, 1))


def test_who_was_cut_off_with_more_of_its_own_is_foreign_to_the_majority() -> None:
    told = goes_on(plan({1: start("a", "x"), 2: start("a", "x"), 3: start("a", "mine", "mine too")}))
    assert told.authority in ((1, 1), (2, 1)) and set(told.foreign) == {(3, 1)}


def test_of_a_fork_the_side_that_showed_something_past_it_is_right() -> None:
    lost = ((2, 1),)
    told = goes_on(
        plan(
            {
                1: start("a", "x", shown=2, unfenced=lost),
                3: start("a", "mine", "mine too", shown=1, unfenced=lost),
            }
        )
    )
    assert told.authority == (1, 1) and set(told.foreign) == {(3, 1)}
    told = goes_on(
        plan({1: start("a", "x", shown=1, unfenced=lost), 3: start("a", "mine", shown=2, unfenced=lost)})
    )
    assert told.authority == (3, 1) and set(told.foreign) == {(1, 1)}


def test_a_fork_that_nobody_present_can_decide_waits_for_the_absent() -> None:
    lost = ((2, 1),)
    sides = {1: start("a", "x", shown=1, unfenced=lost), 3: start("a", "mine", shown=1, unfenced=lost)}
    waits = plan(sides)
    assert isinstance(waits, str) and "node 2" in waits and "side" in waits


def test_a_fork_that_nobody_is_left_to_decide_ends_both_sides() -> None:
    """Node 2 may have shown the last entry of either, and worked under its lock before it ended."""
    lost = ((2, 1),)
    told = goes_on(
        plan({1: start("a", "x", unfenced=lost), 3: start("a", "mine", unfenced=lost)}, proved=lost)
    )
    assert set(told.foreign) == {(1, 1), (3, 1)} and not told.members
    assert "assembled again" in told.foreign[1, 1]


def test_a_side_that_was_no_majority_even_with_the_absent_gives_way() -> None:
    lost, five = ((5, 1),), (1, 2, 3, 4, 5)
    sides = {
        1: start("a", "mine", "mine too", members=five, unfenced=lost),
        2: start("a", "x", members=five, unfenced=lost),
        3: start("a", "x", members=five, unfenced=lost),
        4: start("a", "z", members=five, unfenced=lost),
    }
    told = goes_on(plan(sides, configured=5, proved=lost))
    assert told.authority == (2, 1) and told.current == ((2, 1), (3, 1))
    assert set(told.foreign) == {(1, 1), (4, 1)}


def test_a_fork_whose_sides_are_all_there_goes_on_with_either() -> None:
    told = goes_on(plan({1: start("a", "x", members=(1, 3)), 3: start("a", "mine", members=(1, 3))}))
    assert told.authority == (1, 1) and set(told.foreign) == {(3, 1)}, "nobody showed anything past the fork"


def test_who_has_a_part_of_the_history_gets_the_rest() -> None:
    told = goes_on(plan({1: start("a"), 2: start("a", "b", "c"), 3: start("a", "b")}))
    assert told.authority == (2, 1) and told.behind == ((1, 1), (3, 1)) and not told.foreign


def test_a_newer_epoch_is_right_however_short() -> None:
    told = goes_on(
        plan(
            {
                1: start("a", "b", epoch=6, members=(1, 2)),
                2: start("a", "b", epoch=6, members=(1, 2)),
                3: start("a", "x", "y", "z"),
            }
        )
    )
    assert told.epoch == 7 and "went on without" in told.foreign[3, 1]


def test_one_history_with_two_states_goes_by_votes() -> None:
    other = start("a")
    damaged = Start(
        *(b"another" if name == "digest" else getattr(other, name) for name in Start.__dataclass_fields__)
    )
    told = goes_on(plan({1: damaged, 2: start("a"), 3: start("a")}))
    assert set(told.foreign) == {(1, 1)} and told.authority == (2, 1)


def test_a_majority_that_began_anew_goes_on_over_a_state_that_it_outlived() -> None:
    anew = ((2, 5), (3, 5))
    starts = {(1, 1): start(*"abcdef")} | {key: replace(start("z", epoch=1), members=anew) for key in anew}
    members = tuple(Member(*key, f"node{key[0]}") for key in starts)
    view = View((9, 8, 1), members, (), (), True, (1, 1, 1), 2, ((1, 1), (2, 1), (3, 1)))
    told = goes_on(plan_install(view, starts, {}))
    assert told.authority in anew and set(told.current) == set(anew)
    assert set(told.foreign) == {(1, 1)} and "went on without" in told.foreign[1, 1]


def test_votes_of_a_history_that_was_outlived_count_for_nobody() -> None:
    # 1 and 3 began anew when 2 was proved dead; 1 ended; 2 comes back with the old state, which is longer
    old = start("a", "b", "c", epoch=1)
    new = start("x", epoch=1, members=(1, 3), unfenced=((1, 6),))
    new = Start(
        *(((2,) if name == "outlived" else getattr(new, name)) for name in Start.__dataclass_fields__)
    )
    assert "node 1" in str(plan({2: old, 3: new})), "3 is no majority by itself"
    told = goes_on(plan({2: old, 3: new}, proved=((1, 6),)))
    assert told.authority == (3, 1) and set(told.foreign) == {(2, 1)}
