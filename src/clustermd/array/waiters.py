"""Waiting for the end of one thing in flight: a write, a flush, a step of a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol


class Waited(Protocol):
    """Something whose `waiters` are called once when it has ended."""

    waiters: list[Callable[[], None]] | None


def when_ended(op: Waited, call: Callable[[], None]) -> None:
    """Have `call` called once when `op` has ended."""
    if op.waiters is None:
        op.waiters = []
    op.waiters.append(call)


def end_of(op: Waited) -> asyncio.Future[None]:
    """A future that is done when `op` has ended. Whoever waits may give up."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    when_ended(op, partial(resolve, ended))
    return ended


def resolve(future: asyncio.Future[None]) -> None:
    """What `future` stands for has come about; whoever waited for it may have given up."""
    if not future.done():
        future.set_result(None)


def tell_waiters(op: Waited) -> None:
    """`op` has ended."""
    waiters, op.waiters = op.waiters, None
    for waiter in waiters or ():
        waiter()
