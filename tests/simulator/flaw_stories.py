"""Stories in which a flaw shows: small plans, directed faults, and who makes what more likely.

A scenario plays its plan over one seed's decisions after the other. As the code stands every one of them passes; with
the flaw put back one of the first `tries` must not. The plans hold few operations and one or two faults, so that a
run takes some hundredths of a second, and no scenario hangs on one particular seed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from clustermd.array.array import Array
from clustermd.array.slots import Slots
from clustermd.cluster import channel as channel_module
from clustermd.cluster import life as life_module
from clustermd.cluster.channel import Channel
from clustermd.cluster.messages import SlotBlock
from clustermd.dlm.modes import Mode
from clustermd.dlm.session import SessionLock
from clustermd.errors import LockRefused, Refused
from clustermd.testing.simulator.atlas import draw_plan
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.flaws import Patch, all_flaws, patched
from clustermd.testing.simulator.plan import Plan, Step
from clustermd.testing.simulator.run import Outcome, Run
from clustermd.testing.simulator.workload import draw_work

Faults = tuple[Step, ...]
Settings = Callable[[], tuple[Patch, ...]]


def at(at_s: float, what: str, **args: Any) -> Step:
    return Step(at_s, what, args)


def kill(at_s: float, node: int = 1, down_s: float = 2.0, detect_s: float = 0.002) -> Step:
    return at(at_s, "kill", node=node, down_s=down_s, detect_s=detect_s)


def kill_at(
    point: str, *, skip: int = 0, at_s: float = 0.0, down_s: float = 2.0, detect_s: float = 0.01
) -> Step:
    return at(at_s, "kill-at", point=point, skip=skip, down_s=down_s, detect_s=detect_s)


def stop(at_s: float, node: int = 1, down_s: float = 0.3, leave: bool = False) -> Step:
    return at(at_s, "stop", node=node, down_s=down_s, leave=leave)


def writes(
    region: int, *, begin_s: float, end_s: float, every_s: float, sectors: int = 8, place: int = -1
) -> list[Step]:
    """Writes to one region, one behind the other or all to the same `place`."""
    steps = []
    for number in range(round((end_s - begin_s) / every_s)):
        where = number * sectors % 64 if place < 0 else place
        steps.append(
            at(round(begin_s + number * every_s, 6), "write", region=region, at=where, sectors=sectors)
        )
    return steps


def reads(
    region: int, *, begin_s: float, end_s: float, every_s: float, sectors: int = 8, place: int = 0
) -> list[Step]:
    """Reads of one place by all nodes in turn."""
    count = round((end_s - begin_s) / every_s)
    return [
        at(
            round(begin_s + number * every_s, 6),
            "read",
            region=region,
            at=place,
            sectors=sectors,
            node=number,
        )
        for number in range(count)
    ]


def flushes(*, begin_s: float, end_s: float, every_s: float) -> list[Step]:
    count = round((end_s - begin_s) / every_s)
    return [at(round(begin_s + number * every_s, 6), "flush", node=number) for number in range(count)]


SMALL = Plan(
    nodes=2,
    slots=3,
    array_sectors=1024,
    chunk_bytes=8192,
    late_s=(0.001, 0.05),
    fence_after_s=1.0,
    device_timeout_s=5,
)


def plan(seed: int, *, work: list[Step] | int = 40, faults: Faults = (), **changes: Any) -> Plan:
    """A small plan; `work` is a list of steps, or how many are drawn from the seed."""
    small = replace(SMALL, seed=seed, **changes)
    steps = (
        draw_work(small, Dice(seed), work)
        if isinstance(work, int)
        else sorted(work, key=lambda step: step.at_s)
    )
    return replace(small, work=tuple(steps), faults=faults)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`flaw` shows in `make(seed)` within `tries` seeds, by one of `rules`. `settings` hold with and without it."""

    flaw: str
    rules: str
    make: Callable[[int], Plan]
    tries: int = 12
    settings: Settings = tuple

    def play(self, seed: int, *wrong: Patch) -> Outcome:
        with patched((*self.settings(), *wrong)):
            return Run(self.make(seed), Dice(seed)).play()


