"""Waiting for what another process does: files, processes and disks give no event, so they are looked at.

The only place of the kit that sleeps. A wait has a name and an end: what was awaited is in the error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")
_LOOK_AGAIN_S = 0.01


class TimedOut(AssertionError):
    """What was awaited did not come in time."""


def wait_until(
    condition: Callable[[], _Value], what: str, timeout_s: float = 10.0, last_words: Callable[[], str] = str
) -> _Value:
    """Look until `condition()` is true and return what it returned.

    Raises TimedOut with `what` and, from `last_words()`, whatever helps to understand it.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise TimedOut(f"waited {timeout_s:g} s for {what}\n{last_words()}".rstrip())
        time.sleep(_LOOK_AGAIN_S)
