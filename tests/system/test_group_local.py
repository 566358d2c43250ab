"""The process group of one machine with real processes: one order, deaths, and sequencers that die.

A member is this file run as a program: it joins the group and writes what it hears, one JSON line
an event; its standard input tells it what to do. Members, not the test, are killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_kit import UNRESPONSIVE_S, Machine, Process, commands, machine_of_its_own, tell

from clustermd.clock import SystemClock, SystemRandom
from clustermd.conf import Conf
from clustermd.device.witness import WITNESS_BASE, hold
from clustermd.errors import Refused
from clustermd.group.liveness import Bounds
from clustermd.group.local import LocalGroup
from clustermd.group.process import start_time
from clustermd.group.process_group import Busy, Member, View, Witness
from clustermd.rundir import RunDir
from clustermd.trace import Trace

pytestmark = pytest.mark.system


class Teller:
    """GroupEvents that writes what it hears to standard output."""

    def on_view(self, view: View) -> None:
        left = [[member.name, reason.value] for member, reason in view.left]
        tell(
            "view",
            view.ring,
            [m.name for m in view.members],
            [m.name for m in view.joined],
            left,
            view.quorate,
        )

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        tell("message", index, sender.name, payload.decode())

    def on_stable(self, index: int) -> None:
        pass

    def on_fenced(self, member: Member, proof: str) -> None:
        tell("fenced", member.name, proof)


def expelled(reason: str) -> None:
    tell("expelled", reason)
    os._exit(3)


async def be_member() -> None:
    rundir = RunDir.from_environment()
    group = LocalGroup(
        rundir, Bounds.from_environment(Conf()), SystemClock(), SystemRandom(), Trace(), expelled
    )
    await group.connect()
    tell("node", group.me.node)
    group.join(Teller())
    async for words in commands():
        match words:
            case ["send", first, count]:
                for number in range(int(first), int(first) + int(count)):
                    while True:
                        try:
                            group.multicast(f"{rundir.node}-{number}".encode())
                            break
                        except Busy:
                            await asyncio.sleep(0.001)
                    if number % 20 == 0:
                        await asyncio.sleep(0.001)
            case ["witness", path, pid]:
                status = os.stat(path)
                started = start_time(int(pid))
                assert started is not None
                offset = WITNESS_BASE + group.me.node
                witness = Witness("array", int(pid), started, offset, ((path, status.st_dev, status.st_ino),))
                try:
                    await group.register_witness(witness)
                    tell("registered")
                except Refused as error:
                    tell("refused", error.code)
            case ["withdraw"]:
                await group.withdraw_witness("array")
                tell("withdrawn")
            case ["status"]:
                tell("status", await group.status())
            case ["leave"] | []:
                try:
                    await group.leave()
                except Refused as error:
                    tell("refused", error.code)
                    continue
                tell("gone")
                return


def be_holder(path: str, offset: int) -> None:
    """A process that does I/O for a node: holds the lock until it is told to let go."""
    descriptor = os.open(path, os.O_RDWR)
    assert hold(descriptor, offset)
    tell("holding")
    sys.stdin.readline()


class Group:
    """Members on one machine, and processes that do I/O for them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.root = machine.root

    def member(self, name: str) -> Process:
        return self.machine.start(__file__, name, "member")

    def members(self, *names: str) -> list[Process]:
        """Members that are all in one view, started one after the other."""
        members = []
        for name in names:
            members.append(self.member(name))
            for member in members:
                member.wait_view(*names[: len(members)])
        return members

    def holder(self, path: Path, node: int) -> Process:
        process = self.machine.start(__file__, "holder", "holder", str(path), str(WITNESS_BASE + node))
        process.wait(lambda event: event == ["holding"], "lock")
        return process

    def sequencer_pid(self, among: Process, not_pid: int = 0) -> int:
        def there(state: dict[str, Any]) -> bool:
            return bool(state["sequencer"]) and state["sequencer"]["pid"] != not_pid and not state["frozen"]

        return int(among.wait_status(there, "sequencer")["sequencer"]["pid"])


@pytest.fixture
def group() -> Iterator[Group]:
    with machine_of_its_own() as machine:
        yield Group(machine)


