"""Since when a lock is held or wanted: from the first look that saw it so, until it is so no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clustermd.lockd.waits import Waits

IV, NL, PR, EX = -1, 0, 3, 5


class Told:
    """A Waits whose looks are numbered as they come, and what it says of the locks of one resource."""

    def __init__(self) -> None:
        self.waits = Waits()
        self.looks = 0

    def look(self, now_s: float, *modes: tuple[int, int, int]) -> None:
        self.looks += 1
        self.waits.look(self.looks, lambda: modes, now_s)

    def says(self, now_s: float, **queues: tuple[int, ...]) -> dict[int, dict[str, Any]]:
        resource = {
            queue: [{"id": lock} for lock in queues.get(queue, ())]
            for queue in ("granted", "converting", "waiting")
        }
        self.waits.add_to({"lockspaces": {"space": {"resources": {"token": resource}}}}, now_s)
        return {lock.pop("id"): lock for queue in resource.values() for lock in queue}


def test_a_wait_counts_from_the_first_look_that_saw_it() -> None:
    told = Told()
    told.look(10.0, (1, IV, EX))
    told.look(12.5, (1, IV, EX), (2, IV, EX))
    said = told.says(14.0, waiting=(1, 2, 3))
    assert [said[lock]["waits_s"] for lock in (1, 2, 3)] == [4.0, 1.5, 0.0]
    assert "held_s" not in said[1]


def test_a_request_that_was_granted_and_waits_again_starts_anew() -> None:
    told = Told()
    told.look(10.0, (1, NL, EX))
    told.look(20.0, (1, NL, PR))
    assert told.says(21.0, converting=(1,))[1] == {"held_s": 11.0, "waits_s": 1.0, "age_at_least": True}
    told.look(22.0, (1, PR, IV))
    assert told.says(23.0, granted=(1,))[1]["held_s"] == 1.0, "in this mode"
    told.look(24.0)
    told.look(25.0, (1, PR, IV))
    assert told.says(25.0, granted=(1,))[1]["held_s"] == 0.0


def test_what_was_there_before_the_first_look_is_older_than_it_seems() -> None:
    told = Told()
    told.look(10.0, (1, EX, IV))
    told.look(11.0, (1, EX, IV), (2, NL, IV))
    said = told.says(12.0, granted=(1, 2))
    assert [said[lock]["age_at_least"] for lock in (1, 2)] == [True, False]


def test_locks_are_not_looked_through_while_nothing_was_applied() -> None:
    waits = Waits()
    looked: list[float] = []

    def modes(now_s: float) -> Iterable[tuple[int, int, int]]:
        looked.append(now_s)
        return [(1, EX, IV)]

    for applied, now_s in ((7, 1.0), (7, 2.0), (8, 3.0), (8, 4.0)):
        waits.look(applied, lambda now_s=now_s: modes(now_s), now_s)
    assert looked == [1.0, 3.0]
