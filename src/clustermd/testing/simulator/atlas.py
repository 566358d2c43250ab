"""The fault atlas: what can go wrong, when, and what keeps every run survivable.

A run must be one that a correct array survives, so that any loss, difference or hang is ours. Each fault says its limit:

- Only the *victim* boxes may fail for good (errors, a lost path, no answer for too long, power): one less than there are
  members. All copies of a block are never lost at once, also not with latent read errors, which stand on victims only.
- Every machine comes back, every pause and partition ends, and the group has a majority again.
- A paused process is one that the group gives up and has killed, or fenced at the boxes; it never goes on as a member.
- A loss of power at all boxes is one of all machines too; what flush or FUA covered must survive it, nothing else.

`KINDS` is the table of faults: how it is drawn and how it is done.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clustermd.device.member_device import Op
from clustermd.testing.simulator.boxes import Path, Trouble
from clustermd.testing.simulator.dice import Dice, Stream
from clustermd.testing.simulator.plan import Plan, Step

if TYPE_CHECKING:
    from clustermd.testing.simulator.machine import Machine
    from clustermd.testing.simulator.run import Run

DOWN_S = (0.3, 1.0, 3.0, 8.0)
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
    """One kind of fault. `draw` makes its arguments, `do` does it; `often` is its weight; `fits` whether a plan allows it."""

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


def _paths(run: Run, box: int, node: int | None = None) -> list[Path]:
    """The living ways to a box."""
    found = []
    for number, machine in run.cluster.machines.items():
        if node is None or number == node:
            array = machine.array
            if array is not None and array.process.alive:
                found.append(array.paths[box])
    return found


# --- machines and processes ---------------------------------------------------------------------------------


def _kill(run: Run, args: dict[str, Any]) -> None:
    """A machine loses power; it comes back. Limit: none, all may be down at once, quorum comes back with them."""
    machine = run.cluster.machines[args["node"]]
    if machine.up:
        run.kill(machine, args["detect_s"])
        run.later(args["down_s"], run.start, machine)


def _kill_array(run: Run, args: dict[str, Any]) -> None:
    """SIGKILL of the array process alone; somebody starts it again."""
    machine = run.cluster.machines[args["node"]]
    if machine.array is not None and machine.array.process.alive and not machine.paused:
        run.cluster.kill_array(machine)
        run.later(args["down_s"], run.start_array, machine)


def _kill_lockd(run: Run, args: dict[str, Any]) -> None:
    """SIGKILL of the lock daemon; the array process lives on without membership until a new one is there."""
    machine = run.cluster.machines[args["node"]]
    if machine.up and not machine.paused:
        run.cluster.kill_lockd(machine, args["detect_s"])
        run.later(args["down_s"], run.start_lockd, machine)


def _kill_at(run: Run, args: dict[str, Any]) -> None:
    """A machine loses power exactly at a step of the protocol, the next time some machine comes there."""
    run.die_at(args["point"], args["skip"], args["down_s"], args["detect_s"])


def _stop(run: Run, args: dict[str, Any]) -> None:
    """A clean stop, and a start after it. With `leave`, the lock daemon says goodbye as well."""
    machine = run.cluster.machines[args["node"]]
    if machine.serving and not machine.paused:
        run.stop_and_start(machine, args["down_s"], args["leave"])


def _pause(run: Run, args: dict[str, Any]) -> None:
    """A machine stands still (SIGSTOP, a stalled hypervisor). The group gives it up after a while. One that slept
    through its own exclusion goes on for a while, too. Limit: before anybody relies on its end it is killed, or fenced at the boxes."""
    machine = run.cluster.machines[args["node"]]
    if machine.up and not machine.paused:
        run.pause(machine, args["for_s"], args["detect_s"])


# --- the group ------------------------------------------------------------------------------------------------


def _freeze(run: Run, args: dict[str, Any]) -> None:
    """The sequencer dies: nobody may act until there is a new one. Limit: it comes back."""
    run.freeze(args["for_s"])


def _partition(run: Run, args: dict[str, Any]) -> None:
    """Some nodes do not hear the others. Limit: it heals."""
    run.partition(args["cut_off"], args["for_s"])


def _slow_group(run: Run, args: dict[str, Any]) -> None:
    """One node hears everything late."""
    lockd = run.cluster.machines[args["node"]].lockd
    if lockd is not None:
        port = lockd.port
        port.slow_s = args["slow_s"]
        run.later(args["for_s"], setattr, port, "slow_s", 0.0)


# --- disks ------------------------------------------------------------------------------------------------------


def _trouble(run: Run, args: dict[str, Any], trouble: Trouble) -> None:
    for path in _paths(run, args["box"], args.get("node")):
        path.troubles.append(replace(trouble))
        if args.get("for_s"):
            run.later(args["for_s"], run.well, path)


def _slow(run: Run, args: dict[str, Any]) -> None:
    """A box is slow for one node, less than what counts as no answer."""
    _trouble(run, args, Trouble(slow_s=args["slow_s"]))


def _stuck(run: Run, args: dict[str, Any]) -> None:
    """A box answers one node not at all for a while; what it owes lands late. Limit: a victim, since a time-out fails it."""
    _trouble(run, args, Trouble(ops=(Op.WRITE, Op.READ, Op.FLUSH, Op.DISCARD), stuck=True))


def _write_error(run: Run, args: dict[str, Any]) -> None:
    """Writes of one node fail, before or after some sectors have landed. Limit: a victim."""
    _trouble(
        run,
        args,
        Trouble(ops=(Op.WRITE,), error=errno.EIO, after=args["after"], times=args["times"]),
    )


def _flush_error(run: Run, args: dict[str, Any]) -> None:
    """A flush fails: what it should have covered is in doubt, the member is failed. Limit: a victim."""
    _trouble(run, args, Trouble(ops=(Op.FLUSH,), error=errno.EIO, times=1))


def _bad_sectors(run: Run, args: dict[str, Any]) -> None:
    """Latent read errors in the data, until they are written. Limit: on victims only, and few enough to be repaired."""
    box = run.cluster.boxes[args["box"]]
    first = run.cluster.plan.data_offset_sectors + args["at"]
    box.bad_sectors.update(range(first, min(first + args["sectors"], box.size_sectors)))


def _lost_path(run: Run, args: dict[str, Any]) -> None:
    """One node loses its way to a box, the others keep theirs. Limit: a victim; the path comes back at the end."""
    machine = run.cluster.machines[args["node"]]
    name = run.cluster.boxes[args["box"]].name
    machine.lost_paths.add(name)
    for path in _paths(run, args["box"], args["node"]):
        path.lost_path = True
        run.release(path)


def _box_power(run: Run, args: dict[str, Any]) -> None:
    """One box loses power, with what nothing had covered. Limit: a victim, and it does not come back."""
    box = run.cluster.boxes[args["box"]]
    if box.powered:
        box.powered = False
        box.lose_power()
        run.box_lost(box)


def _gate_pause(run: Run, args: dict[str, Any]) -> None:
    """Requests that have passed the gate take their time to the medium. Limit: less than what counts as no answer."""
    array = run.cluster.machines[args["node"]].array
    if array is not None and array.process.alive:
        array.submitter.pause_s = args["slow_s"]
        run.later(args["for_s"], setattr, array.submitter, "pause_s", 0.0)


def _blackout(run: Run, args: dict[str, Any]) -> None:
    """All machines and all boxes lose power at once and come back. Limit: what flush and FUA covered must be there."""
    run.blackout(args["down_s"])


def _pick(values: tuple[float, ...], draw: Stream) -> float:
    return values[draw.below(len(values))]


KINDS: dict[str, Kind] = {
    "kill": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(DOWN_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        _kill,
        often=8,
    ),
    "kill-array": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "down_s": _pick(DOWN_S, draw)}, _kill_array, often=6
    ),
    "kill-lockd": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(DOWN_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        _kill_lockd,
    ),
    "kill-at": Kind(
        lambda plan, draw: {
            "point": POINTS[draw.below(len(POINTS))],
            "skip": draw.below(3),
            "down_s": _pick(DOWN_S, draw),
            "detect_s": _pick(DETECT_S, draw),
        },
        _kill_at,
        often=12,
    ),
    "stop": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "down_s": _pick(SHORT_S, draw),
            "leave": bool(draw.below(2)),
        },
        _stop,
        often=6,
    ),
    "pause": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "for_s": _pick((0.05, 0.5, 2.0, 6.0, 12.0), draw),
            "detect_s": _pick((0.4, 1.0, 2.0), draw),
        },
        _pause,
    ),
    "freeze": Kind(
        lambda plan, draw: {"for_s": _pick(SHORT_S, draw)}, _freeze, fits=lambda plan: plan.durable
    ),
    "partition": Kind(
        lambda plan, draw: {
            "cut_off": sorted(
                {_node(plan, draw), _node(plan, draw)} if draw.one_in(4) else {_node(plan, draw)}
            ),
            "for_s": _pick(DOWN_S, draw),
        },
        _partition,
        often=8,
        fits=lambda plan: not plan.durable,
    ),
    "slow-group": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "slow_s": _pick((0.001, 0.01, 0.1), draw),
            "for_s": _pick(SHORT_S, draw),
        },
        _slow_group,
        often=2,
    ),
    "slow-disk": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "box": draw.below(plan.members),
            "slow_s": _pick((0.002, 0.02, 0.3), draw),
            "for_s": _pick(SHORT_S, draw),
        },
        _slow,
    ),
    "stuck-disk": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "box": _victim(plan, draw),
            "for_s": _pick((0.2, 1.0, 9.0), draw),
        },
        _stuck,
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
        _write_error,
        often=2,
        fails_member=True,
    ),
    "flush-error": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "box": _victim(plan, draw)},
        _flush_error,
        often=1,
        fails_member=True,
    ),
    "bad-sectors": Kind(
        lambda plan, draw: {
            "box": _victim(plan, draw),
            "at": draw.below(plan.array_sectors),
            "sectors": 1 + draw.below(8),
        },
        _bad_sectors,
        often=3,
        fails_member=True,
    ),
    "lost-path": Kind(
        lambda plan, draw: {"node": _node(plan, draw), "box": _victim(plan, draw)},
        _lost_path,
        often=1,
        fails_member=True,
    ),
    "box-power": Kind(
        lambda plan, draw: {"box": _victim(plan, draw)}, _box_power, often=1, fails_member=True
    ),
    "gate-pause": Kind(
        lambda plan, draw: {
            "node": _node(plan, draw),
            "slow_s": _pick((0.005, 0.1, 1.0), draw),
            "for_s": _pick(SHORT_S, draw),
        },
        _gate_pause,
        often=3,
    ),
    "blackout": Kind(lambda plan, draw: {"down_s": _pick(SHORT_S, draw)}, _blackout, often=2),
}


def draw_faults(plan: Plan, dice: Dice, count: int, over_s: float) -> tuple[Step, ...]:
    """About `count` faults within `over_s` seconds, in the order of their times."""
    draw = dice.stream("atlas")
    may_fail = draw.one_in(
        2
    )  # half of the runs keep all members: the other half would hide what only these show
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
    work = draw_work(plan, dice, operations)
    return replace(plan, work=work, faults=draw_faults(plan, dice, faults, work[-1].at_s + 1.0))


def machine_of(run: Run, args: dict[str, Any]) -> Machine:
    return run.cluster.machines[args["node"]]
