"""A file of its own that proves the end of a process which holds locks but no disks.

A lock must not be given to somebody else while its former holder may still act on it, also when that one has lost
its lockd and has not noticed yet, is being killed and not gone yet, or stands still. Array processes prove their end
by record locks on their disks (`group.proof`); a process without disks locks a byte of a file in its node's directory
instead. The kernel keeps that lock as long as anybody has the open file: also a process that was forked with it. So
locks go on to others when the last of these has ended, or when the file is unlocked, which ends it for all.
"""

from __future__ import annotations

import os
from pathlib import Path

from clustermd.device import witness
from clustermd.device.direct import identity
from clustermd.group.process import start_time
from clustermd.group.process_group import Witness
from clustermd.lockd.client import LockdConnection
from clustermd.rundir import RunDir

KEY = "locks"


class WitnessFile:
    """An open file `locks.PID` in the node's directory. Forked children share it, executed programs do not."""

    def __init__(self, rundir: RunDir) -> None:
        directory = rundir.make()
        _remove_those_of_the_dead(directory)
        number = 0
        while True:
            self.path = directory / f"locks.{os.getpid()}{f'.{number}' if number else ''}"
            try:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                break
            except FileExistsError:
                number += 1
        self._offset = -1

    async def register(self, connection: LockdConnection) -> None:
        """Lock it and make it the proof of this process's end. Raises as `LockdConnection.register`."""
        self._offset = witness.WITNESS_BASE + connection.node
        pid = os.getpid()
        started = start_time(pid)
        assert started is not None, "this process runs"
        assert witness.hold(self._fd, self._offset), f"{self.path} is new and nobody else's"
        path = (os.fspath(self.path), *identity(os.fspath(self.path)))
        await connection.register(Witness(KEY, pid, started, self._offset, (path,)))

    def release(self) -> None:
        """Nothing that these locks guarded goes on any more, in no process. May be called again."""
        if self._offset >= 0 and self._fd >= 0:
            witness.release(self._fd, self._offset)
            self._offset = -1

    def bury(self) -> None:
        """Remove the file of a process that is dead, in a child of it, whose end then releases the lock."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release it, and remove the file. May be called again."""
        if self._fd >= 0:
            self.release()
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _remove_those_of_the_dead(directory: Path) -> None:
    """Who was killed leaves its file. A lock on it that lives on in a child is found without its name, too."""
    for path in directory.glob("locks.*"):
        pid = path.name.split(".")[1]
        if pid.isdigit() and start_time(int(pid)) is None:
            path.unlink(missing_ok=True)
