"""What tests of the daemons share: child programs that tell what they hear, and a run directory of their own.

A child writes one JSON line an event to standard output (`tell`) and reads commands from standard input
(`commands`), so that it, and not the test, can be stopped and killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0
UNRESPONSIVE_S = 1.5


def tell(*event: Any) -> None:
    """In a child: one event."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def commands() -> AsyncIterator[list[str]]:
    """In a child: the words of each command; an empty list when the test closed our input."""
    lines: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        data = os.read(0, 1 << 16)
        for line in data.decode().splitlines() or [""]:
            lines.put_nowait(line)
        if not data:
            asyncio.get_running_loop().remove_reader(0)

    asyncio.get_running_loop().add_reader(0, read)
    while True:
        yield (await lines.get()).split()


class Process:
    """A child of the test and the events it has written so far."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        assert self.popen.stdout is not None
        os.set_blocking(self.popen.stdout.fileno(), False)
        self.events: list[list[Any]] = []
        self._partial = b""

    @property
    def pid(self) -> int:
        return self.popen.pid

    def say(self, *words: Any) -> None:
        assert self.popen.stdin is not None
        self.read()
        assert self.popen.poll() is None, self.events[-5:]
        self.popen.stdin.write((" ".join(map(str, words)) + "\n").encode())

    def read(self) -> None:
        assert self.popen.stdout is not None
        try:
            while data := os.read(self.popen.stdout.fileno(), 1 << 20):
                *lines, self._partial = (self._partial + data).split(b"\n")
                self.events += [json.loads(line) for line in lines]
        except BlockingIOError:
            pass

    def wait(self, wanted: Callable[[list[Any]], bool], what: str) -> list[Any]:
        """The first event that is `wanted`."""
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            self.read()
            for event in self.events:
                if wanted(event):
                    return event
            time.sleep(0.005)
        raise AssertionError(f"no {what}; heard {self.events[-8:]}")

    def wait_view(self, *names: str) -> list[Any]:
        return self.wait(lambda e: e[0] == "view" and e[2] == list(names) and e[5], f"view of {names}")

    def wait_status(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first status, asked again and again, that is `wanted`; statuses leave the events."""
        end_s = time.monotonic() + PATIENCE_S
        state: dict[str, Any] = {}
        while time.monotonic() < end_s:
            self.say("status")
            state = self.wait(lambda event: event[0] == "status", "status")[1]
            self.events = [event for event in self.events if event[0] != "status"]
            if wanted(state):
                return state
        raise AssertionError(f"no {what}; last {state}")

    def ordered(self) -> list[Any]:
        """Everything of the agreed order: no views of a member alone with itself."""
        return [e for e in self.events if e[0] in ("message", "fenced") or (e[0] == "view" and e[5])]

    def wait_messages(self, count: int) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while len(self.messages()) < count:
            assert time.monotonic() < end_s, f"{len(self.messages())} of {count} messages; {self.events[-3:]}"
            self.read()
            time.sleep(0.005)

    def messages(self) -> list[Any]:
        return [event for event in self.events if event[0] == "message"]

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.close()
        self.popen.stdout.close()


class Machine:
    """A run directory and the processes of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: list[Process] = []
        self.environment = dict(
            os.environ,
            CLUSTERMD_RUN=str(root),
            CLUSTERMD_UNRESPONSIVE_S=str(UNRESPONSIVE_S),
            CLUSTERMD_LINGER_S="0.3",
        )

    def start(self, program: str, node: str, *arguments: str) -> Process:
        """A child of ours on that node: `program` is its Python file."""
        process = Process(self.environment | {"CLUSTERMD_NODE": node}, program, *arguments)
        self.processes.append(process)
        return process

    def log(self) -> str:
        return (self.root / "sequencer.log").read_text()


@contextmanager
def machine_of_its_own() -> Iterator[Machine]:
    """A run directory whose daemons have all ended by themselves when the test is over."""
    with tempfile.TemporaryDirectory(prefix="cmd-") as directory:
        machine = Machine(Path(directory) / "run")
        try:
            yield machine
        finally:
            for process in machine.processes:
                process.end()
            # without members the sequencer proves their end and goes
            wait_for(lambda: machine.log().rstrip().endswith("] ended"), machine.log)


def wait_for(state: Callable[[], bool], last_words: Callable[[], str]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not state():
        assert time.monotonic() < end_s, last_words()
        time.sleep(0.01)
