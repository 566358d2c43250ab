"""What every submitter does around its batches, whichever way requests reach the kernel.

A batch passes the I/O gate once (rule 12). Opening and shutting are events. A lease that is renewed gives no
event, so while one is over the gate is asked again every `RECHECK_S`.

Completions of one wake-up form a sweep: all targets, then the listeners, then one submit of all that
they queued. An error in one target must not swallow the completions behind it: it goes to the loop's
exception handler and the sweep goes on. Refused requests complete in a sweep of their own, later, so
that nobody is ever called back from within `submit`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clustermd.device.member_device import Buffer, Gate, GateState, MemberDevice, Op, Submitter, Target

RECHECK_S = 0.02
"""Much shorter than any lease, and cheap beside what stands still meanwhile."""


class Sweep:
    """The gate's verdicts, refusals, listeners and waiters of one submitter."""

    __slots__ = (
        "_drain_waiters",
        "_gate",
        "_listeners",
        "_loop",
        "_recheck",
        "_refused",
        "_submit",
        "closed",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, gate: Gate, submit: Callable[[], None]) -> None:
        self._loop = loop
        self._gate = gate
        self._submit = submit
        self._listeners: list[Callable[[], None]] = []
        self._refused: list[tuple[Target, int, int]] = []
        self._recheck: asyncio.TimerHandle | None = None
        self._drain_waiters: list[asyncio.Future[None]] = []
        self.closed = False
        gate.listen(self._gate_changed)

    def verdict(self) -> GateState:
        """May a batch go now?"""
        state = self._gate.verdict()
        if self._gate.lapsed:
            self.submit_later(RECHECK_S)
        return state

    def submit_later(self, delay_s: float) -> None:
        """Submit again after `delay_s`, once."""
        if self._recheck is None:
            self._recheck = self._loop.call_later(delay_s, self._submit_now)

    def _submit_now(self) -> None:
        self._recheck = None
        if self.closed:
            return
        if self._gate.lapsed:
            self.verdict()
        self._submit()

    def _gate_changed(self, state: GateState) -> None:
        if self.closed:
            return
        if state is GateState.SHUT:
            # now, not later: what the old life queued must not find the gate open in a new one
            self._submit()
        elif state is GateState.OPEN:
            self._loop.call_soon(self._submit_now)
        elif self._gate.lapsed:
            self.submit_later(RECHECK_S)

    def refuse(self, requests: list[tuple[Target, int]], error: int) -> None:
        """Complete each `(target, tag)` with `-error` in a later sweep."""
        if not requests:
            return
        if not self._refused:
            self._loop.call_soon(self._answer_refused)
        self._refused.extend([(target, tag, -error) for target, tag in requests])

    def _answer_refused(self) -> None:
        refused, self._refused = self._refused, []
        self.deliver(refused)

    def deliver(self, completions: list[tuple[Target, int, int]]) -> None:
        """One sweep of `(target, tag, result)`."""
        for target, tag, result in completions:
            try:
                target.io_done(tag, result)
            except Exception as error:
                self.failed(target, error)
        self.end()

    def end(self) -> None:
        """All targets of a sweep were called: listeners, then submit."""
        for listener in self._listeners:
            try:
                listener()
            except Exception as error:
                self.failed(listener, error)
        if not self.closed:
            self._submit()

    def failed(self, who: object, error: Exception) -> None:
        """Report an error of a target or listener to the loop; the sweep goes on."""
        self._loop.call_exception_handler(
            {"message": f"an I/O completion raised in {who!r}", "exception": error}
        )

    def listen(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    @property
    def has_refused(self) -> bool:
        """Refusals that still wait for their sweep."""
        return bool(self._refused)

    def drained(self) -> None:
        """Nothing is in flight: wake who waits for that."""
        waiters, self._drain_waiters = self._drain_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    @property
    def awaits_drain(self) -> bool:
        return bool(self._drain_waiters)

    async def wait_drained(self) -> None:
        """Wait for the next `drained()`."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._drain_waiters.append(waiter)
        await waiter

    def close(self) -> None:
        self.closed = True
        if self._recheck is not None:
            self._recheck.cancel()
            self._recheck = None


class Awaited:
    """The target of one awaited request."""

    __slots__ = ("done",)

    def __init__(self, done: asyncio.Future[int]) -> None:
        self.done = done

    def io_done(self, tag: int, result: int) -> None:
        if not self.done.done():
            self.done.set_result(result)


async def run_one(
    submitter: Submitter,
    withdraw: Callable[[Target], bool],
    device: MemberDevice,
    op: Op,
    offset_bytes: int,
    length_bytes: int,
    buffer: Buffer | None,
    buffer_offset: int,
    fua: bool,
) -> int:
    """Queue one request, submit, await it; bytes or -errno.

    A cancelled caller gets its buffer back only when the kernel is done with it: a request that is still
    queued is withdrawn, one in flight is awaited first.
    """
    awaited = Awaited(asyncio.get_running_loop().create_future())
    submitter.queue(device, op, offset_bytes, length_bytes, buffer, buffer_offset, awaited, 0, fua)
    submitter.submit()
    try:
        await asyncio.wait((awaited.done,))
    except asyncio.CancelledError:
        if not withdraw(awaited):
            while not awaited.done.done():
                try:
                    await asyncio.wait((awaited.done,))
                except asyncio.CancelledError:
                    continue
        raise
    return awaited.done.result()
