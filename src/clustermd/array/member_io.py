"""I/O with members off the hot path, bounded: no member can hang the array (rule 16).

Whoever awaits a member waits `device_timeout_s` at most, not counting the time while I/O is held. After that the
request is given up: the caller gets ETIMEDOUT and fails the member, the request and its buffer stay with the device,
and the member counts it as stuck until it is gone.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import TypeVar

from clustermd.array.member import Member
from clustermd.array.state import ArrayState
from clustermd.device.member_device import Buffer, Op

T = TypeVar("T")


class Shared:
    """A buffer that goes back to its pool when its owner and every request that uses it have let go."""

    __slots__ = ("_users", "buffer")

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self._users = 1

    def hold(self) -> None:
        self._users += 1

    def drop(self) -> None:
        self._users -= 1
        if not self._users:
            self.buffer.release()


async def bounded(state: ArrayState, member: Member, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, which is I/O with `member`. Raises OSError ETIMEDOUT when it is given up."""
    task = asyncio.get_running_loop().create_task(work)
    begin = state.tick
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,), timeout=state.tick_s)
        except asyncio.CancelledError:
            cancelled = True
        if state.tick - begin > state.device_timeout_s and not task.done():
            _abandon(state, member, task)
            if cancelled:
                raise asyncio.CancelledError
            raise OSError(errno.ETIMEDOUT, f"{member.path} does not answer")
    if cancelled:
        task.exception()
        raise asyncio.CancelledError
    return task.result()


def _abandon(state: ArrayState, member: Member, task: asyncio.Task[T]) -> None:
    member.stuck += 1
    state.tasks.add(task)

    def gone(_: object) -> None:
        member.stuck -= 1
        state.tasks.discard(task)
        if not task.cancelled():
            task.exception()

    task.add_done_callback(gone)


async def transfer(
    state: ArrayState,
    member: Member,
    op: Op,
    array_sector: int,
    length: int,
    shared: Shared,
    *,
    fua: bool = False,
) -> int:
    """Read or write array data on one member; bytes or -errno."""

    async def work() -> int:
        shared.hold()
        try:
            at = member.data_offset_bytes + array_sector * 512
            return await state.submitter.run(member.device, op, at, length, shared.buffer, fua=fua)
        finally:
            shared.drop()

    try:
        return await bounded(state, member, work())
    except OSError as error:
        return -(error.errno or errno.EIO)


async def flush(state: ArrayState, member: Member) -> int:
    """Flush one member's cache; 0 or -errno."""
    try:
        return await bounded(state, member, state.submitter.run(member.device, Op.FLUSH, 0, 0))
    except OSError as error:
        return -(error.errno or errno.EIO)


def halves(lo: int, hi: int, block: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """[lo, hi), longer than `block` sectors, as two ranges that meet on a whole number of blocks from `lo`."""
    middle = lo + max(block, (hi - lo) // 2 // block * block)
    return (lo, middle), (middle, hi)
