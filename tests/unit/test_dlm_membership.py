"""Slots, recovery events and the fates of sessions: what survivors hear and what the dead keep (dlm.md 3.3, 3.4)."""

from __future__ import annotations

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
from clustermd.dlm.modes import ECANCEL, EINVAL, ENOENT, EUNLOCK, Flag, Mode, StatusFlag

SPACE = "array"
A, B, C, D = (1, 11, 1), (2, 22, 1), (3, 33, 1), (4, 44, 1)
VALBLK = int(Flag.VALBLK)


class Story:
    """An engine with sessions on nodes 1 to 4; every call returns what it told, in order."""

    def __init__(self, *members: SessionKey, max_slots: int = 4) -> None:
        self.engine = Engine()
        self.max_slots = max_slots
        for key in (A, B, C, D):
            self.engine.open_session(key, f"node{key[0]}", "array", 100 + key[0])
        for key in members:
            self.join(key)

    def join(self, key: SessionKey, *, lvb_bytes: int = 64) -> list[Effect]:
        self.engine.join(key, 1, SPACE, lvb_bytes, self.max_slots)
        return self.engine.take_effects()

    def leave(self, key: SessionKey) -> list[Effect]:
        assert self.engine.leave(key, SPACE) == 0
        return self.engine.take_effects()

    def lose(self, *keys: SessionKey) -> list[Effect]:
        self.engine.lose_sessions(keys)
        return self.engine.take_effects()

    def end(self, *keys: SessionKey, clean: bool = False, node_died: bool = False) -> list[Effect]:
        self.engine.end_sessions(keys, clean=clean, node_died=node_died)
        return self.engine.take_effects()

    def recovered(self, key: SessionKey, slot: int, generation: int | None = None) -> list[Effect]:
        known = self.engine.spaces[SPACE].generation if generation is None else generation
        assert self.engine.recovered(key, SPACE, slot, known) == 0
        return self.engine.take_effects()

    def lock(
        self, key: SessionKey, mode: Mode, flags: int = 0, name: bytes = b"bitmap0000"
    ) -> tuple[int, list[Effect]]:
        rc, lock = self.engine.request(key, 5, SPACE, name, int(mode), flags, True)
        assert rc == 0
        return lock, self.engine.take_effects()

    def slots(self) -> dict[int, str]:
        return {
            slot: f"node{seat.node} {seat.state.value}"
            for slot, seat in self.engine.spaces[SPACE].seats.items()
        }


def who(effects: list[Effect], session: SessionKey) -> list[str]:
    """The recovery events of one session as words."""
    words = []
    for effect in effects:
        if effect.session != session:
            continue
        match effect:
            case RecoverPrep():
                words.append("prep")
            case RecoverSlot(slot=slot):
                words.append(f"slot {slot}")
            case RecoverDone(slots=slots, our_slot=ours):
                words.append(f"done {[slot for slot, _, _ in slots]} ours {ours}")
    return words


def casts(effects: list[Effect]) -> list[tuple[int, int, int]]:
    return [(cast.lock, cast.status, cast.mode) for cast in effects if isinstance(cast, Cast)]


def test_joiners_get_the_lowest_slots_and_everybody_is_told() -> None:
    story = Story()
    assert who(story.join(B), B) == ["done [1] ours 1"]
    joined = story.join(A)
    assert who(joined, B) == ["prep", "done [1, 2] ours 1"]
    assert who(joined, A) == ["done [1, 2] ours 2"]
    assert [effect.generation for effect in joined if isinstance(effect, RecoverDone)] == [2, 2]


def test_a_clean_leaver_causes_no_recover_slot_and_frees_its_slot_and_locks() -> None:
    story = Story(A, B, C)
    held, _ = story.lock(A, Mode.EX)
    waiting, _ = story.lock(B, Mode.PR)
    left = story.leave(A)
    assert who(left, B) == ["prep", "done [2, 3] ours 2"]
    assert casts(left) == [(held, EUNLOCK, -1), (waiting, 0, Mode.PR)]
    assert who(story.join(D), D) == ["done [1, 2, 3] ours 1"]


def test_a_lost_session_keeps_what_it_holds_until_its_end_is_proved() -> None:
    story = Story(A, B, C)
    held, _ = story.lock(A, Mode.PW, VALBLK)
    waiting, told = story.lock(B, Mode.PR, VALBLK)
    assert [effect.session for effect in told if isinstance(effect, Bast)] == [A]
    assert casts(story.lose(A)) == []
    _, told = story.lock(C, Mode.EX)
    assert not [effect for effect in told if isinstance(effect, Bast)], "basts to zombies help nobody"
    ended = story.end(A)
    assert who(ended, B) == ["prep", "slot 1", "done [2, 3] ours 2"]
    assert who(ended, C) == ["prep", "slot 1", "done [2, 3] ours 3"]
    assert held not in story.engine.locks
    assert casts(ended) == [(waiting, 0, Mode.PR)]
    kinds = [type(effect).__name__ for effect in ended if effect.session == B]
    assert kinds == ["RecoverPrep", "RecoverSlot", "Cast", "Bast", "RecoverDone"]


