"""Faults planted below the array and in tasks and buffers, so that every rule that watches is seen to fire.

Here are the lock manager's (a lock that is granted against another, a value block that is lost, a slot that is given
twice, a dead node's locks given away before its end is proved) and slips that no protocol rule names: a task or buffer
that is left, an exception, a loop that never ends, memory that is written while a disk reads it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from clustermd.array.array import Array
from clustermd.array.member_io import Shared
from clustermd.array.metadata import Metadata
from clustermd.array.request import Request
from clustermd.array.write import WriteOp, Writer
from clustermd.cluster.channel import Channel
from clustermd.cluster.life import Life
from clustermd.cluster.messages import Message
from clustermd.cluster.slot_lock import OwnSlot, slot_lock_name
from clustermd.device import helpers
from clustermd.dlm import resource as resource_module
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import COMPATIBLE, Mode
from clustermd.dlm.resource import Resource
from clustermd.dlm.space import Space
from clustermd.errors import LockRefused
from clustermd.testing.simulator.flaws import Flaw, Patch, flaw
from clustermd.testing.simulator.model import Model
from clustermd.testing.simulator.submitter import SimSubmitter

_stop, _start = Array.stop, Writer.start
_lose, _end = Engine.lose_sessions, Engine.end_sessions
_received = Channel._process

_TOO_COMPATIBLE = COMPATIBLE | {
    (int(one), int(other)) for one in (Mode.PW, Mode.EX) for other in (Mode.PW, Mode.EX)
}


def _first_slot(self: Space, max_slots: int) -> int | None:
    """The lowest slot that no member has; a zombie's is given away."""
    taken = {seat.slot for seat in self.members()}
    return next((slot for slot in range(1, max_slots + 1) if slot not in taken), None)


async def _claim_nothing(lockspace: Any, slot: int) -> OwnSlot:
    """Takes the slot's lock if it is free, and goes on without it if not."""
    lock = await lockspace.lock(slot_lock_name(slot), Mode.NL, value_block=True)
    with suppress(LockRefused):
        await lock.convert(Mode.PW, noqueue=True)
    return OwnSlot(lock)


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


def _model_slip(self: Model, write: Any, error: int) -> None:
    raise ValueError("a slip")


async def _slip(self: Life, message: Message) -> int:
    raise RuntimeError("a slip")


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
    flaw(
        "dlm slots",
        "gives a zombie's slot away",
        (Space, "free_slot", _first_slot),
        (OwnSlot, "claim", _claim_nothing),
    ),
    flaw("dlm fencing", "takes who is lost for dead", (Engine, "lose_sessions", _purge_when_lost)),
    flaw(
        "dlm leave",
        "keeps who left",
        (Engine, "leave", _keep_its_locks),
        (Engine, "end_sessions", lambda *args, **how: None),
    ),
    flaw(
        "a proof",
        "proves a death before the last request has landed",
        (SimSubmitter, "in_flight", property(lambda self: 0)),
    ),
    flaw("a model", "slips in the simulator itself", (Model, "answered", _model_slip)),
    flaw("a task", "leaves a task behind", (Array, "stop", _leave_a_task)),
    flaw("a buffer", "keeps a buffer", (Shared, "drop", _keep_the_buffer)),
    flaw("an exception", "raises where nobody expects it", (Life, "_resyncing_elsewhere", _slip)),
    flaw("a loop", "runs for ever", (Array, "wake_resync", _again_and_again)),
    flaw("a sector", "writes beside where it was asked to", (Writer, "start", _write_elsewhere)),
    flaw("memory", "writes to memory that a disk reads", (Writer, "start", _scribble)),
    flaw("a superblock", "writes garbage for a superblock", (Metadata, "_write_one", _torn_superblock)),
    flaw("a message", "receives another message than was sent", (Channel, "_process", _another_message)),
    Flaw("half a write", "writes half to the last member", _half_a_write),
)
