"""The lock manager for programs: cluster-wide locks with asyncio. `lockd.plain` is the same for programs without it.

    async with connect_lockspace("backup") as space:
        async with await space.lock("db1", Mode.EX, timeout_s=5) as lock:
            ...

Joining starts this node's lockd when none runs. A lockspace exists while somebody is in it; whoever joins must name
the same value block size. Locks are freed at the end of their block, with the lockspace, and with the process however
it dies.

What a holder can rely on (design section 5, dlm.md 6.8): a lock is given to nobody else before this process has let it
go, has ended, or has left its lockspace, also when this node's lockd dies. When that happens the session is *lost*:
`on_lost` is called, every call raises ClusterLost, and the process must free its locks or leave the lockspace within
`unresponsive_s` (10 s), else it is killed. The same happens to a process whose event loop stands still for that long.

Blocking callbacks `blocking(lock, mode)` come from the event loop, after the grant, when somebody waits for `mode`.
They may start a task that converts or frees the lock. They are a hint: the mode may be out of date, none is repeated.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from clustermd.clock import SystemClock
from clustermd.conf import Conf
from clustermd.device.lease import LeaseFile
from clustermd.dlm.wire import SLOTS_MAX
from clustermd.errors import Refused
from clustermd.lockd.client import LockdConnection, connect
from clustermd.lockd.held import HeldLock, OpenLockspace, ended
from clustermd.lockd.kept import KeptLock
from clustermd.lockd.lease_watch import patience_s
from clustermd.lockd.witness_file import WitnessFile
from clustermd.rundir import RunDir

__all__ = ["VALUE_BLOCK_BYTES", "HeldLock", "KeptLock", "OpenLockspace", "connect_lockspace"]

VALUE_BLOCK_BYTES = 64
_SAY_S = 2.0
_LABEL_MAX = 80


@asynccontextmanager
async def connect_lockspace(
    name: str,
    *,
    label: str = "",
    rundir: RunDir | None = None,
    start: bool = True,
    timeout_s: float | None = None,
    value_block_bytes: int = VALUE_BLOCK_BYTES,
    max_slots: int = SLOTS_MAX,
    deadlocks: bool = False,
    witness: WitnessFile | bool = True,
    on_lost: Callable[[str], None] | None = None,
    on_waiting: Callable[[str], None] | None = None,
) -> AsyncIterator[OpenLockspace]:
    """Be in lockspace `name` (1 to 64 characters) for the length of the block.

    `label` is what people see of this process (default: the program's name). Waits for the cluster, without bound
    unless `timeout_s` is given; `on_waiting(reason)` hears for what. `start` False does not start a lockd. With
    `witness` False locks are free as soon as the lockd has lost this process, whatever that one is still at.
    With `deadlocks` a request that would close a circle of waits is refused ("deadlock"); all members must say the
    same. Raises Refused ("not-running", "daemon-failed", "group-not-ready"), LockRefused ("value-block-size",
    "deadlock-detection", "too-many-nodes"), ClusterLost.
    """
    where = rundir or RunDir.from_environment()
    proof = WitnessFile(where) if witness is True else witness or None
    conf = Conf.load()
    entering = _Entering(name, where, label or os.path.basename(sys.argv[0]) or "python", start, on_waiting)
    try:
        space = await entering.within(timeout_s, proof, on_lost, value_block_bytes, max_slots, deadlocks)
        try:
            async with _leased(space, where, conf):
                yield space
        finally:
            await space.leave()
    finally:
        if proof is not None:
            proof.close()


@asynccontextmanager
async def _leased(space: OpenLockspace, rundir: RunDir, conf: Conf) -> AsyncIterator[None]:
    """Beside the block, on a cluster of machines: the session ends with this node's lease."""
    if not conf.clustered:
        yield
        return
    clock = SystemClock()
    lease = LeaseFile.open(rundir.lease, lambda: int(clock.boottime_s() * 1e9))
    task = asyncio.get_running_loop().create_task(space.end_with(lease, clock, patience_s(conf)))
    try:
        yield
    finally:
        task.cancel()
        await ended(task)


class _Entering:
    """The way into a lockspace, which may be given up at every step."""

    def __init__(
        self, name: str, rundir: RunDir, label: str, start: bool, on_waiting: Callable[[str], None] | None
    ) -> None:
        self._name = name
        self._rundir = rundir
        self._label = label[:_LABEL_MAX]
        self._start = start
        self._on_waiting = on_waiting
        self._connection: LockdConnection | None = None
        self._waiting = ""

    async def within(
        self,
        timeout_s: float | None,
        proof: WitnessFile | None,
        on_lost: Callable[[str], None] | None,
        value_block_bytes: int,
        max_slots: int,
        deadlocks: bool,
    ) -> OpenLockspace:
        async def enter() -> OpenLockspace:
            connection = self._connection = await self._connect()
            space = OpenLockspace(self._name, connection, proof, on_lost)
            await space.enter(value_block_bytes, max_slots, deadlocks)
            return space

        task = asyncio.get_running_loop().create_task(enter())
        try:
            in_time = await self._ends(task, timeout_s)
        except asyncio.CancelledError:
            await self._give_up(task)
            raise
        if not in_time:
            await self._give_up(task)
            raise Refused(
                "group-not-ready",
                f"lockspace {self._name} could not be joined in {timeout_s:g} s: "
                f"{self._waiting or 'the lock manager of this node does not answer'}",
            )
        try:
            return task.result()
        except BaseException:
            self._drop()
            raise

    async def _ends(self, task: asyncio.Task[OpenLockspace], timeout_s: float | None) -> bool:
        """Whether the task ends in time; meanwhile it is told why the cluster stands still, if it does."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + (math.inf if timeout_s is None else timeout_s)
        while not (await asyncio.wait((task,), timeout=max(0.0, min(_SAY_S, end_s - loop.time()))))[0]:
            if self._connection is not None and self._connection.suspended:
                self._tell(f"the cluster stands still: {self._connection.suspended}")
            if loop.time() >= end_s:
                return False
        return True

    def _heard(self, reason: str) -> None:
        """Not told yet, but known when the time is over."""
        self._waiting = f"{self._rundir.node} is not in its cluster: {reason}"

    def _tell(self, waiting: str) -> None:
        self._waiting = waiting
        if self._on_waiting is not None:
            self._on_waiting(waiting)

    async def _connect(self) -> LockdConnection:
        while True:
            try:
                connection = await connect(
                    self._rundir,
                    self._label,
                    start=self._start,
                    timeout_s=_SAY_S,
                    on_waiting=self._heard,
                )
            except Refused as refusal:
                if refusal.code != "group-not-ready":
                    raise
                self._tell(refusal.message)
            else:
                return connection

    async def _give_up(self, task: asyncio.Task[OpenLockspace]) -> None:
        task.cancel()
        self._drop()
        await ended(task)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.abort()
