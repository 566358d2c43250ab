"""Votes: how many there are, how many make a quorum, and by which rules (libvotequorum, votequorum(5)).

The rules matter for what a quorum proves (dlm.md 5.4, 6.2). With plain majorities two sides never both have
it. With two_node both sides of a partition do, and with last_man_standing the expected votes shrink after
each loss: there only fencing decides.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clustermd.group.corosync.errors import Status, refusal
from clustermd.group.corosync.library import Connection, Handle, function, patiently

SONAME = "libvotequorum.so.8"
_NAME_MAX = 255
_CHANGES = 2


class Rules(enum.IntFlag):
    """VOTEQUORUM_INFO_*: what holds, and which rules are configured."""

    TWO_NODE = 1
    QUORATE = 2
    WAIT_FOR_ALL = 4
    LAST_MAN_STANDING = 8
    AUTO_TIE_BREAKER = 16
    ALLOW_DOWNSCALE = 32
    QDEVICE_REGISTERED = 64
    QDEVICE_ALIVE = 128
    QDEVICE_CAST_VOTE = 256
    QDEVICE_MASTER_WINS = 512


class NodeState(enum.IntEnum):
    """VOTEQUORUM_NODESTATE_*."""

    MEMBER = 1
    DEAD = 2
    LEAVING = 3


class Info(ctypes.Structure):
    """struct votequorum_info."""

    _fields_ = [
        ("node_id", ctypes.c_uint),
        ("node_state", ctypes.c_uint),
        ("node_votes", ctypes.c_uint),
        ("node_expected_votes", ctypes.c_uint),
        ("highest_expected", ctypes.c_uint),
        ("total_votes", ctypes.c_uint),
        ("quorum", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("qdevice_votes", ctypes.c_uint),
        ("qdevice_name", ctypes.c_char * _NAME_MAX),
    ]


EXPECTED = ctypes.CFUNCTYPE(None, Handle, ctypes.c_uint64, ctypes.c_uint32)


class Callbacks(ctypes.Structure):
    """votequorum_callbacks_t; only changes of the expected votes are asked for."""

    _fields_ = [("quorum", ctypes.c_void_p), ("expected", EXPECTED), ("nodelist", ctypes.c_void_p)]


@dataclass(frozen=True, slots=True)
class Votes:
    """What corosync knows of the votes, asked for one node.

    `state`, `votes` and `node_expected_votes` are of that node; `expected_votes` (the highest of any node),
    `total_votes` (of the members), `quorum` (the least number of votes that has it) and `rules` are of the
    cluster as this node sees it.
    """

    node: int
    state: NodeState
    votes: int
    node_expected_votes: int
    expected_votes: int
    total_votes: int
    quorum: int
    rules: Rules
    qdevice_votes: int
    qdevice: str


class Votequorum:
    """A connection that answers about votes and tells when the expected votes change.

    `on_expected_votes(votes)` is called by `dispatch` only. Raises CorosyncRefused.
    """

    def __init__(self, on_expected_votes: Callable[[int], None] | None = None) -> None:
        initialize = function(
            SONAME, "votequorum_initialize", ctypes.POINTER(Handle), ctypes.POINTER(Callbacks)
        )
        track = function(SONAME, "votequorum_trackstart", Handle, ctypes.c_uint64, ctypes.c_uint)
        self._getinfo = function(SONAME, "votequorum_getinfo", Handle, ctypes.c_uint, ctypes.POINTER(Info))
        self._on_expected_votes = on_expected_votes
        self._connection = Connection(SONAME, "votequorum")
        self._callbacks = Callbacks(None, EXPECTED(self._connection.guard(self._expected)), None)
        handle = self._connection.handle
        self._connection.open(
            "votequorum_initialize", lambda: initialize(ctypes.byref(handle), ctypes.byref(self._callbacks))
        )
        if on_expected_votes is None:
            return
        status = patiently(lambda: track(handle, 0, _CHANGES))
        if status != Status.OK:
            self._connection.close()
            raise refusal("votequorum_trackstart", status, connecting=True)

    def votes(self, node: int) -> Votes | None:
        """What is known of `node` and of the cluster; None for a node that corosync never heard of."""
        info = Info()
        status = self._getinfo(self._connection.handle, node, ctypes.byref(info))
        if status == Status.NOT_EXIST:
            return None
        if status != Status.OK:
            raise refusal("votequorum_getinfo", status)
        return Votes(
            node=info.node_id,
            state=NodeState(info.node_state),
            votes=info.node_votes,
            node_expected_votes=info.node_expected_votes,
            expected_votes=info.highest_expected,
            total_votes=info.total_votes,
            quorum=info.quorum,
            rules=Rules(info.flags),
            qdevice_votes=info.qdevice_votes,
            qdevice=info.qdevice_name.decode(errors="replace"),
        )

    def fileno(self) -> int:
        """Readable when `dispatch` has something to do."""
        return self._connection.fileno()

    def dispatch(self) -> int:
        """Deliver what waits (`library.Connection.dispatch`)."""
        return self._connection.dispatch()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _expected(self, _handle: int, _context: Any, votes: int) -> None:
        if self._on_expected_votes is not None:
            self._on_expected_votes(votes)
