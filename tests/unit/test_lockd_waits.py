"""For how long a lock request has been waiting: from the first look that saw it, until it is gone."""

from __future__ import annotations

from typing import Any

from clustermd.cli.locks import _for_whom
from clustermd.lockd.waits import Waits


def status(*waiting: int, converting: tuple[int, ...] = ()) -> dict[str, Any]:
    resource = {
        "converting": [{"id": lock} for lock in converting],
        "waiting": [{"id": lock} for lock in waiting],
    }
    return {"lockspaces": {"space": {"resources": {"token": resource}}}}


def waits_of(waits: Waits, now_s: float, *waiting: int) -> list[float]:
    told = status(*waiting)
    waits.add_to(told, now_s)
    return [lock["waits_s"] for lock in told["lockspaces"]["space"]["resources"]["token"]["waiting"]]


def test_a_wait_counts_from_the_first_look_that_saw_it() -> None:
    waits = Waits()
    waits.look([(1, 5)], 10.0)
    waits.look([(1, 5), (2, 5)], 12.5)
    assert waits_of(waits, 14.0, 1, 2, 3) == [4.0, 1.5, 0.0]


def test_a_request_that_was_granted_and_waits_again_starts_anew() -> None:
    waits = Waits()
    waits.look([(1, 5)], 10.0)
    waits.look([(1, 3)], 20.0)
    assert waits_of(waits, 21.0, 1) == [1.0]
    waits.look([], 22.0)
    assert waits_of(waits, 23.0, 1) == [0.0]


def test_converting_locks_are_told_too() -> None:
    waits = Waits()
    waits.look([(7, 5)], 1.0)
    told = status(converting=(7,))
    waits.add_to(told, 3.0)
    assert told["lockspaces"]["space"]["resources"]["token"]["converting"] == [{"id": 7, "waits_s": 2.0}]


def test_the_page_says_for_how_long_and_for_whom() -> None:
    holder = {"id": 1, "mode": "EX", "node": 1, "name": "node1"}
    waiter = {"id": 2, "mode": "NL", "wants": "EX", "waits_s": 3.2, "node": 2, "name": "node2"}
    assert _for_whom(waiter, [holder, waiter]) == ", waits 3.2 s for node1"
    assert _for_whom({**waiter, "mode": "IV"}, []) == ", waits 3.2 s in the queue"