# --- what makes things more likely: a refusal, a peer that is busy, a message that is missed ------------------


def every(
    count: int, owner: Any, name: str, instead: Callable[..., Any], when: Callable[..., bool]
) -> Settings:
    """Of each `count` calls of a coroutine method for which `when(self, *args)` is true, the first is `instead`'s."""

    def make() -> tuple[Patch, ...]:
        right = vars(owner)[name]
        calls = 0

        async def sometimes(self: Any, *args: Any, **how: Any) -> Any:
            nonlocal calls
            if when(self, *args):
                calls += 1
                if calls % count == 1:
                    return await instead(right, self, *args, **how)
            return await right(self, *args, **how)

        return ((owner, name, sometimes),)

    return make


async def _refuse(right: Any, self: Any, *args: Any, **how: Any) -> None:
    raise LockRefused("deadlock", "the scenario says so")


async def _busy(right: Any, self: Any, *args: Any) -> bool:
    return False


async def _unread(right: Any, self: Any, *args: Any, **how: Any) -> None:
    await right(self, *args, **how)
    self.lvb_valid = False


async def _woken_twice(right: Any, self: Any) -> None:
    await right(self)
    self._asked.set()


async def _unreadable(right: Any, self: Any, slot: int) -> None:
    raise Refused("bitmap-unreadable", "the scenario says so")


refused_tokens = every(
    4, SessionLock, "convert", _refuse, lambda lock, mode: lock.name == "token" and mode is Mode.EX
)
busy_peers = every(2, Array, "quiesce", _busy, lambda *_: True)
missed_messages = every(
    4, SessionLock, "convert", _unread, lambda lock, mode: lock.name == "message" and mode is Mode.CR
)
spurious_callbacks = every(2, Channel, "_receive", _woken_twice, lambda *_: True)
unreadable_bitmaps = every(2, Slots, "merge", _unreadable, lambda slots, slot: not slots.state.held)


def unreadable_windows() -> tuple[Patch, ...]:
    right, calls = life_module.read_block, 0

    async def sometimes(lockspace: Any, slot: int) -> SlotBlock:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise LockRefused("failed", "the scenario says so")
        return await right(lockspace, slot)

    return ((life_module, "read_block", sometimes),)


def impatient() -> tuple[Patch, ...]:
    return ((channel_module, "ACK_S", 0.5),)


# --- plans ------------------------------------------------------------------------------------------------------


def slow(at_s: float, node: int, box: int, slow_s: float, for_s: float = 9.0) -> Step:
    return at(at_s, "slow-disk", node=node, box=box, slow_s=slow_s, for_s=for_s)


def dying_writer(
    seed: int, *, nodes: int = 3, down_s: float = 2.0, faults: Faults = (), **changes: Any
) -> Plan:
    """Node 1 writes to a few chunks and dies in the middle; the others read there and go on writing."""
    work = writes(0, begin_s=0, end_s=0.1, every_s=0.005) + writes(
        nodes, begin_s=0.002, end_s=0.1, every_s=0.005
    )
    work += reads(0, begin_s=0.1, end_s=1.5, every_s=0.02) + writes(1, begin_s=0.1, end_s=1.5, every_s=0.07)
    dies = kill(0.1 + seed % 7 * 0.0003, down_s=down_s)
    return plan(seed, nodes=nodes, work=work, faults=(dies, *faults), **changes)


