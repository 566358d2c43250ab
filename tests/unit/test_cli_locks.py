"""The page of `clustermd locks`: what is stuck first, holders, waiters with those they wait for, nodes in trouble."""

from __future__ import annotations

from typing import Any

import pytest

from clustermd.cli import locks
from clustermd.cli.command import UsageError
from clustermd.cli.locks import check_text, dlm_text, run
from clustermd.cli.locks_page import locks_text
from clustermd.errors import Refused

ONE = {"node": 1, "session": 1, "name": "node1", "label": "array md0", "pid": 11, "zombie": False}
TWO = {"node": 2, "session": 1, "name": "node2", "label": "array md0", "pid": 22, "zombie": True}
THREE = {"node": 3, "session": 1, "name": "node3", "label": "lock backup: rsync", "pid": 33, "zombie": False}


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


def resource(name: str, **queues: Any) -> dict[str, Any]:
    return {
        "granted": [],
        "converting": [],
        "waiting": [],
        "name_hex": name.encode().hex(),
        "value_block": None,
        "value_block_sequence": 0,
        "value_block_invalid": False,
        **queues,
    }


def of(resources: dict[str, dict[str, Any]], name: str = "uuid", **space: Any) -> dict[str, Any]:
    """The state with one lockspace."""
    whole = {"slots": [], "joining": [], "resources": resources, **space}
    return state(replica={"nodes": [{"name": "node1", "lost": False}], "lockspaces": {name: whole}})


def test_who_waits_for_whom() -> None:
    ack = resource(
        "ack",
        granted=[
            {**ONE, "id": 1, "mode": "CR", "held_s": 62.0},
            {**TWO, "id": 2, "mode": "PR", "held_s": 200.0},
        ],
        converting=[{**ONE, "id": 3, "mode": "NL", "wants": "EX", "held_s": 9.0, "waits_s": 3.5}],
        waiting=[{**ONE, "id": 4, "mode": "IV", "wants": "CR", "waits_s": 12.0}],
    )
    slots = [{**ONE, "slot": 1, "state": "member"}, {**TWO, "slot": 2, "state": "zombie"}]
    joining = [{**ONE, "waits_for": [{"slot": 2, "name": "node2", "state": "zombie"}]}]
    told = of({"ack": ack}, slots=slots, joining=joining)
    told["replica"]["nodes"].append({"name": "node2", "lost": True})
    one, two = "node1 array md0 (pid 11)", "node2 array md0 (pid 22) ZOMBIE"
    assert locks_text(told).splitlines() == [
        "node node1 (number 1, lockd process 9)",
        "  member node1",
        "  member node2 (lost, not yet proved dead)",
        "",
        "waiting, the longest first",
        f"  uuid ack: {one} wants CR, waits 12.0 s for its turn behind {one}",
        f"  uuid ack: {one} wants EX, waits 3.5 s for {one} in CR for 62.0 s, {two} in PR for 3 min",
        "",
        "lockspace uuid",
        f"  slot 1: {one}",
        f"  slot 2: {two} (zombie)",
        f"  joining: {one} waits for slot 2 of node2 (zombie)",
        "  ack",
        f"    CR {one} for 62.0 s",
        f"    PR {two} for 3 min",
        f"    NL {one} for 9.0 s wants EX, waits 3.5 s for {one} in CR for 62.0 s, {two} in PR for 3 min",
        f"    -- {one} wants CR, waits 12.0 s for its turn behind {one}",
    ]


def held(lock: int, owner: dict[str, Any], waiter: dict[str, Any] | None = None, waits_s: float = 0.0) -> Any:
    """A resource under EX, with somebody waiting for it."""
    wanted = {**(waiter or {}), "id": lock + 100, "mode": "IV", "wants": "EX", "waits_s": waits_s}
    holds = {**owner, "id": lock, "mode": "EX", "held_s": 20.0}
    return resource("r", granted=[holds], waiting=[wanted] if waiter else [])


def test_stuck_resources_come_first_then_the_dead_ones_then_the_rest() -> None:
    told = of({
        "a-quiet": held(1, ONE),
        "b-dead": held(2, TWO),
        "c-short": held(3, ONE, THREE, 1.0),
        "d-long": held(4, ONE, THREE, 50.0),
    })  # fmt: skip
    told["replica"]["lockspaces"]["a-quiet-space"] = {
        "slots": [],
        "joining": [],
        "resources": {"q": held(9, ONE)},
    }
    lines = locks_text(told).splitlines()
    assert [line.strip() for line in lines if line[:2] == "  " and line[2] in "abcd"] == [
        "d-long",
        "c-short",
        "b-dead",
        "a-quiet",
    ]
    assert [line for line in lines if line.startswith("lockspace")] == [
        "lockspace uuid",
        "lockspace a-quiet-space",
    ]


def test_an_age_may_be_a_least_one() -> None:
    lock = {**ONE, "id": 1, "mode": "EX", "held_s": 7300.0, "age_at_least": True}
    assert "    EX node1 array md0 (pid 11) for at least 2 h\n" in locks_text(
        of({"r": resource("r", granted=[lock])})
    )


