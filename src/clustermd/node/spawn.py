"""Start an array process and wait until it serves I/O, or hear why it does not.

Blocking, for the command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from clustermd.errors import Refused
from clustermd.node.config import ArrayConfig, refusal_from_wire
from clustermd.node.files import ArrayFiles, make_private
from clustermd.rundir import RunDir

_LOG_TAIL_BYTES = 2000


def start_array_process(
    config: ArrayConfig, rundir: RunDir, notice: Callable[[str], None], module: str = "clustermd.node"
) -> dict[str, Any]:
    """What the process says of itself once it serves I/O (`name`, `pid`, `uri`, `status`...).

    Raises Refused with the process's own reason. When this one is interrupted, the start is undone: the pipe
    that tells the process so closes.
    """
    files = ArrayFiles.of(rundir, config.name)
    files.check_socket_paths()
    try:
        make_private(rundir, files)
        log_fd = os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            "run-directory",
            f"cannot use the run directory {files.directory}: {error.strerror}; CLUSTERMD_RUN names another",
        ) from error
    log_start = os.fstat(log_fd).st_size
    to_child, from_child = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    try:
        _spawn([sys.executable, "-m", module], to_child[0], from_child[1], log_fd)
        os.close(to_child[0])
        os.close(from_child[1])
        os.write(to_child[1], (config.to_json() + "\n").encode())
        return _hear(from_child[0], notice, files, log_start)
    finally:
        for fd in (to_child[1], from_child[0], log_fd):
            os.close(fd)


def _spawn(words: list[str], stdin_fd: int, stdout_fd: int, stderr_fd: int) -> int:
    """A child in a session of its own, with nothing open but these three."""
    return os.posix_spawn(
        words[0],
        words,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, stdin_fd, 0),
            (os.POSIX_SPAWN_DUP2, stdout_fd, 1),
            (os.POSIX_SPAWN_DUP2, stderr_fd, 2),
        ],
        setsid=True,
        setsigmask=[],
    )


def _hear(fd: int, notice: Callable[[str], None], files: ArrayFiles, log_start: int) -> dict[str, Any]:
    with open(fd, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if "notice" in said:
                    notice(str(said["notice"]))
                elif "refused" in said:
                    raise refusal_from_wire(said["refused"])
                elif "ready" in said:
                    ready: dict[str, Any] = said["ready"]
                    return ready
    raise Refused(
        "array-process-died",
        f"the process of {files.directory.name} ended before it served I/O; its log ({files.log}) says:\n"
        + _log_tail(files, log_start),
        log=str(files.log),
    )


def _log_tail(files: ArrayFiles, start: int) -> str:
    with open(files.log, "rb") as log:
        log.seek(max(start, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
        return log.read().decode("utf-8", "replace").strip() or "(nothing)"
