"""Finding corosync's libraries, and what all their connections have in common.

All four libraries (libcpg, libquorum, libvotequorum, libcmap) work alike: `X_initialize` gives a 64-bit
handle, `X_fd_get` a descriptor that is readable when something waits, `X_dispatch` calls the callbacks,
`X_finalize` ends it. The soname is the ABI, so libraries are opened by soname and no header is needed.

Two rules are kept here for all of them. A callback runs inside C, where an exception would only be printed:
the first one is kept, nothing more is delivered, and `dispatch` raises it. And `dispatch` never blocks and
never goes on for ever: it takes what waits, up to a bound; what is left keeps the descriptor readable.

Only `send` and `dispatch` of a connection return at once whatever corosync does. All other calls wait for
corosync's answer, so they stand still with a corosync that is stopped (SIGSTOP): make them before anything
depends on this process being alert.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any

from clustermd.group.corosync.errors import CorosyncRefused, Status, check, refusal

Handle = ctypes.c_uint64
DISPATCH_ONE_NONBLOCKING = 4
AT_MOST = 256
"""Messages that one `dispatch` delivers at most, so that clients' sockets are looked at in between."""
PATIENCE_S = 5.0
"""How long a corosync that is just starting may tell us to try again."""
_PAUSE_S = 0.05


@functools.cache
def load(soname: str) -> ctypes.CDLL:
    """The library, opened once a process. Raises CorosyncRefused `corosync-not-installed`."""
    try:
        return ctypes.CDLL(soname)
    except OSError as error:
        raise CorosyncRefused(
            "corosync-not-installed",
            f"corosync's library {soname} cannot be loaded ({error}): apt install corosync",
            library=soname,
        ) from None


def function(soname: str, name: str, *arguments: Any) -> Callable[..., int]:
    """`name` of the library, with its argument types; it answers a cs_error_t."""
    try:
        found = getattr(load(soname), name)
    except AttributeError:
        raise CorosyncRefused(
            "corosync-too-old", f"{soname} has no {name}: corosync 3.1 or later is needed", library=soname
        ) from None
    found.argtypes = arguments
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]


def patiently(call: Callable[[], int]) -> int:
    """The answer of `call`; asked again for `PATIENCE_S` while that is TRY_AGAIN.

    corosync answers so on its sockets from its start until its first membership stands. Blocks, as the first
    calls of a connection do anyway.
    """
    until_s = time.monotonic() + PATIENCE_S
    while (status := call()) == Status.TRY_AGAIN and time.monotonic() < until_s:
        time.sleep(_PAUSE_S)
    return status


class Connection:
    """One connection of one of the libraries: its handle, its descriptor and the exceptions of its callbacks."""

    def __init__(self, soname: str, prefix: str) -> None:
        self.handle = Handle()
        self.prefix = prefix
        self.closed = False
        self._failure: BaseException | None = None
        self._dispatch = function(soname, f"{prefix}_dispatch", Handle, ctypes.c_int)
        self._finalize = function(soname, f"{prefix}_finalize", Handle)
        self._fd_get = function(soname, f"{prefix}_fd_get", Handle, ctypes.POINTER(ctypes.c_int))
        self._descriptor = -1

    def open(self, name: str, initialize: Callable[[], int]) -> None:
        """Make the connection: `initialize` is the call `name` that fills `handle`. Raises CorosyncRefused."""
        status = patiently(initialize)
        if status != Status.OK:
            self.closed = True
            raise refusal(name, status, connecting=True)
        descriptor = ctypes.c_int(-1)
        check(f"{self.prefix}_fd_get", self._fd_get(self.handle, ctypes.byref(descriptor)))
        self._descriptor = descriptor.value

    def fileno(self) -> int:
        """The descriptor that is readable when `dispatch` has something to do, or corosync is gone."""
        return self._descriptor

    def guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """`callback` for C: its exception is kept for `dispatch`, which ends with it."""

        def guarded(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except BaseException as error:
                self._failure = error

        return guarded

    def dispatch(self) -> int:
        """Deliver what waits, `AT_MOST` at once; never blocks. How many times corosync had something.

        Raises CorosyncRefused `corosync-lost` when corosync is gone, and the first exception of a callback.
        """
        for count in range(AT_MOST):
            if self.closed:
                return count
            status = self._dispatch(self.handle, DISPATCH_ONE_NONBLOCKING)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if status == Status.TRY_AGAIN:
                return count
            if status != Status.OK and not self.closed:
                raise refusal(f"{self.prefix}_dispatch", status)
        return AT_MOST

    def close(self) -> None:
        """End the connection; a second time is nothing. Also after corosync is gone."""
        if not self.closed:
            self.closed = True
            self._finalize(self.handle)
