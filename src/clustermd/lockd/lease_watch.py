"""How long a program outside the array process may believe in its locks when its node has lost contact.

On a cluster of machines a node may act only while its lease runs (`device.lease`), and the others take its locks when
they have fenced it, or when its lease and the bound D for what was under way must be over (dlm.md 6.2). An array looks
at the lease before each write and holds it back. A program cannot be held back like that, so it is told to end; not at
once, as most losses of contact are short, but so early that it is gone before D is over.
"""

from __future__ import annotations

import asyncio

from clustermd.clock import Clock
from clustermd.conf import Conf
from clustermd.device.lease import Lease

_LOOK_S = 0.25


def patience_s(conf: Conf) -> float:
    """How long the lease may be over before the locks count as lost: a third of D is left for the program's end."""
    return min(conf.lease_s, conf.device_bound_s / 3)


def grace_s(conf: Conf, wanted_s: float) -> float:
    """How long a program may take for its end, if it wants `wanted_s`."""
    return min(wanted_s, conf.device_bound_s / 3) if conf.clustered else wanted_s


async def lease_ends(lease: Lease, clock: Clock, patience_s: float) -> None:
    """Wait until the lease has been over for `patience_s`.

    That is counted by the clock which goes on while the machine sleeps, from the last look that found it valid.
    """
    seen_s = clock.boottime_s()
    while True:
        now_s = clock.boottime_s()
        if lease.valid():
            seen_s = now_s
        elif now_s - seen_s >= patience_s:
            return
        await asyncio.sleep(_LOOK_S)
