"""Scheduling of a lockd that machines depend on: before ordinary processes, as corosync and sbd run.

The others of the cluster wait for this node's word on every message, and make it leave when it is silent for
`unresponsive_s`. On a host that is busy with its virtual machines neither may depend on when ordinary
processes leave it a processor. Children (fence agents, successors) begin with ordinary scheduling.
"""

from __future__ import annotations

import logging
import os

PRIORITY = 1
"""The lowest of the realtime priorities: before all ordinary processes, after corosync itself."""

log = logging.getLogger("clustermd.lockd")


def ask_for_realtime() -> bool:
    """Run this process in SCHED_RR; False, and a line in the log, where the system does not allow it."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    except OSError as error:
        log.warning(
            "no realtime scheduling (%s): on a busy machine this node may answer its cluster too late, and be made to "
            "leave it. Run as root, or allow priority %d (LimitRTPRIO= in systemd, ulimit -r)",
            error.strerror,
            PRIORITY,
        )
        return False
    return True
