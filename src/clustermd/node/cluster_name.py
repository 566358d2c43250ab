"""The name of the cluster this node belongs to, which clustered arrays carry on disk (design 5).

`CLUSTERMD_CLUSTER`, else `local-` and the first 12 digits of the machine's id: a cluster of one machine. An
array of another cluster is refused unless its name is given by hand, so that disks that two clusters can see
do not get written by both.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from clustermd.errors import Refused

NAME_MAX_BYTES = 64


def own_cluster_name() -> str:
    """The name. Raises Refused when the environment names one that does not fit on disk."""
    name = os.environ.get("CLUSTERMD_CLUSTER", "")
    if name:
        if len(name.encode()) > NAME_MAX_BYTES:
            raise Refused(
                "bad-cluster-name",
                f"CLUSTERMD_CLUSTER has {len(name.encode())} bytes, and a cluster's name may have {NAME_MAX_BYTES}",
            )
        return name
    return f"local-{_machine_id()[:12]}"


def _machine_id() -> str:
    """machine-id(5); a machine without one is known by its host name."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(path).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        if re.fullmatch(r"[0-9a-f]{32}", text):
            return text
    return socket.gethostname()
