"""A program of the fence-agents project itself: its options, its statuses and its words are what we take them for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from clustermd.conf import FenceAgent
from clustermd.errors import Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.lockd.fencing.agent import AgentFencer

pytestmark = pytest.mark.needs("fence_dummy")
VICTIM = Victim(2, "node2", 7, 1000.0)


@pytest.fixture
def power(tmp_path: Path) -> Path:
    """The file that stands for the power switch of a node: "on" or "off"."""
    path = tmp_path / "power"
    path.write_text("on")
    return path


def dummy(power: Path, action: str = "off", **options: str) -> AgentFencer:
    table = FenceAgent("fence_dummy", action, retries=0, options={"status_file": str(power), **options})
    return AgentFencer(table, "/etc/clustermd.conf")


def test_off_is_verified_once_more_and_off_again_is_no_failure(power: Path) -> None:
    for _ in range(2):
        assert "verified action=off for node2" in asyncio.run(dummy(power).fence(VICTIM))
        assert power.read_text() == "off"


def test_a_reboot_counts_when_it_is_on_again(power: Path) -> None:
    assert "verified action=reboot" in asyncio.run(dummy(power, "reboot").fence(VICTIM))
    assert power.read_text() == "on"


def test_checks_tell_whether_the_node_is_on(power: Path) -> None:
    assert "action=monitor succeeded" in asyncio.run(dummy(power).check(""))
    assert "the node is on" in asyncio.run(dummy(power).check("node2"))
    power.write_text("off")
    assert "the node is off" in asyncio.run(dummy(power).check("node2"))


def test_a_switch_that_does_not_obey_is_no_proof(power: Path) -> None:
    with pytest.raises(Refused, match=r"did not fence node2: it ended with status 1;.* power OFF") as caught:
        asyncio.run(dummy(power, type="fail", power_timeout="1").fence(VICTIM))
    assert caught.value.code == "fence-failed"


def test_a_switch_that_says_nothing_sensible_is_no_proof(power: Path) -> None:
    power.write_text("perhaps")
    with pytest.raises(Refused, match=r"did not fence node2: it ended with status 1;.* plug status"):
        asyncio.run(dummy(power).fence(VICTIM))
    with pytest.raises(Refused, match="action=status ended with status 1"):
        asyncio.run(dummy(power).check("node2"))
