"""The lock engine: sessions, lockspaces, and what every operation does to them. Pure.

A session is one client of one node's lock daemon. It joins lockspaces (an array is one), gets a slot
in each, and holds locks there. The engine is given operations and the fates of sessions, one after another; each
call changes the state and appends effects, which `take_effects` hands out. It knows no time, no
randomness, no node of its own: all replicas make the same calls and hold the same state (dlm.md 6.1).

How a session ends decides what happens to its locks (dlm.md 3.4, 6.4):

    leave                everything freed at once, nobody recovers anything
    clean end            the same for locks; a lockspace it had not left recovers its slot
    lost                 its process may be gone, its I/O may be not: waiting requests are removed, conversions
                         cancelled; granted locks stay as *zombies* that block others and get no basts
    end, with proof      it is dead and its I/O has drained: locks purged, value blocks it may have left half
                         done marked invalid, waiters granted, survivors told which slot to take over

Except for a lost one, locks that were requested with PERSISTENT stay in all these cases, as orphans (`orphans`).

Survivors hear recover_prep, recover_slot for each failed member, then recover_done (md-cluster spec 4.1);
the grants that a purge causes come between the last slot and done.

Rules 1.4 to 1.8 and 2 of dlm.md are `resource`, waits over several resources are `deadlock`, slots are `space`. Invalid
arguments are refused here (dlm.md 1.3): a flag that says nothing about the operation is no reason, just as for Linux.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clustermd.dlm.deadlock import Waits
from clustermd.dlm.effects import (
    Answer,
    Effect,
    JoinWaits,
    RecoverDone,
    RecoverPrep,
    RecoverSlot,
    Refusal,
    SessionKey,
)
from clustermd.dlm.lock import EX, IV, NL, PW, VALBLK, Callbacks
from clustermd.dlm.modes import ECANCEL, EDEADLK, EINVAL, ENOENT, ETIMEDOUT, EUNLOCK, Flag, SpaceFlag
from clustermd.dlm.orphans import owner_of
from clustermd.dlm.resource import Lock, Resource
from clustermd.dlm.space import Joiner, Seat, SeatState, Space

NAME_BYTES_MAX = 64

_ALL = int(~Flag.NONE)
_NOT_FOR_REQUEST = ~_ALL | int(Flag.CANCEL | Flag.CONVERT | Flag.QUECVT | Flag.CONVDEADLK)
_NOT_FOR_CONVERT = ~_ALL | int(Flag.CANCEL | Flag.EXPEDITE)
_NOT_FOR_UNLOCK = ~int(Flag.CANCEL | Flag.VALBLK | Flag.IVVALBLK | Flag.FORCEUNLOCK)
_CANCEL_STATUSES = (ECANCEL, EDEADLK, ETIMEDOUT)
_CONVERT, _CANCEL, _FORCEUNLOCK = int(Flag.CONVERT), int(Flag.CANCEL), int(Flag.FORCEUNLOCK)
_EXPEDITE, _NOQUEUE, _ORPHAN = int(Flag.EXPEDITE), int(Flag.NOQUEUE), int(Flag.ORPHAN)
_PERSISTENT, _QUECVT, _CONVDEADLK = int(Flag.PERSISTENT), int(Flag.QUECVT), int(Flag.CONVDEADLK)
_QUECVT_PAIRS = frozenset(
    (a, b)
    for a, row in {0: (1, 2, 3, 4, 5), 1: (2, 4, 3, 5), 2: (3, 4, 5), 3: (2, 4, 5), 4: (5,)}.items()
    for b in row
)


@dataclass(slots=True, eq=False)
class SessionState:
    """One client: its label and process for people, its node's name, and whether it is lost (a zombie)."""

    key: SessionKey
    name: str
    label: str
    pid: int
    lost: bool = False


@dataclass(slots=True)
class Place:
    """Where a lock lives."""

    space: Space
    resource: Resource
    lock: Lock


