"""`clustermd lock` with real commands on real nodes: who gets it, what it says, and every way in which it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from lock_kit import PATIENCE_S, QUICK, Locks, Program, runs

from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system

# says who it is and works on, in two processes, one of which has left its parent's session
WORKS = "setsid sleep 1000 & echo $$ $!; exec sleep 1000"
# the same, and does not listen to SIGTERM
STUBBORN = "trap '' TERM; sleep 1000 & echo $$ $!; wait; exec sleep 1000"
LOST = 75


@pytest.fixture
def locks() -> Iterator[Locks]:
    with LocalCluster(QUICK) as cluster:
        locks = Locks(cluster)
        yield locks
        locks.close()


def whether_they_run(pids: list[int]) -> list[str]:
    """The words of a command that says of processes whether they run while it has the lock."""
    tests = " ".join(f"kill -0 {pid} 2>/dev/null && echo {pid} runs;" for pid in pids)
    return ["--", "sh", "-c", f"{tests} echo looked"]


def test_two_nodes_take_turns_and_the_second_says_for_whom_it_waits(locks: Locks) -> None:
    first, [pid] = locks.hold("n1", "echo $$; exec sleep 1000", name="backup")
    second = locks.start("n2", "lock", "backup", "--", "echo", "mine")
    wait_until(lambda: second.err, "what it waits for", PATIENCE_S)
    assert second.err.startswith(
        f"clustermd: waiting for backup in EX: n1 lock backup: sh (pid {first.pid}) in EX for "
    )
    time.sleep(2.5)  # two more looks
    assert second.err.count("waiting") == 1 and second.out == ""
    os.kill(pid, signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM
    assert second.end() == 0 and second.out == "mine\n"


def test_it_says_it_again_when_it_waits_for_somebody_else(locks: Locks) -> None:
    first, [pid] = locks.hold("n1", "echo $$; exec sleep 1000")
    second = locks.start("n1", "lock", "r", "--", "sh", "-c", "echo $$; exec sleep 1000")
    wait_until(lambda: second.err, "the second to wait", PATIENCE_S)
    third = locks.start("n2", "lock", "r", "--", "true")
    wait_until(lambda: f"(pid {first.pid})" in third.err, "the third to wait for the first", PATIENCE_S)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: f"(pid {second.pid})" in third.err, "the third to wait for the second", PATIENCE_S)
    os.kill(int(second.out), signal.SIGKILL)
    assert [first.end(), second.end(), third.end()] == [137, 137, 0]
    assert third.err.count("\n") == 2


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["/nonexistent/program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_the_exit_status_is_the_command_s(locks: Locks, command: list[str], status: int) -> None:
    assert locks.run("n1", "lock", "r", "--", *command).popen.returncode == status


def test_who_does_not_want_to_wait_is_told_who_has_it(locks: Locks) -> None:
    first, [pid] = locks.hold("n1", "echo $$; exec sleep 1000", "--mode", "PR")
    started_s = time.monotonic()
    refused = locks.run("n2", "lock", "r", "--nonblock", "--", "touch", "it-ran")
    late = locks.run("n2", "lock", "r", "--timeout", "1.5", "--mode=CW", "--", "touch", "it-ran")
    assert time.monotonic() - started_s > 1.5
    holder = f"it is held by n1 lock r: sh (pid {first.pid}) in PR for "
    assert refused.popen.returncode == 1
    assert f"clustermd: r was not granted in EX: {holder}" in refused.err
    assert late.popen.returncode == 1
    assert f"clustermd: r was not granted in CW within 1.5 s: {holder}" in late.err
    assert not (locks.cluster.directory / "it-ran").exists()
    together = locks.run("n2", "lock", "r", "--nonblock", "--mode", "pr", "--", "echo", "together")
    elsewhere = locks.run("n2", "lock", "r", "--nonblock", "--lockspace=other", "--", "echo", "elsewhere")
    assert (together.out, elsewhere.out) == ("together\n", "elsewhere\n")
    os.kill(pid, signal.SIGKILL)
    assert first.end() == 137


def test_for_programs_its_words_are_json_and_standard_output_is_the_command_s(locks: Locks) -> None:
    first, [pid] = locks.hold("n1", "echo $$; exec sleep 1000")
    refused = locks.run("n2", "lock", "r", "--json", "--timeout=2", "--", "echo", "mine")
    waiting, error = (json.loads(line) for line in refused.err.splitlines())
    assert refused.out == "" and waiting["event"] == "waiting"
    assert [(who["name"], who["pid"], who["mode"]) for who in waiting["waits_for"]] == [
        ("n1", first.pid, "EX")
    ]
    assert error["event"] == "refused" and error["error"]["code"] == "timed-out"
    assert [who["label"] for who in error["error"]["data"]["holders"]] == ["lock r: sh"]
    os.kill(pid, signal.SIGKILL)


def killed_is_followed_when_all_is_gone(locks: Locks, first: Program, pids: list[int]) -> None:
    """The next one gets the lock, and while it has it nothing of the first command runs."""
    second = locks.run("n2", "lock", "r", *whether_they_run(pids))
    assert second.out == "looked\n", second.err
    assert first.popen.wait(PATIENCE_S) is not None
    assert not any(map(runs, pids))


def test_a_killed_holder_takes_its_command_with_it(locks: Locks) -> None:
    first, pids = locks.hold("n1", WORKS)
    first.kill()
    killed_is_followed_when_all_is_gone(locks, first, pids)
    witnesses = locks.cluster.node("n1").rundir.node_dir.glob("locks.*")
    assert not list(witnesses), "the guard has removed the file that proved the end"


def test_a_killed_guard_takes_the_command_with_it(locks: Locks) -> None:
    locks.run("n1", "lock", "other", "--", "true")  # the daemons are there, so the guard is the only child
    first, pids = locks.hold("n1", WORKS)
    [guard] = first.children()
    os.kill(guard, signal.SIGKILL)
    assert first.end() == 137 and "guard was killed" in first.err
    killed_is_followed_when_all_is_gone(locks, first, pids)


def test_a_command_does_not_outlive_holder_and_guard_killed_together(locks: Locks) -> None:
    locks.run("n1", "lock", "other", "--", "true")
    first, [pid] = locks.hold("n1", "echo $$; exec sleep 1000")
    [guard] = first.children()
    os.kill(first.pid, signal.SIGSTOP)  # so it cannot see to it itself
    os.kill(guard, signal.SIGKILL)
    wait_until(lambda: not runs(pid), "the end of the command", PATIENCE_S)
    first.kill()


def test_daemons_that_a_holder_started_outlive_its_killed_guard(locks: Locks) -> None:
    first, pids = locks.hold("n1", WORKS)
    daemon = locks.lockd("n1")
    [guard] = [pid for pid in first.children() if pid != daemon]
    os.kill(guard, signal.SIGKILL)
    assert first.end() == 137
    assert runs(daemon) and not any(map(runs, pids))


def test_a_stopped_holder_is_killed_with_its_command(locks: Locks) -> None:
    first, pids = locks.hold("n1", WORKS)
    os.kill(first.pid, signal.SIGSTOP)
    killed_is_followed_when_all_is_gone(locks, first, pids)
    assert first.end() == -signal.SIGKILL


@pytest.mark.parametrize("script", [WORKS, STUBBORN])
def test_a_lost_lock_ends_the_command_before_anybody_else_has_it(locks: Locks, script: str) -> None:
    first, pids = locks.hold("n1", script)
    locks.run("n2", "lock", "other", "--", "true")
    os.kill(locks.lockd("n1"), signal.SIGKILL)
    killed_is_followed_when_all_is_gone(locks, first, pids)
    assert first.end() == LOST
    assert first.err.startswith("clustermd: r is lost: the connection to this node's lockd ended: ")


def test_a_command_may_clean_up_when_its_lock_is_lost(locks: Locks) -> None:
    first, _ = locks.hold("n1", "trap 'echo cleaned; exit 0' TERM; echo $$; sleep 1000 & wait")
    os.kill(locks.lockd("n1"), signal.SIGKILL)
    assert first.end() == LOST, "whatever its own status"
    assert first.out.splitlines()[1:] == ["cleaned"]


def test_what_a_command_leaves_in_the_background_does_not_keep_the_lock(locks: Locks) -> None:
    first = locks.run("n1", "lock", "r", "--", "sh", "-c", "setsid sleep 1000 & echo $!")
    left = int(first.out)
    assert first.popen.returncode == 0 and runs(left)
    assert locks.run("n2", "lock", "r", "--nonblock", "--", "true").popen.returncode == 0
    os.kill(left, signal.SIGKILL)


def test_a_command_has_no_descriptor_of_the_lock(locks: Locks) -> None:
    listed = locks.run("n1", "lock", "r", "--", "sh", "-c", "ls -l /proc/$$/fd | grep -c 'locks\\|socket'")
    assert listed.out == "0\n"


@contextmanager
def started_with(number: signal.Signals, disposition: signal.Handlers) -> Iterator[None]:
    """What is started within inherits it, whatever these tests were started with."""
    before = signal.signal(number, disposition)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_signals_go_to_the_command_and_end_who_waits(locks: Locks) -> None:
    with started_with(signal.SIGHUP, signal.SIG_DFL):
        first, _ = locks.hold("n1", "trap 'echo told; exit 5' HUP; echo $$; while :; do sleep 0.05; done")
    second = locks.start("n2", "lock", "r", "--", "true")
    wait_until(lambda: second.err, "the second to wait", PATIENCE_S)
    os.kill(second.pid, signal.SIGTERM)
    assert second.end() == 128 + signal.SIGTERM
    for number in (signal.SIGINT, signal.SIGTSTP, signal.SIGHUP):
        os.kill(first.pid, number)  # a terminal sends the first two to the command itself
    assert first.end() == 5 and first.out.splitlines()[1:] == ["told"]
    third = locks.run("n2", "lock", "r", "--nonblock", "--", "true")
    assert third.popen.returncode == 0, "the second's request is gone"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_from_the_start_ends_nobody(locks: Locks, number: signal.Signals) -> None:
    first, _ = locks.hold("n1", "echo $$; until [ -e go ]; do sleep 0.05; done")
    with started_with(number, signal.SIG_IGN):
        second = locks.start("n1", "lock", "r", "--", "echo", "done")
    wait_until(lambda: second.err, "the second to wait", PATIENCE_S)
    os.kill(second.pid, number)
    (locks.cluster.directory / "go").touch()
    assert [first.end(), second.end(), second.out] == [0, 0, "done\n"]


def test_fifty_commands_of_two_nodes_never_work_at_once(locks: Locks) -> None:
    counter = locks.cluster.directory / "counter"
    counter.write_text("0\n")
    script = "read n < counter; sleep 0.01; echo $((n + 1)) > counter"

    def add(number: int) -> int:
        return locks.run(f"n{number % 2 + 1}", "lock", "counter", "--", "sh", "-c", script).popen.returncode

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(add, range(50))) == {0}
    assert counter.read_text() == "50\n"


def test_locks_shows_it_and_checks_it(locks: Locks) -> None:
    first, [pid] = locks.hold("n1", "echo $$; exec sleep 1000", name="backup")
    second = locks.start("n2", "lock", "backup", "--", "true")
    wait_until(lambda: second.err, "the second to wait", PATIENCE_S)
    page = locks.run("n2", "locks").out
    waits = f"n2 lock backup: true (pid {second.pid}) wants EX, waits "
    assert f"  clustermd-lock backup: {waits}" in page
    assert f" s for n1 lock backup: sh (pid {first.pid}) in EX for " in page
    assert locks.run("n1", "locks", "--check").popen.returncode == 0
    stuck = locks.run("n1", "locks", "--check", "--over", "0.5")
    assert stuck.popen.returncode == 1 and stuck.out.startswith(f"clustermd-lock backup: {waits}")
    told = json.loads(locks.run("n1", "locks", "--json", "--lockspace", "clustermd-lock").out)
    [wait] = told["waits"]
    assert (wait["resource"], wait["lock"]["pid"], wait["blockers"][0]["pid"]) == (
        "backup",
        second.pid,
        first.pid,
    )
    dlm = locks.run("n1", "locks", "--dlm-format", "--lockspace=clustermd-lock").out.splitlines()
    assert dlm[:4] == ["", 'Resource len  6  "backup"', "Master           ", "Granted"]
    assert " EX " in dlm[4] and dlm[5] == "Waiting" and " -- (EX) Remote:   2 " in dlm[6]
    os.kill(pid, signal.SIGKILL)
    assert [first.end(), second.end()] == [137, 0]


def test_what_cannot_be_understood_runs_nothing() -> None:
    from clustermd.cli.command import UsageError
    from clustermd.cli.lock import run

    for words in (
        ["r", "true"],
        ["--", "true"],
        ["r", "--"],
        ["r", "s", "--", "true"],
        ["r", "--mode", "XX", "--", "true"],
        ["r", "--mode", "IV", "--", "true"],
        ["r", "--timeout=-1", "--", "true"],
        ["r", "--nonblock", "--timeout", "1", "--", "true"],
        ["r" * 65, "--", "true"],
        ["r", "--lockspace", "", "--", "true"],
        ["r", "--quiet", "--", "true"],
    ):
        with pytest.raises(UsageError):
            run(words)


def test_its_help_needs_no_cluster() -> None:
    from lock_kit import CLUSTERMD

    done = subprocess.run(
        [CLUSTERMD, "lock", "--help"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.startswith("Usage: clustermd lock NAME")
