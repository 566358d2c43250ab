"""The lease file: ends by the clock, is renewed in place, and never begins with what a former life left."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from clustermd.device.lease import UNBOUNDED_NS, LeaseFile
from clustermd.errors import Refused


class Now:
    def __init__(self) -> None:
        self.ns = 10**9

    def __call__(self) -> int:
        return self.ns


def test_a_reader_sees_what_lockd_writes_and_the_clock_end_it(tmp_path: Path) -> None:
    now, path = Now(), tmp_path / "lease"
    lockd = LeaseFile.make(path, now)
    array = LeaseFile.open(path, now)
    assert not array.valid()
    lockd.renew(3 * 10**9)
    assert array.valid() and array.until_ns == 3 * 10**9
    now.ns = 3 * 10**9 - 1
    assert array.valid()
    now.ns = 3 * 10**9
    assert not array.valid(), "a lease is over at its end, not after it"
    lockd.renew(4 * 10**9)
    assert array.valid()
    lockd.renew(2 * 10**9)
    assert array.until_ns == 4 * 10**9, "an older word arrived late"
    lockd.expire()
    assert not array.valid()
    lockd.renew(UNBOUNDED_NS)
    now.ns = 10**18
    assert array.valid()
    array.close()
    lockd.close()


def test_a_new_lockd_begins_with_no_lease_and_what_it_renews_is_not_for_who_joined_before(
    tmp_path: Path,
) -> None:
    now, path = Now(), tmp_path / "lease"
    first = LeaseFile.make(path, now)
    sleeper = LeaseFile.open(path, now)
    first.renew(2 * 10**9)
    now.ns = 3 * 10**9
    second = LeaseFile.make(path, now)
    array = LeaseFile.open(path, now)
    assert not array.valid()
    second.renew(10**12)
    assert array.valid()
    assert not sleeper.valid(), "it wakes in a life that others took for dead"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for lease in (first, sleeper, array, second):
        lease.close()


def test_without_a_lease_file_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be opened") as caught:
        LeaseFile.open(tmp_path / "lease", Now())
    assert caught.value.code == "no-lease"
    (tmp_path / "lease").write_bytes(b"123")
    with pytest.raises(Refused, match="8 bytes"):
        LeaseFile.open(tmp_path / "lease", Now())


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    LeaseFile.make(tmp_path / "lease", Now()).close()
    array = LeaseFile.open(tmp_path / "lease", Now())
    with pytest.raises(TypeError):
        array.renew(5)
    array.close()
