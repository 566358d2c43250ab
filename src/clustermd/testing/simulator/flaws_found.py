"""Flaws of our own that simulated runs found, as they were: what the code did before it was put right.

Each is kept as a small run of the same name in `tests/simulator/kept`, or has a direct story: with the flaw put back it
must break again, and as the code stands it must not (`tests/simulator/test_bugs_found.py`, `docs/flaws.md`).
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any

from clustermd.array import array as array_module
from clustermd.array import assemble
from clustermd.array.array import Array
from clustermd.array.faults import Faults
from clustermd.array.flush import FlushOp
from clustermd.array.metadata import Metadata
from clustermd.array.read import Reader, ReadOp
from clustermd.array.resync import Resync
from clustermd.cluster import life as life_module
from clustermd.cluster import slot_lock as slot_lock_module
from clustermd.cluster.cluster import Cluster
from clustermd.cluster.life import Life
from clustermd.cluster.messages import Message, MessageType
from clustermd.cluster.slot_lock import slot_lock_name, try_vacant
from clustermd.device.helpers import read_bytes
from clustermd.device.member_device import MemberDevice, Submitter
from clustermd.dlm import install as install_module
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import Mode
from clustermd.dlm.replica import Replica
from clustermd.dlm.resource import Resource
from clustermd.errors import ClusterLost, Refused
from clustermd.group.process_group import View
from clustermd.ondisk.superblock import Superblock, find, location
from clustermd.testing.simulator.flaws import flaw, patched

_copy, _adopt, _reload, _end_sessions = Resync._copy, Metadata._adopt, Metadata.reload, Engine.end_sessions
_grant_converting, _failed = Resource._grant_converting, Reader.failed
_stop_in_order, _stop_recording, _leave = Array._stop_in_order, Faults.stop, Life.leave
_follow, _hear_late = Life._reload, Replica._hear_late


# --- undecided data and bad sectors -----------------------------------------------------------------------------


async def _copy_from_whoever_has_it_all(self: Resync, lo: int, hi: int, first_only: bool = False) -> None:
    await _copy(self, lo, hi)


def _reads_from_whoever_has_it_all(self: Reader, op: ReadOp, result: int) -> None:
    with patched(((self, "read_first", lambda lo, hi: False),)):
        _failed(self, op, result)


# --- lock daemons -------------------------------------------------------------------------------------------------


def _hears_late_when_it_was_live(self: Replica, late: tuple[tuple[Any, bytes | str], ...]) -> None:
    if self._was_live:
        _hear_late(self, late)


def _minds_the_last_view_only(self: Replica, view: View) -> None:
    self._unbroken = view.unbroken


# --- joining ------------------------------------------------------------------------------------------------------


def _keeps_what_it_heard_last(self: Array) -> None:
    self._no_contact = self._in_doubt = ""


async def _stays_a_member(self: Cluster) -> None:
    """A life that came to nothing goes on until the next attempt."""


def _gathers(queues: bool, believes: bool) -> Any:
    async def gather(self: Life, slot: int) -> None:
        while True:
            vacant = await try_vacant(self._lockspace, slot)
            if vacant is not None:
                try:
                    self.trace.point("join.locked", slot=slot)
                    await self.array.merge_slot(slot)
                finally:
                    await vacant.unlock()
                self.trace.point("join.merged", slot=slot)
                return
            if any(member.slot == slot + 1 for member in self._lockspace.slots):
                async with self.channel.receiving:
                    block = await life_module.read_block(self._lockspace, slot)  # type: ignore[attr-defined]
                    if slot in self.takeovers & self._gone and not believes:
                        continue
                    self.array.set_window(slot, block.lo, block.hi)
                    self.trace.point("join.window", slot=slot, lo=block.lo, hi=block.hi)
                return
            if queues:
                lock = await self._lockspace.lock(slot_lock_name(slot), Mode.PW, value_block=True)
                await lock.unlock()
            else:
                await asyncio.sleep(life_module.LOOK_AGAIN_S)

    return gather


async def _claims_nothing(self: Life) -> None:
    """The resync right is asked for when there is time to copy."""


def _clean_ends_leave_nothing(
    self: Engine, keys: Any, *, clean: bool, node_died: bool = False, node_left: bool = False
) -> None:
    _end_sessions(self, keys, clean=clean, node_died=node_died, node_left=clean)


async def _all_places_or_none(submitter: Submitter, device: MemberDevice) -> Superblock:
    parts = {}
    for minor in (0, 1, 2):
        at = location(minor, device.size_sectors)
        block_sectors = max(1, device.logical_block_bytes // 512)
        count = min(8, device.size_sectors - at) // block_sectors * block_sectors
        if at % block_sectors == 0 and count > 0:
            parts[at] = await read_bytes(submitter, device, at * 512, count * 512)
    return find(lambda sector, count: parts.get(sector, b"")[: count * 512], device.size_sectors)


# --- faults of members ------------------------------------------------------------------------------------------------


def _knows_it_alone(self: Metadata, newest: Superblock, fresh: dict[int, Superblock]) -> None:
    """A fault that is read from the superblocks is known to all."""
    before = self.state.unpublished
    _adopt(self, newest, fresh)
    if all(member.fault_recorded for member in self.state.members if member.faulty):
        self.state.unpublished = before


async def _reads_what_it_trusts(self: Metadata, *, ours: bool = False, announced: int | None = None) -> None:
    """A member that this node has failed is not read, whatever was announced there."""
    failed = [member for member in self.state.members if member.faulty and not member.fault_recorded]
    for member in failed:
        member.fault_recorded = True
    try:
        await _reload(self, ours=ours)
    except (Refused, OSError):
        for member in failed:
            member.fault_recorded = False
        raise


async def _begins_with_all_or_none(self: Metadata) -> None:
    """Each member that works must be readable, although it is not known yet who else could judge it."""
    for member in self.state.members:
        if member.faulty and not member.fault_recorded and not member.stuck:
            try:
                await self.read_one(member)
            except (OSError, Refused):
                continue
            member.faulty = False
            member.why = ""
            self.state.trace.point("member.trusted", number=member.number)
    self.state.unpublished = False
    self.state.refresh()
    await self.reload()


# --- ends -------------------------------------------------------------------------------------------------------------


_TRIED_IN_VAIN = (
    (Faults, "_lost", lambda self, error: isinstance(error, ClusterLost)),
    (Faults, "_no_more", lambda self: errno.EIO),
)
"""What waits for a record when a node leaves without the cluster is answered as if no disk had taken it."""


async def _waits_for_none(self: Array) -> None:
    """The array leaves."""


async def _stops_and_merges_on(self: Array) -> None:
    state = self.state
    state.gate.shut("stopped")
    left = state.bitmap is not None and next(state.bitmap.dirty_chunks(), None) is not None
    ending = asyncio.get_running_loop().create_task(self._end_tasks())
    await asyncio.wait((ending,), timeout=array_module.CUT_S)
    await self._drain()
    await self.coordinator.leave(handover=left)
    await ending


def _begins_while_it_leaves(self: Life, key: object, work: Any) -> None:
    if key not in self._tasks and not self._over:
        self._tasks[key] = asyncio.get_running_loop().create_task(self._insist(key, work))


async def _looks_once_who_is_there(self: Life, handover: bool) -> None:
    """Who joins while it says that its window has ended neither hears of its bits nor finds its slot empty."""
    if handover and self.peers():
        await self.channel.send(Message(MessageType.BITMAP_NEEDS_SYNC, self.slot))
    elif self._announced:
        await self._finish()
    await _leave(self, False)


async def _doubts_when_it_is_over(self: Life, announced: int) -> int:
    result = await _follow(self, announced)
    if result and self._over:
        self.array.doubt("the superblocks cannot be confirmed")
    return result


async def _stops_the_present_record_only(self: Faults) -> None:
    before = self._over
    await _stop_recording(self)
    self._over = before


async def _records_before_the_last_sweep_only(self: Array) -> None:
    recorded = self.faults.recorded
    said: list[int] = []

    async def once() -> int:
        if said:
            return 0
        said.append(await recorded())
        return said[0]

    with patched(((self.faults, "recorded", once),)):
        await _stop_in_order(self)


async def _sweeps_until_surprised(self: Array) -> None:
    state = self.state
    header = state.bitmap_header
    delay_s = header.daemon_sleep if header is not None else 5
    while True:
        await asyncio.sleep(delay_s)
        if state.held:
            continue
        try:
            if await self.sweep.once():
                self.changed()
        except ClusterLost:
            continue
        except OSError as error:
            if error.errno != errno.ESHUTDOWN:
                state.log.warning("a sweep failed: %s", error)


# --- the lock manager ---------------------------------------------------------------------------------------------


def _tells_who_did_not_ask(self: Resource, high: int, cw_blocked: bool) -> tuple[int, bool]:
    silent = [lock for lock in self.converting if not lock.wants_bast]
    for lock in silent:
        lock.wants_bast = True
    try:
        return _grant_converting(self, high, cw_blocked)
    finally:
        for lock in silent:
            lock.wants_bast = False


FLAWS = (
    flaw(
        "whole-step-from-another-copy",
        "a resync takes a whole step from another copy because of one bad sector of the first",
        (Resync, "_copy", _copy_from_whoever_has_it_all),
    ),
    flaw(
        "whole-read-from-another-copy",
        "a read of undecided data is answered whole from another copy because of one bad sector of the first",
        (Reader, "failed", _reads_from_whoever_has_it_all),
    ),
    flaw(
        "joiners-refuse-each-other",
        "a node whose join failed stays a member with a shut gate until its next attempt",
        (Cluster, "abandon", _stays_a_member),
        (array_module, "REJOIN_MOST_S", array_module.REJOIN_S),
    ),
    flaw(
        "ended-without-leaving",
        "a session that ends in order leaves nothing to recover, whatever lockspace it had not left",
        (Engine, "end_sessions", _clean_ends_leave_nothing),
    ),
    flaw(
        "follower-answers-early",
        "who follows a fault that another node found answers before all have followed",
        (Metadata, "_adopt", _knows_it_alone),
    ),
    flaw(
        "half-each",
        "a node reads what is announced only on members that it has not failed itself",
        (Metadata, "reload", _reads_what_it_trusts),
    ),
    flaw(
        "settled-before-the-joiner-copied",
        "a joiner does not ask for the resync right before its slot has an owner and others are empty",
        (Life, "_claim_right", _claims_nothing),
    ),
    flaw(
        "right-asked-for-too-early",
        "a pass settles the array although its resync right was asked for before that of who has bits to copy",
        (Life, "settles", property(lambda self: self.all_settled)),
    ),
    flaw(
        "joiner-queues-for-a-slot",
        "a joiner queues for the lock of a slot that somebody takes over",
        (Life, "_gather", _gathers(queues=True, believes=False)),
    ),
    flaw(
        "lost-value-block-is-no-window",
        "a joiner believes the lost value block of an owner that died",
        (Life, "_gather", _gathers(queues=False, believes=True)),
    ),
    flaw(
        "window-of-a-former-owner",
        "a slot's block keeps the window of who is gone, and a joiner takes it for that of the slot's next owner",
        (Life, "_gather", _gathers(queues=False, believes=False)),
        (life_module, "forget_window", lambda lock: None),
        (slot_lock_module, "forget_window", lambda lock: None),
    ),
    flaw(
        "start-refused-takes-over",
        "a stop of a start that failed lets takeovers run without a bitmap",
        (Array, "_stop_at_once", _stops_and_merges_on),
    ),
    flaw(
        "one-node-blocks-all",
        "a node that alone cannot read a member tries for ever, and nobody can record anything meanwhile",
        (life_module, "RELOADS", 1 << 30),
    ),
    flaw(
        "unreadable-place-refuses-a-disk",
        "a disk is refused when a place for another superblock version cannot be read",
        (assemble, "read_superblock", _all_places_or_none),
    ),
    flaw(
        "dead-disk-keeps-it-out",
        "a node that comes back alone must read each member before it is known who else is there",
        (Metadata, "begin_anew", _begins_with_all_or_none),
    ),
    flaw(
        "leaver-takes-over",
        "a node that is leaving begins to take over, or to publish, what a death has left",
        (Life, "_spawn", _begins_while_it_leaves),
    ),
    flaw(
        "leaver-tells-no-joiner",
        "a node that leaves with bits tells whoever began to join meanwhile nothing",
        (Life, "leave", _looks_once_who_is_there),
    ),
    flaw(
        "leaver-records-faults",
        "a node that is leaving begins to record a fault that it hears of",
        (Faults, "stop", _stops_the_present_record_only),
    ),
    flaw(
        "last-sweep-finds-a-fault",
        "a fault that the last sweep before a stop finds is recorded nowhere",
        (Array, "_stop_in_order", _records_before_the_last_sweep_only),
    ),
    flaw(
        "doubt-outlives-its-life",
        "what a life could not read before its end keeps the requests of the next one, for ever",
        (Array, "_forget_former_life", lambda self: None),
        (Life, "_reload", _doubts_when_it_is_over),
    ),
    flaw(
        "sweep-ends-silently",
        "a sweep that fails in an unexpected way is the last one",
        (Array, "_sweep", _sweeps_until_surprised),
    ),
    flaw(
        "loss-that-nobody-hears-of",
        "nobody hears of the loss that ends giving back the resync right",
        (life_module, "_seen", lambda task: None),
    ),
    flaw(
        "blocking-callback-nobody-asked-for",
        "a deadlocked conversion is told of itself, though its owner asked for no callbacks",
        (Resource, "_grant_converting", _tells_who_did_not_ask),
    ),
    flaw(
        "quorum-lost-is-forgotten",
        "a view that came to no install makes up for the quorum that was lost before it",
        (Replica, "_keep_in_mind", _minds_the_last_view_only),
    ),
    flaw(
        "proof-heard-late-is-forgotten",
        "a proof that is heard after the loss of quorum that ended its view is forgotten by who had no state then",
        (Replica, "_hear_late", _hears_late_when_it_was_live),
    ),
    flaw(
        "flush-outlives-the-stop",
        "a stop waits for no flush, and who has left can record no fault that one finds",
        (Array, "_no_flushes", _waits_for_none),
        *_TRIED_IN_VAIN,  # else it says that it shuts down, which is true
    ),
    flaw(
        "flush-before-the-record",
        "a flush is answered though a member that was not asked any more is not recorded as faulty yet",
        (FlushOp, "_awaits_record", lambda self: bool(self._failed)),
    ),
    flaw(
        "stop-answers-with-an-error",
        "what waits for a record when a stopping node loses the cluster is answered as if no disk had taken it",
        *_TRIED_IN_VAIN,
    ),
    flaw(
        "window-outlives-its-life",
        "a window that a life hears of while it is given up keeps the writes of the next one, for ever",
        (Array, "_forget_former_life", _keeps_what_it_heard_last),
    ),
    flaw(
        "late-answer-counts",
        "a read is answered with what a member says after it has failed",
        (Reader, "_instead_of", lambda *_: None),
    ),
    flaw(
        "either-side-will-do",
        "of two forked histories either goes on, once who knew which of them it showed is proved dead",
        (install_module, "_may_have_shown", lambda *_: []),
    ),
    flaw(
        "own-word-lost-with-quorum",
        "a node that hears of its loss of quorum before its own last words forgets these, and others count on them",
        (Replica, "_hear_late", lambda self, late: None),
    ),
)
