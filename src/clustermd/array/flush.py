"""Flush: every working member's cache, for all writes answered before (rule 19).

A member that cannot flush is failed, and the client is answered when that is recorded: what it holds in its
cache may be gone, and nobody may read it as if it were not. So it is with one that failed before, and was not asked.

What was asked of a life that ended by exclusion is refused: it says nothing about what the others wrote since.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from clustermd.array.faults import Faults
from clustermd.array.request import Request
from clustermd.array.state import EXCLUDED, ArrayState
from clustermd.array.waiters import tell_waiters
from clustermd.device.member_device import Op


class FlushOp:
    """One flush in flight."""

    __slots__ = (
        "_exclusions",
        "_failed",
        "_faults",
        "_pending",
        "_request",
        "_shut",
        "_state",
        "tick",
        "waiters",
    )

    def __init__(self, state: ArrayState, faults: Faults, request: Request) -> None:
        self._state = state
        self._faults = faults
        self._request = request
        self._exclusions = state.exclusions
        self._failed = 0
        self._shut = False
        self._pending = 0
        self.tick = state.tick
        self.waiters: list[Callable[[], None]] | None = None
        for member in state.writable:
            self._pending |= 1 << member.index
            state.submitter.queue(member.device, Op.FLUSH, 0, 0, None, 0, self, member.index)
        state.flushes.add(self)

    def io_done(self, tag: int, result: int) -> None:
        if not self._pending >> tag & 1:
            self._state.members[tag].stuck -= 1
            return
        if result == -errno.ESHUTDOWN:
            self._shut = True
        elif result < 0:
            self._failed |= 1 << tag
        self._pending &= ~(1 << tag)
        if not self._pending:
            self._done()

    def give_up(self) -> int:
        """The mask of members that do not answer."""
        stuck = self._pending
        for member in self._state.member_of(stuck):
            member.stuck += 1
        self._failed |= stuck
        self._pending = 0
        self._done()
        return stuck

    def exclude(self) -> None:
        self._shut = True

    def _done(self) -> None:
        state = self._state
        state.flushes.discard(self)
        if self._shut:
            state.keep(self._request)
        elif self._awaits_record():
            fine = not self._failed or self._faults.fail(self._failed, "a flush failed")
            task = asyncio.get_running_loop().create_task(self._answer_later(0 if fine else errno.EIO))
            state.tasks.add(task)
            task.add_done_callback(state.tasks.discard)
        else:
            self._request.owner.completed(self._request)
        tell_waiters(self)

    def _awaits_record(self) -> bool:
        return bool(self._failed) or self._state.unpublished

    async def _answer_later(self, error: int) -> None:
        error = await self._faults.recorded() or error
        self._request.error = error if self._state.exclusions == self._exclusions else EXCLUDED
        self._request.owner.completed(self._request)
