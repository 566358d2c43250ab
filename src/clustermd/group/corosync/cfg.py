"""Ending another node's corosync (libcfg, dlm.md 5.4): for a node whose part of the work is not done.

Its clients then see their corosync gone, and the others a node that is down.
"""

from __future__ import annotations

import ctypes
from contextlib import closing

from clustermd.group.corosync.errors import check
from clustermd.group.corosync.library import Connection, Handle, function

SONAME = "libcfg.so.7"


def kill_node(node: int, reason: str) -> None:
    """Ask `node`'s corosync to end; it logs `reason`. Waits for the local corosync's answer. Raises CorosyncRefused."""
    initialize = function(SONAME, "corosync_cfg_initialize", ctypes.POINTER(Handle), ctypes.c_void_p)
    kill = function(SONAME, "corosync_cfg_kill_node", Handle, ctypes.c_uint, ctypes.c_char_p)
    with closing(Connection(SONAME, "corosync_cfg")) as connection:
        connection.open("corosync_cfg_initialize", lambda: initialize(ctypes.byref(connection.handle), None))
        check("corosync_cfg_kill_node", kill(connection.handle, node, reason.encode()))
