"""The fault atlas: what can go wrong, how often, and what keeps every run survivable.

A run must be one that a correct array survives, so that any loss, difference or hang is ours. Each fault says its
limit:

- Only the *victim* boxes may fail for good (errors, a lost path, no answer for too long, power): one fewer than there
  are members. All copies of a block are never lost at once, also not with latent read errors, which stand on victims.
- Every machine comes back, every pause and partition ends, and the group has a majority again.
- A paused process is one that the group gives up and has killed, or fenced at the boxes; it never goes on as a member.
- A loss of power at all boxes is one of all machines too; what flush or FUA covered must survive it, nothing else.

`KINDS` is the table of faults, each with how it is drawn; what they do is `faults`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clustermd.testing.simulator import faults
from clustermd.testing.simulator.dice import Dice, Stream
from clustermd.testing.simulator.plan import Plan, Step

if TYPE_CHECKING:
    from clustermd.testing.simulator.run import Run

DOWN_S = (0.3, 1.0, 3.0, 8.0)
LANDS_WITHIN_S = 12.0
"""Longer than any request of a run takes to the medium: a stuck disk, then the longest delay of what lands late."""
VOTES = (1, 2, 1, 3, 0)
"""Of a node, where not all have one."""
SHORT_S = (0.01, 0.1, 0.5, 1.5)
DETECT_S = (0.002, 0.05, 0.4, 1.0)
POINTS = (
    "write.issue",
    "bitmap.flush",
    "bitmap.stable",
    "sweep.cleared",
    "metadata.token",
    "metadata.write",
    "metadata.written",
    "send.begin",
    "send.written",
    "send.acknowledged",
    "recv.message",
    "recv.processed",
    "takeover.locked",
    "takeover.read",
    "takeover.merged",
    "takeover.own_stable",
    "takeover.source_cleared",
    "takeover.done",
    "resync.right",
    "resync.begin",
    "resync.window",
    "resync.read",
    "resync.copied",
    "resync.finished",
    "join.member",
    "join.slot",
    "join.gathered",
    "slot.loaded",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault. `draw` makes its arguments, `do` does it.

    `often` is its weight, `fits` says whether a plan allows it, `fails_member` whether it takes a box out for good.
    """

    draw: Callable[[Plan, Stream], dict[str, Any]]
    do: Callable[[Run, dict[str, Any]], None]
    often: int = 4
    fits: Callable[[Plan], bool] = lambda plan: True
    fails_member: bool = False


def _node(plan: Plan, draw: Stream) -> int:
    return 1 + draw.below(plan.nodes)


def _victim(plan: Plan, draw: Stream) -> int:
    """The box that may fail: the first one is never a victim in half the runs, the last one in the others."""
    return (plan.seed + draw.below(plan.members - 1)) % plan.members if plan.members > 1 else 0


def _pick(values: tuple[float, ...], draw: Stream) -> float:
    return values[draw.below(len(values))]


KINDS: dict[str, Kind] = {
    "kill": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(DOWN_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        faults.kill,
        often=8,
    ),
    "kill-array": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "down_s": _pick(DOWN_S, draw)},
        faults.kill_array,
        often=6,
    ),
    "kill-lockd": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(DOWN_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        faults.kill_lockd,
    ),
    "kill-at": Kind(
        lambda plan, draw: {
            "point": POINTS[draw.below(len(POINTS))],
            "skip": draw.below(3),
            "down_s": _pick(DOWN_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        faults.kill_at,
        often=12,
    ),
    "stop": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(SHORT_S, draw),
            "leave": bool(draw.below(2)),
        },
        faults.stop,
        often=6,
    ),
    "pause": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "for_s": _pick((0.05, 0.5, 2.0, 6.0, 12.0), draw),
            "detect_s": _pick((0.4, 1.0, 2.0), draw),
        },
        faults.pause,
    ),
    "freeze": Kind(
        lambda plan, draw: {"for_s": _pick(SHORT_S, draw)}, faults.freeze, fits=lambda plan: plan.durable
    ),
    "partition": Kind(
        lambda plan, draw: {
            "cut_off": sorted(
                {_node(plan, draw), _node(plan, draw)} if draw.one_in(4) else {_node(plan, draw)}
            ),
            "for_s": _pick(DOWN_S, draw),
        },
        faults.partition,
        often=8,
        fits=lambda plan: not plan.durable,
    ),
    "kill-corosync": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(SHORT_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        faults.kill_corosync,
        fits=lambda plan: not plan.durable,
    ),
    "stop-corosync": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "down_s": _pick(SHORT_S, draw)},
        faults.stop_corosync,
        often=2,
        fits=lambda plan: not plan.durable,
    ),
    "pause-lockd": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "for_s": _pick((0.5, 2.0, 9.0), draw)},
        faults.pause_lockd,
        often=3,
        fits=lambda plan: not plan.durable,
    ),
    "pause-corosync": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "for_s": _pick((0.1, 1.0, 4.0), draw),
            "detect_s": _pick((0.4, 1.0, 2.0), draw),
        },
        faults.pause_corosync,
        often=3,
        fits=lambda plan: not plan.durable,
    ),
    "slow-group": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "slow_s": _pick((0.001, 0.01, 0.1), draw),
            "for_s": _pick(SHORT_S, draw),
        },
        faults.slow_group,
        often=2,
    ),
    "slow-disk": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "box": draw.below(plan.members),
            "slow_s": _pick((0.002, 0.02, 0.3), draw),
            "for_s": _pick(SHORT_S, draw),
        },
        faults.slow,
    ),
    "stuck-disk": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "box": _victim(plan, draw),
            "for_s": _pick((0.2, 1.0, 9.0), draw),
        },
        faults.stuck,
        often=2,
        fails_member=True,
    ),
    "write-error": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "box": _victim(plan, draw),
            "after": bool(draw.below(2)),
            "times": 1 + draw.below(2),
        },
        faults.write_error,
        often=2,
        fails_member=True,
    ),
    "flush-error": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "box": _victim(plan, draw)},
        faults.flush_error,
        often=1,
        fails_member=True,
    ),
    "bad-sectors": Kind(
        lambda plan, draw: {
            "box": _victim(plan, draw),
            "at": draw.below(plan.array_sectors),
            "sectors": 1 + draw.below(8),
        },
        faults.bad_sectors,
        often=3,
        fails_member=True,
    ),
    "lost-path": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "box": _victim(plan, draw)},
        faults.lost_path,
        often=1,
        fails_member=True,
    ),
    "box-power": Kind(
        lambda plan, draw: {"box": _victim(plan, draw)}, faults.box_power, often=1, fails_member=True
    ),
    "gate-pause": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "slow_s": _pick((0.005, 0.1, 1.0), draw),
            "for_s": _pick(SHORT_S, draw),
        },
        faults.gate_pause,
        often=3,
    ),
    "blackout": Kind(lambda plan, draw: {"down_s": _pick(SHORT_S, draw)}, faults.blackout, often=2),
}