def slow_copies(seed: int, **how: Any) -> Plan:
    """As before; what the survivors copy is on its way for a while, and they write there."""
    faults = how.pop("faults", ())
    late = tuple(slow(0.09, node, 1, 0.05) for node in (2, 3))
    made = dying_writer(seed, faults=(*late, *faults), **how)
    more = writes(1, begin_s=0.12, end_s=2.0, every_s=0.013, place=0) + writes(
        2, begin_s=0.12, end_s=2.0, every_s=0.017
    )
    return replace(made, work=tuple(sorted((*made.work, *more), key=lambda step: step.at_s)))


def joiner_in_a_copy(seed: int) -> Plan:
    """The writer comes back while the survivors are in the middle of a slow copy, and writes there at once."""
    late = tuple(slow(0.09, node, 1, 0.2) for node in (2, 3))
    made = dying_writer(seed, down_s=0.05 + seed % 5 * 0.03, faults=late, resync_kib_s=(8, 8))
    made = replace(made, work=tuple(step for step in made.work if step.at_s < 1.0))
    more = [at(1.6 + turn * 0.1, "move", region=1, node=0) for turn in range(10)]
    more += writes(1, begin_s=2.7, end_s=5.0, every_s=0.03)
    return replace(made, work=tuple(sorted((*made.work, *more), key=lambda step: step.at_s)))


def undecided_reads(seed: int, *, late_box: int = 1) -> Plan:
    """A writer dies in the middle of writes to one place that all read, several at a time, while copies are slow."""
    work = writes(0, begin_s=0, end_s=0.1, every_s=0.002, place=0)
    for turn in range(60):
        at_s = 0.1 + turn * 0.013
        work += [at(round(at_s, 6), "read", region=0, at=0, sectors=8, node=turn) for _ in range(4)]
    late = (slow(0.0, 1, late_box, 0.02), slow(0.09, 2, 1, 0.3), slow(0.09, 3, 1, 0.3))
    return plan(seed, nodes=3, work=work, faults=(kill(0.098, down_s=5.0), *late), late_s=(0.001, 0.01))


def chunk_0_only(seed: int) -> Plan:
    work = writes(0, begin_s=0, end_s=0.1, every_s=0.002, place=0)
    return plan(seed, nodes=3, work=work, faults=(slow(0.0, 1, 1, 0.02), kill(0.098, down_s=5.0)))


