"""Choosing the submitter: io_uring where the kernel grants it, threads elsewhere.

`CLUSTERMD_IO` decides by hand: `uring` insists (and fails with the kernel's reason), `threads` avoids
io_uring, `auto` or nothing tries io_uring first.
"""

from __future__ import annotations

import asyncio
import os

from clustermd.device.buffers import DEFAULT_POOL_BYTES
from clustermd.device.member_device import Gate, Submitter
from clustermd.device.ring import usable_here
from clustermd.device.threads import ThreadSubmitter
from clustermd.device.uring import UringSubmitter
from clustermd.errors import Refused

VARIABLE = "CLUSTERMD_IO"


def make_submitter(
    loop: asyncio.AbstractEventLoop | None = None,
    *,
    gate: Gate | None = None,
    pool_bytes: int = DEFAULT_POOL_BYTES,
) -> Submitter:
    """A submitter on `loop` (default: the running one) behind `gate` (default: a new, open one).

    Its pool maps `pool_bytes` at most. Raises Refused if `CLUSTERMD_IO` asks for what is not there.
    """
    if loop is None:
        loop = asyncio.get_running_loop()
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "uring", "threads"):
        raise Refused(
            "bad-io-choice",
            f"{VARIABLE}={wanted} names no way to do I/O: use auto, uring or threads",
            value=wanted,
        )
    if wanted == "uring" or (wanted == "auto" and usable_here()):
        try:
            return UringSubmitter(loop, gate, pool_bytes)
        except OSError as error:
            if wanted == "uring":
                raise Refused(
                    "no-io-uring",
                    f"{VARIABLE}=uring, but this kernel gives no io_uring ({error.strerror}): "
                    f"unset {VARIABLE} to use threads",
                    errno=error.errno or 0,
                ) from error
    return ThreadSubmitter(loop, gate, pool_bytes)
