"""The lease file belongs to the lockd that has the file lock: a second one that comes too late leaves it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from clustermd.group.start import HELD, take_lock


def test_a_lockd_that_comes_second_does_not_touch_the_lease_of_the_first(tmp_path: Path) -> None:
    node = tmp_path / "node1"
    node.mkdir(mode=0o700)
    lock = take_lock(node / "lockd.lock")
    assert lock is not None
    conf = tmp_path / "conf"
    conf.write_text('engine = "corosync"\nfence = "none"\n')
    lease = node / "lease"
    lease.write_bytes(bytes(8))
    mapped = os.open(lease, os.O_RDONLY)
    try:
        second = subprocess.run(
            [sys.executable, "-m", "clustermd.lockd"],
            env={
                **os.environ,
                "CLUSTERMD_RUN": str(tmp_path),
                "CLUSTERMD_NODE": "node1",
                "CLUSTERMD_CONF": str(conf),
            },
            timeout=60,
        )
        links = os.fstat(mapped).st_nlink
    finally:
        os.close(mapped)
        os.close(lock)
    assert second.returncode == HELD
    assert links == 1, "array processes would look at a lease that nobody renews"
