"""When a program on a cluster of machines has to stop believing in its locks: what the lease says, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from clustermd.clock import SystemClock
from clustermd.conf import Conf
from clustermd.lockd import lease_watch
from clustermd.lockd.lease_watch import grace_s, lease_ends, patience_s


class Looks(SystemClock):
    """A clock and a lease that go on with each look: (seconds after boot, whether the lease is valid)."""

    def __init__(self, looks: Sequence[tuple[float, bool]]) -> None:
        self._looks = list(looks)
        self.now_s, self._valid = 0.0, False

    def boottime_s(self) -> float:
        self.now_s, self._valid = self._looks.pop(0)
        return self.now_s

    def valid(self) -> bool:
        return self._valid


def ended_at(monkeypatch: pytest.MonkeyPatch, *looks: tuple[float, bool]) -> float:
    """When `lease_ends` is content with what the looks find, with a patience of 10 s."""
    monkeypatch.setattr(lease_watch, "_LOOK_S", 0)
    told = Looks(looks)
    asyncio.run(lease_ends(told, told, 10.0))
    return told.now_s


def test_a_short_loss_of_contact_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [
        (1.0, True),
        (2.0, False),
        (9.0, False),
        (10.0, True),
        (15.0, False),
        (19.0, False),
        (30.0, False),
        (99.0, True),
    ]
    assert ended_at(monkeypatch, *looks) == 30.0


def test_who_slept_through_the_end_of_the_lease_knows_at_the_first_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ended_at(monkeypatch, (1.0, True), (5000.0, False), (5000.2, True)) == 5000.0


def test_the_end_of_a_program_fits_in_the_bound_for_what_was_under_way() -> None:
    for conf in (Conf(engine="corosync", lease_s=5.0), Conf(engine="corosync", device_bound_s=6.0)):
        assert patience_s(conf) + grace_s(conf, 5.0) < conf.device_bound_s
    assert grace_s(Conf(), 5.0) == 5.0