class Engine:
    """All lockspaces. Methods that answer with a return code give (rc, lock id) as the DLM's calls do."""

    def __init__(self) -> None:
        self.sessions: dict[SessionKey, SessionState] = {}
        self.spaces: dict[str, Space] = {}
        self.locks: dict[int, Place] = {}
        self.next_lock = 1
        self.callbacks = Callbacks()
        self.waits = Waits()

    def take_effects(self) -> list[Effect]:
        """The effects since the last call, in the order in which they were generated."""
        effects = self.callbacks.out[:]
        self.callbacks.out.clear()
        self.callbacks.begin()
        return effects

    # ---- sessions

    def open_session(self, key: SessionKey, name: str, label: str, pid: int) -> None:
        self.sessions[key] = SessionState(key, name, label, pid)

    def alive(self, key: SessionKey) -> bool:
        session = self.sessions.get(key)
        return session is not None and not session.lost

    def lose_sessions(self, keys: Iterable[SessionKey]) -> None:
        """Sessions whose client may be dead: they get nothing more and keep what they hold (zombies)."""
        lost = frozenset(key for key in keys if self.alive(key))
        for key in sorted(lost):
            self.sessions[key].lost = True
        for name in sorted(self.spaces):
            space = self.spaces[name]
            touched = space.locks_by_resource(lost)
            for resource, locks in touched:
                for lock in locks:
                    lock.wants_bast = False
                    if lock in resource.waiting:
                        self._forget(resource, lock)
                    elif lock in resource.converting:
                        resource.revert(lock)
            for resource, _ in touched:
                resource.pend()
                space.forget_if_empty(resource)
            space.joiners = [joiner for joiner in space.joiners if joiner.session not in lost]
            for seat in space.members():
                if seat.session in lost:
                    seat.state = SeatState.ZOMBIE
            self._settle(space)

    def end_sessions(
        self, keys: Iterable[SessionKey], *, clean: bool, node_died: bool = False, node_left: bool = False
    ) -> None:
        """Sessions that said goodbye (`clean`), or whose process (or node) is proved dead: purge.

        A dead process leaves every value block under its PW or EX lock invalid, a dead node only those it held with
        VALBLK (dlm.md 2.4). Whoever ends without leaving a lockspace first may have left something there that others
        must recover, however clean its end: only `leave`, or a node that leaves, says that there is nothing.
        """
        ended = frozenset(key for key in keys if key in self.sessions)
        states = {key: self.sessions.pop(key) for key in ended}
        leave_orphans = {} if node_died or node_left else states
        for name in sorted(self.spaces):
            space = self.spaces[name]
            space.joiners = [joiner for joiner in space.joiners if joiner.session not in ended]
            invalid = not clean and not node_died
            self._depart(
                space, ended, failed=not node_left, always_invalid=invalid, leave_orphans=leave_orphans
            )

    # ---- membership of a lockspace

    def join(
        self, key: SessionKey, op: int, name: str, lvb_bytes: int, max_slots: int, flags: int = 0
    ) -> None:
        """Enter a lockspace (`flags`: SpaceFlag); completes with the session's first RecoverDone, or a Refusal."""
        space = self.spaces.get(name)
        deadlocks = bool(flags & SpaceFlag.DEADLOCKS)
        if space is None:
            space = self.spaces[name] = Space(name, lvb_bytes, self.waits if deadlocks else None)
        if flags & SpaceFlag.NEWEXCL and any(seat.session[:2] == key[:2] for seat in space.members()):
            self._refuse(
                key,
                op,
                "exists",
                f"this node is in lockspace {name} already, and it was to be new",
                space=name,
            )
        elif space.member(key) or space.joiner(key):
            self._refuse(
                key, op, "already-joined", f"this session is in lockspace {name} already", space=name
            )
        elif space.lvb_bytes != lvb_bytes:
            self._refuse(
                key,
                op,
                "value-block-size",
                f"lockspace {name} has value blocks of {space.lvb_bytes} bytes, not {lvb_bytes}: "
                "all its members must agree",
                space=name,
            )
        elif (space.waits is not None) != deadlocks:
            does = "looks for deadlocks" if space.waits is not None else "does not look for deadlocks"
            self._refuse(
                key,
                op,
                "deadlock-detection",
                f"lockspace {name} {does} over several locks, this session asks for the other: "
                "all its members must agree",
                space=name,
            )
        else:
            space.joiners.append(Joiner(key, op, max_slots))
            self._settle(space)

    def leave(self, key: SessionKey, name: str) -> int:
        """Release a lockspace: its locks are freed (EUNLOCK) or become orphans, the members get no recover_slot."""
        space = self.spaces.get(name)
        if space is None or not (space.member(key) or space.joiner(key)):
            return ENOENT
        joiner = space.joiner(key)
        if joiner is not None:
            space.joiners.remove(joiner)
            self._refuse(key, joiner.op, "left", f"the session gave up joining lockspace {name}", space=name)
        states = {key: self.sessions[key]}
        self._depart(space, frozenset(states), failed=False, always_invalid=False, leave_orphans=states)
        return 0

    def recovered(self, key: SessionKey, name: str, slot: int, generation: int) -> int:
        """The takeover of a failed slot is finished; `generation` is that of the caller's last recover_done.

        A slot that came free meanwhile, or that failed again without the caller knowing, is left alone.
        """
        space = self.spaces.get(name)
        if space is None or not space.member(key):
            return ENOENT
        seat = space.seats.get(slot)
        if seat is not None and seat.state is SeatState.RECOVERING and seat.told_generation <= generation:
            del space.seats[slot]
            self._settle(space)
        return 0

    # ---- locks (dlm.md 1.3, 1.5)

    def request(
        self, key: SessionKey, op: int, space_name: str, name: bytes, mode: int, flags: int, wants_bast: bool
    ) -> tuple[int, int]:
        """A new lock. Returns (rc, lock id); the completion is a Cast. With ORPHAN it is an old one (`orphans`)."""
        space = self.spaces.get(space_name)
        if space is None or not space.member(key):
            return ENOENT, 0
        if not NL <= mode <= EX or flags & _NOT_FOR_REQUEST or not 1 <= len(name) <= NAME_BYTES_MAX:
            return EINVAL, 0
        if flags & _EXPEDITE and (flags & _NOQUEUE or mode != NL):
            return EINVAL, 0
        self.callbacks.begin()
        if flags & _ORPHAN:
            return self._adopt(space, key, op, name, mode, flags, wants_bast)
        number = self.next_lock
        self.next_lock += 1
        lvb = bytes(space.lvb_bytes) if flags & VALBLK else None
        lock = Lock(number, key, op, mode, flags, wants_bast, lvb)
        if flags & _PERSISTENT:
            lock.persistent = True
        resource = space.resource(name, self.callbacks)
        self.locks[number] = Place(space, resource, lock)
        self.callbacks.out.append(Answer(key, op, 0, number))
        if not resource.request(lock):
            self._forget(resource, lock)
            space.forget_if_empty(resource)
        return 0, number

    def convert(
        self, key: SessionKey, op: int, lock_id: int, mode: int, flags: int, lvb: bytes | None
    ) -> tuple[int, int]:
        """Change the mode of a granted lock; `lvb` is the caller's buffer as it is now.

        The buffer is his memory: it exists from the first VALBLK on, and keeps what he wrote even if the call fails.
        """
        place = self._own(key, lock_id)
        if place is None:
            return ENOENT, lock_id
        lock, lvb_bytes = place.lock, place.space.lvb_bytes
        if lvb is not None and len(lvb) != lvb_bytes:
            return EINVAL, lock_id
        if flags & VALBLK and lock.lvb is None:
            lock.lvb = bytes(lvb_bytes)
        if lvb is not None and lock.lvb is not None:
            lock.lvb = lvb
        if not NL <= mode <= EX or flags & _NOT_FOR_CONVERT or (flags & _CONVDEADLK and flags & _NOQUEUE):
            return EINVAL, lock_id
        if flags & _QUECVT and (lock.gr, mode) not in _QUECVT_PAIRS and lock in place.resource.granted:
            return EINVAL, lock_id
        self.callbacks.begin()
        rc = place.resource.convert(lock, op, mode, flags | _CONVERT)
        if flags & _PERSISTENT and rc == 0:
            lock.persistent = True
        return rc, lock_id

    def unlock(
        self, key: SessionKey, op: int, lock_id: int, flags: int, lvb: bytes | None
    ) -> tuple[int, int]:
        """Free a lock in whatever state it is; the completion is EUNLOCK. With CANCEL it is `cancel`."""
        place = self._own(key, lock_id)
        if place is None:
            return ENOENT, lock_id
        lock = place.lock
        if lvb is not None:
            if len(lvb) != place.space.lvb_bytes:
                return EINVAL, lock_id
            if lock.lvb is not None:
                lock.lvb = lvb
        if flags & _NOT_FOR_UNLOCK or (flags & _CANCEL and flags & _FORCEUNLOCK):
            return EINVAL, lock_id
        if flags & _CANCEL:
            return self._cancel(place, ECANCEL)
        self.callbacks.begin()
        del self.locks[lock_id]
        place.resource.unlock(lock, op, flags)
        place.space.forget_if_empty(place.resource)
        return 0, lock_id

    def cancel(self, key: SessionKey, lock_id: int, status: int = ECANCEL) -> tuple[int, int]:
        """Cancel what is pending on a lock: `status` is cast for it, or nothing if a grant was faster.

        `status` says why: ECANCEL, EDEADLK (the deadlock cancel of dlm.md 1.6), ETIMEDOUT (the caller's time is up).
        """
        place = self._own(key, lock_id)
        if place is None:
            return ENOENT, lock_id
        if status not in _CANCEL_STATUSES:
            return EINVAL, lock_id
        return self._cancel(place, status)

    def purge(self, key: SessionKey, space_name: str, node: int, pid: int) -> int:
        """Free the orphans that process `pid` (0: any) of living node `node` (0: the caller's) left in a lockspace."""
        space = self.spaces.get(space_name)
        if space is None or not space.member(key):
            return ENOENT
        node = node or key[0]
        owners = [owner for owner in self.sessions if owner == owner_of(owner) and owner[0] == node]
        touched: dict[bytes, Resource] = {}
        for orphan in space.orphans.of_process(filter(self.alive, owners), pid):
            resource = touched[orphan.resource.name] = orphan.resource
            if orphan.lock.gr >= PW:
                resource.invalid = True
            self._forget(resource, orphan.lock)
        for resource in touched.values():
            self.callbacks.begin()
            resource.pend()
            space.forget_if_empty(resource)
        self._settle_owners(owners)
        return 0

    # ---- inside

    def _own(self, key: SessionKey, lock_id: int) -> Place | None:
        place = self.locks.get(lock_id)
        return place if place is not None and place.lock.session == key else None

    def _cancel(self, place: Place, status: int) -> tuple[int, int]:
        self.callbacks.begin()
        if not place.resource.cancel(place.lock, status):
            del self.locks[place.lock.id]
            place.space.forget_if_empty(place.resource)
        return 0, place.lock.id

    def _forget(self, resource: Resource, lock: Lock) -> None:
        resource.drop(lock)
        self.locks.pop(lock.id).space.orphans.forget(lock.id)

    def _leave_orphan(self, space: Space, resource: Resource, lock: Lock, left_by: SessionState) -> None:
        if lock in resource.converting:
            resource.revert(lock)
            if left_by.key in self.sessions:  # it leaves the lockspace only
                resource.end(lock, ECANCEL)
        owner = owner_of(left_by.key)
        if owner not in self.sessions:
            self.sessions[owner] = SessionState(owner, left_by.name, "orphans", 0)
        space.orphans.leave_behind(resource, lock, left_by.pid)

    def _adopt(
        self, space: Space, key: SessionKey, op: int, name: bytes, mode: int, flags: int, wants_bast: bool
    ) -> tuple[int, int]:
        owner = owner_of(key)
        orphan = space.orphans.find(owner, name, mode)
        if isinstance(orphan, int):
            return orphan, 0
        lock = orphan.lock
        space.orphans.forget(lock.id)
        lock.session, lock.op, lock.fl, lock.wants_bast = key, op, flags, wants_bast
        lock.persistent = bool(flags & _PERSISTENT)
        if flags & VALBLK and lock.lvb is None:
            lock.lvb = bytes(space.lvb_bytes)
        orphan.resource.adopt(lock)
        self._settle_owners((owner,))
        return 0, lock.id

    def _settle_owners(self, owners: Iterable[SessionKey]) -> None:
        """A node's own session is there only as long as it has orphans."""
        for owner in owners:
            if not any(
                orphan.lock.session == owner
                for space in self.spaces.values()
                for orphan in space.orphans.by_id.values()
            ):
                del self.sessions[owner]

    def _refuse(self, key: SessionKey, op: int, code: str, message: str, **data: Any) -> None:
        self.callbacks.out.append(Refusal(key, op, code, message, data))

    def _depart(
        self,
        space: Space,
        gone: frozenset[SessionKey],
        *,
        failed: bool,
        always_invalid: bool,
        leave_orphans: dict[SessionKey, SessionState],
    ) -> None:
        """Sessions leave a lockspace for good: recovery of those who stay, purge, then the joiners' turn."""
        out = self.callbacks.out
        leavers = [
            seat for seat in space.in_state(SeatState.MEMBER, SeatState.ZOMBIE) if seat.session in gone
        ]
        if leavers:
            space.generation += 1
        for seat in space.in_state(SeatState.RECOVERING):
            # who comes back later knows nothing of the takeovers of its earlier membership
            seat.told = [key for key in seat.told if key not in gone]
        for seat in leavers:
            if failed:
                seat.state = SeatState.RECOVERING
                seat.told_generation = space.generation
            else:
                del space.seats[seat.slot]
        survivors = space.members()
        if leavers:
            for survivor in survivors:
                out.append(RecoverPrep(survivor.session, space.name))
                for seat in space.in_state(SeatState.RECOVERING):
                    # also those that only a leaver knew of: somebody must finish what he began
                    if survivor.session not in seat.told:
                        seat.told.append(survivor.session)
                        out.append(RecoverSlot(survivor.session, space.name, seat.slot, seat.node, seat.name))
        self._purge(space, gone, always_invalid, leave_orphans)
        if leavers:
            self._announce(space)
        if not space.in_state(SeatState.MEMBER, SeatState.ZOMBIE):
            # nobody is left to take over: the next to join reads all bitmaps that nobody holds
            space.seats.clear()
        self._settle(space)

    def _purge(
        self,
        space: Space,
        gone: frozenset[SessionKey],
        always_invalid: bool,
        leave_orphans: dict[SessionKey, SessionState],
    ) -> None:
        """Remove the locks of `gone` or make them orphans, mark value blocks, then re-evaluate (dlm.md 6.4).

        Resources come in the order of their names.
        """
        touched = space.locks_by_resource(gone)
        for resource, locks in touched:
            for lock in locks:
                if lock.persistent and lock.gr != IV and (left_by := leave_orphans.get(lock.session)):
                    self._leave_orphan(space, resource, lock, left_by)
                    continue
                if lock in resource.granted:
                    lock.op = 0  # nothing of it is pending
                if lock.gr >= PW and (always_invalid or lock.fl & VALBLK):
                    resource.invalid = True
                self._forget(resource, lock)
                if lock.session in self.sessions:  # it left the lockspace only
                    lock.gr = -1
                    resource.end(lock, EUNLOCK)
        for resource, _ in touched:
            self.callbacks.begin()
            resource.pend()
            space.forget_if_empty(resource)

    def _announce(self, space: Space) -> None:
        slots = space.slots()
        for seat in space.members():
            self.callbacks.out.append(
                RecoverDone(seat.session, space.name, slots, seat.slot, space.generation)
            )

    def _settle(self, space: Space) -> None:
        """Admit, refuse or keep waiting each joiner in turn; drop a lockspace that nobody is in."""
        for joiner in list(space.joiners):
            key, limit = joiner.session, joiner.max_slots
            slot = space.free_slot(limit)
            if slot is not None:
                space.joiners.remove(joiner)
                for seat in space.members():
                    self.callbacks.out.append(RecoverPrep(seat.session, space.name))
                space.seats[slot] = Seat(slot, key, self.sessions[key].name)
                space.generation += 1
                self._announce(space)
                continue
            holders = space.holders(limit)
            if not holders:
                space.joiners.remove(joiner)
                self._refuse(
                    key,
                    joiner.op,
                    "too-many-nodes",
                    f"all {limit} slots of lockspace {space.name} are held by living nodes: "
                    f"{', '.join(seat.name for seat in space.members())}",
                    space=space.name,
                    slots=limit,
                )
            elif holders != joiner.waits_for:
                joiner.waits_for = holders
                self.callbacks.out.append(JoinWaits(key, joiner.op, space.name, holders))
        if space.empty:
            self.spaces.pop(space.name, None)
