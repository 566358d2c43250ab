"""The token / message / ack channel: one message at a time, processed and answered by every member.

Three locks carry it (md-cluster spec 4.8, 4.9). Every member holds `ack` in CR. A sender

    takes `token` EX            it is the one sender, cluster-wide
    takes `message` EX          the previous message has been let go by all
    converts to CW              which writes the value block: the message
    takes `ack` EX              granted when every member has given up its CR, that is: has processed it
    reads all answers           each member's `bitmapNNNN` block says (sequence, result)
    `ack` CR, `message` NL, `token` NL

and a receiver, woken by the blocking callback on `ack`,

    takes `message` CR          which reads the message
    processes it, and writes its answer into its own slot's block
    `ack` NL                    processed
    takes `message` PR          waits until the sender has left CW: nobody re-arms too early
    `ack` CR, `message` NL      armed again before the next sender can pass `message` EX

A receiver always answers (rule 6). A sender that waits longer than `ACK_S` cancels and awaits the cancel's outcome
(F16), and the send has failed: what it guarded does not happen (rule 5). A member that died is purged by the lock
manager, which grants `ack`. The sequence number makes processing the same message twice impossible.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from clustermd.cluster.messages import LVB_BYTES, Message, sequence_of
from clustermd.cluster.slot_lock import OwnSlot, read_block, try_vacant
from clustermd.dlm.lockspace import Lock, Lockspace
from clustermd.dlm.modes import Mode
from clustermd.errors import BadBytes, ClusterLost, LockRefused, Refused
from clustermd.trace import Trace

ACK_S = 30.0
"""As Linux since 6.11 (md-cluster spec 4.3)."""


class Channel:
    """The channel of one life. `handle(message)` processes one and returns 0 or an errno.

    While `awaits_all()` a receiver wants to know whether all others have followed too: `followed(by_all)` tells it."""

    def __init__(
        self,
        lockspace: Lockspace,
        trace: Trace,
        handle: Callable[[Message], Awaitable[int]],
        awaits_all: Callable[[], bool] = lambda: False,
        followed: Callable[[bool], None] = lambda by_all: None,
    ) -> None:
        self.lockspace = lockspace
        self.trace = trace
        self.sent = 0
        self.log = logging.getLogger("clustermd.cluster")
        self._handle = handle
        self._awaits_all = awaits_all
        self._followed = followed
        self._sending = asyncio.Lock()
        self.receiving = asyncio.Lock()
        self._asked = asyncio.Event()
        self._own: OwnSlot | None = None
        self._last_sequence = 0
        self._sender = -1  # of the message that was processed last
        self._task: asyncio.Task[None] | None = None
        self._message: Lock
        self._token: Lock
        self._ack: Lock

    @property
    def slot(self) -> int:
        """Our md slot."""
        return self.lockspace.our_slot - 1

    async def open(self, prepare: Callable[[], Awaitable[None]]) -> None:
        """Become a receiver. `prepare` runs with the token held: no message is in flight, nobody writes metadata."""
        lock = self.lockspace.lock
        self._message = await lock("message", value_block=True)
        self._token = await lock("token")
        self._ack = await lock("ack", blocking=self._blocking)
        await self._token.convert(Mode.EX)
        try:
            await prepare()
            await self._ack.convert(Mode.CR)
            self.trace.point("join.armed", slot=self.slot)
        finally:
            await self._settle(self._token, Mode.NL)

    def start(self, own: OwnSlot) -> None:
        """Answer messages from now on; one that waits already is taken at once."""
        self._own = own
        self._task = asyncio.get_running_loop().create_task(self._receive_all(), name="cluster-recv")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # --- sending ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def token(self) -> AsyncIterator[None]:
        """The right to send and to write metadata. Nothing is received meanwhile."""
        async with self._sending:
            await self._token.convert(Mode.EX)
            try:
                async with self.receiving:
                    yield
            finally:
                await self._settle(self._token, Mode.NL)

    async def send(self, message: Message) -> None:
        """Take the token, broadcast, give it back. Raises as `broadcast`."""
        async with self.token():
            await self.broadcast(message)

    async def broadcast(self, message: Message) -> None:
        """With the token held: have every member process `message`.

        Raises LockRefused `not-acknowledged` (nobody's word after ACK_S, or a missing answer) or `peer-failed`
        (with what each said), ClusterLost.
        """
        self.trace.point("send.begin", type=message.type.name, slot=self.slot)
        await self._in_time(self._message, message)
        try:
            block = self._message.lvb
            assert block is not None
            message = replace(message, slot=self.slot, sequence=sequence_of(block) + 1)
            block[:LVB_BYTES] = message.to_bytes()
            await self._message.convert(Mode.CW)
            self._point("send.written", message)
            await self._in_time(self._ack, message)
            self._point("send.acknowledged", message)
            try:
                await self._answers(message)
            finally:
                await self._settle(self._ack, Mode.CR)
            self.sent += 1
        finally:
            await self._settle(self._message, Mode.NL)
        self._point("send.done", message)

    def _point(self, name: str, message: Message) -> None:
        self.trace.point(
            name,
            type=message.type.name,
            sequence=message.sequence,
            slot=message.slot,
            low=message.low,
            high=message.high,
        )

    async def _in_time(self, lock: Lock, message: Message) -> None:
        """`lock` in EX: all have let go of the previous message, or have processed this one."""
        try:
            async with asyncio.timeout(ACK_S):
                await lock.convert(Mode.EX)
        except TimeoutError:
            raise LockRefused(
                "not-acknowledged",
                f"{message.type.name} was not acknowledged by all nodes within {ACK_S:.0f} s "
                f"(`clustermd locks` shows who holds {lock.name})",
            ) from None

    async def _tally(self, sequence: int, sender: int) -> tuple[list[str], dict[str, int]]:
        """Who of all but us and the sender has not answered message `sequence`, and who has failed to follow it."""
        missing: list[str] = []
        failed: dict[str, int] = {}
        for member in self.lockspace.slots:
            if member.slot == self.lockspace.our_slot or member.slot - 1 == sender:
                continue
            block = await read_block(self.lockspace, member.slot - 1)
            if block.sequence != sequence:
                vacant = await try_vacant(self.lockspace, member.slot - 1, Mode.PR)
                if vacant is not None:
                    await vacant.unlock()  # it is still joining, or dead: nobody owns that slot
                else:
                    missing.append(member.name)
            elif block.result:
                failed[member.name] = block.result
        return missing, failed

    async def _answers(self, message: Message) -> None:
        """Every living member has answered this very message with 0, or raise."""
        missing, failed = await self._tally(message.sequence, self.slot)
        if missing:
            raise LockRefused(
                "not-acknowledged",
                f"{message.type.name} was let go without an answer by {', '.join(missing)}",
            )
        if failed:
            words = ", ".join(f"{name} ({errno.errorcode.get(code, code)})" for name, code in failed.items())
            raise LockRefused(
                "peer-failed", f"{message.type.name} could not be followed by {words}", failed=failed
            )

    async def _settle(self, lock: Lock, mode: Mode) -> None:
        """Convert down whatever happens, and wait for it: a right must not stay with a task that ended, and the
        next one to use the lock must not find it busy."""
        down = asyncio.get_running_loop().create_task(self._down(lock, mode))
        cancelled = False
        while not down.done():
            try:
                await asyncio.wait((down,))
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            down.exception()
            raise asyncio.CancelledError
        try:
            down.result()
        except ClusterLost:
            pass  # the lock is gone with the session

    async def _down(self, lock: Lock, mode: Mode) -> None:
        if lock.mode != mode:
            await lock.convert(mode)

    # --- receiving ------------------------------------------------------------------------------------

    def _blocking(self, mode: Mode) -> None:
        if mode == Mode.EX:
            self._asked.set()

    async def _receive_all(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                async with self.receiving:
                    await self._receive()
            except ClusterLost:
                return

    async def _receive(self) -> None:
        own = self._own
        assert own is not None
        await self._message.convert(Mode.CR)
        sequence, result = self._last_sequence, 0
        block = self._message.lvb
        if self._message.lvb_valid and block is not None and sequence_of(block) != self._last_sequence:
            sequence = sequence_of(block)
            result = await self._process(bytes(block))
            self._last_sequence = sequence
            await own.set_answer(sequence, result)
            self.trace.point("recv.answered", sequence=sequence, result=result)
        else:
            self.trace.point("recv.skipped", sequence=sequence, valid=self._message.lvb_valid)
        self.trace.point("recv.processed", sequence=sequence, result=result)
        await self._ack.convert(Mode.NL)
        await self._message.convert(Mode.PR)
        if self._awaits_all():
            # It has let go, but maybe because it died or gave up: the answers tell.
            missing, failed = await self._tally(sequence, self._sender)
            self._followed(not missing and not failed)
        await self._ack.convert(Mode.CR)
        await self._message.convert(Mode.NL)
        self.trace.point("recv.done", sequence=sequence)

    async def _process(self, block: bytes) -> int:
        try:
            message = Message.from_bytes(block)
            if message.slot == self.slot:
                return 0
            self._point("recv.message", message)
            return await self._handle(message)
        except ClusterLost:
            raise
        except BadBytes:
            return errno.EPROTO
        except OSError as error:
            return error.errno or errno.EIO
        except Refused:
            return errno.EIO
        except Exception:
            # A receiver that ends without an answer would stop every node.
            self.log.exception("a message could not be processed")
            return errno.EIO