def test_what_a_lost_session_awaits_is_removed_at_once() -> None:
    story = Story(A, B, C)
    first, _ = story.lock(A, Mode.PR)
    converter, _ = story.lock(B, Mode.PR)
    assert story.engine.convert(B, 6, converter, Mode.EX, 0, None)[0] == 0
    story.engine.take_effects()
    request, _ = story.lock(B, Mode.EX)
    behind, _ = story.lock(C, Mode.CR)
    assert casts(story.lose(B)) == [(behind, 0, Mode.CR)]
    assert request not in story.engine.locks
    resource = story.engine.locks[converter].resource
    assert {lock.id: lock.gr for lock in resource.granted} == {first: 3, converter: 3, behind: 1}


def test_a_dead_process_leaves_its_value_invalid_also_without_valblk() -> None:
    story = Story(A, B)
    writer, _ = story.lock(B, Mode.EX, VALBLK)
    story.engine.convert(B, 6, writer, Mode.NL, VALBLK, b"v" * 64)
    story.lock(A, Mode.EX)
    waiting, _ = story.lock(B, Mode.PR, VALBLK)
    story.lose(A)
    granted = [cast for cast in story.end(A) if isinstance(cast, Cast)]
    assert [(cast.lock, cast.sb_flags) for cast in granted] == [(waiting, StatusFlag.VALNOTVALID)]
    assert granted[0].lvb == b"v" * 64, "the content behind the mark is the last that was written"


def test_a_dead_node_invalidates_only_what_it_held_with_valblk() -> None:
    for flags, mark in ((0, 0), (VALBLK, StatusFlag.VALNOTVALID)):
        story = Story(A, B)
        writer, _ = story.lock(B, Mode.EX, VALBLK)
        story.engine.convert(B, 6, writer, Mode.NL, VALBLK, b"v" * 64)
        story.lock(A, Mode.PW, flags)
        story.lock(B, Mode.PR, VALBLK)
        story.lose(A)
        granted = [cast for cast in story.end(A, node_died=True) if isinstance(cast, Cast)]
        assert [cast.sb_flags for cast in granted] == [mark]


def test_too_many_nodes_is_for_living_members_only() -> None:
    story = Story(A, B, max_slots=2)
    refused = story.join(C)
    assert [(effect.code, effect.data["slots"]) for effect in refused if isinstance(effect, Refusal)] == [
        ("too-many-nodes", 2)
    ]
    story.lose(B)
    waits = [effect for effect in story.join(C) if isinstance(effect, JoinWaits)]
    assert [effect.holders for effect in waits] == [((2, 2, "node2", "zombie"),)]
    ended = story.end(B)
    assert [effect.holders for effect in ended if isinstance(effect, JoinWaits)] == [
        ((2, 2, "node2", "recovering"),)
    ], "the slot stays taken until its bitmap was taken over"
    assert who(story.recovered(A, 2), C) == ["done [1, 2] ours 2"]


def test_a_waiting_joiner_is_refused_when_the_living_fill_the_slots() -> None:
    story = Story(A, B, max_slots=2)
    story.lose(B)
    story.join(C)
    story.join(D)
    story.end(B)
    told = story.recovered(A, 2)
    assert who(told, C) == ["done [1, 2] ours 2"]
    assert [effect.session for effect in told if isinstance(effect, Refusal)] == [D]


def test_a_free_slot_is_used_before_one_that_must_be_waited_for() -> None:
    story = Story(A, B, max_slots=4)
    story.lose(A)
    assert who(story.join(C), C) == ["done [1, 2, 3] ours 3"]
    story.end(A)
    assert who(story.join(D), D) == ["done [2, 3, 4] ours 4"]
    assert story.slots()[1] == "node1 recovering"


def test_a_takeover_that_died_with_its_taker_is_announced_to_the_others() -> None:
    story = Story(A, B)
    story.end(A)
    story.join(C)
    assert who(story.end(B), C) == ["prep", "slot 1", "slot 2", "done [3] ours 3"]


def test_a_takeover_that_a_leaver_did_not_finish_is_announced_to_the_others() -> None:
    story = Story(A, B)
    story.end(A)
    story.join(C)
    assert who(story.leave(B), C) == ["prep", "slot 1", "done [3] ours 3"]


