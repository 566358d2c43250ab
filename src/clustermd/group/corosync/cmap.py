"""What corosync is configured with and measures, by key (libcmap, cmap_keys(7)).

From here come node numbers, names, addresses, votes, the cluster's name and the timeouts that really hold, so
that a running corosync or pacemaker cluster needs no second configuration. Values are read once, when needed:
each of the functions at the end opens a connection of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from clustermd.group.corosync.errors import CorosyncRefused, Status, check
from clustermd.group.corosync.library import Connection, Handle, function

SONAME = "libcmap.so.4"
KEY_MAX = 255
LINKS_MAX = 8
"""Addresses that a node may have: ring0_addr to ring7_addr (INTERFACE_MAX of corosync)."""


class Cmap:
    """A connection that reads keys. Raises CorosyncRefused; a key that is not there reads as None."""

    def __init__(self) -> None:
        initialize = function(SONAME, "cmap_initialize", ctypes.POINTER(Handle))
        self._connection = Connection(SONAME, "cmap")
        handle = self._connection.handle
        self._connection.open("cmap_initialize", lambda: initialize(ctypes.byref(handle)))

    def uint32(self, key: str) -> int | None:
        """A key of type u32."""
        value: int | None = self._read("cmap_get_uint32", key, ctypes.c_uint32())
        return value

    def uint64(self, key: str) -> int | None:
        """A key of type u64."""
        value: int | None = self._read("cmap_get_uint64", key, ctypes.c_uint64())
        return value

    def string(self, key: str) -> str | None:
        """A key of type str."""
        # The library allocates the string and leaves it to us.
        address: int | None = self._read("cmap_get_string", key, ctypes.c_void_p())
        if address is None:
            return None
        try:
            return ctypes.string_at(address).decode(errors="surrogateescape")
        finally:
            _free(address)

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that begin with `prefix`, in corosync's order."""
        begin = function(SONAME, "cmap_iter_init", Handle, ctypes.c_char_p, ctypes.POINTER(Handle))
        step = function(
            SONAME,
            "cmap_iter_next",
            Handle,
            Handle,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_size_t),
            ctypes.POINTER(ctypes.c_int),
        )
        end = function(SONAME, "cmap_iter_finalize", Handle, Handle)
        handle, iteration = self._connection.handle, Handle()
        check("cmap_iter_init", begin(handle, prefix.encode(), ctypes.byref(iteration)))
        try:
            key = ctypes.create_string_buffer(KEY_MAX + 1)
            while (status := step(handle, iteration, key, None, None)) == Status.OK:
                yield key.value.decode(errors="surrogateescape")
            if status != Status.NO_SECTIONS:
                check("cmap_iter_next", status)
        finally:
            end(handle, iteration)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _read(self, call: str, key: str, value: Any) -> Any:
        get = function(SONAME, call, Handle, ctypes.c_char_p, ctypes.c_void_p)
        status = get(self._connection.handle, key.encode(), ctypes.byref(value))
        if status == Status.NOT_EXIST:
            return None
        check(f"{call} {key}", status)
        return value.value


def _free(address: int) -> None:
    free = ctypes.CDLL(None).free
    free.argtypes, free.restype = [ctypes.c_void_p], None
    free(address)


@dataclass(frozen=True, slots=True)
class ConfiguredNode:
    """A node of corosync.conf's nodelist. `name` is empty where the file has none; `votes` is 1 unless it
    says otherwise.
    """

    number: int
    name: str
    addresses: tuple[str, ...]
    votes: int


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The timeouts in force, coefficient included. A loss is seen after token + consensus."""

    token_ms: int
    consensus_ms: int


def nodelist() -> tuple[ConfiguredNode, ...]:
    """The configured nodes by number. Raises CorosyncRefused `corosync-no-nodelist`, `corosync-no-node-id`."""
    with closing(Cmap()) as cmap:
        positions = {int(key.split(".")[2]) for key in cmap.keys("nodelist.node.")}
        if not positions:
            raise _no_nodelist()
        return tuple(sorted((_node(cmap, at) for at in positions), key=lambda node: node.number))


def local_number() -> int:
    """This node's number. Raises CorosyncRefused `corosync-no-nodelist` where the file does not name this
    node.
    """
    with closing(Cmap()) as cmap:
        at = cmap.uint32("nodelist.local_node_pos")
        if at is None:
            raise _no_nodelist()
        return _node(cmap, at).number


def cluster_name() -> str:
    """totem.cluster_name. Raises CorosyncRefused `corosync-no-cluster-name`."""
    with closing(Cmap()) as cmap:
        name = cmap.string("totem.cluster_name")
    if not name:
        raise CorosyncRefused(
            "corosync-no-cluster-name",
            "corosync's cluster has no name: put 'cluster_name: NAME' into totem { } of corosync.conf on all nodes "
            "and restart corosync",
        )
    return name


def timeouts() -> Timeouts:
    """The token and consensus timeouts that corosync runs with."""
    with closing(Cmap()) as cmap:
        values = [cmap.uint32(f"runtime.config.totem.{name}") for name in ("token", "consensus")]
    token, consensus = values
    if token is None or consensus is None:
        raise CorosyncRefused(
            "corosync-no-timeouts", "corosync does not tell its token and consensus timeouts (cmap)"
        )
    return Timeouts(token, consensus)


def _node(cmap: Cmap, at: int) -> ConfiguredNode:
    prefix = f"nodelist.node.{at}"
    number = cmap.uint32(f"{prefix}.nodeid")
    addresses = [cmap.string(f"{prefix}.ring{link}_addr") for link in range(LINKS_MAX)]
    if number is None:
        raise CorosyncRefused(
            "corosync-no-node-id",
            f"the node with the address {addresses[0]} has no 'nodeid: NUMBER' in corosync.conf: give each node one, "
            "on all nodes, and restart corosync",
        )
    return ConfiguredNode(
        number=number,
        name=cmap.string(f"{prefix}.name") or "",
        addresses=tuple(address for address in addresses if address),
        votes=_votes(cmap, prefix),
    )


def _votes(cmap: Cmap, prefix: str) -> int:
    votes = cmap.uint32(f"{prefix}.quorum_votes")
    return 1 if votes is None else votes


def _no_nodelist() -> CorosyncRefused:
    return CorosyncRefused(
        "corosync-no-nodelist",
        "corosync.conf has no nodelist that names this node: list every node with nodeid and name "
        "(clustermd cluster setup writes such a file)",
    )
