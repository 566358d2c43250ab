"""Slots, and what the members of a lockspace are told when one of them is gone (dlm.md 3.3, 6.9 I9, I25)."""

from __future__ import annotations

from dataclasses import dataclass, field

from clustermd.dlm.effects import Effect, RecoverDone, RecoverPrep, RecoverSlot, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.testing.locks.ledger import Input, Ledger, Seats
from clustermd.testing.locks.rules import LockRuleBroken


@dataclass(slots=True)
class Membership:
    """The rules of slots and of recovery callbacks. `open` are the sessions between prep and done."""

    ledger: Ledger
    open: set[tuple[SessionKey, str]] = field(default_factory=set)
    generations: dict[tuple[SessionKey, str], int] = field(default_factory=dict)

    def clone(self, ledger: Ledger) -> Membership:
        return Membership(ledger, set(self.open), dict(self.generations))

    def told(self, effect: Effect) -> None:
        """Prep, then a slot for each failed one, then done with a new generation; a joiner hears done first."""
        match effect:
            case RecoverPrep(session, space):
                if (session, space) not in self.generations or (session, space) in self.open:
                    raise LockRuleBroken("recovery-order", f"{effect} to a session that cannot expect it")
                self.open.add((session, space))
            case RecoverSlot(session, space):
                if (session, space) not in self.open:
                    raise LockRuleBroken("recovery-order", f"{effect} without prep")
            case RecoverDone(session, space, _, _, generation):
                known = self.generations.get((session, space))
                if known is not None and ((session, space) not in self.open or generation <= known):
                    raise LockRuleBroken("recovery-order", f"{effect} after generation {known}")
                self.open.discard((session, space))
                self.generations[session, space] = generation

    def after(self, call: Input, engine: Engine) -> None:
        """Compare the seats with what they were, and what the members heard."""
        if self.open:
            raise LockRuleBroken("recovery-order", f"{sorted(self.open)} were told of a recovery without end")
        now: dict[str, Seats] = {}
        for name, space in engine.spaces.items():
            if space.empty:
                raise LockRuleBroken("left-over", f"lockspace {name} has nobody in it")
            now[name] = Seats({slot: (seat.session, seat.state.value) for slot, seat in space.seats.items()})
            if now[name] != self.ledger.seats.get(name):
                self._seats(call, engine, name, self.ledger.seats.get(name, Seats()), now[name])
        for name, was in self.ledger.seats.items():
            if call.purges and (not call.space or call.space == name):
                self._departed(call, name, was.seats, now.get(name, Seats()).seats)
        for key in [key for key in self.generations if call.purges and key[0] in call.keys]:
            if not call.space or key[1] == call.space:
                del self.generations[key]
        self.ledger.seats = now

    def _seats(self, call: Input, engine: Engine, name: str, was: Seats, now: Seats) -> None:
        sessions = [session for session, state in now.seats.values() if state != "recovering"]
        if len(set(sessions)) != len(sessions):
            raise LockRuleBroken("slot", f"a session has two slots of {name}: {now}")
        for slot, (session, state) in now.seats.items():
            known = engine.sessions.get(session)
            right = {
                "member": known is not None and not known.lost,
                "zombie": known is not None and known.lost,
                "recovering": known is None,
            }
            if not right[state] or engine.spaces[name].seats[slot].slot != slot:
                raise LockRuleBroken("slot", f"slot {slot} of {name} is {state}, which {session} is not")
            if slot not in was.seats and any(lower not in now.seats for lower in range(1, slot)):
                raise LockRuleBroken("slot", f"{session} got slot {slot} of {name}, but a lower one is free")
        for slot, before in was.seats.items():
            after = now.seats.get(slot)
            if (after is None or after[0] != before[0]) and not _given_up(call, *before, engine):
                raise LockRuleBroken("slot", f"slot {slot} of {name} went from {before} to {after}")

    def _departed(
        self,
        call: Input,
        name: str,
        was: dict[int, tuple[SessionKey, str]],
        now: dict[int, tuple[SessionKey, str]],
    ) -> None:
        gone = {
            slot for slot, (session, state) in was.items() if session in call.keys and state != "recovering"
        }
        if not gone:
            return
        failed = gone if call.word == "end_sessions" and not call.node_left else set()
        for session, state in was.values():
            if state != "member" or session in call.keys or (session, "member") not in now.values():
                continue
            heard = [
                effect
                for effect in call.effects
                if isinstance(effect, (RecoverPrep, RecoverSlot, RecoverDone))
                and effect.session == session
                and effect.space == name
            ]
            slots = {effect.slot for effect in heard if isinstance(effect, RecoverSlot)}
            if not heard or not failed <= slots or slots & (gone - failed):
                raise LockRuleBroken(
                    "recovery-order", f"{session} heard {heard} when slots {sorted(gone)} of {name} were left"
                )


def _given_up(call: Input, session: SessionKey, state: str, engine: Engine) -> bool:
    """Whether a slot came free by this input: its holder ended, or its takeover is over or nobody is left."""
    if state == "recovering":
        return call.word == "recovered" or call.purges
    return call.purges and (session in call.keys or session not in engine.sessions)
