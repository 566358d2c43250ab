"""Closed process groups: corosync's one order of messages and memberships (libcpg, dlm.md 5.1 - 5.3).

A group is a name; its length belongs to it. A member is (node number, process id). All members see messages and
membership changes in one order (AGREED, the only one there is). What that does not say (dlm.md 5.2, 6.2):

- Agreed is not safe: a node may deliver its own message before anybody else has it, and be cut off then.
- A node without quorum goes on delivering to itself. Quorum is told elsewhere (`quorum`), and not in this order.
- A message may be delivered in a later membership than it was sent in.
- A heal joins the other side's processes with reason NODEUP: they have a history, unlike those with JOIN.
- One change may come as two (those who left, then those who joined), and before or after its ring.
- Both sides of a partition may have the same ring sequence: a ring is (sequence, lowest node), compared as a
whole.
- `send` that says True means: copied to the local corosync. The delivery of the own message is the only receipt.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from typing import Any

from clustermd.group.corosync.errors import CorosyncRefused, Status, check, refusal
from clustermd.group.corosync.library import Connection, Handle, function

SONAME = "libcpg.so.4"
NAME_MAX = 128
_MODEL_V1 = 1
_AGREED = 2
_TELL_FIRST_RING = 1

Process = tuple[int, int]
"""A member: node number, process id."""
Ring = tuple[int, int]
"""A ring: sequence, lowest node number. Two rings are the same only if both are."""


class Reason(enum.IntEnum):
    """Why a process joined or left (cpg_reason_t)."""

    UNDEFINED = 0
    JOIN = 1
    LEAVE = 2
    NODEDOWN = 3
    NODEUP = 4
    PROCDOWN = 5


class Name(ctypes.Structure):
    """struct cpg_name."""

    _fields_ = [("length", ctypes.c_uint32), ("value", ctypes.c_char * NAME_MAX)]


class Address(ctypes.Structure):
    """struct cpg_address."""

    _fields_ = [("nodeid", ctypes.c_uint32), ("pid", ctypes.c_uint32), ("reason", ctypes.c_uint32)]


class RingId(ctypes.Structure):
    """struct cpg_ring_id."""

    _fields_ = [("nodeid", ctypes.c_uint32), ("seq", ctypes.c_uint64)]


class IoVector(ctypes.Structure):
    """struct iovec. `base` is a char pointer so that it takes and keeps the bytes themselves, uncopied."""

    _fields_ = [("base", ctypes.c_char_p), ("len", ctypes.c_size_t)]


_Addresses = ctypes.POINTER(Address)
DELIVER = ctypes.CFUNCTYPE(
    None, Handle, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t
)
CONFCHG = ctypes.CFUNCTYPE(
    None,
    Handle,
    ctypes.c_void_p,
    _Addresses,
    ctypes.c_size_t,
    _Addresses,
    ctypes.c_size_t,
    _Addresses,
    ctypes.c_size_t,
)
TOTEM = ctypes.CFUNCTYPE(None, Handle, RingId, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32))


class Model(ctypes.Structure):
    """cpg_model_v1_data_t."""

    _fields_ = [
        ("model", ctypes.c_int),
        ("deliver", DELIVER),
        ("confchg", CONFCHG),
        ("totem", TOTEM),
        ("flags", ctypes.c_uint),
    ]


class Cpg:
    """A connection to corosync that can be in one group.

    `on_deliver(node, pid, payload)`, `on_confchg(members, left, joined)` with members as (node, pid) and the
    others as (node, pid, Reason), `on_ring(ring, nodes)` with the ring as (sequence, lowest node) are called
    by `dispatch` only. `on_ring` also tells the ring at the start. Not for several threads. Raises
    CorosyncRefused.
    """

    def __init__(
        self,
        name: bytes,
        on_deliver: Callable[[int, int, bytes], None],
        on_confchg: Callable[
            [tuple[Process, ...], tuple[tuple[int, int, Reason], ...], tuple[tuple[int, int, Reason], ...]],
            None,
        ],
        on_ring: Callable[[Ring, tuple[int, ...]], None],
    ) -> None:
        if not 1 <= len(name) <= NAME_MAX:
            raise CorosyncRefused(
                "corosync-name", f"a group's name has 1 to {NAME_MAX} bytes, not {len(name)}"
            )
        self._name = Name(len(name), name)
        self._on_deliver, self._on_confchg, self._on_ring = on_deliver, on_confchg, on_ring
        initialize = function(
            SONAME,
            "cpg_model_initialize",
            ctypes.POINTER(Handle),
            ctypes.c_int,
            ctypes.POINTER(Model),
            ctypes.c_void_p,
        )
        self._join = function(SONAME, "cpg_join", Handle, ctypes.POINTER(Name))
        self._leave = function(SONAME, "cpg_leave", Handle, ctypes.POINTER(Name))
        self._mcast = function(
            SONAME, "cpg_mcast_joined", Handle, ctypes.c_int, ctypes.POINTER(IoVector), ctypes.c_uint
        )
        self._connection = Connection(SONAME, "cpg")
        guard = self._connection.guard
        # The library keeps pointers to these: they live as long as this object.
        self._model = Model(
            _MODEL_V1,
            DELIVER(guard(self._delivered)),
            CONFCHG(guard(self._changed)),
            TOTEM(guard(self._ring_formed)),
            _TELL_FIRST_RING,
        )
        self._vector = IoVector()
        handle = self._connection.handle
        self._connection.open(
            "cpg_model_initialize",
            lambda: initialize(ctypes.byref(handle), _MODEL_V1, ctypes.byref(self._model), None),
        )
        try:
            self.local_node: int = self._number("cpg_local_get")
            """This node's number."""
            self.max_payload: int = self._number("cpg_max_atomic_msgsize_get")
            """Bytes of the largest message that cannot be torn by a membership change."""
        except BaseException:
            self._connection.close()
            raise

    def join(self) -> bool:
        """Enter the group. False: call again soon, corosync is busy with a membership change or not done yet with a
        former membership of this process in the group.
        """
        return self._unless_busy("cpg_join", self._join(self._connection.handle, ctypes.byref(self._name)))

    def leave(self) -> bool:
        """Leave the group; the others see LEAVE. False: busy, call again soon."""
        return self._unless_busy("cpg_leave", self._leave(self._connection.handle, ctypes.byref(self._name)))

    def send(self, payload: bytes) -> bool:
        """Multicast to the group, this process too. Never blocks.

        False: corosync's queue is full or the membership changes. Dispatch, then try again: without
        dispatching it may stay so for ever. Raises CorosyncRefused `corosync-too-big` above `max_payload`,
        `corosync-lost`.
        """
        if len(payload) > self.max_payload:
            raise CorosyncRefused(
                "corosync-too-big",
                f"a message of {len(payload)} bytes is larger than the {self.max_payload} that corosync "
                "carries in one piece",
                status=int(Status.TOO_BIG),
            )
        self._vector.base, self._vector.len = payload, len(payload)
        status = self._mcast(self._connection.handle, _AGREED, ctypes.byref(self._vector), 1)
        return status == Status.OK or self._unless_busy("cpg_mcast_joined", status)

    def fileno(self) -> int:
        """Readable when `dispatch` has something to do."""
        return self._connection.fileno()

    def dispatch(self) -> int:
        """Deliver what waits (`library.Connection.dispatch`)."""
        return self._connection.dispatch()

    def close(self) -> None:
        """End the connection. Others see PROCDOWN if this process was in the group.

        Waits for corosync's answer, so it does not return while corosync is stopped.
        """
        self._connection.close()

    def _unless_busy(self, call: str, status: int) -> bool:
        if status == Status.TRY_AGAIN:
            return False
        check(call, status)
        return True

    def _number(self, call: str) -> int:
        value = ctypes.c_uint(0)
        status = function(SONAME, call, Handle, ctypes.POINTER(ctypes.c_uint))(
            self._connection.handle, ctypes.byref(value)
        )
        if status != Status.OK:
            raise refusal(call, status, connecting=True)
        return value.value

    def _delivered(
        self, _handle: int, _name: int, node: int, pid: int, message: int | None, length: int
    ) -> None:
        self._on_deliver(node, pid, ctypes.string_at(message, length) if message else b"")

    def _changed(
        self,
        _handle: int,
        _name: int,
        members: Any,
        member_count: int,
        left: Any,
        left_count: int,
        joined: Any,
        joined_count: int,
    ) -> None:
        self._on_confchg(
            tuple((members[i].nodeid, members[i].pid) for i in range(member_count)),
            _with_reasons(left, left_count),
            _with_reasons(joined, joined_count),
        )

    def _ring_formed(self, _handle: int, ring: RingId, count: int, nodes: Any) -> None:
        self._on_ring((ring.seq, ring.nodeid), tuple(nodes[i] for i in range(count)))


def _with_reasons(addresses: Any, count: int) -> tuple[tuple[int, int, Reason], ...]:
    return tuple((addresses[i].nodeid, addresses[i].pid, Reason(addresses[i].reason)) for i in range(count))