def test_three_nodes_start_by_themselves_and_hear_one_order(group: Group) -> None:
    members = [group.member(name) for name in ("a", "b", "c")]  # at once: they race for the sequencer
    names = {member.wait(lambda e: e[0] == "node", "number")[1] for member in members}
    assert names == {1, 2, 3}
    for member in members:
        member.wait(lambda e: e[0] == "view" and len(e[2]) == 3, "view of three")
        member.say("send", 0, 500)
    for member in members:
        member.wait_messages(1500)
    assert members[0].messages() == members[1].messages() == members[2].messages()
    indexes = [event[1] for event in members[0].messages()]
    assert indexes == list(range(indexes[0], indexes[0] + 1500))
    assert sorted((group.root / "nodes").read_text().split()[1::2]) == ["a", "b", "c"]
    for path in ("sequencer.sock", "order.log", "incarnations.json", "nodes", "sequencer.lock"):
        assert (group.root / path).stat().st_mode & 0o077 == 0, path
    assert group.machine.log().count("started") == 1


def test_a_leaver_is_not_fenced(group: Group) -> None:
    a, b = group.members("a", "b")
    b.say("leave")
    view = a.wait_view("a")
    a.wait(lambda e: e[0] == "view" and e[4] == [["b", "left"]], "departure of b")
    b.wait(lambda e: e == ["gone"], "end of leave")
    a.say("leave")
    a.wait(lambda e: e == ["gone"], "end of leave")
    assert view is not None and not [e for e in a.events if e[0] == "fenced"]


def test_a_killed_member_is_lost_at_once_and_fenced_when_its_lock_is_free(group: Group) -> None:
    a, b = group.members("a", "b")
    disk = group.root / "disk"
    disk.write_bytes(bytes(4096))
    b.say("witness", disk, os.getpid())
    b.wait(lambda e: e == ["refused", "witness-not-held"], "refusal of a lock nobody holds")
    holder = group.holder(disk, 2)
    b.say("witness", disk, holder.pid)
    b.wait(lambda e: e == ["registered"], "registration")
    b.say("leave")
    b.wait(lambda e: e == ["refused", "not-clean"], "refusal: its process still does I/O")
    b.popen.kill()
    a.wait(lambda e: e[0] == "view" and e[4] == [["b", "lost"]], "loss of b")
    state = a.wait_status(lambda state: bool(state["sequencer"]), "answer")["sequencer"]
    assert state["unproved"][0]["node"] == "b"
    a.read()
    assert not [e for e in a.events if e[0] == "fenced"]
    holder.say("let go")
    proof = a.wait(lambda e: e[0] == "fenced" and e[1] == "b", "fencing")[2]
    assert "killed" not in proof and str(disk) in proof
    again = group.member("b")
    assert again.wait(lambda e: e[0] == "node", "number")[1] == 2
    a.wait(lambda e: e[0] == "view" and e[3] == ["b"] and e[1][1] > 3, "return of b")


def test_a_disk_whose_name_is_gone_still_proves_an_end(group: Group) -> None:
    a, b = group.members("a", "b")
    disk = group.root / "disk"
    disk.write_bytes(bytes(4096))
    holder = group.holder(disk, 2)
    b.say("witness", disk, holder.pid)
    b.wait(lambda e: e == ["registered"], "registration")
    disk.unlink()
    b.popen.kill()
    a.wait_status(lambda s: "path is gone" in str(s["sequencer"]), "the lock of a file without a name")
    assert not [e for e in a.events if e[0] == "fenced"]
    holder.say("let go")
    a.wait(lambda e: e[0] == "fenced" and e[1] == "b", "fencing")


def test_a_process_that_does_not_let_go_is_killed_within_the_bound(group: Group) -> None:
    a, b = group.members("a", "b")
    disk = group.root / "disk"
    disk.write_bytes(bytes(4096))
    holder = group.holder(disk, 2)
    os.kill(holder.pid, signal.SIGSTOP)
    b.say("witness", disk, holder.pid)
    b.wait(lambda e: e == ["registered"], "registration")
    killed_s = time.monotonic()
    b.popen.kill()
    assert "killed" in a.wait(lambda e: e[0] == "fenced", "fencing")[2]
    assert UNRESPONSIVE_S <= time.monotonic() - killed_s < UNRESPONSIVE_S + 3
    assert holder.popen.wait() == -signal.SIGKILL


