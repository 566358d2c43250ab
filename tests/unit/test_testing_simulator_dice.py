"""Decisions: streams of their own, recorded, replayed from lists, dull where a list ends."""

from __future__ import annotations

from clustermd.testing.simulator.dice import Dice


def test_a_seed_draws_the_same_and_each_stream_is_its_own() -> None:
    def draws(seed: int, others: int) -> list[int]:
        dice = Dice(seed)
        for _ in range(others):
            dice.stream("other").below(100)
        stream = dice.stream("mine")
        return [stream.below(100) for _ in range(50)]

    assert draws(7, 0) == draws(7, 13) != draws(8, 0)
    assert set(draws(7, 0)) <= set(range(100)) and len(set(draws(7, 0))) > 20
    dice = Dice(7)
    assert [dice.stream("other").below(100) for _ in range(50)] != draws(7, 0)


def test_what_was_drawn_is_replayed_without_the_seed() -> None:
    dice = Dice(7)
    bounds = (2, 10, 3, 1, 50, 7)
    drawn = [dice.stream("a").below(bound) for bound in bounds]
    again = Dice(999, dice.record)
    assert [again.stream("a").below(bound) for bound in bounds] == drawn
    assert again.record == dice.record


def test_where_a_list_ends_the_decision_is_the_dull_one() -> None:
    stream = Dice(7, {"a": [4]}).stream("a")
    assert [stream.below(5) for _ in range(3)] == [4, 0, 0]
    assert not stream.one_in(2)
    assert stream.shuffled([3, 1, 2]) == [3, 1, 2]
    assert Dice(7, {}).stream("b").below(9) == 0


def test_a_kept_number_that_is_too_large_still_decides() -> None:
    assert Dice(0, {"a": [14]}).stream("a").below(5) == 4


def test_two_holders_of_a_stream_draw_from_one_list() -> None:
    dice = Dice(0, {"a": [1, 2, 3]})
    assert [dice.stream("a").below(9), dice.stream("a").below(9), dice.stream("a").below(9)] == [1, 2, 3]


def test_shuffled_keeps_all_items() -> None:
    stream = Dice(5).stream("a")
    shuffled = [stream.shuffled(range(6)) for _ in range(20)]
    assert all(sorted(items) == list(range(6)) for items in shuffled)
    assert len({tuple(items) for items in shuffled}) > 10


def test_one_in_is_about_as_often_as_it_says() -> None:
    stream = Dice(5).stream("a")
    assert 180 < sum(stream.one_in(5) for _ in range(1100)) < 260
