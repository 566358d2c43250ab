"""Quorum as corosync sees it, with whole ring ids (libquorum model 1, dlm.md 5.4).

It comes over a connection of its own, some milliseconds after the membership change of `cpg` and never in its
order. So what belongs together is found by the ring, (sequence, lowest node), which both tell: never by time,
and never by the sequence alone, which both sides of a partition may share.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from clustermd.group.corosync.errors import CorosyncRefused, Status, refusal
from clustermd.group.corosync.library import Connection, Handle, function, patiently

SONAME = "libquorum.so.5"
_MODEL_V1 = 1
_NO_PROVIDER = 0
_CURRENT_AND_CHANGES = 1 | 2


class RingId(ctypes.Structure):
    """struct quorum_ring_id."""

    _fields_ = [("nodeid", ctypes.c_uint32), ("seq", ctypes.c_uint64)]


QUORUM = ctypes.CFUNCTYPE(
    None, Handle, ctypes.c_uint32, RingId, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32)
)


class Model(ctypes.Structure):
    """quorum_model_v1_data_t; the list of nodes that joined and left is not asked for (NULL)."""

    _fields_ = [("model", ctypes.c_int), ("quorum", QUORUM), ("nodelist", ctypes.c_void_p)]


class Quorum:
    """A connection that tells the quorum now and at every change.

    `on_quorum(quorate, ring, nodes)`: whether the members `nodes` of `ring` = (sequence, lowest node) have
    quorum; called by `dispatch` only, the first time soon after the start. Raises CorosyncRefused
    `corosync-no-quorum` where corosync counts no votes: such a cluster cannot tell a partition from a death.
    """

    def __init__(self, on_quorum: Callable[[bool, tuple[int, int], tuple[int, ...]], None]) -> None:
        self._on_quorum = on_quorum
        initialize = function(
            SONAME,
            "quorum_model_initialize",
            ctypes.POINTER(Handle),
            ctypes.c_int,
            ctypes.POINTER(Model),
            ctypes.POINTER(ctypes.c_uint32),
            ctypes.c_void_p,
        )
        track = function(SONAME, "quorum_trackstart", Handle, ctypes.c_uint)
        self._connection = Connection(SONAME, "quorum")
        self._model = Model(_MODEL_V1, QUORUM(self._connection.guard(self._changed)), None)
        provider = ctypes.c_uint32(0)
        handle = self._connection.handle
        self._connection.open(
            "quorum_model_initialize",
            lambda: initialize(
                ctypes.byref(handle), _MODEL_V1, ctypes.byref(self._model), ctypes.byref(provider), None
            ),
        )
        try:
            if provider.value == _NO_PROVIDER:
                raise CorosyncRefused(
                    "corosync-no-quorum",
                    "corosync has no quorum provider, so no side of a partition could know that it may go on: "
                    "put 'provider: corosync_votequorum' into quorum { } of corosync.conf on all nodes "
                    "and restart corosync",
                )
            status = patiently(lambda: track(handle, _CURRENT_AND_CHANGES))
            if status != Status.OK:
                raise refusal("quorum_trackstart", status, connecting=True)
        except BaseException:
            self._connection.close()
            raise

    def fileno(self) -> int:
        """Readable when `dispatch` has something to do."""
        return self._connection.fileno()

    def dispatch(self) -> int:
        """Deliver what waits (`library.Connection.dispatch`)."""
        return self._connection.dispatch()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _changed(self, _handle: int, quorate: int, ring: RingId, count: int, nodes: Any) -> None:
        self._on_quorum(bool(quorate), (ring.seq, ring.nodeid), tuple(nodes[i] for i in range(count)))