def test_who_comes_back_is_told_again_of_takeovers_it_has_forgotten() -> None:
    story = Story(A, B, C)
    story.end(A)
    story.leave(B)
    story.join(B)
    assert who(story.leave(C), B) == ["prep", "slot 1", "done [2] ours 2"]


def test_unfinished_takeovers_end_when_nobody_is_left_to_finish_them() -> None:
    story = Story(A, B)
    story.end(A)
    story.lose(B)
    assert who(story.join(C), C) == ["done [2, 3] ours 3"], "what B may still be writing keeps slot 1 taken"
    story.leave(C)
    story.end(B)
    assert SPACE not in story.engine.spaces
    assert who(story.join(D), D) == ["done [1] ours 1"]


def test_an_old_recovered_does_not_free_a_slot_that_failed_again() -> None:
    story = Story(A, B, C)
    story.end(A)
    known_to_b = story.engine.spaces[SPACE].generation
    story.recovered(C, 1)
    story.join(D)
    assert story.slots()[1] == "node4 member"
    story.end(D)
    story.recovered(B, 1, generation=known_to_b)
    assert story.slots()[1] == "node4 recovering"
    story.recovered(B, 1)
    assert 1 not in story.slots()


def test_sessions_of_a_dead_node_are_one_recovery() -> None:
    story = Story(A, B, C)
    other = (1, 11, 2)
    story.engine.open_session(other, "node1", "lock", 7)
    story.join(other)
    story.lose(A, other)
    assert who(story.end(A, other, node_died=True), B) == ["prep", "slot 1", "slot 4", "done [2, 3] ours 2"]


def test_value_block_sizes_must_agree() -> None:
    story = Story(A)
    refused = [effect for effect in story.join(B, lvb_bytes=32) if isinstance(effect, Refusal)]
    assert [effect.code for effect in refused] == ["value-block-size"]


def test_leaving_while_waiting_to_join_ends_the_wait() -> None:
    story = Story(A, max_slots=1)
    story.lose(A)
    story.join(B)
    assert [effect.code for effect in story.leave(B) if isinstance(effect, Refusal)] == ["left"]
    assert story.end(A) == []
    assert SPACE not in story.engine.spaces


def test_bad_operations_are_answered_and_change_nothing() -> None:
    story = Story(A, B)
    lock, told = story.lock(A, Mode.NL, int(Flag.EXPEDITE))
    assert isinstance(told[0], Answer)
    engine = story.engine
    assert engine.request(C, 1, SPACE, b"x", 0, 0, False)[0] == ENOENT, "not a member"
    assert engine.request(A, 1, "other", b"x", 0, 0, False)[0] == ENOENT
    assert engine.request(A, 1, SPACE, b"x" * 65, 0, 0, False)[0] == EINVAL
    assert engine.request(A, 1, SPACE, b"x", 3, int(Flag.EXPEDITE), False)[0] == EINVAL
    assert engine.request(A, 1, SPACE, b"x", 3, int(Flag.QUECVT), False)[0] == EINVAL
    assert engine.request(A, 1, SPACE, b"x", 3, 1 << 25, False)[0] == EINVAL, "a flag nobody knows"
    assert engine.convert(B, 1, lock, 3, 0, None)[0] == ENOENT, "somebody else's lock"
    assert engine.convert(A, 1, lock, 0, int(Flag.QUECVT), None)[0] == EINVAL, "NL to NL with QUECVT"
    assert engine.convert(A, 1, lock, 3, int(Flag.CONVDEADLK | Flag.NOQUEUE), None)[0] == EINVAL
    assert engine.convert(A, 1, lock, 3, VALBLK, b"short")[0] == EINVAL
    assert engine.unlock(A, 1, lock, int(Flag.NOQUEUE), None)[0] == EINVAL
    assert engine.cancel(A, lock + 1)[0] == ENOENT
    assert engine.take_effects() == []


def test_a_repeated_cancel_answers_0_and_says_nothing() -> None:
    story = Story(A, B)
    story.lock(A, Mode.EX)
    lock, _ = story.lock(B, Mode.EX)
    engine = story.engine
    assert engine.cancel(B, lock) == (0, lock)
    assert casts(engine.take_effects()) == [(lock, ECANCEL, -1)]
    held, _ = story.lock(B, Mode.NL)
    assert engine.cancel(B, held) == engine.cancel(B, held) == (0, held)
    assert engine.take_effects() == []


def test_lock_ids_are_never_used_again() -> None:
    story = Story(A)
    seen = set()
    for _ in range(5):
        lock, _ = story.lock(A, Mode.EX)
        assert lock not in seen
        seen.add(lock)
        story.engine.unlock(A, 6, lock, int(Flag.FORCEUNLOCK), None)
        story.engine.take_effects()
