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

Survivors hear recover_prep, recover_slot for each failed member, then recover_done (md-cluster spec 4.1);
the grants that a purge causes come between the last slot and done.

Rules 1.3 to 1.8 and 2 of dlm.md are `resource.py`, slots are `space.py`; invalid arguments are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
from clustermd.dlm.modes import EINVAL, ENOENT, EUNLOCK, Flag, Mode
from clustermd.dlm.resource import NL, PW, VALBLK, Callbacks, Lock, Resource
from clustermd.dlm.space import Joiner, Seat, SeatState, Space

NAME_BYTES_MAX = 64

_REQUEST_FLAGS = int(
    Flag.NOQUEUE | Flag.VALBLK | Flag.EXPEDITE | Flag.NOQUEUEBAST | Flag.HEADQUE | Flag.NOORDER | Flag.ALTPR
    | Flag.ALTCW | Flag.IVVALBLK | Flag.NODLCKWT
)  # fmt: skip
_CONVERT_FLAGS = int(
    Flag.CONVERT | Flag.NOQUEUE | Flag.VALBLK | Flag.QUECVT | Flag.IVVALBLK | Flag.CONVDEADLK | Flag.NODLCKWT
    | Flag.NOQUEUEBAST | Flag.HEADQUE | Flag.NOORDER | Flag.ALTPR | Flag.ALTCW
)  # fmt: skip
_UNLOCK_FLAGS = int(Flag.VALBLK | Flag.IVVALBLK | Flag.FORCEUNLOCK)
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
        for key in ended:
            del self.sessions[key]
        for name in sorted(self.spaces):
            space = self.spaces[name]
            space.joiners = [joiner for joiner in space.joiners if joiner.session not in ended]
            self._depart(space, ended, failed=not node_left, always_invalid=not clean and not node_died)

    # ---- membership of a lockspace

    def join(self, key: SessionKey, op: int, name: str, lvb_bytes: int, max_slots: int) -> None:
        """Enter a lockspace; completes with the session's first RecoverDone, or a Refusal."""
        space = self.spaces.get(name)
        if space is None:
            space = self.spaces[name] = Space(name, lvb_bytes)
        if space.member(key) or space.joiner(key):
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
        else:
            space.joiners.append(Joiner(key, op, max_slots))
            self._settle(space)

    def leave(self, key: SessionKey, name: str) -> int:
        """Release a lockspace: all locks are freed (EUNLOCK), the members get no recover_slot."""
        space = self.spaces.get(name)
        if space is None or not (space.member(key) or space.joiner(key)):
            return ENOENT
        joiner = space.joiner(key)
        if joiner is not None:
            space.joiners.remove(joiner)
            self._refuse(key, joiner.op, "left", f"the session gave up joining lockspace {name}", space=name)
        self._depart(space, frozenset((key,)), failed=False, always_invalid=False)
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
        """A new lock. Returns (rc, lock id); the completion is a Cast."""
        space = self.spaces.get(space_name)
        if space is None or not space.member(key):
            return ENOENT, 0
        if not NL <= mode <= Mode.EX or flags & ~_REQUEST_FLAGS or not 1 <= len(name) <= NAME_BYTES_MAX:
            return EINVAL, 0
        if flags & Flag.EXPEDITE and (flags & Flag.NOQUEUE or mode != NL):
            return EINVAL, 0
        self.callbacks.begin()
        lock = Lock(
            id=self.next_lock,
            session=key,
            op=op,
            rq=mode,
            fl=flags,
            wants_bast=wants_bast,
            lvb=bytes(space.lvb_bytes) if flags & VALBLK else None,
        )
        self.next_lock += 1
        resource = space.resource(name, self.callbacks)
        self.locks[lock.id] = Place(space, resource, lock)
        self.callbacks.out.append(Answer(key, op, 0, lock.id))
        if not resource.request(lock):
            self._forget(resource, lock)
            space.forget_if_empty(resource)
        return 0, lock.id

    def convert(
        self, key: SessionKey, op: int, lock_id: int, mode: int, flags: int, lvb: bytes | None
    ) -> tuple[int, int]:
        """Change the mode of a granted lock; `lvb` is the caller's buffer as it is now."""
        place = self._own(key, lock_id)
        if place is None:
            return ENOENT, lock_id
        lock, lvb_bytes = place.lock, place.space.lvb_bytes
        flags |= int(Flag.CONVERT)
        if not NL <= mode <= Mode.EX or flags & ~_CONVERT_FLAGS:
            return EINVAL, lock_id
        if (flags & Flag.CONVDEADLK and flags & Flag.NOQUEUE) or (lvb is not None and len(lvb) != lvb_bytes):
            return EINVAL, lock_id
        if flags & Flag.QUECVT and (lock.gr, mode) not in _QUECVT_PAIRS and lock in place.resource.granted:
            return EINVAL, lock_id
        if flags & VALBLK and lock.lvb is None:
            lock.lvb = bytes(lvb_bytes)
        self.callbacks.begin()
        rc = place.resource.convert(lock, op, mode, flags, lvb if lock.lvb is not None else None)
        return rc, lock_id

    def unlock(
        self, key: SessionKey, op: int, lock_id: int, flags: int, lvb: bytes | None
    ) -> tuple[int, int]:
        """Free a lock in whatever state it is; the completion is EUNLOCK."""
        place = self._own(key, lock_id)
        if place is None:
            return ENOENT, lock_id
        if flags & ~_UNLOCK_FLAGS or (lvb is not None and len(lvb) != place.space.lvb_bytes):
            return EINVAL, lock_id
        self.callbacks.begin()
        del self.locks[lock_id]
        place.resource.unlock(place.lock, op, flags, lvb)
        place.space.forget_if_empty(place.resource)
        return 0, lock_id

    def cancel(self, key: SessionKey, lock_id: int) -> tuple[int, int]:
        """Cancel what is pending on a lock: ECANCEL is cast for it, or nothing if a grant was faster."""
        place = self._own(key, lock_id)
        if place is None:
            return ENOENT, lock_id
        self.callbacks.begin()
        if not place.resource.cancel(place.lock):
            del self.locks[lock_id]
            place.space.forget_if_empty(place.resource)
        return 0, lock_id

    # ---- inside

    def _own(self, key: SessionKey, lock_id: int) -> Place | None:
        place = self.locks.get(lock_id)
        return place if place is not None and place.lock.session == key else None

    def _forget(self, resource: Resource, lock: Lock) -> None:
        resource.drop(lock)
        del self.locks[lock.id]

    def _refuse(self, key: SessionKey, op: int, code: str, message: str, **data: Any) -> None:
        self.callbacks.out.append(Refusal(key, op, code, message, data))

    def _depart(
        self, space: Space, gone: frozenset[SessionKey], *, failed: bool, always_invalid: bool
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
        self._purge(space, gone, always_invalid)
        if leavers:
            self._announce(space)
        if not space.in_state(SeatState.MEMBER, SeatState.ZOMBIE):
            # nobody is left to take over: the next to join reads all bitmaps that nobody holds
            space.seats.clear()
        self._settle(space)

    def _purge(self, space: Space, gone: frozenset[SessionKey], always_invalid: bool) -> None:
        """Remove all locks of `gone`, mark value blocks, then re-evaluate; resources in name order (dlm.md 6.4)."""
        touched = space.locks_by_resource(gone)
        for resource, locks in touched:
            for lock in locks:
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