def test_a_stopped_member_is_shown_then_killed_and_proved(group: Group) -> None:
    a, b = group.members("a", "b")
    stopped_s = time.monotonic()
    os.kill(b.pid, signal.SIGSTOP)

    def shown(state: dict[str, Any]) -> bool:
        return bool(state["sequencer"]) and [p["node"] for p in state["sequencer"]["unresponsive"]] == ["b"]

    a.wait_status(shown, "silence of b in the status")
    assert time.monotonic() - stopped_s < UNRESPONSIVE_S
    a.wait(lambda e: e[0] == "fenced" and e[1] == "b", "fencing")
    assert UNRESPONSIVE_S * 0.9 <= time.monotonic() - stopped_s < UNRESPONSIVE_S + 3
    assert b.popen.wait() == -signal.SIGKILL


def test_a_stopped_sequencer_is_replaced(group: Group) -> None:
    a, b = group.members("a", "b")
    pid = group.sequencer_pid(a)
    os.kill(pid, signal.SIGSTOP)
    a.say("send", 0, 10)
    for member in (a, b):
        member.wait_messages(10)
    assert group.sequencer_pid(a) != pid
    assert a.ordered()[1:] == b.ordered()  # a heard one view before b joined


def test_twenty_dead_sequencers_under_load_lose_and_reorder_nothing(group: Group) -> None:
    members = group.members("a", "b", "c")
    pid = 0
    for life in range(20):
        for member in members:
            member.say("send", life * 200, 200)
        pid = group.sequencer_pid(members[0], not_pid=pid)
        os.kill(pid, signal.SIGKILL)
    for member in members:
        member.wait_messages(3 * 4000)
        member.wait(lambda e: e[0] == "view" and e[1] == [21, 1], "view of the last life")
    assert members[0].messages() == members[1].messages() == members[2].messages()
    for name in ("a", "b", "c"):
        sent = [event[3] for event in members[0].messages() if event[2] == name]
        assert sent == [f"{name}-{number}" for number in range(4000)]
    rings = [event[1] for event in members[0].ordered() if event[0] == "view"]
    assert rings == sorted(rings) and len({tuple(ring) for ring in rings}) == len(rings)
    assert rings[-1][0] == 21
    assert not [event for event in members[0].events if event[0] == "expelled"]
    # the same places for views and messages alike
    last_join = [e for e in members[0].ordered() if e[0] == "view" and e[3]][-1]
    tails = [m.ordered()[m.ordered().index(last_join) :] for m in members]
    assert tails[0] == tails[1] == tails[2]
    assert [e for e in members[0].events if e[0] == "view" and not e[5]], (
        "members were told that they are frozen"
    )


def test_a_new_sequencer_waits_for_the_former_lives(group: Group) -> None:
    a, b = group.members("a", "b")
    disk = group.root / "disk"
    disk.write_bytes(bytes(4096))
    holder = group.holder(disk, 2)
    b.say("witness", disk, holder.pid)
    b.wait(lambda e: e == ["registered"], "registration")
    pid = group.sequencer_pid(a)
    os.kill(b.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    os.kill(b.pid, signal.SIGKILL)
    a.wait(lambda e: e[0] == "view" and not e[5], "frozen view")
    c = group.member("c")

    def unproved(state: dict[str, Any]) -> bool:
        sequencer = state["sequencer"]
        return bool(sequencer) and sequencer["recovering"] and bool(sequencer["unproved"])

    a.say("send", 0, 5)
    a.wait_status(unproved, "wait for b's lock in the status")
    assert not a.messages(), "nothing is ordered while b's fate is open"
    assert not [e for e in c.events if e[0] == "view"]
    holder.say("let go")
    a.wait(lambda e: e[0] == "fenced" and e[1] == "b", "fencing")
    a.wait_messages(5)
    events = [event for event in a.ordered() if event[0] != "message"]
    tail = events[[event[1] for event in events].index([2, 1]) :]
    assert tail[0][:5] == ["view", [2, 1], ["a"], [], [["b", "lost"]]]
    assert tail[1][0] == "fenced"
    c.wait(lambda e: e[0] == "view" and e[2] == ["a", "c"], "view with c")


def test_a_former_life_that_stays_away_is_killed_and_fenced(group: Group) -> None:
    a, b = group.members("a", "b")
    os.kill(b.pid, signal.SIGSTOP)
    os.kill(group.sequencer_pid(a), signal.SIGKILL)
    a.wait(lambda e: e[0] == "fenced" and e[1] == "b", "fencing")
    assert b.popen.wait() == -signal.SIGKILL
    a.say("send", 0, 1)
    a.wait(lambda e: e[0] == "message", "a message of the new life")


if __name__ == "__main__":
    if sys.argv[1] == "member":
        asyncio.run(be_member())
    else:
        be_holder(sys.argv[2], int(sys.argv[3]))
