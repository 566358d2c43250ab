"""Transcripts of the lock engine: operations of named sessions, and every effect in the order it was generated.

Each session is the only client of a node that has its name. `A.token` is A's lock on resource `token`, `A.token/2`
another lock of A on it. Value blocks have eight bytes and are shown as text. After every operation the invariants
of the engine are checked (dlm.md 6.9).

    members A B C   join without many words
    join A [slots=4]                        leave A                recovered A slot=2 [generation=3]
    request A.token EX [FLAG ...] [nobast]  convert A.token PR [FLAG ...] [value=text]
    unlock A.token [FLAG ...] [value=text]  cancel A.token [EDEADLK | ETIMEDOUT]
    purge A node=1 [pid=1]
    lose A          its connection ended, its I/O may be in flight        end A        its process is proved dead
    fence A         its whole node is proved dead                         goodbye A    it ended cleanly
    deadlocks       before the first join: the lockspace looks for circles of waits
    queues [name]   what is in the three queues, and the value            slots
    compatibility, directions               tables, found by asking the engine
"""

from __future__ import annotations

from clustermd.dlm import modes
from clustermd.dlm.effects import (
    Answer,
    Bast,
    Cast,
    Effect,
    JoinWaits,
    RecoverDone,
    RecoverPrep,
    RecoverSlot,
    Refusal,
    SessionKey,
)
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import Flag, Mode, SpaceFlag, StatusFlag
from clustermd.dlm.orphans import NODE_SESSION, owner_of
from clustermd.dlm.resource import Lock, Resource
from clustermd.dlm.space import SeatState
from clustermd.testing.locks.invariants import Checker

SPACE = "array"
LVB_BYTES = 8
MODES = tuple(mode for mode in Mode if mode is not Mode.IV)
STATUS = {
    getattr(modes, word): word
    for word in ("EAGAIN", "EBUSY", "EINVAL", "ENOENT", "EDEADLK", "ETIMEDOUT", "ECANCEL", "EUNLOCK")
}


def key_of(session: str, life: int = 1, number: int = 1) -> SessionKey:
    return (ord(session) - ord("A") + 1, life, number)


def session_of(key: SessionKey) -> str:
    return chr(ord("A") + key[0] - 1)


def text_of(value: bytes) -> str:
    return '"' + value.rstrip(b"\0").decode("ascii") + '"'


def _options(words: tuple[str, ...]) -> tuple[int, bytes | None, bool]:
    """(flags, value block, blocking callback wanted) of the words behind an operation."""
    flags, value, bast = Flag.NONE, None, True
    for word in words:
        if word.startswith("value="):
            value = word.removeprefix("value=").encode().ljust(LVB_BYTES, b"\0")
        elif word == "nobast":
            bast = False
        else:
            flags |= Flag[word]
    return int(flags), value, bast


