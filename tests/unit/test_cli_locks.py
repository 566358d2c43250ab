"""The page of `clustermd locks`: holders, waiters with those they wait for, and nodes in trouble."""

from __future__ import annotations

from typing import Any

import pytest

from clustermd.cli.command import UsageError
from clustermd.cli.locks import locks_text, run

ONE = {"node": 1, "name": "node1", "label": "array md0", "pid": 11, "zombie": False}
TWO = {"node": 2, "name": "node2", "label": "array md0", "pid": 22, "zombie": True}


def state(**changes: Any) -> dict[str, Any]:
    sequencer: dict[str, Any] = {"unresponsive": [], "awaited": [], "unproved": []}
    replica = {"nodes": [{"name": "node1", "lost": False}], "lockspaces": {}}
    base: dict[str, Any] = {
        "name": "node1",
        "node": 1,
        "pid": 9,
        "suspended": "",
        "group": {"sequencer": sequencer},
    }
    return {**base, "replica": replica, **changes}


def test_who_waits_for_whom() -> None:
    resource = {
        "granted": [{**ONE, "id": 1, "mode": "CR"}, {**TWO, "id": 2, "mode": "PR"}],
        "converting": [{**ONE, "id": 3, "mode": "NL", "wants": "EX"}],
        "waiting": [{**ONE, "id": 4, "mode": "IV", "wants": "CR"}],
        "value_block": None,
        "value_block_invalid": False,
    }
    space = {
        "slots": [{**ONE, "slot": 1, "state": "member"}, {**TWO, "slot": 2, "state": "zombie"}],
        "joining": [{**ONE, "waits_for": [{"slot": 2, "name": "node2", "state": "zombie"}]}],
        "resources": {"ack": resource},
    }
    nodes = [{"name": "node1", "lost": False}, {"name": "node2", "lost": True}]
    text = locks_text(state(replica={"nodes": nodes, "lockspaces": {"uuid": space}}))
    one, two = "node1 array md0 (pid 11)", "node2 array md0 (pid 22) ZOMBIE"
    assert text.splitlines() == [
        "node node1 (number 1, lockd process 9)",
        "  member node1",
        "  member node2 (lost, not yet proved dead)",
        "",
        "lockspace uuid",
        f"  slot 1: {one}",
        f"  slot 2: {two} (zombie)",
        f"  joining: {one} waits for slot 2 of node2 (zombie)",
        "  ack",
        f"    CR {one}",
        f"    PR {two}",
        f"    NL {one} wants EX, waits for {one}, {two}",
        f"    -- {one} wants CR, waits in the queue",
    ]


def test_nodes_in_trouble_are_named() -> None:
    sequencer = {
        "unresponsive": [{"node": "node2", "pid": 22, "silent_s": 3.5}],
        "awaited": [{"node": "node3", "for_s": 1.0}],
        "unproved": [{"node": "node4", "for_s": 2.0, "waiting": ["byte 4 of /x is locked"]}],
    }
    text = locks_text(state(group={"sequencer": sequencer}, suspended="the sequencer is gone"))
    assert "  suspended: the sequencer is gone\n" in text
    assert "  node2 (process 22) has been silent for 3.5 s\n" in text
    assert "  node3 is awaited for 1.0 s to rejoin\n" in text
    assert "  node4 is lost for 2.0 s and not proved dead: byte 4 of /x is locked\n" in text
    assert "the sequencer does not answer" in locks_text(state(group={"sequencer": None}))


def test_words_it_does_not_know_are_refused() -> None:
    with pytest.raises(UsageError):
        run(["--frob"])
