"""`lockd.client.connect` when the lives of this node's lockd end as soon as they began."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clustermd.clock import SystemClock
from clustermd.errors import Refused
from clustermd.group import start
from clustermd.group.frames import Frame, FrameLink, serve_links, stop_serving
from clustermd.lockd.client import connect
from clustermd.rundir import RunDir

WELCOME = {"node": 1, "name": "node1", "incarnation": "1f", "session": 7, "suspended": ""}


class Lives:
    """Starts one life after the other: each ends for its reason at a hello, "" says none; after them one welcomes."""

    def __init__(self, rundir: RunDir, reasons: Sequence[str]) -> None:
        self.rundir = rundir
        self.reasons = list(reasons)
        self.started = 0

    async def start(self, *_: Any) -> int:
        self.started += 1
        reason = self.reasons.pop(0) if self.reasons else None

        def on_frame(link: FrameLink, frame: Frame) -> None:
            assert frame[0] == "hello"
            stop_serving(server, self.rundir.lockd_socket)
            if reason is None:
                link.send("welcome", WELCOME)
                return
            if reason:
                link.send("over", reason)
            link.close()

        self.rundir.make()
        server = await serve_links(self.rundir.lockd_socket, lambda _: None, on_frame, lambda *_: None)
        return 0


def connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *reasons: str) -> tuple[int, int]:
    """The session's number that `connect` gives and how many lives it started."""
    lives = Lives(RunDir(tmp_path / "run", "node1"), reasons)
    monkeypatch.setattr(start, "start_daemon", lives.start)

    async def run() -> int:
        connection = await connect(lives.rundir, "a test", clock=SystemClock())
        connection.abort()
        return connection.number

    try:
        return asyncio.run(run()), lives.started
    except Refused as error:
        error.data["started"] = lives.started
        raise


def test_a_second_life_given_up_for_the_same_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match="node1 cannot take part in its cluster: it is a stranger") as caught:
        connected(tmp_path, monkeypatch, "it is a stranger", "it is a stranger")
    assert caught.value.code == "not-in-cluster"
    assert caught.value.data["started"] == 2, "whoever is refused leaves no lockd behind"


def test_a_life_that_was_killed_in_between_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match="it is a stranger") as caught:
        connected(tmp_path, monkeypatch, "it is a stranger", "", "it is a stranger")
    assert caught.value.data["started"] == 3


def test_lives_given_up_for_different_reasons_are_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connected(tmp_path, monkeypatch, "it lost its quorum", "", "", "it was evicted") == (7, 5)
