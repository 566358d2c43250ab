"""Faults planted below the array and in tasks and buffers, so that every rule that watches is seen to fire.

Here are the lock manager's (a lock that is granted against another, a value block that is lost, a slot that is given
twice, a dead node's locks given away before its end is proved) and slips that no protocol rule names: a task or buffer
that is left, an exception, a loop that never ends, memory that is written while a disk reads it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from clustermd.array.array import Array
from clustermd.array.member_io import Shared
from clustermd.array.metadata import Metadata
from clustermd.array.request import Request
from clustermd.array.sweep import Sweep
from clustermd.array.write import WriteOp, Writer
from clustermd.cluster.channel import Channel
from clustermd.device import helpers
from clustermd.dlm import resource as resource_module
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import COMPATIBLE, Mode
from clustermd.dlm.resource import Resource
from clustermd.dlm.space import Space
from clustermd.testing.simulator.flaws import Flaw, Patch, flaw

_stop, _start, _reload, _once = Array.stop, Writer.start, Array.reload, Sweep.once
_lose, _end, _leave = Engine.lose_sessions, Engine.end_sessions, Engine.leave
_received = Channel._process

_TOO_COMPATIBLE = COMPATIBLE | {
    (int(one), int(other)) for one in (Mode.PW, Mode.EX) for other in (Mode.PW, Mode.EX)
}


def _first_slot(self: Space, max_slots: int) -> int | None:
    """The lowest slot that no member has; a zombie's is given away."""
    taken = {seat.slot for seat in self.members()}
    return next((slot for slot in range(1, max_slots + 1) if slot not in taken), None)


def _purge_when_lost(self: Engine, keys: Any) -> None:
    """What is lost is taken for dead."""
    keys = list(keys)
    _lose(self, keys)
    _end(self, keys, clean=False)


def _write_no_block(self: Resource, lock: Any) -> None:
    self.invalid = False


def _keep_its_locks(self: Engine, key: Any, name: str) -> int:
    """A lockspace that is left keeps the leaver as a member."""
    return 0


async def _leave_a_task(self: Array) -> None:
    asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="forgotten")
    await _stop(self)


def _keep_the_buffer(self: Shared) -> None:
    self._users -= 1


async def _slip(self: Sweep) -> int:
    if self.state.counters.data_writes > 3:
        raise RuntimeError("a slip")
    return await _once(self)


def _again_and_again(self: Array) -> None:
    loop = asyncio.get_running_loop()

    def again() -> None:
        loop.call_soon(again)

    if self.state.counters.data_writes > 3:
        again()


def _write_elsewhere(self: Writer, request: Request) -> None:
    """One sector further than asked."""
    if request.offset_bytes and request.length_bytes == 4096 and request.buffer is not None:
        request.offset_bytes -= 512
    _start(self, request)


def _scribble(self: Any, request: Request) -> None:
    """Memory of a write is used for something else while disks read it."""
    _start(self, request)
    if request.buffer is not None and request.length_bytes > 512:
        request.buffer.view[100:104] = b"oops"


async def _torn_superblock(self: Any, member: Any, superblock: Any) -> None:
    at = superblock.super_offset * 512
    garbage = superblock.to_bytes()[:100].ljust(512, b"x")
    await helpers.write_bytes(self.state.submitter, member.device, at, garbage, fua=True)


async def _another_message(self: Channel, block: bytes) -> int:
    """The second byte of a message arrives as another one."""
    changed = bytearray(block)
    changed[8] ^= 1
    return await _received(self, bytes(changed))


def _half_a_write() -> tuple[Patch, ...]:
    """The last member gets half of every tenth write, and nobody says so."""
    issue = Writer.issue
    count = 0

    def half(self: Any, op: WriteOp) -> None:
        nonlocal count
        count += 1
        if count % 10 or op.buffer is None or op.request.length_bytes <= 512:
            issue(self, op)
            return
        submitter = self.state.submitter
        queue = submitter.queue
        last = self.state.writable[-1]

        def cut(device: Any, operation: Any, at: int, length: int, *rest: Any) -> None:
            queue(device, operation, at, 512 if device is last.device else length, *rest)

        submitter.queue = cut
        op.expected = op.request.length_bytes
        done = op.writer

        try:
            issue(done, op)
        finally:
            del submitter.queue

    def any_length(self: Any, tag: int, result: int) -> None:
        io_done(self, tag, self.expected if result == 512 else result)

    io_done = WriteOp.io_done
    return ((Writer, "issue", half), (WriteOp, "io_done", any_length))


FLAWS = (
    flaw(
        "dlm grants", "grants PW and EX against each other", (resource_module, "COMPATIBLE", _TOO_COMPATIBLE)
    ),
    flaw("dlm value block", "loses value blocks", (Resource, "_write_lvb", _write_no_block)),
    flaw("dlm slots", "gives a zombie's slot away", (Space, "free_slot", _first_slot)),
    flaw("dlm fencing", "takes who is lost for dead", (Engine, "lose_sessions", _purge_when_lost)),
    flaw(
        "dlm leave",
        "keeps who left",
        (Engine, "leave", _keep_its_locks),
        (Engine, "end_sessions", lambda *args, **how: None),
    ),
    flaw("a task", "leaves a task behind", (Array, "stop", _leave_a_task)),
    flaw("a buffer", "keeps a buffer", (Shared, "drop", _keep_the_buffer)),
    flaw("an exception", "raises where nobody expects it", (Sweep, "once", _slip)),
    flaw("a loop", "runs for ever", (Array, "wake_resync", _again_and_again)),
    flaw("a sector", "writes beside where it was asked to", (Writer, "start", _write_elsewhere)),
    flaw("memory", "writes to memory that a disk reads", (Writer, "start", _scribble)),
    flaw("a superblock", "writes garbage for a superblock", (Metadata, "_write_one", _torn_superblock)),
    flaw("a message", "receives another message than was sent", (Channel, "_process", _another_message)),
    Flaw("half a write", "writes half to the last member", _half_a_write),
)