class LocksStory:
    """One lockspace."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.checker = Checker(self.engine)
        self.lives: dict[str, tuple[int, int]] = {}
        self.ids: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.flags = 0

    def begin(self) -> None: ...

    def close(self) -> None: ...

    # --- sessions

    def do_deadlocks(self) -> None:
        self.flags = int(SpaceFlag.DEADLOCKS)

    def do_members(self, *sessions: str) -> list[str]:
        for session in sessions:
            self.do_join(session)
        return self.do_slots()

    def do_join(self, session: str, slots: str = "slots=4") -> list[str]:
        key = self._key(session)
        if key not in self.engine.sessions:
            self.engine.open_session(key, session, "transcript", 1)
        self.engine.join(key, 1, SPACE, LVB_BYTES, int(slots.removeprefix("slots=")), self.flags)
        return self._told()

    def do_leave(self, session: str) -> list[str]:
        rc = self.engine.leave(self._key(session), SPACE)
        return self._told(session, rc)

    def do_recovered(self, session: str, slot: str, generation: str = "") -> list[str]:
        known = self.engine.spaces[SPACE].generation
        if generation:
            known = int(generation.removeprefix("generation="))
        rc = self.engine.recovered(self._key(session), SPACE, int(slot.removeprefix("slot=")), known)
        return self._told(session, rc)

    def do_lose(self, *sessions: str) -> list[str]:
        self.engine.lose_sessions([self._key(session) for session in sessions])
        return self._told()

    def do_end(self, session: str) -> list[str]:
        self.engine.end_sessions([self._dies(session)], clean=False)
        return self._told()

    def do_fence(self, session: str) -> list[str]:
        owner = owner_of(self._key(session))
        self.engine.end_sessions([self._dies(session, node=True), owner], clean=False, node_died=True)
        return self._told()

    def do_goodbye(self, session: str) -> list[str]:
        self.engine.end_sessions([self._dies(session)], clean=True)
        return self._told()

    # --- locks

    def do_request(self, name: str, mode: str, *words: str) -> list[str]:
        session, resource = name.split(".")
        flags, _, bast = _options(words)
        lock_id = self.engine.next_lock
        self.names[lock_id] = name
        rc, adopted = self.engine.request(
            self._key(session), 1, SPACE, resource.split("/")[0].encode(), Mode[mode], flags, bast
        )
        if rc == 0:
            self.ids[name] = adopted
            self.names[adopted] = name
        return self._told(name, rc)

    def do_convert(self, name: str, mode: str, *words: str) -> list[str]:
        flags, value, _ = _options(words)
        rc, _ = self.engine.convert(
            self._key(name[0]), 2, self.ids[name], Mode[mode], flags, self._buffer(name, value)
        )
        return self._told(name, rc)

    def do_unlock(self, name: str, *words: str) -> list[str]:
        flags, value, _ = _options(words)
        rc, _ = self.engine.unlock(self._key(name[0]), 3, self.ids[name], flags, self._buffer(name, value))
        return self._told(name, rc)

    def do_cancel(self, name: str, status: str = "ECANCEL") -> list[str]:
        rc, _ = self.engine.cancel(self._key(name[0]), self.ids[name], getattr(modes, status))
        return self._told(name, rc)

    def do_purge(self, session: str, node: str, pid: str = "pid=0") -> list[str]:
        numbers = int(node.removeprefix("node=")), int(pid.removeprefix("pid="))
        return self._told(session, self.engine.purge(self._key(session), SPACE, *numbers))

    # --- looking

    def do_queues(self, name: str = "") -> list[str]:
        lines = []
        space = self.engine.spaces.get(SPACE)
        resources = space.resources if space is not None else {}
        for resource_name in sorted(resources):
            if not name or resource_name == name.encode():
                lines += self._queues(resources[resource_name])
        return lines or ["no locks"]

    def do_slots(self) -> list[str]:
        space = self.engine.spaces.get(SPACE)
        if space is None:
            return ["the lockspace is gone"]
        lines = [
            f"slot {seat.slot}: {seat.name}, {seat.state}"
            + (f", told {' '.join(map(session_of, seat.told))}" if seat.state is SeatState.RECOVERING else "")
            for seat in space.in_state(*SeatState)
        ]
        return [*lines, *(f"waiting to join: {session_of(joiner.session)}" for joiner in space.joiners)]

    def do_compatibility(self) -> list[str]:
        """Which modes may be granted together: for each pair one lock is held, and the other asked for."""
        lines = ["held    " + "  ".join(mode.name for mode in MODES) + "   <- asked for"]
        for held in MODES:
            row = []
            for wanted in MODES:
                engine = _fresh()
                engine.request(key_of("A"), 1, SPACE, b"r", held, 0, True)
                engine.take_effects()
                engine.request(key_of("B"), 1, SPACE, b"r", wanted, int(Flag.NOQUEUE), True)
                row.append("Y " if _last_cast(engine).status == 0 else "- ")
            lines.append(f"  {held.name}    {'  '.join(row)}")
        return lines

    def do_directions(self) -> list[str]:
        """Which way the value block goes in a conversion: the resource says "old", the caller's buffer "new"."""
        lines = ["from \\ to  " + "  ".join(mode.name for mode in MODES)]
        valblk, old, new = int(Flag.VALBLK), b"old".ljust(LVB_BYTES, b"\0"), b"new".ljust(LVB_BYTES, b"\0")
        for held in (Mode.IV, *MODES):
            row = []
            for wanted in MODES:
                engine = _fresh()
                _, keeper = engine.request(key_of("A"), 1, SPACE, b"r", Mode.EX, valblk, True)
                engine.convert(key_of("A"), 1, keeper, Mode.NL, valblk, old)
                if held is Mode.IV:
                    engine.request(key_of("B"), 1, SPACE, b"r", wanted, valblk, True)
                else:
                    _, lock = engine.request(key_of("B"), 1, SPACE, b"r", held, valblk, True)
                    engine.convert(key_of("B"), 1, lock, wanted, valblk, new)
                written = engine.spaces[SPACE].resources[b"r"].lvb == new
                row.append("W " if written else "R " if _last_cast(engine).lvb == old else ". ")
            lines.append(f"  {'new' if held is Mode.IV else held.name:<9}{'  '.join(row)}")
        return lines

    # --- words

    def _key(self, session: str) -> SessionKey:
        return key_of(session, *self.lives.get(session, (1, 1)))

    def _dies(self, session: str, *, node: bool = False) -> SessionKey:
        """Its key; the next session of that name is another one, in another life of its node if that died too."""
        key = self._key(session)
        self.lives[session] = (key[1] + 1, 1) if node else (key[1], key[2] + 1)
        return key

    def _buffer(self, name: str, value: bytes | None) -> bytes | None:
        """What the caller has in its buffer: what it says now, or what it read or wrote last."""
        place = self.engine.locks.get(self.ids[name])
        return value if value is not None or place is None else place.lock.lvb

    def _told(self, name: str = "", rc: int = 0) -> list[str]:
        """The effects of the last operation; `name` is the lock it was about, or the session."""
        effects = self.engine.take_effects()
        self.checker.after(effects)
        lines = [line for effect in effects if (line := self._line(effect))]
        if rc:
            lines.append(f"{name}: refused with {STATUS[rc]}, nothing changed")
        place = self.engine.locks.get(self.ids.get(name, 0))
        if place is not None and not rc and place.lock not in place.resource.granted:
            keeps = "" if place.lock.gr < 0 else f"keeps {Mode(place.lock.gr).name} and "
            lines.append(f"({name} {keeps}waits for {Mode(place.lock.rq).name})")
        return lines

    def _line(self, effect: Effect) -> str:
        who = session_of(effect.session)
        match effect:
            case Answer(_, _, 0, _):
                return ""
            case Answer(_, _, rc, _):
                return f"{who}: {STATUS[rc]}"
            case Cast():
                return f"{self.names[effect.lock]}: {_outcome(effect)}"
            case Bast(_, lock, mode):
                return f"{self.names[lock]}: somebody wants {Mode(mode).name}"
            case RecoverPrep():
                return f"{who}: recover_prep"
            case RecoverSlot():
                return f"{who}: recover_slot {effect.slot} (was {effect.name})"
            case RecoverDone():
                slots = ", ".join(f"{slot} {name}" for slot, _, name in effect.slots)
                return f"{who}: recover_done, own slot {effect.our_slot}; {slots}; generation {effect.generation}"
            case JoinWaits():
                holders = ", ".join(
                    f"slot {slot} ({name}, {state})" for slot, _, name, state in effect.holders
                )
                return f"{who}: the join waits for {holders}"
            case Refusal():
                return f"{who}: refused with {effect.code}: {effect.message}"

    def _queues(self, resource: Resource) -> list[str]:
        value = (
            "never written" if resource.lvb is None else f"{text_of(resource.lvb)}, write {resource.lvb_seq}"
        )
        mark = ", not valid" if resource.invalid else ""
        lines = [f"{resource.name.decode()}: value {value}{mark}"]
        for word, queue in (
            ("granted", resource.granted),
            ("converting", resource.converting),
            ("waiting", resource.waiting),
        ):
            if queue:
                lines.append(f"  {word:<11}{', '.join(self._in_queue(word, lock) for lock in queue)}")
        return lines

    def _in_queue(self, word: str, lock: Lock) -> str:
        name = self.names[lock.id]
        who = name[0] + ("/" + name.split("/")[1] if "/" in name else "")
        if lock.session[2] == NODE_SESSION:
            who += " (left behind)"
        elif self.engine.sessions[lock.session].lost:
            who += " (lost)"
        held, wanted = Mode(lock.gr).name, Mode(lock.rq).name
        return f"{who} " + (
            held if word == "granted" else wanted if word == "waiting" else f"{held}→{wanted}"
        )


def _outcome(cast: Cast) -> str:
    status = STATUS.get(cast.status)
    if status == "EUNLOCK":
        return "freed"
    if status is not None:
        return f"{status}, " + ("there is no lock" if cast.mode < 0 else f"stays {Mode(cast.mode).name}")
    words = [f"{'adopted' if cast.adopted else 'granted'} {Mode(cast.mode).name}"]
    if cast.lvb is not None:
        words.append(f"value {text_of(cast.lvb)}")
    words += [flag.name for flag in StatusFlag if flag & cast.sb_flags and flag.name]
    return ", ".join(words)


def _fresh() -> Engine:
    engine = Engine()
    for session in "AB":
        engine.open_session(key_of(session), session, "table", 1)
        engine.join(key_of(session), 1, SPACE, LVB_BYTES, 4)
    engine.take_effects()
    return engine


def _last_cast(engine: Engine) -> Cast:
    return next(effect for effect in reversed(engine.take_effects()) if isinstance(effect, Cast))
