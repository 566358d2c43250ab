"""Every rule of the lock manager can fire: a flaw planted in one method breaks exactly that rule in a seeded storm.

A plant replaces one method of the engine or the replica. The storms of the first seeds must pass without it, and with
it the first storm that fails must name the rule. Then what a storm is: deterministic, replayable, and made shorter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from clustermd.dlm import deadlock, replica, resource, snapshot
from clustermd.dlm.deadlock import Waits
from clustermd.dlm.effects import Bast
from clustermd.dlm.engine import Engine
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import ECANCEL, EUNLOCK, Flag, Mode, StatusFlag
from clustermd.dlm.orphans import Orphans
from clustermd.dlm.replica import Replica
from clustermd.dlm.resource import Lock, Resource
from clustermd.dlm.shown import AT_ONCE, Shown
from clustermd.dlm.space import SeatState, Space
from clustermd.errors import BadBytes
from clustermd.group.process_group import Member
from clustermd.testing.locks import order
from clustermd.testing.locks.invariants import Checker
from clustermd.testing.locks.order import MemoryGroup
from clustermd.testing.locks.replicas import Cluster
from clustermd.testing.locks.rules import RULES, LockRuleBroken
from clustermd.testing.locks.storm import replay, run, shrink
from clustermd.testing.trace.events import Layer

SEEDS = 300
Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
PLANTS: list[tuple[str, Plant]] = []

STORIES: dict[str, list[list[Any]]] = {
    # a node is cut off, hears its own request for EX alone, and another one gets EX
    "the_group_says_stable_what_is_not": [
        ["begin", 3, 65536, False],
        ["send", 1, 0, "request", 0, 5, 0, True],
        ["cut", 1, 1],
        ["alone", 0],
        ["settle"],
        ["send", 2, 0, "request", 0, 5, 0, True],
        ["settle"],
    ],
    # the PR holder goes down to CR: that is enough for the second conversion, not for the first
    "a_conversion_passes_the_head": [
        ["begin", 3, 65536, True],
        ["send", 1, 0, "request", 0, 3, 0, True],
        ["send", 2, 0, "request", 0, 0, 1024, True],
        ["send", 3, 0, "request", 0, 0, 1024, True],
        ["settle"],
        ["send", 2, 0, "convert", 0, 5, 0, 1],
        ["settle"],
        ["send", 3, 0, "convert", 0, 2, 0, 1],
        ["settle"],
        ["send", 1, 0, "convert", 0, 1, 0, 1],
        ["settle"],
    ],
    # each waits for the other, but one of them said that it goes on meanwhile
    "a_patient_request_is_the_victim": [
        ["begin", 2, 65536, True, 256],
        ["send", 1, 0, "request", 0, 5, 0, False],
        ["send", 2, 0, "request", 1, 5, 0, False],
        ["settle"],
        ["send", 1, 0, "request", 1, 5, 0, False],
        ["settle"],
        ["send", 2, 0, "request", 0, 5, 256, False],
        ["settle"],
    ],
    # EX was left behind, PR is asked for
    "an_orphan_is_given_away_in_another_mode": [
        ["begin", 2, 65536, True],
        ["send", 1, 0, "request", 0, 5, 128, False],
        ["settle"],
        ["closed", 1, 0],
        ["client", 1],
        ["settle"],
        ["send", 1, 0, "adopt", 3, 3, 16384, False],
        ["settle"],
    ],
}
"""What happens too rarely for the first seeds, step by step."""


def plants(rule: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        PLANTS.append((rule, plant))
        return plant

    return add


@plants("excluding-modes-granted")
def conflicts_are_not_seen(patch: Patch) -> None:
    patch.setattr(resource, "_conflict", lambda queue, lock: False)


@plants("rise-not-held-back")
def rights_are_shown_before_they_are_stable(patch: Patch) -> None:
    really = Shown.put
    patch.setattr(Shown, "put", lambda self, number, after, frame: really(self, number, AT_ONCE, frame))


@plants("excluding-modes-shown")
def the_group_says_stable_what_is_not(patch: Patch) -> None:
    really = order._message
    patch.setattr(order, "_message", lambda *args, **_: really(*args, stable=True))


@plants("replicas-differ")
def an_order_that_nobody_promised(patch: Patch) -> None:
    really, turns = Space.members, itertools.count()
    patch.setattr(Space, "members", lambda self: really(self)[:: 1 if next(turns) % 7 else -1])


@plants("applied-while-frozen")
def what_is_delivered_is_applied(patch: Patch) -> None:
    def entry(self: Replica, entry: bytes) -> None:
        if self._has_state:
            self._apply(entry)

    patch.setattr(Replica, "_entry", entry)


@plants("rise-not-held-back")
def every_conversion_counts_as_down(patch: Patch) -> None:
    patch.setattr(resource, "is_down_conversion", lambda granted, requested: True)


@plants("lock-vanished")
def a_lost_session_loses_its_locks_at_once(patch: Patch) -> None:
    really = Engine.lose_sessions

    def lose(self: Engine, keys: Any) -> None:
        lost = list(keys)
        really(self, lost)
        for place in list(self.locks.values()):
            if place.lock.session in lost:
                self._forget(place.resource, place.lock)
                place.resource.pend()
                place.space.forget_if_empty(place.resource)

    patch.setattr(Engine, "lose_sessions", lose)


@plants("slot")
def a_lost_session_loses_its_slot_at_once(patch: Patch) -> None:
    really = Engine.lose_sessions

    def lose(self: Engine, keys: Any) -> None:
        lost = list(keys)
        really(self, lost)
        for space in self.spaces.values():
            for slot in [slot for slot, seat in space.seats.items() if seat.session in lost]:
                del space.seats[slot]

    patch.setattr(Engine, "lose_sessions", lose)


@plants("zombie-granted")
def a_lost_session_waits_on(patch: Patch) -> None:
    def lose(self: Engine, keys: Any) -> None:
        lost = [key for key in keys if self.alive(key)]
        for key in lost:
            self.sessions[key].lost = True
        for space in self.spaces.values():
            space.joiners = [joiner for joiner in space.joiners if joiner.session not in lost]
            for seat in space.members():
                if seat.session in lost:
                    seat.state = SeatState.ZOMBIE
        for name in sorted(self.spaces):
            self._settle(self.spaces[name])

    patch.setattr(Engine, "lose_sessions", lose)


@plants("epoch-not-new")
def an_epoch_comes_twice(patch: Patch) -> None:
    really = replica.plan_install

    def plan(*args: Any) -> Any:
        plan = really(*args)
        return plan if isinstance(plan, str) else dataclasses.replace(plan, epoch=plan.epoch - 1)

    patch.setattr(replica, "plan_install", plan)


@plants("slot")
def slots_only_grow(patch: Patch) -> None:
    patch.setattr(Space, "free_slot", lambda self, limit: max(self.seats, default=0) + 1)


@plants("one-queue")
def a_cancelled_conversion_stays_queued(patch: Patch) -> None:
    patch.setattr(Resource, "revert", lambda self, lock: self._add_granted(lock))


@plants("lock-id-again")
def ids_are_used_again(patch: Patch) -> None:
    really = Engine.request

    def request(self: Engine, *args: Any) -> Any:
        self.next_lock = next(number for number in itertools.count(1) if number not in self.locks)
        return really(self, *args)

    patch.setattr(Engine, "request", request)


@plants("waiting-order")
def who_comes_last_is_served_first(patch: Patch) -> None:
    really = Resource._enqueue

    def enqueue(self: Resource, queue: list[Lock], lock: Lock) -> None:
        really(self, queue, lock)
        if queue is self.waiting and not lock.fl & Flag.HEADQUE:
            queue.insert(0, queue.pop())

    patch.setattr(Resource, "_enqueue", enqueue)


@plants("waiting-order")
def a_request_passes_who_waits(patch: Patch) -> None:
    really = Resource._can_grant

    def can_grant(self: Resource, lock: Lock, *, now: bool) -> bool:
        if now and lock.gr == Mode.IV and not lock.fl & Flag.EXPEDITE:
            return not resource._conflict([*self.granted, *self.converting], lock)
        return really(self, lock, now=now)

    patch.setattr(Resource, "_can_grant", can_grant)


@plants("converting-order")
def a_conversion_passes_the_head(patch: Patch) -> None:
    really = Resource._can_grant

    def can_grant(self: Resource, lock: Lock, *, now: bool) -> bool:
        if not now and lock.gr != Mode.IV:
            return not resource._conflict([*self.granted, *self.converting], lock)
        return really(self, lock, now=now)

    patch.setattr(Resource, "_can_grant", can_grant)


@plants("missed-grant")
def nobody_looks_at_the_queue(patch: Patch) -> None:
    patch.setattr(Resource, "_grant_waiting", lambda self, high, cw_blocked: (Mode.EX, cw_blocked))


@plants("down-conversion-waits")
def down_conversions_queue(patch: Patch) -> None:
    really = Resource._can_grant
    patch.setattr(
        Resource,
        "_can_grant",
        lambda self, lock, *, now: not (now and 0 <= lock.rq < lock.gr - 2) and really(self, lock, now=now),
    )


@plants("noqueue-waits")
def noqueue_is_forgotten(patch: Patch) -> None:
    really = Resource.request

    def request(self: Resource, lock: Lock) -> bool:
        flags, lock.fl = lock.fl, lock.fl & ~Flag.NOQUEUE
        granted = really(self, lock)
        lock.fl = flags
        return granted

    patch.setattr(Resource, "request", request)


@plants("conversion-deadlock")
def a_deadlock_is_not_seen(patch: Patch) -> None:
    patch.setattr(Resource, "_deadlocked", lambda self, lock: False)


@plants("conversion-deadlock deadlock")
def a_deadlock_is_seen_where_none_is(patch: Patch) -> None:
    patch.setattr(Resource, "_deadlocked", lambda self, lock: not lock.fl & Flag.CONVDEADLK)


@plants("deadlock")
def a_circle_is_not_seen(patch: Patch) -> None:
    patch.setattr(Waits, "close_a_circle", lambda self, lock: False)


@plants("deadlock")
def a_circle_is_seen_where_none_is(patch: Patch) -> None:
    patch.setattr(Waits, "close_a_circle", lambda self, lock: not lock.fl & Flag.NODLCKWT)


@plants("deadlock")
def a_patient_request_is_the_victim(patch: Patch) -> None:
    patch.setattr(deadlock, "NODLCKWT", 0)


@plants("orphan")
def an_orphan_is_given_away_in_another_mode(patch: Patch) -> None:
    really = Orphans.find

    def find(self: Orphans, owner: Any, name: bytes, mode: int) -> Any:
        found = (really(self, owner, name, other) for other in Mode)
        return next(
            (orphan for orphan in found if not isinstance(orphan, int)), really(self, owner, name, mode)
        )

    patch.setattr(Orphans, "find", find)


@plants("orphan")
def a_purge_forgets_the_process(patch: Patch) -> None:
    really = Orphans.of_process
    patch.setattr(Orphans, "of_process", lambda self, owners, pid: really(self, owners, pid)[1:])


@plants("completion-twice")
def a_grant_is_told_twice(patch: Patch) -> None:
    really = Resource._cast

    def cast(self: Resource, lock: Lock, status: int, *, rising: bool = False) -> None:
        really(self, lock, status, rising=rising)
        if status == 0 and lock.gr == Mode.PW:
            really(self, lock, status, rising=rising)

    patch.setattr(Resource, "_cast", cast)


@plants("callback-after-end")
def a_bast_after_the_unlock(patch: Patch) -> None:
    really = Resource.unlock

    def unlock(self: Resource, lock: Lock, *args: Any) -> None:
        really(self, lock, *args)
        self.callbacks.out.append(Bast(lock.session, lock.id, Mode.EX))

    patch.setattr(Resource, "unlock", unlock)


@plants("callback-order")
def what_waits_is_overtaken(patch: Patch) -> None:
    def put(self: Shown, number: int, after: int, frame: Any) -> None:
        if self.listens(number):
            self._clients[number].queue.appendleft((after, frame))
            self._flush(number)

    patch.setattr(Shown, "put", put)


@plants("callback-needless")
def everybody_is_told(patch: Patch) -> None:
    def bast_blockers(self: Resource, lock: Lock, queue: list[Lock]) -> None:
        for holder in queue:
            self.callbacks.out.append(Bast(holder.session, holder.id, lock.rq))

    patch.setattr(Resource, "_bast_blockers", bast_blockers)


@plants("holder-not-told")
def nobody_is_told_when_somebody_queues(patch: Patch) -> None:
    patch.setattr(Resource, "_bast_blockers", lambda self, lock, queue: None)


@plants("holder-not-told")
def a_new_holder_is_not_told_of_those_behind(patch: Patch) -> None:
    really = Resource.pend

    def pend(self: Resource) -> None:
        out = self.callbacks.out
        place = len(out)
        really(self)
        out[place:] = [effect for effect in out[place:] if not isinstance(effect, Bast)]

    patch.setattr(Resource, "pend", pend)


@plants("status")
def a_status_flag_that_means_nothing(patch: Patch) -> None:
    really = Resource._cast

    def cast(self: Resource, lock: Lock, status: int, *, rising: bool = False) -> None:
        if status == 0:
            lock.sb |= StatusFlag.ALTMODE
        really(self, lock, status, rising=rising)

    patch.setattr(Resource, "_cast", cast)


@plants("value-read")
def a_reader_gets_an_old_value(patch: Patch) -> None:
    really = Resource._transfer_lvb

    def transfer(self: Resource, lock: Lock) -> None:
        mine, reads = lock.lvb, resource.LVB_DIRECTION[lock.gr][lock.rq] == "r"
        really(self, lock)
        if reads:
            lock.lvb = mine

    patch.setattr(Resource, "_transfer_lvb", transfer)


@plants("value-changed")
def a_write_that_is_not_counted(patch: Patch) -> None:
    really = Resource._write_lvb

    def write(self: Resource, lock: Lock) -> None:
        really(self, lock)
        self.lvb_seq -= 1

    patch.setattr(Resource, "_write_lvb", write)


@plants("value-changed value-read")
def a_reader_writes(patch: Patch) -> None:
    really = Resource.unlock

    def unlock(self: Resource, lock: Lock, op: int, flags: int) -> None:
        if lock.gr == Mode.PR and lock.lvb is not None:
            self._write_lvb(lock)
        really(self, lock, op, flags)

    patch.setattr(Resource, "unlock", unlock)


@plants("value-mark")
def a_writer_dies_and_the_value_stays_valid(patch: Patch) -> None:
    really = Engine._purge
    patch.setattr(Engine, "_purge", lambda self, space, gone, _, left: really(self, space, gone, False, left))


@plants("completion-lost")
def a_cancelled_conversion_is_never_told(patch: Patch) -> None:
    really = Resource._cast

    def cast(self: Resource, lock: Lock, status: int, *, rising: bool = False) -> None:
        if status != ECANCEL or lock.gr == Mode.IV:
            really(self, lock, status, rising=rising)

    patch.setattr(Resource, "_cast", cast)


@plants("completion-lost")
def the_last_word_to_a_client_is_lost(patch: Patch) -> None:
    really = Shown.put

    def put(self: Shown, number: int, after: int, frame: Any) -> None:
        if frame[0] != "cast" or frame[3] != EUNLOCK:
            really(self, number, after, frame)
        elif number in self._clients:
            self._clients[number].queue.append((1 << 61, frame))  # it waits for a message that never comes

    patch.setattr(Shown, "put", put)


@plants("purged-unproved")
def who_is_lost_is_taken_for_dead(patch: Patch) -> None:
    really = Machine._install

    def install(self: Machine, *args: Any) -> None:
        really(self, *args)
        for node, incarnation in [key for key, state in self.nodes.items() if state.lost]:
            self._fenced(node, incarnation)

    patch.setattr(Machine, "_install", install)


@plants("snapshot-differs")
def a_snapshot_forgets_who_was_asked_to_let_go(patch: Patch) -> None:
    really = snapshot._load_lock

    def load(wire: list[Any]) -> Lock:
        lock = really(wire)
        lock.highbast = 0
        return lock

    patch.setattr(snapshot, "_load_lock", load)


@plants("applied-twice")
def whatever_comes_is_done(patch: Patch) -> None:
    really, turns = MemoryGroup.accept, itertools.count(1)

    def accept(self: MemoryGroup, member: Member) -> bool:
        sent = self.ports[member].sent
        if sent and next(turns) % 3 == 0:
            sent.insert(0, sent[0])
        return really(self, member)

    def ops(self: Machine, node: int, incarnation: int, first: int, ops: list[Any]) -> None:
        state = self.nodes[node, incarnation]
        for number, op in enumerate(ops, first):
            if number <= state.last_op + 1:
                state.last_op = max(state.last_op, number)
                self._op(state, (node, incarnation, op[0]), op[1:])

    patch.setattr(MemoryGroup, "accept", accept)
    patch.setattr(Machine, "_ops", ops)


@plants("recovery-order")
def a_recovery_has_no_end(patch: Patch) -> None:
    patch.setattr(Engine, "_announce", lambda self, space: None)


@plants("recovery-order")
def the_survivors_hear_of_no_slot(patch: Patch) -> None:
    really = Engine._depart

    def depart(self: Engine, space: Space, gone: Any, **how: Any) -> None:
        place = len(self.callbacks.out)
        really(self, space, gone, **how)
        out = self.callbacks.out
        out[place:] = [effect for effect in out[place:] if type(effect).__name__ != "RecoverSlot"]

    patch.setattr(Engine, "_depart", depart)


@plants("left-over")
def a_resource_without_locks_stays(patch: Patch) -> None:
    patch.setattr(Space, "forget_if_empty", lambda self, resource: None)


@plants("must-restart")
def who_is_behind_is_sent_away(patch: Patch) -> None:
    def catch_up(self: Replica, whole: bytes) -> None:
        raise BadBytes("other-history", "nobody may be behind")

    patch.setattr(Replica, "_catch_up", catch_up)


@plants("never-quiet")
def every_message_is_answered(patch: Patch) -> None:
    really = Replica.on_message

    def on_message(self: Replica, index: int, sender: Any, payload: bytes) -> None:
        really(self, index, sender, payload)
        if sender == self._group.me:  # type: ignore[union-attr]
            self._say_ack(0, b"")
            self._flush()

    patch.setattr(Replica, "on_message", on_message)
    patch.setattr(order, "ROUNDS_MAX", 500)


@plants("exception")
def the_engine_raises(patch: Patch) -> None:
    def cancel(self: Engine, key: Any, lock: int) -> Any:
        raise KeyError(lock)

    patch.setattr(Engine, "cancel", cancel)


@pytest.mark.parametrize(("rule", "plant"), PLANTS, ids=[plant.__name__ for _, plant in PLANTS])
def test_a_planted_flaw_breaks_its_rule(rule: str, plant: Plant, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    story = STORIES.get(plant.__name__)
    outcomes = (run(seed) for seed in range(SEEDS)) if story is None else iter([replay(story)])
    for outcome in outcomes:
        failure = outcome.failure
        if failure is not None:
            assert failure.rule in rule.split(), failure
            assert failure.spec == RULES[failure.rule]
            assert failure.layer is Layer.LOCK_MANAGER
            return
    pytest.fail(f"{SEEDS} storms passed")


def test_the_stories_pass_without_a_flaw() -> None:
    for name, story in STORIES.items():
        outcome = replay(story)
        assert outcome.failure is None, f"{name}: {outcome.report()}"


def test_every_rule_has_a_flaw_that_breaks_it() -> None:
    assert {rule for rule, _ in PLANTS if " " not in rule} == RULES.keys()


def test_storms_of_the_first_seeds_pass() -> None:
    for seed in range(60):
        outcome = run(seed)
        assert outcome.failure is None, outcome.report()


def test_a_storm_is_the_same_again_and_by_its_steps() -> None:
    for seed in range(8):
        first, second = run(seed), run(seed)
        assert first.steps == second.steps
        assert first.digest == second.digest
        recorded = json.loads(json.dumps(first.steps))
        assert replay(recorded).digest == first.digest


def test_a_storm_is_the_same_in_another_process() -> None:
    program = "from clustermd.testing.locks.storm import run\nprint([run(seed).digest for seed in range(12)])"
    answers = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4711")
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 12 * 32


def test_a_failing_storm_is_made_shorter_and_reported(monkeypatch: Patch) -> None:
    conflicts_are_not_seen(monkeypatch)
    outcome = next(outcome for seed in range(SEEDS) if (outcome := run(seed)).failure is not None)
    assert outcome.failure is not None
    short = shrink(outcome.steps, outcome.failure.rule)
    again = replay(short)
    assert again.failure is not None
    assert again.failure.rule == "excluding-modes-granted"
    assert len(short) < 12 < len(outcome.steps)
    report = outcome.report()
    assert f"seed {outcome.seed}" in report
    assert "layer: lock manager" in report
    assert "excluding-modes-granted (dlm.md 6.9 I1)" in report


def test_a_broken_rule_names_the_layer() -> None:
    broken = LockRuleBroken("missed-grant", "nobody looked")
    violation = broken.violation("node1", 1.5, (3, 4))
    assert (violation.layer, violation.rule, violation.spec) == (
        Layer.LOCK_MANAGER,
        "missed-grant",
        "dlm.md 6.9 I13",
    )
    assert isinstance(broken, AssertionError)


def test_a_checker_knows_what_the_engine_must_hand_out() -> None:
    engine = Engine()
    checker = Checker(engine)
    engine.open_session((1, 1, 1), "node1", "test", 1)
    engine.join((1, 1, 1), 1, "array", 8, 4)
    engine.request((1, 1, 1), 2, "array", b"token", Mode.EX, 0, True)
    effects = engine.take_effects()
    with pytest.raises(LockRuleBroken, match="callback-order"):
        checker.after(effects[:-1])


def test_a_separated_node_hears_its_own_messages_and_shows_no_right_by_them() -> None:
    cluster = Cluster(3, stable=False)
    cluster.settle()
    clients = [node.client() for node in cluster.nodes.values()]
    for client in clients:
        client.send("join", "array", 16, 4)
        cluster.settle()
        for member in cluster.nodes:
            cluster.group.tell_stable(member)
    a = clients[0]
    op = a.send("request", "array", b"token", int(Mode.EX), 0, True)
    cluster.cut(a.node, own=1)
    while cluster.group.deliver_alone(a.node.port):
        pass
    assert op not in a.done, "granted alone, shown to nobody"
    assert a.node.machine.engine.locks, "the message was heard"
    assert a.node.events[-1] == "suspended"
    b = clients[1]
    other = b.send("request", "array", b"token", int(Mode.EX), 0, True)
    cluster.settle()
    for member in cluster.nodes:
        cluster.group.tell_stable(member)
    assert other in b.done, "the others never heard of it"
