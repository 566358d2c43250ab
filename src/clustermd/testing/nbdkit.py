"""nbdkit, the NBD server that others wrote: what ours is compared with, and disks with faults switched on."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clustermd.testing.waiting import wait_until


@contextmanager
def nbdkit(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An nbdkit with these arguments: (the path of its socket, which is short, and its process).

    It answers whoever connects from the first line of the body on. Raises TimedOut when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="cmd-", dir="/tmp") as directory:
        socket, ready = f"{directory}/nbd.sock", Path(directory, "pid")
        # the socket is there before anybody listens to it, the pid file after
        process = subprocess.Popen(["nbdkit", "--foreground", "-U", socket, "-P", str(ready), *arguments])
        try:
            wait_until(ready.exists, "nbdkit to serve")
            yield socket, process
        finally:
            process.kill()
            process.wait()