def draw_faults(plan: Plan, dice: Dice, count: int, over_s: float) -> tuple[Step, ...]:
    """About `count` faults within `over_s` seconds, in the order of their times."""
    draw = dice.stream("atlas")
    # half of the runs keep all members: the other half would hide what only these show
    may_fail = draw.one_in(2)
    table = [
        name
        for name, kind in KINDS.items()
        if kind.fits(plan) and (may_fail or not kind.fails_member)
        for _ in range(kind.often)
    ]
    times = sorted(draw.below(1000) / 1000 * over_s for _ in range(count))
    steps = []
    for at_s in times:
        name = table[draw.below(len(table))]
        steps.append(Step(round(at_s, 4), name, KINDS[name].draw(plan, draw)))
    return tuple(steps)


def draw_plan(seed: int, dice: Dice, operations: int = 250, faults: int = 10) -> Plan:
    """The whole plan of a seed."""
    from clustermd.testing.simulator.workload import draw_work

    draw = dice.stream("plan")
    nodes = (3, 3, 3, 2, 4)[draw.below(5)]
    members = (2, 2, 2, 3)[draw.below(4)]
    plan = Plan(
        seed=seed,
        nodes=nodes,
        slots=max(nodes, (4, 3, 5)[draw.below(3)]),
        members=members,
        raid_disks=members,
        durable=nodes < 3 or draw.below(2) == 0,
        storage_fence=bool(draw.below(2)),
        fence_after_s=(3.0, 1.0, 6.0)[draw.below(3)],
        chunk_bytes=(16384, 65536, 8192)[draw.below(3)],
        daemon_sleep_s=1 + draw.below(2),
        discard=bool(draw.below(3)),
    )
    plan = _count(_meet(plan, dice.stream("group")), dice.stream("votes"))
    work = draw_work(plan, dice, operations)
    return replace(plan, work=work, faults=draw_faults(plan, dice, faults, work[-1].at_s + 1.0))


def _meet(plan: Plan, draw: Stream) -> Plan:
    """How its nodes meet, where that is by corosync."""
    if plan.nodes == 2 and draw.below(2):
        plan = replace(plan, durable=False, two_node=True)
    if plan.durable:
        return plan
    if plan.nodes == 4 and draw.one_in(3):
        plan = replace(plan, nodes=5, slots=max(plan.slots, 5))
    # Between two nodes a lease proves nothing: who is left is no majority either. And one that is cut off from the
    # boxes only is a whole cluster by itself, to whoever uses nothing but its locks.
    fence = "power" if plan.two_node else ("power", "storage", "lease")[draw.below(3)]
    leases = fence == "lease" or (not plan.two_node and draw.one_in(4))
    return replace(
        plan,
        fence=fence,
        lease_s=(2.0, 4.0)[draw.below(2)] if leases else 0.0,
        device_bound_s=LANDS_WITHIN_S if fence == "lease" else 0.0,
        wait_for_all=plan.two_node or draw.one_in(5),
    )


def _count(plan: Plan, draw: Stream) -> Plan:
    """What their votes are, where they meet by corosync, and whether those who are left are quorate though they are no
    majority."""
    if plan.durable or plan.two_node:
        return plan
    if draw.one_in(4):
        votes = tuple(VOTES[draw.below(len(VOTES))] for _ in range(plan.nodes))
        plan = replace(plan, votes=votes if sum(votes) else ())
    return replace(plan, last_man_standing=plan.fence != "storage" and draw.one_in(3))
