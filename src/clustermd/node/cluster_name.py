"""The name of the cluster this node belongs to, which clustered arrays carry on disk (design 5).

With corosync it is corosync's (`totem.cluster_name`). On one machine it is `CLUSTERMD_CLUSTER`, else `local-`
and the first 12 digits of the machine's id. An array of another cluster is refused unless its name is given by
hand, so that disks that two clusters can see do not get written by both.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from clustermd.conf import Conf
from clustermd.errors import Refused

NAME_MAX_BYTES = 64


def own_cluster_name(conf: Conf | None = None) -> str:
    """The name. Raises Refused when it does not fit on disk, CorosyncRefused when corosync cannot be asked."""
    if (conf or Conf.load()).clustered:
        # corosync's libraries are wanted only here
        from clustermd.group.corosync.cmap import cluster_name

        name = cluster_name()
        if len(name.encode()) > NAME_MAX_BYTES:
            raise Refused(
                "bad-cluster-name",
                f"corosync's cluster_name has {len(name.encode())} bytes, and an array has room for {NAME_MAX_BYTES}: "
                "choose a shorter one in corosync.conf",
            )
        return name
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
