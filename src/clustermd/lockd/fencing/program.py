"""Running a fencing program: input, output, an end that always comes.

The exit status is the whole answer. What the program prints is for the log and, its last lines, for the
message of a failure; it is read as it comes and only its end is kept, so that no program can fill our memory or
hang on a full pipe. A program that takes too long is killed with all it started: it runs in a process group of its
own (dlm.md 6.8, 38). Only its own end is awaited, not that of the pipe, which a child it leaves behind may keep open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from clustermd.errors import Refused

LAST_LINES = 3
_LINE_BYTES = 400
_LOGGED_LINES = 200
_KILL_S = 5.0
_unreaped: list[subprocess.Popen[bytes]] = []
"""Programs that hang in the kernel although killed; collected when the next one runs."""
log = logging.getLogger("clustermd.lockd")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended. `status` is its exit status, -N for signal N, None when it was killed for its time.

    `last_words` is the end of its output on one line, "" for none.
    """

    status: int | None
    last_words: str


async def run_program(words: Sequence[str], text: str, timeout_s: float) -> Outcome:
    """Run `words` with `text` on standard input. Raises Refused ("no-program") when it cannot be started.

    When the caller is cancelled, the program is killed first.
    """
    _unreaped[:] = [process for process in _unreaped if process.poll() is None]
    name = os.path.basename(words[0])
    loop = asyncio.get_running_loop()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    output = _Output(reader, name)
    try:
        process = _start(words, text, writer)
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        os.close(reader)
        raise Refused(
            "no-program", f"{words[0]} cannot be run: {error.strerror}", program=words[0]
        ) from error
    finally:
        os.close(writer)
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    loop.add_reader(reader, output.read)
    in_time = True
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except (TimeoutError, asyncio.CancelledError) as why:
        in_time = False
        log.error("%s %s and is killed", shlex.join(words), _why(why, timeout_s))
        _kill_group(process.pid)
        try:
            await asyncio.wait_for(ended.wait(), _KILL_S)
        except TimeoutError:
            log.error("not even SIGKILL has ended process %d of %s", process.pid, name)
        if isinstance(why, asyncio.CancelledError):
            raise
    finally:
        # what it left behind
        _kill_group(process.pid)
        loop.remove_reader(pidfd)
        loop.remove_reader(reader)
        os.close(pidfd)
        output.close()
        status = process.poll()
        if status is None:
            _unreaped.append(process)
    return Outcome(status if in_time else None, " / ".join(output.last))


def _start(words: Sequence[str], text: str, output: int) -> subprocess.Popen[bytes]:
    """The program in a session of its own. Its input is a file, so it may read it or not."""
    stdin = os.memfd_create("input", os.MFD_CLOEXEC)
    try:
        os.write(stdin, text.encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    finally:
        os.close(stdin)


def _kill_group(pid: int) -> None:
    """End the program and what it started: it leads a group with its own number."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _why(error: BaseException, timeout_s: float) -> str:
    return f"did not end within {timeout_s:g} s" if isinstance(error, TimeoutError) else "is wanted no more"


class _Output:
    """What a program prints: logged line by line, the last ones kept."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._fd = descriptor
        self._name = name
        self._rest = b""
        self._logged = 0
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        os.set_blocking(descriptor, False)

    def read(self) -> bool:
        """Take what is there; False when there is no more now."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            return False
        *whole, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_LINE_BYTES:]
        for line in whole:
            self._keep(line)
        return True

    def close(self) -> None:
        """Take the rest. The program is dead, so a pipe's capacity is all there can be."""
        for _ in range(16):
            if not self.read():
                break
        self._keep(self._rest)
        os.close(self._fd)

    def _keep(self, line: bytes) -> None:
        text = line[:_LINE_BYTES].decode(errors="replace")
        words = "".join(letter if letter.isprintable() else "?" for letter in text).strip()
        if not words:
            return
        self.last.append(words)
        self._logged += 1
        if self._logged <= _LOGGED_LINES:
            log.info("%s says: %s", self._name, words)
