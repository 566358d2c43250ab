"""What corosync answers, in words: cs_error_t as refusals with remedies.

Every call of corosync's libraries ends with a number (corotypes.h). One exception carries it,
`CorosyncRefused`: with a stable code, a sentence that says what to do, and the number in `data["status"]`. A
connection that once worked and then ends is another thing than a corosync that never ran: the first closes
gates (`corosync-lost`), the second is a remark to the person who starts us (`corosync-not-running`).
"""

from __future__ import annotations

import enum

from clustermd.errors import Refused


class Status(enum.IntEnum):
    """cs_error_t of corotypes.h."""

    OK = 1
    LIBRARY = 2
    VERSION = 3
    INIT = 4
    TIMEOUT = 5
    TRY_AGAIN = 6
    INVALID_PARAM = 7
    NO_MEMORY = 8
    BAD_HANDLE = 9
    BUSY = 10
    ACCESS = 11
    NOT_EXIST = 12
    NAME_TOO_LONG = 13
    EXIST = 14
    NO_SPACE = 15
    INTERRUPT = 16
    NAME_NOT_FOUND = 17
    NO_RESOURCES = 18
    NOT_SUPPORTED = 19
    BAD_OPERATION = 20
    FAILED_OPERATION = 21
    MESSAGE_ERROR = 22
    QUEUE_FULL = 23
    QUEUE_NOT_AVAILABLE = 24
    BAD_FLAGS = 25
    TOO_BIG = 26
    NO_SECTIONS = 27
    CONTEXT_NOT_FOUND = 28
    TOO_MANY_GROUPS = 30
    SECURITY = 100


class CorosyncRefused(Refused):
    """corosync refused, is away, or cannot be used; `data["status"]` is its cs_error_t where it gave one."""

    @property
    def status(self) -> Status | None:
        """The answer of the call that failed; None when there was none (no library, no provider)."""
        number = self.data.get("status")
        return Status(number) if number in _KNOWN else None


_KNOWN = frozenset(Status)

NOT_RUNNING = "corosync is not running on this node: systemctl start corosync"

_REMEDIES: dict[Status, tuple[str, str]] = {
    Status.LIBRARY: (
        "corosync-lost",
        "the connection to corosync is gone: corosync stopped or was killed on this node. "
        "See journalctl -u corosync, then: systemctl start corosync",
    ),
    Status.VERSION: (
        "corosync-version",
        "corosync and its libraries are of different versions: upgrade both and restart corosync",
    ),
    Status.TIMEOUT: (
        "corosync-timeout",
        "corosync does not answer; see corosync-quorumtool -s and journalctl -u corosync",
    ),
    Status.TRY_AGAIN: (
        "corosync-busy",
        "corosync is busy with a change of membership or its queue is full: try again",
    ),
    Status.NO_MEMORY: ("corosync-no-memory", "corosync's library found no memory (is /dev/shm full?)"),
    Status.BAD_HANDLE: ("corosync-lost", "the connection to corosync was closed"),
    Status.ACCESS: (
        "corosync-no-access",
        "no access to corosync's sockets: run as root or with group 0, or let root write "
        "a file in /etc/corosync/uidgid.d with 'uidgid {', 'uid: USER', '}' on lines of their own, "
        "and restart corosync",
    ),
    Status.EXIST: ("corosync-exists", "this process is in that group already, through another connection"),
    Status.NAME_TOO_LONG: ("corosync-name", "the name is longer than 128 bytes"),
    Status.NO_SPACE: ("corosync-no-space", "corosync's library found no room in /dev/shm"),
    Status.NO_RESOURCES: (
        "corosync-no-resources",
        "corosync has no more connections to give; see ulimit -n of corosync",
    ),
    Status.TOO_BIG: ("corosync-too-big", "the message is larger than corosync takes"),
    Status.SECURITY: (
        "corosync-no-access",
        "corosync refuses this user: run as root or see /etc/corosync/uidgid.d",
    ),
}


def refusal(call: str, status: int, *, connecting: bool = False) -> CorosyncRefused:
    """The exception for `status`, the answer of `call`. `connecting`: the call was the first of a connection."""
    known = Status(status) if status in _KNOWN else None
    if connecting and known in (Status.LIBRARY, Status.TIMEOUT):
        return CorosyncRefused("corosync-not-running", f"{NOT_RUNNING} ({call})", call=call, status=status)
    code, words = _REMEDIES.get(known or Status.OK, ("corosync-failed", "corosync refused"))
    name = known.name if known is not None else str(status)
    return CorosyncRefused(code, f"{words} ({call}: {name})", call=call, status=status)


def check(call: str, status: int) -> None:
    """Raise unless `status` is OK."""
    if status != Status.OK:
        raise refusal(call, status)