def failing_member(
    seed: int, *, point: str = "", node: int = 1, members: int = 2, fails_s: float = 0.2, **changes: Any
) -> Plan:
    """A write of one node fails on one member; with `point`, the node dies when it comes there."""
    work = [*draw_work(replace(SMALL, nodes=3, seed=seed), Dice(seed), 60)]
    work += writes(0, begin_s=0.0, end_s=0.6, every_s=0.01) + writes(1, begin_s=0.0, end_s=0.6, every_s=0.01)
    fails = at(fails_s, "write-error", node=node, box=members - 1, after=bool(seed % 2), times=1)
    faults: Faults = (fails,)
    if point:
        faults = (kill_at(point, at_s=0.15, skip=seed // 2 % 2, down_s=30.0), fails)
    return plan(seed, nodes=3, work=work, faults=faults, members=members, raid_disks=members, **changes)


def bad_sectors(seed: int) -> Plan:
    """A latent read error that readers meet; nobody writes there, which would mend it."""
    work = reads(1, begin_s=0.1, end_s=0.8, every_s=0.004) + writes(
        1, begin_s=0, end_s=0.8, every_s=0.05, place=32
    )
    bad = at(0.2, "bad-sectors", box=0, at=64, sectors=4)
    return plan(seed, nodes=3, work=work, faults=(bad,))


def lost_sessions(seed: int) -> Plan:
    """Lock daemons die under load that dirties one chunk after the other, over slow disks."""
    work = [
        step for region in range(16) for step in writes(region, begin_s=0, end_s=0.4, every_s=0.1, sectors=16)
    ]
    faults = tuple(
        at(0.11 + 0.2 * turn + seed % 10 * 0.004, "kill-lockd", node=1 + turn, down_s=0.1, detect_s=0.01)
        for turn in range(2)
    )
    late = tuple(slow(0.05, node, box, 0.03) for node in (1, 2) for box in (0, 1))
    return plan(seed, work=work, faults=(*late, *faults), array_sectors=2048)


def excluded_writers(seed: int) -> Plan:
    """Machines of a cluster of three lose their lock daemons, and the others go on."""
    return replace(lost_sessions(seed), nodes=3, slots=4, durable=False)


def lost_contact(seed: int) -> Plan:
    made = lost_sessions(seed)
    faults = tuple(at(0.1 + 0.3 * turn + seed % 10 * 0.003, "freeze", for_s=0.1) for turn in range(4))
    return replace(made, faults=(*made.faults[:4], *faults))


def blackout(seed: int, *, at_s: float, flush: bool = False) -> Plan:
    work = [step for region in range(8) for step in writes(region, begin_s=0, end_s=0.3, every_s=0.05)]
    dark = at(at_s, "blackout", down_s=0.1)
    if flush:
        work += flushes(begin_s=0.35, end_s=0.4, every_s=0.01)
        return plan(seed, work=work, faults=(at(0.42, "box-power", box=0), dark))
    return plan(seed, work=work, faults=(dark,))


def overlapping(seed: int) -> Plan:
    work = writes(0, begin_s=0, end_s=0.3, every_s=0.001, place=0) + writes(
        0, begin_s=0, end_s=0.3, every_s=0.0013, place=4
    )
    return plan(seed, work=work)


def stuck(seed: int, *, box: int = 1) -> Plan:
    """The copies of a takeover get no answer from a box, and land when the box answers again."""
    made = dying_writer(seed, nodes=2, down_s=30.0)
    hangs = at(0.11, "stuck-disk", node=2, box=box, for_s=9.0)
    more = writes(1, begin_s=1.5, end_s=12.0, every_s=0.4)
    return replace(
        made,
        work=tuple(sorted((*made.work, *more), key=lambda step: step.at_s)),
        faults=(*made.faults, hangs),
    )


def slow_fencing(seed: int) -> Plan:
    """A writer dies with requests that land seconds later, and is back before they have."""
    made = slow_copies(seed, down_s=0.1, late_s=(2.0, 0.5), fence_after_s=6.0)
    return replace(made, faults=(slow(0.0, 1, 1, 0.02), *made.faults))


def joins_a_window(seed: int) -> Plan:
    """A node that died joins again while others copy, and writes at once."""
    made = slow_copies(seed, down_s=0.1, fence_after_s=0.5)
    late = tuple(slow(0.09, node, 1, 1.0) for node in (2, 3))
    more = [at(round(0.2 + 0.05 * turn, 6), "move", region=turn % 8, node=0) for turn in range(60)]
    for region in range(8):
        more += writes(region, begin_s=0.15, end_s=3.0, every_s=0.11)
    return replace(
        made,
        work=tuple(sorted((*made.work, *more), key=lambda step: step.at_s)),
        faults=(*late, made.faults[0]),
    )


def late_writes(seed: int) -> Plan:
    """Writes of all nodes take longer than an announcement is waited for."""
    made = dying_writer(seed, faults=(slow(0.1, 2, 0, 1.5, 5.0), slow(0.1, 3, 0, 1.5, 5.0)))
    more = writes(1, begin_s=0.1, end_s=9.0, every_s=0.2) + writes(2, begin_s=0.15, end_s=9.0, every_s=0.2)
    return replace(made, work=tuple(sorted((*made.work, *more), key=lambda step: step.at_s)))


def joins_meanwhile(seed: int) -> Plan:
    """Node 2 was stopped and joins while node 1 dies."""
    made = dying_writer(seed, down_s=3.0)
    again = stop(0.0, node=2, down_s=0.09 + seed % 16 * 0.002)
    return replace(made, faults=(again, *made.faults))


def drawn(count: int = 60, faults: int = 8) -> Callable[[int], Plan]:
    """Plans of the atlas."""
    return lambda seed: draw_plan(seed, Dice(seed), count, faults)


SCENARIOS = (
    Scenario("F1", "joined-too-early", dying_writer),
    Scenario("F2", "bits-left|hang|bits-of-nobody|members-differ", chunk_0_only),
    Scenario("F3", "acknowledged-write-lost|unasked-value", undecided_reads, 20),
    Scenario("F4", "source-cleared-early|difference-without-bit", dying_writer),
    Scenario("F5", "hang|bits-of-nobody", dying_writer, settings=unreadable_bitmaps),
    Scenario("F6", "write-in-foreign-window", slow_copies),
    Scenario("F7", "write-in-foreign-window", slow_copies, 20),
    Scenario("F8", "write-in-foreign-window", slow_copies, settings=busy_peers),
    Scenario("F11", "copy-outside-window", bad_sectors),
    Scenario("F13", "slot-written-without-lock", dying_writer),
    Scenario("F15", "hang", slow_copies, settings=busy_peers),
    Scenario(
        "F16",
        "hang",
        late_writes,
        settings=impatient,
    ),
    Scenario("F17", "hang", dying_writer, settings=refused_tokens),
    Scenario("F18", "metadata-without-token", dying_writer, settings=refused_tokens),
    Scenario("F19", "roles-differ", lambda seed: failing_member(seed, point="metadata.written")),
    Scenario("F20", "message-skipped", slow_copies, settings=missed_messages),
    Scenario("F20b", "message-twice", dying_writer, settings=spurious_callbacks),
    Scenario("F21", "joined-too-early|write-in-foreign-window", slow_copies, settings=unreadable_windows),
    Scenario("F27", "source-cleared-early|difference-without-bit", dying_writer),
    Scenario("F33", "acknowledged-write-lost|unasked-value", undecided_reads, 20),
    Scenario("F34", "hang", lambda seed: slow_copies(seed, faults=(kill_at("resync.read", skip=seed % 3),))),
    Scenario(
        "F35",
        "hang|bits-of-nobody",
        lambda seed: replace(
            failing_member(seed), faults=(*failing_member(seed).faults, stop(0.5, down_s=30.0))
        ),
    ),
    Scenario("F36", "window-ended-early|bits-left", dying_writer),
    Scenario("F38", "hang", drawn(80), 30),
    Scenario("F39", "joined-too-early", drawn(80), 30),
    Scenario("I10", "write-in-foreign-window", joiner_in_a_copy, 20),
    Scenario("I8", "write-in-foreign-window", slow_copies),
    Scenario("I8b", "write-in-foreign-window", slow_copies),
    Scenario("I7", "two-resyncers", slow_copies),
    Scenario("rule 1", "joined-too-early", dying_writer),
    Scenario(
        "rule 4",
        "write-in-foreign-window",
        lambda seed: slow_copies(seed, faults=(kill_at("resync.read", skip=seed % 3),)),
        20,
    ),
    Scenario("rule 6", "write-in-foreign-window", slow_copies, settings=busy_peers),
    Scenario("rule 6b", "answer-before-record|roles-differ", failing_member),
    Scenario("rule 6 slots", "slot-written-without-lock", dying_writer),
    Scenario("I12", "events-not-growing", lambda seed: failing_member(seed, point="metadata.written")),
    Scenario(
        "rule 13",
        "hang",
        lambda seed: plan(
            seed,
            nodes=3,
            work=writes(0, begin_s=0, end_s=0.1, every_s=0.005),
            faults=(kill(0.1, down_s=30.0),),
        ),
    ),
    Scenario("rule 14", "events-not-growing|events-only-grow", dying_writer),
    Scenario("I13", "hang|unexpected-error", dying_writer),
    Scenario("I1", "data-before-bit|bits-before-data", dying_writer),
    Scenario("I1b", "data-before-bit|bits-before-data", dying_writer),
    Scenario("I2", "bit-cleared-early", slow_copies),
    Scenario("I2b", "bit-cleared-early", failing_member),
    Scenario("I2c", "hang|difference-without-bit|bit-cleared-early", dying_writer),
    Scenario("rule 8", "copy-outside-window|window-moved-early", slow_copies),
    Scenario("rule 9", "bits-before-data|write-in-foreign-window", drawn()),
    Scenario("rule 10b", "unasked-value", lambda seed: undecided_reads(seed, late_box=0), 40),
    Scenario("rule 2", "members-differ", undecided_reads, 20),
    Scenario("rule 14b", "events-only-grow", dying_writer),
    Scenario("rule 12", "gate-passed", lost_sessions, 20),
    Scenario("rule 12b", "gate-passed", lost_contact, 20),
    Scenario("rule 12c", "landed-after-exclusion", excluded_writers, 20),
    Scenario("rule 15", "difference-without-bit", lambda seed: blackout(seed, at_s=3.6)),
    Scenario("rule 15b", "window-moved-early", slow_copies),
    Scenario("rule 15c", "difference-without-bit", lambda seed: blackout(seed, at_s=0.31)),
    Scenario("rule 16b", "bits-left|difference-without-bit|write-in-foreign-window", drawn(60), 20),
    Scenario("rule 17", "answer-before-record", failing_member),
    Scenario(
        "rule 17b",
        "difference-without-bit|members-differ|acknowledged-write-lost",
        lambda seed: failing_member(seed, fails_s=0.56 + seed % 4 * 0.01),
        20,
    ),
    Scenario("rule 17c", "torn-sector|difference-without-bit|unasked-value", overlapping, 20),
    Scenario("rule 17d", "needless-error", failing_member),
    Scenario("rule 18", "difference-without-bit|members-differ|acknowledged-write-lost", overlapping),
    Scenario("rule 19", "acknowledged-write-lost", lambda seed: blackout(seed, at_s=0.6, flush=True)),
    Scenario("rule 19b", "acknowledged-write-lost", lambda seed: blackout(seed, at_s=0.6, flush=True)),
    Scenario("dlm grants", "incompatible-grant", dying_writer),
    Scenario("dlm value block", "stale-value-block", dying_writer),
    Scenario("dlm slots", "slot-owned-twice", slow_fencing),
    Scenario("dlm fencing", "taken-for-dead-early", slow_fencing),
    Scenario("dlm leave", "hang", dying_writer),
    Scenario("a proof", "late-write-after-fence", slow_fencing, 20),
    Scenario("a model", "simulator-error", dying_writer),
    Scenario("a task", "tasks-left", dying_writer),
    Scenario("a buffer", "buffers-left", dying_writer),
    Scenario("an exception", "unexpected-error", dying_writer),
    Scenario("a loop", "spinning", dying_writer),
    Scenario("a sector", "torn-sector", dying_writer),
    Scenario("memory", "torn-sector", dying_writer),
    Scenario("a superblock", "superblock-torn", dying_writer),
    Scenario("a message", "message-differs", dying_writer),
    Scenario("half a write", "difference-without-bit|acknowledged-write-lost|members-differ", dying_writer),
)


def table() -> None:
    """Print which rule each flaw breaks, and in which run of its scenario: the table of `docs/flaws.md`."""
    logging.getLogger("clustermd").addHandler(logging.NullHandler())
    for scenario in SCENARIOS:
        flaw = all_flaws()[scenario.flaw]
        for seed in range(scenario.tries):
            violation = scenario.play(seed, *flaw.make()).violation
            if violation is not None and violation.rule in scenario.rules.split("|"):
                words = f"`{violation.rule}` ({violation.layer.value})"
                print(f"| {flaw.name} | {flaw.says} | {words} | {seed + 1} |", flush=True)
                break


if __name__ == "__main__":
    table()
