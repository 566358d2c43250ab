"""The control socket of an array process: one JSON object a line, asked and answered in turn.

`{"command": "status"}` is answered by `{"ok": true, ...}` or by `{"refused": {"code", "message", "data"}}`.
The server side is asyncio; the client side is a plain blocking socket with a time-out, for the command line,
which must say something when the process is there but does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from clustermd.errors import Refused
from clustermd.node.config import refusal_from_wire, refusal_to_wire
from clustermd.node.files import ArrayFiles, process_alive, running_pid
from clustermd.rundir import RunDir

ANSWER_S = 5.0
LINE_MAX_BYTES = 1 << 20

Answerer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers each line of each connection with `answer(request)`; a Refused becomes a refusal."""

    def __init__(self, path: Path, answer: Answerer) -> None:
        self.path = path
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._idle: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, path=self.path, limit=LINE_MAX_BYTES)
        finally:
            os.umask(mask)

    async def close(self) -> None:
        """Stop listening, give the answers that are being made, and end the connections."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        for task in self._idle:
            task.cancel()
        tasks = self._idle | self._answering
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=ANSWER_S)
            for task in late:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while not self._closing:
                self._idle.add(task)
                line = await reader.readline()
                self._idle.discard(task)
                if not line:
                    break
                self._answering.add(task)
                writer.write((json.dumps(await self._reply(line)) + "\n").encode())
                await writer.drain()
                self._answering.discard(task)
        except (ConnectionError, ValueError):
            pass  # the client went away, or sent a line without end
        except asyncio.CancelledError:
            pass  # the process ends
        finally:
            self._idle.discard(task)
            self._answering.discard(task)
            writer.close()

    async def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise Refused("bad-request", "a request is a JSON object on one line")
            return {"ok": True, **await self._answer(request)}
        except ValueError as error:
            return {
                "refused": refusal_to_wire(Refused("bad-request", f"not a JSON object on a line: {error}"))
            }
        except Refused as refusal:
            return {"refused": refusal_to_wire(refusal)}


class ControlClient:
    """One connection to the array process of `name` on this node. Refused when it is not running."""

    def __init__(self, rundir: RunDir, name: str) -> None:
        self.name = name
        pid = running_pid(rundir, name)
        if pid is None:
            raise Refused("not-running", f"{name} is not running on this node ({rundir.node})", name=name)
        self.pid = pid
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.connect(os.fspath(ArrayFiles.of(rundir, name).control_socket))
        except OSError as error:
            self._socket.close()
            raise Refused(
                "not-ready",
                f"{name} is not ready: process {pid} is just starting or ending ({error.strerror})",
                name=name,
            ) from error

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(
        self, command: str, patience: Callable[[], None] | None = None, **arguments: object
    ) -> dict[str, Any]:
        """The answer to one command. Raises what the process refused.

        Waits ANSWER_S, or with `patience` for as long as the process lives, calling it each time that passed.
        """
        try:
            self._socket.sendall((json.dumps({"command": command, **arguments}) + "\n").encode())
            while b"\n" not in self._rest:
                try:
                    received = self._socket.recv(1 << 16)
                except TimeoutError:
                    if patience is None:
                        raise Refused(
                            "no-answer",
                            f"the process {self.pid} that runs {self.name} does not answer"
                            f" (it is {process_state(self.pid)}): look at its log, or end it with kill -9",
                            pid=self.pid,
                        ) from None
                    patience()
                    continue
                if not received:
                    raise ConnectionResetError("it ended")
                self._rest += received
        except OSError as error:
            raise Refused(
                "process-ended",
                f"the process {self.pid} that runs {self.name} ended before it answered",
                pid=self.pid,
            ) from error
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise refusal_from_wire(answer["refused"])
        return answer

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait until the process is gone, with all it had open. False after `timeout_s`."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([pidfd], [], [], timeout_s)[0])
        finally:
            os.close(pidfd)


_STATES = {
    "R": "running",
    "S": "waiting",
    "D": "waiting for a disk",
    "T": "stopped by a signal",
    "Z": "ended",
}


def process_state(pid: int) -> str:
    """What a process does, in words (proc(5))."""
    if not process_alive(pid):
        return "ended"
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            letter = file.read().rpartition(")")[2].split()[0]
        return _STATES.get(letter, letter)
    return "ended"
