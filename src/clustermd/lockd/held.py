"""What a program has in its hands: an open lockspace and the locks it was granted there (`lockd.api`).

Around the session's own locks (`dlm.session`) this adds what a program outside the array process needs: a refusal
names the holders, a time limit is kept also while the cluster stands still, a lock is freed by the end of a block, and
the slots of members that died are given free, since nothing is to be repaired for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from clustermd.clock import Clock
from clustermd.device.lease import LeaseFile
from clustermd.dlm.lock import is_down_conversion
from clustermd.dlm.lockspace import Lock, Lockspace, Slot
from clustermd.dlm.modes import Flag, Mode
from clustermd.errors import ClusterLost, LockRefused, Refused
from clustermd.group.tasks import Tasks
from clustermd.lockd.client import LockdConnection
from clustermd.lockd.kept import KeptLock
from clustermd.lockd.lease_watch import lease_ends
from clustermd.lockd.who import holder, holders
from clustermd.lockd.witness_file import WitnessFile

_STATUS_S = 2.0
_LEAVE_S = 5.0

T = TypeVar("T")
Blocking = Callable[["HeldLock", Mode], None]


class HeldLock:
    """A lock that this program has. Made by `OpenLockspace.lock`; the end of its `async with` block frees it."""

    def __init__(self, space: OpenLockspace, name: str, blocking: Blocking | None) -> None:
        self.space = space
        self.name = name
        self._blocking = blocking
        self._early: Mode | None = None
        self._given_up: Mode | None = None
        self._lock: Lock | None = None

    @property
    def mode(self) -> Mode:
        """What this program may rely on: IV when it has been freed or lost.

        Others may have what a down conversion gives away before its completion comes back.
        """
        if self._lock is None or self.space.lost:
            return Mode.IV
        given = self._given_up
        return self._lock.mode if given is None or not is_down_conversion(self._lock.mode, given) else given

    @property
    def value(self) -> bytes:
        """The value block as the last grant read it, or as it was set here. Raises ValueError without one."""
        return bytes(self._block())

    @value.setter
    def value(self, value: bytes) -> None:
        """Filled up with zeros. Others see it when a lock in PW or EX is converted down or freed (dlm.md 2.2)."""
        block = self._block()
        if len(value) > len(block):
            raise ValueError(f"{len(value)} bytes do not fit in a value block of {len(block)}")
        block[:] = value.ljust(len(block), b"\0")

    @property
    def value_valid(self) -> bool:
        """False when the last one who could write it died with that right: the value may be an old one."""
        return self._alive().lvb_valid

    async def convert(
        self, mode: Mode, *, noqueue: bool = False, timeout_s: float | None = None, flags: Flag = Flag.NONE
    ) -> None:
        """Change the mode, and wait for that. `flags` are those of `Lock.convert`.

        Raises LockRefused ("would-block", "timed-out", "deadlock", "busy"), ClusterLost.
        Refused, the lock keeps its old mode. After "timed-out" it is busy until the lock manager has confirmed that.
        """
        lock = self._alive()
        what = f"converting {self.name} of lockspace {self.space.name} from {lock.mode.name} to {mode.name}"
        given_before = self._given_up
        self._given_up = mode if is_down_conversion(self.mode, mode) else None
        try:
            await self.space._asked(
                lock.convert(mode, noqueue=noqueue, flags=flags), self.name, mode, timeout_s, what
            )
        except LockRefused as refusal:
            if refusal.code != "timed-out":
                self._given_up = given_before
            raise

    async def unlock(self) -> None:
        """Free it. Does nothing when it has been freed. Raises ClusterLost when it was lost before: what it
        guarded may not have been guarded to the end."""
        lock = self.let_go()
        if lock is not None:
            self.space.check_alive(f"freeing {self.name} of lockspace {self.space.name}")
            await lock.unlock()

    def let_go(self) -> Lock | None:
        """From now on this program relies on it for nothing, whether it is freed or lost."""
        lock, self._lock = self._lock, None
        self.space._freed(self)
        return lock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.unlock()
        except ClusterLost:
            if error is None:
                raise

    def _alive(self) -> Lock:
        self.space.check_alive(f"using {self.name} of lockspace {self.space.name}")
        if self._lock is None:
            raise LockRefused("unlocked", f"{self.name} of lockspace {self.space.name} has been freed")
        return self._lock

    def _block(self) -> bytearray:
        block = None if self._lock is None else self._lock.lvb
        if block is None:
            raise ValueError(f"{self.name} was locked without value_block=True, or has been freed")
        return block

    def _granted(self, lock: Lock) -> None:
        self._lock = lock
        if self._early is not None:
            asyncio.get_running_loop().call_soon(self._blocked, self._early)

    def _blocked(self, mode: Mode) -> None:
        """Somebody waits for `mode`. Nobody has the lock in hand yet when that follows the grant at once."""
        if self._lock is None:
            self._early = mode
        elif self._blocking is not None:
            self._blocking(self, mode)


class OpenLockspace:
    """A lockspace that this program is in. Made by `connect_lockspace`.

    `stands_still` says why the cluster does not answer now: locks are kept, operations take longer. Else it is empty.
    """

    def __init__(
        self,
        name: str,
        connection: LockdConnection,
        witness: WitnessFile | None,
        on_lost: Callable[[str], None] | None,
    ) -> None:
        self.name = name
        self.connection = connection
        self.stands_still = ""
        self._space: Lockspace | None = None
        self._witness = witness
        self._on_lost = on_lost
        self._held: set[HeldLock] = set()
        self._kept: list[KeptLock] = []
        self._tasks = Tasks()

    @property
    def lost(self) -> str:
        """Why the session and all locks are gone; empty while they are not."""
        return self.connection.lost

    @property
    def members(self) -> tuple[Slot, ...]:
        """Who is in the lockspace, us included."""
        return () if self._space is None else self._space.slots

    async def lock(
        self,
        name: str,
        mode: Mode = Mode.EX,
        *,
        value_block: bool = False,
        noqueue: bool = False,
        timeout_s: float | None = None,
        blocking: Blocking | None = None,
        flags: Flag = Flag.NONE,
    ) -> HeldLock:
        """A new lock on resource `name` (1 to 64 bytes), when it is granted. `flags`: `Lockspace.lock`.

        Raises LockRefused: "would-block" with `noqueue` where others exclude `mode`, "timed-out" after `timeout_s`;
        both name the holders and have them in `data["holders"]`. "invalid" for a name that is none. Raises ClusterLost.
        """
        what = f"locking {name} of lockspace {self.name} in {mode.name}"
        self.check_alive(what)
        assert self._space is not None, "joined"
        held = HeldLock(self, name, blocking)
        wanted = self._space.lock(
            name,
            mode,
            value_block=value_block,
            noqueue=noqueue,
            blocking=held._blocked if blocking is not None else None,
            flags=flags,
        )
        lock = await self._asked(wanted, name, mode, timeout_s, what)
        self._held.add(held)
        held._granted(lock)
        return held

    def keep(self, name: str, *, value_block: bool = False) -> KeptLock:
        """A lock on resource `name` that stays here between its uses, until somebody else wants it.

        Two of the same name exclude each other as other locks do.
        """
        kept = KeptLock(self, name, value_block)
        self._kept.append(kept)
        return kept

    async def holders(self, name: str, mode: Mode) -> list[dict[str, Any]]:
        """The locks that exclude `mode` on `name` now: "node", "name", "label", "pid", "mode", "held_s" ...

        Empty when there are none, and when this node's lockd cannot say. Raises ClusterLost.
        """
        try:
            async with asyncio.timeout(_STATUS_S):
                state = await self.connection.status()
        except TimeoutError:
            return []
        return holders(state["replica"], self.name, name, mode)

    # --- for locks

    async def _asked(
        self, work: Coroutine[Any, Any, T], name: str, mode: Mode, timeout_s: float | None, what: str
    ) -> T:
        """What `work` gives, in time. A refusal says who was in the way."""
        try:
            return await self._within(work, timeout_s, what)
        except LockRefused as refusal:
            if refusal.code not in ("would-block", "timed-out"):
                raise
            found = await self.holders(name, mode)
            if not found:
                raise
            holding = ", ".join(holder(lock) for lock in found)
            raise LockRefused(
                refusal.code, f"{refusal.message}: it is held by {holding}", **refusal.data, holders=found
            ) from None

    async def _within(self, work: Coroutine[Any, Any, T], timeout_s: float | None, what: str) -> T:
        """The request of an operation that comes too late is taken back behind our back: that may take as long as
        the cluster stands still, and a grant that was faster is given back (dlm.md 6.8, trap 22)."""
        if timeout_s is None:
            return await work
        task = asyncio.get_running_loop().create_task(work)
        try:
            done, _ = await asyncio.wait((task,), timeout=timeout_s)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))
            raise
        if done:
            return task.result()
        task.cancel()
        self._tasks.spawn(ended(task))
        raise LockRefused("timed-out", f"{what} was not granted in {timeout_s:g} s", timeout_s=timeout_s)

    def _freed(self, held: HeldLock) -> None:
        self._held.discard(held)
        if self.lost and self._witness is not None and not self._held:
            self._witness.release()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Background work that ends with the lockspace."""
        self._tasks.spawn(work)

    def check_alive(self, what: str) -> None:
        """Raises ClusterLost when the session is over."""
        if self.lost:
            raise ClusterLost("session-lost", f"{what} is not possible: {self.lost}")

    # --- its life

    def _session_lost(self, reason: str) -> None:
        for kept in self._kept:
            kept.space_lost()
        if self._witness is not None and not self._held:
            self._witness.release()
        if self._on_lost is not None:
            self._on_lost(reason)

    async def enter(self, value_block_bytes: int, max_slots: int, deadlocks: bool) -> None:
        """Register what proves our end, then join. For `connect_lockspace`."""
        self.connection.on_lost(self._session_lost)
        if self._witness is not None:
            await self._witness.register(self.connection)
        self._space = await self.connection.session.join(
            self.name,
            _Recovery(self),
            lvb_bytes=value_block_bytes,
            max_slots=max_slots,
            deadlocks=deadlocks,
        )

    async def leave(self) -> None:
        """Free all locks and end the session, at once when the cluster stands still. For `connect_lockspace`."""
        self._tasks.cancel()
        if self._witness is not None:
            self._witness.release()
        if self.stands_still:
            self.connection.abort()
            return
        try:
            async with asyncio.timeout(_LEAVE_S):
                if self._space is not None and not self.lost:
                    await self._space.leave()
                await self.connection.close()
        except (TimeoutError, Refused):
            self.connection.abort()

    async def end_with(self, lease: LeaseFile, clock: Clock, patience_s: float) -> None:
        """Give the session up when this node's lease is over for good. For `connect_lockspace`."""
        try:
            await lease_ends(lease, clock, patience_s)
        finally:
            lease.close()
        self.connection.abort("this node's lease has run out, so the cluster may give its locks to others")

    async def _recovered(self, slot: int) -> None:
        space = self.connection.session.spaces.get(self.name)
        try:
            if space is not None and not self.lost:
                await space.recovered(slot)
        except Refused:
            pass  # we are on our way out, and every other member says the same


class _Recovery:
    """LockspaceEvents of a lockspace that guards nothing the lock manager knows of.

    Nothing is left to repair when a member dies, so its slot is free again at once.
    """

    def __init__(self, space: OpenLockspace) -> None:
        self._space = space
        self._failed: list[int] = []

    def recover_prep(self) -> None:
        self._failed = []

    def recover_slot(self, slot: Slot) -> None:
        self._failed.append(slot.slot)

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None:
        for slot in self._failed:
            self._space._tasks.spawn(self._space._recovered(slot))
        self._failed = []

    def suspended(self, reason: str) -> None:
        self._space.stands_still = reason

    def resumed(self) -> None:
        self._space.stands_still = ""

    def lost(self, reason: str) -> None:
        pass  # LockdConnection.on_lost tells it as well, also before the lockspace is joined


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait for a request that was taken back; how it ended does not matter any more."""
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
