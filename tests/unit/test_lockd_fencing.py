"""Fencing policies: what counts as a proof, and that everything else is a failure that says why."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from clustermd.conf import FenceAgent
from clustermd.errors import Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.lockd.fencing.agent import AgentFencer
from clustermd.lockd.fencing.lease import LeaseFencer
from clustermd.lockd.fencing.none import NoFencer
from clustermd.lockd.fencing.stonith import StonithFencer

VICTIM = Victim(3, "node3", 0xABCD, 1000.0)
LIMIT_S = 20.0
T = TypeVar("T")
Script = Callable[[str], str]


def run(story: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(story, LIMIT_S)

    return asyncio.run(bounded())


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def make(text: str) -> str:
        path = tmp_path / "fence_test"
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
        return str(path)

    return make


def _fencer(program: str, **settings: Any) -> AgentFencer:
    return AgentFencer(FenceAgent(program, **{"retries": 0, "timeout_s": 10.0, **settings}), "/etc/c.conf")


def _stonith(program: str, **settings: Any) -> StonithFencer:
    return StonithFencer("reboot", program, **settings)


def _failure(fencer: AgentFencer | StonithFencer, victim: Victim = VICTIM) -> str:
    with pytest.raises(Refused) as caught:
        run(fencer.fence(victim))
    assert caught.value.code == "fence-failed"
    return caught.value.message


def test_an_agent_gets_its_options_on_standard_input(script: Script, tmp_path: Path) -> None:
    program = script(f"cat > {tmp_path}/heard; exit 0\n")
    options = {"username": "admin", "ip": "10.0.0.9"}
    fencer = _fencer(program, options=options, nodes={"node3": {"ip": "10.0.0.3"}})
    assert "verified action=off for node3" in run(fencer.fence(VICTIM))
    heard = (tmp_path / "heard").read_text().splitlines()
    assert sorted(heard) == [
        "action=off",
        "ip=10.0.0.3",
        "nodename=node3",
        "plug=node3",
        "port=node3",
        "username=admin",
    ]


def test_a_plug_of_the_configuration_is_the_only_one(script: Script, tmp_path: Path) -> None:
    program = script(f"cat > {tmp_path}/heard\n")
    run(_fencer(program, nodes={"node3": {"port": "7"}}, action="reboot").fence(VICTIM))
    assert sorted((tmp_path / "heard").read_text().split()) == ["action=reboot", "nodename=node3", "port=7"]


def test_every_end_but_zero_is_a_failure_with_the_last_words(script: Script) -> None:
    message = _failure(_fencer(script("echo starting; echo 'login refused' >&2; exit 1\n")))
    assert "did not fence node3: it ended with status 1; its last words: starting / login refused" in message
    assert "status 2" in _failure(_fencer(script("exit 2\n")))
    assert "without a word" in _failure(_fencer(script("exit 2\n")))
    assert "ended by signal 9" in _failure(_fencer(script("kill -9 $$\n")))


def test_garbage_and_floods_end_in_one_bounded_line(script: Script) -> None:
    message = _failure(_fencer(script("head -c 3000000 /dev/urandom; exit 1\n")))
    assert len(message) < 2000 and message.isprintable()


def test_an_agent_that_reads_nothing_is_no_matter(script: Script) -> None:
    options = {f"option{number}": "x" * 1000 for number in range(200)}  # more than a pipe holds
    assert "verified" in run(_fencer(script("exec 0<&-; exit 0\n"), options=options).fence(VICTIM))


def test_an_agent_that_hangs_is_killed_with_what_it_started(script: Script, tmp_path: Path) -> None:
    program = script(
        f"echo connecting; sleep 1000 & echo $! > {tmp_path}/child; trap '' TERM; sleep 1000; exit 0\n"
    )
    began = time.monotonic()
    message = _failure(_fencer(program, timeout_s=1.0))
    assert time.monotonic() - began < 8
    assert "did not end within 1 s and was killed; its last words: connecting" in message
    _gone(int((tmp_path / "child").read_text()))


def test_a_child_that_keeps_the_pipe_delays_no_proof(script: Script, tmp_path: Path) -> None:
    program = script(f"sleep 1000 & echo $! > {tmp_path}/child; exit 0\n")
    began = time.monotonic()
    run(_fencer(program).fence(VICTIM))
    assert time.monotonic() - began < 5
    _gone(int((tmp_path / "child").read_text()))


def test_a_cancelled_fencing_kills_the_agent(script: Script, tmp_path: Path) -> None:
    program = script(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 1000\n")

    async def story() -> None:
        task = asyncio.create_task(_fencer(program).fence(VICTIM))
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(story())
    _gone(int((tmp_path / "pid").read_text()))


def test_the_loop_goes_on_while_an_agent_runs(script: Script) -> None:
    async def story() -> int:
        task = asyncio.create_task(_fencer(script("sleep 1; exit 0\n")).fence(VICTIM))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns

    assert run(story()) > 20


def test_failures_are_retried_and_counted(script: Script, tmp_path: Path) -> None:
    program = script(f"echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -ge 3 ]\n")
    assert "(2 tries)" in _failure(_fencer(program, retries=1))
    (tmp_path / "runs").unlink()
    assert "verified" in run(_fencer(program, retries=2).fence(VICTIM))


def test_what_cannot_be_run_says_what_to_install() -> None:
    assert "package fence-agents" in _failure(_fencer("fence_that_nobody_has"))
    assert "/etc/c.conf" in _failure(_fencer("/no/such/agent"))


def test_a_program_that_the_kernel_refuses_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "fence_bad"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    assert "cannot be run" in _failure(_fencer(str(path)))


def test_a_node_that_the_configuration_forgot_is_not_fenced_with_the_common_options(script: Script) -> None:
    fencer = _fencer(script("exit 0\n"), options={"ip": "10.0.0.1"}, nodes={"node1": {}, "node2": {}})
    message = _failure(fencer)
    assert "[fence_agent.nodes.node3]" in message and "node1, node2" in message


def test_a_check_asks_for_the_status_and_harms_nobody(script: Script, tmp_path: Path) -> None:
    program = script(f"cat > {tmp_path}/heard; grep -q node3 {tmp_path}/heard && exit 2; exit 0\n")
    fencer = _fencer(program)
    assert "the node is off" in run(fencer.check("node3"))
    assert "action=status" in (tmp_path / "heard").read_text()
    assert "the node is on" in run(fencer.check("node1"))
    assert "action=monitor succeeded" in run(fencer.check(""))
    with pytest.raises(Refused, match="status 1; its last words: no route"):
        run(_fencer(script("echo no route; exit 1\n")).check("node3"))


def test_stonith_counts_only_its_exit_status(script: Script, tmp_path: Path) -> None:
    program = script(f'echo "$@" > {tmp_path}/words\n')
    assert "pacemaker verified" in run(_stonith(program).fence(VICTIM))
    assert (tmp_path / "words").read_text().startswith("--reboot node3 --timeout")
    run(StonithFencer("off", program).fence(VICTIM))
    assert (tmp_path / "words").read_text().startswith("--fence node3 --timeout")
    assert "No route" in _failure(_stonith(script("echo No route; exit 124\n")))
    assert "no answer in time" in _failure(_stonith(script("sleep 1000\n"), timeout_s=-9.5))
    assert "install pacemaker" in _failure(_stonith("/no/stonith_admin"))


def test_a_failure_of_stonith_says_what_to_do(script: Script) -> None:
    """The exit statuses and words are those of pacemaker 2.1.5."""
    lost = "Couldn't fence node3: Transport endpoint is not connected"
    assert "systemctl start pacemaker" in _failure(_stonith(script(f'echo "{lost}"; exit 102\n')))
    none = "Couldn't fence node3: No such device (No device configured for target 'node3')"
    assert "pcs stonith create" in _failure(_stonith(script(f'echo "{none}"; exit 105\n')))
    silent = script('echo "Couldn\'t fence node3: No data available"; exit 1\n')
    assert "stonith_admin --history 'node3'" in _failure(_stonith(silent))
    with pytest.raises(Refused, match="systemctl start pacemaker"):
        run(_stonith(script("exit 102\n")).check(""))


def test_stonith_without_a_device_fails_its_check(script: Script) -> None:
    assert "1 fence device found" in run(
        _stonith(script("echo fence_xvm; echo 1 fence device found\n")).check("")
    )
    assert "10 fence devices" in run(_stonith(script("echo 10 fence devices found\n")).check("node3"))
    for words in ("No devices found", "0 fence devices found"):
        with pytest.raises(Refused, match="pcs stonith create"):
            run(_stonith(script(f"echo {words}; exit 0\n")).check("node3"))


class Boottime:
    """A clock that shows what a test says, and jumps when looked at."""

    def __init__(self, *shown_s: float) -> None:
        self.left_s = list(shown_s)

    def boottime_s(self) -> float:
        return self.left_s.pop(0) if len(self.left_s) > 1 else self.left_s[0]

    def monotonic_s(self) -> float:
        raise AssertionError("leases are not measured with a clock that sleeps")

    now_s = monotonic_s


def test_a_lease_is_waited_out_to_its_end() -> None:
    def waits(*shown_s: float) -> Coroutine[Any, Any, str]:
        return LeaseFencer(Boottime(*shown_s), 10, 0.01, 30).fence(VICTIM)

    assert "its lease of 10 s is over" in run(waits(1040.1))
    # it does not trust its own sleep: the clock may have gone slower than the loop's
    clock = Boottime(1000, 1040.05, 1040.08, 1040.09, 1040.11)
    run(LeaseFencer(clock, 10, 0.01, 30).fence(VICTIM))
    assert clock.boottime_s() == 1040.11 and len(clock.left_s) == 1

    async def too_early() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waits(1040.0), 0.05)

    run(too_early())


def test_unsafe_policies_say_why() -> None:
    lease = LeaseFencer(Boottime(0), 10, 0.01, 30)
    assert "watchdog" in lease.unsafe and "30 s" in lease.unsafe
    assert NoFencer.unsafe and not AgentFencer.unsafe and not StonithFencer.unsafe
    assert "nobody made sure" in run(NoFencer().fence(VICTIM))


def test_one_victim_is_one_life() -> None:
    assert replace(VICTIM, incarnation=1) != VICTIM


def _gone(pid: int) -> None:
    """That process is dead (it may be a zombie of somebody)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        os.sched_yield()
    raise AssertionError(f"process {pid} still runs")