def test_waits_that_go_round_are_named() -> None:
    live = {**TWO, "zombie": False}
    told = of({
        "left": held(1, ONE, live, 2.0),
        "middle": held(2, live, THREE, 3.0),
        "right": held(3, THREE, ONE, 4.0),
        "apart": held(4, ONE, {**ONE, "session": 2, "pid": 12}, 9.0),
    })  # fmt: skip
    circle = [line for line in locks_text(told).splitlines() if "circle" in line]
    assert circle == [
        "  in a circle: node1 array md0 (pid 11) waits for node3 lock backup: rsync (pid 33) (right), "
        "node3 lock backup: rsync (pid 33) waits for node2 array md0 (pid 22) (middle), "
        "node2 array md0 (pid 22) waits for node1 array md0 (pid 11) (left)"
    ]
    del told["replica"]["lockspaces"]["uuid"]["resources"]["middle"]
    assert "circle" not in locks_text(told)


def test_a_check_tells_only_what_waits_longer_than_its_bound() -> None:
    told = of({"short": held(1, ONE, THREE, 9.9), "long": held(2, ONE, THREE, 10.0)})
    assert check_text(told, 10.0) == (
        "uuid long: node3 lock backup: rsync (pid 33) wants EX, waits 10.0 s for node1 array md0 (pid 11) in EX for "
        "20.0 s\n"
    )
    assert check_text(told, 10.1) == ""


def test_the_status_of_a_check_and_one_lockspace_of_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = of({"long": held(1, ONE, THREE, 11.0)})
    told["replica"]["lockspaces"]["other"] = {"slots": [], "joining": [], "resources": {}}

    async def status(*_: Any) -> dict[str, Any]:
        return told

    monkeypatch.setattr(locks, "lockd_status", status)
    assert run([]) == 0, "the question was answered"
    assert run(["--check"]) == 1
    assert run(["--check", "--over=11.5"]) == 0
    assert run(["--check", "--over", "5", "--lockspace", "other"]) == 0
    capsys.readouterr()
    assert run(["--lockspace=other"]) == 0
    assert "lockspace uuid" not in capsys.readouterr().out
    with pytest.raises(Refused, match=r"'nowhere'.*other, uuid"):
        run(["--lockspace", "nowhere"])


# What the real dlm_tool 4.2.0 prints for the same state of the kernel's lock manager.
LOCKDEBUG = """\

Resource len  1  "A"
Master           \nLVB len 20 seq 1
76 31 2d 41 00 00 00 00 00 00 00 00 00 00 00 00 \n01 02 03 04
Granted
00000005 EX      Remote:   3 00000005          \nConvert
00000001 NL (PR)                               \n00000008 NL (PR) Remote:   2 00000008          \nWaiting
00000007 -- (EX)                               \n00000009 -- (EX) Remote:   2 00000009          \n
Resource len  3 hex 01 ff 61
Master           flags 00000002 first_lkid 0 root 0 recover 0 locks 0
Granted
00000001 CR                                    \n
"""


def test_the_format_of_dlm_tool() -> None:
    first = resource(
        "A",
        granted=[{**THREE, "id": 5, "mode": "EX"}],
        converting=[
            {**ONE, "id": 1, "mode": "NL", "wants": "PR"},
            {**TWO, "id": 8, "mode": "NL", "wants": "PR"},
        ],
        waiting=[
            {**ONE, "id": 7, "mode": "IV", "wants": "EX"},
            {**TWO, "id": 9, "mode": "IV", "wants": "EX"},
        ],
        value_block=(b"v1-A" + bytes(12) + bytes((1, 2, 3, 4))).hex(),
        value_block_sequence=1,
    )
    second = resource(
        "x", granted=[{**ONE, "id": 1, "mode": "CR"}], name_hex="01ff61", value_block_invalid=True
    )
    told = of({"A": first, "\\x01\\xffa": second})
    assert dlm_text(told, named=False) == LOCKDEBUG
    assert dlm_text(told, named=True) == "lockspace uuid\n" + LOCKDEBUG


def test_nodes_in_trouble_are_named() -> None:
    sequencer = {
        "unresponsive": [{"node": "node2", "pid": 22, "silent_s": 3.5}],
        "awaited": [{"node": "node3", "for_s": 1.0}],
        "unproved": [{"node": "node4", "for_s": 2.0, "waiting": ["byte 4 of /x is locked"]}],
    }
    sessions = [{"label": "array md1", "pid": 5, "lost_for_s": 4.0, "waiting": ["its lock is held"]}]
    text = locks_text(
        state(group={"sequencer": sequencer}, suspended="the sequencer is gone", sessions=sessions)
    )
    assert "  suspended: the sequencer is gone\n" in text
    assert "  node2 (process 22) has been silent for 3.5 s\n" in text
    assert "  node3 is awaited for 1.0 s to rejoin\n" in text
    assert "  node4 is lost for 2.0 s and not proved dead: byte 4 of /x is locked\n" in text
    assert "  session array md1 (pid 5) is lost for 4.0 s and not proved dead: its lock is held\n" in text
    assert "the sequencer does not answer" in locks_text(state(group={"sequencer": None}))
    assert "sequencer" not in locks_text(state(group={})), "another engine has none"


@pytest.mark.parametrize(
    "words",
    [
        ["--frob"],
        ["--over"],
        ["--over", "5"],
        ["--json", "--check"],
        ["--check", "--over=soon"],
        ["--check", "--over=-1"],
    ],
)
def test_words_it_does_not_know_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        run(words)
