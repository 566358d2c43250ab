"""Refusals with a stable code.

The library never prints. Everything it refuses is raised as `Refused` (or a subclass): a code that
never changes, the sentence for a person (what, where, why, what to do), and data. The command line
prints the sentence, JSON carries code and data, a test asserts the code.
"""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """Something was refused before anything was changed.

    `code` is stable and lower-case with hyphens (`not-a-member`), `message` a sentence for people,
    `data` plain values (str, int, bool, list, dict) for programs.
    """

    def __init__(self, code: str, message: str, **data: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data: dict[str, Any] = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.code, self.message, self.data)


def _rebuild(cls: type[Refused], code: str, message: str, data: dict[str, Any]) -> Refused:
    error = Refused.__new__(cls)
    Refused.__init__(error, code, message, **data)
    return error


class BadBytes(Refused):
    """Bytes on a disk or a wire are not what their format allows."""


class DeviceRefused(Refused):
    """A member device cannot be used: missing, busy, too small, no O_DIRECT."""


class LockRefused(Refused):
    """The lock manager answered a request with a failure; `data["status"]` is the DLM status."""


class ClusterLost(Refused):
    """Membership, the lock session or the lease is gone; what it guarded must stop."""
