"""What all connections to corosync have in common, without corosync."""

from __future__ import annotations

import pytest

from clustermd.group.corosync import library
from clustermd.group.corosync.errors import CorosyncRefused, Status


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PAUSE_S", 0.0)


def test_a_corosync_that_is_just_starting_is_asked_again() -> None:
    answers = iter([Status.TRY_AGAIN, Status.TRY_AGAIN, Status.LIBRARY, Status.OK])
    assert library.patiently(lambda: next(answers)) == Status.LIBRARY
    assert next(answers) == Status.OK


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PATIENCE_S", 0.01)
    assert library.patiently(lambda: Status.TRY_AGAIN) == Status.TRY_AGAIN


def test_a_corosync_that_stays_busy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PATIENCE_S", 0.01)
    monkeypatch.setattr(library, "function", lambda *_: lambda *_: 0)
    connection = library.Connection("libcpg.so.4", "cpg")
    with pytest.raises(CorosyncRefused) as refused:
        connection.open("cpg_model_initialize", lambda: Status.TRY_AGAIN)
    assert refused.value.code == "corosync-busy"
    assert "cpg_model_initialize" in refused.value.message
    assert connection.closed
