"""fence-ack, fence-test and fence-device as a person meets them."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clustermd.cli.cluster import run
from clustermd.cli.command import UsageError
from clustermd.cli.main import main
from clustermd.errors import Refused
from clustermd.group.frames import Frame, FrameLink, serve_links
from clustermd.lockd.fencing.fence_disk import SIZE_BYTES, Beat, FenceDisk
from clustermd.node.disk import Disk
from clustermd.rundir import RunDir

Text = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("CLUSTERMD_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("CLUSTERMD_NODE", "node1")
    monkeypatch.delenv("CLUSTERMD_ENGINE", raising=False)
    return RunDir.from_environment()


@contextmanager
def lockd(rundir: RunDir, answers: dict[str, list[Any]]) -> Iterator[list[str]]:
    """A lockd that knows fence-ack only, in a thread; who was vouched for."""
    heard: list[str] = []
    ready, end = threading.Event(), threading.Event()

    def on_frame(link: FrameLink, frame: Frame) -> None:
        assert frame[0] == "fence-ack"
        heard.append(frame[1])
        link.send(*answers[frame[1]])

    async def serve() -> None:
        rundir.make()
        server = await serve_links(
            rundir.lockd_socket, lambda link: None, on_frame, lambda link, reason: None
        )
        ready.set()
        while not end.is_set():
            await asyncio.sleep(0.01)
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield heard
    finally:
        end.set()
        thread.join()


def _typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(text))


def _conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.conf").write_text(text)
    monkeypatch.setenv("CLUSTERMD_CONF", str(tmp_path / "c.conf"))


# --- fence-ack


def test_a_person_vouches_by_typing_the_name(
    node: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    with lockd(node, {"node3": ["fence-acked", "node3: vouched for"]}) as heard:
        _typed(monkeypatch, "node3\n")
        assert run(["fence-ack", "node3"]) == 0
        said = capsys.readouterr()
        assert said.out == "node3: vouched for\n"
        assert "both sides write" in said.err and "Type the node's name" in said.err
        _typed(monkeypatch, "yes\n")
        with pytest.raises(Refused, match="nothing was done"):
            run(["fence-ack", "node3"])
        assert run(["fence-ack", "--yes", "node3"]) == 0
    assert heard == ["node3", "node3"]


def test_nobody_vouches_from_a_script_without_saying_so(
    node: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("node3\n"))
    with lockd(node, {}) as heard, pytest.raises(Refused, match="--yes"):
        run(["fence-ack", "node3"])
    assert heard == []


def test_lockds_refusal_and_absence_are_told(node: RunDir, capsys: Text) -> None:
    refusal = ["refused", "not-lost", "node3 is not waited for: nobody is", {"node": "node3"}]
    with lockd(node, {"node3": refusal}):
        assert main(["cluster", "fence-ack", "node3", "--yes"]) == 1
    assert "node3 is not waited for" in capsys.readouterr().err
    assert main(["cluster", "fence-ack", "node3", "--yes"]) == 1
    assert "no lockd runs for node1" in capsys.readouterr().err


def test_words_that_make_no_sense_are_refused() -> None:
    for words in (
        ["fence-ack"],
        ["fence-ack", "a", "b"],
        ["fence-ack", "a", "--no"],
        ["fence-test", "--yes"],
        ["fence-test", "a", "b"],
        ["fence-device", "/dev/x"],
        ["fence-device", "--create"],
    ):
        with pytest.raises(UsageError):
            run(words)
    for name in ("fence-ack", "fence-test", "fence-device"):
        assert run([name, "--help"]) == 0


# --- fence-test

AGENT = """
fence = "agent"
[fence_agent]
agent = "{}"
retries = 0
[fence_agent.nodes.node1]
plug = "1"
[fence_agent.nodes.node2]
plug = "2"
"""
SCRIPT = """#!/bin/sh
cat > {0}/heard; cat {0}/heard >> {0}/all
grep -q action=off {0}/heard && exit 0
grep -q plug=2 {0}/heard && echo no such plug && exit 1
exit 0
"""


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "fence_x"
    program.write_text(SCRIPT.format(tmp_path))
    program.chmod(0o755)
    _conf(monkeypatch, tmp_path, AGENT.format(program))
    return tmp_path


def test_each_node_is_looked_at_and_none_is_harmed(agent: Path, capsys: Text) -> None:
    assert run(["fence-test"]) == 1
    text = capsys.readouterr().out
    assert 'fence = "agent"' in text and "action=monitor succeeded" in text
    assert "node1: fence_x" not in text and "node1: " in text and "the node is on" in text
    assert "node2: FAILED: " in text and "no such plug" in text
    assert "action=off" not in (agent / "all").read_text()
    assert run(["fence-test", "node1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fence_test"]
    assert told["policy"] == "agent" and told["checks"][0]["good"] and told["checks"][0]["node"] == "node1"


def test_a_real_fencing_needs_yes_and_another_node(agent: Path, capsys: Text) -> None:
    with pytest.raises(Refused, match="from another one"):
        run(["fence-test", "node1", "--yes"])
    assert run(["fence-test", "node2", "--yes"]) == 0
    assert "verified action=off for node2" in capsys.readouterr().out
    assert "nodename=node2" in (agent / "all").read_text()


def test_policies_that_fence_nobody_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    _conf(monkeypatch, tmp_path, 'fence = "lease"\n')
    assert run(["fence-test"]) == 0
    assert "unsafe: nothing stops a lost node" in capsys.readouterr().out
    with pytest.raises(Refused, match="nobody is ever switched off"):
        run(["fence-test", "node2", "--yes"])
    _conf(monkeypatch, tmp_path, "")
    with pytest.raises(Refused, match="no way to fence"):
        run(["fence-test"])


# --- fence-device


def test_a_fence_device_is_made_used_and_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    path = tmp_path / "fence"
    assert run(["fence-device", "--create", str(path)]) == 0
    assert f'fence_device = "{path}"' in capsys.readouterr().out
    assert path.stat().st_size == SIZE_BYTES
    _conf(
        monkeypatch,
        tmp_path,
        f'fence = "device"\nfence_device = "{path}"\nwatchdog_s = 1\ndevice_bound_s = 0\n',
    )
    with pytest.raises(Refused, match="never given a heartbeat"):
        run(["fence-test", "node2", "--yes"])
    disk = FenceDisk.open(str(path))
    disk.write_beat(Beat(2, "node2", 0x77, 1))
    assert run(["fence-test", "node2", "--yes"]) == 0
    pill = disk.pill(2)
    assert pill is not None and pill.incarnation == 0x77 and pill.sender == "node1"
    disk.close()
    assert main(["-Q", str(path)]) in (0, 1)  # whatever it says, it does not fail
    from clustermd.cli.contents import contents

    with Disk(str(path)) as opened:
        assert any("fence device of clustermd" in message for message in contents(opened))


def test_what_is_on_a_disk_is_named(tmp_path: Path, capsys: Text) -> None:
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(32 << 20)
        file.seek(512)
        file.write(b"EFI PART")
    assert main(["cluster", "fence-device", "--create", str(path)]) == 1
    said = capsys.readouterr().err
    assert "not empty" in said
    assert "GPT" in said or "partition" in said
