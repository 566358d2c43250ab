"""The atlas of faults: what may happen in a storm. Any mixture is survivable, so any loss is ours.

A fault is a function of the arena and the dice. It does something and returns; what takes time goes on beside
it (held processes, commands), so that the next fault may come in the middle. Disks do not fail here: that
no member is lost, whatever dies, is one of the things to be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from clustermd.testing.local_cluster import Node, Process
from clustermd.testing.storm.arena import Arena, names

Fault = Callable[[Arena, Random], None]

QUICK_S = 8.0
"""In that time `locks` and `-D` must have said something: they wait 5 s for a process that does not answer."""

_DIFFER_SHARE = 0.6
_SLOW_KIB_S = (200, 1000, 4000)


def _kill(arena: Arena, dice: Random, victims: list[Process]) -> None:
    if not victims:
        return
    differ = dice.random() < _DIFFER_SHARE
    arena.say(f"SIGKILL {names(victims)}{', halves made to differ' if differ else ''}")
    arena.kill(victims, differ)


def _running(arena: Arena) -> list[Node]:
    return [node for node in arena.nodes if arena.array(node) is not None]


def _some_node(arena: Arena, dice: Random) -> Node:
    return dice.choice(_running(arena) or arena.nodes)


def kill_array(arena: Arena, dice: Random) -> None:
    _kill(arena, dice, arena.processes(_some_node(arena, dice), "array"))


def kill_lockd(arena: Arena, dice: Random) -> None:
    _kill(arena, dice, arena.processes(_some_node(arena, dice), "lockd"))


def kill_sequencer(arena: Arena, dice: Random) -> None:
    _kill(arena, dice, arena.processes(role="sequencer"))


def kill_node(arena: Arena, dice: Random) -> None:
    _kill(arena, dice, arena.processes(_some_node(arena, dice)))


def kill_node_and_sequencer(arena: Arena, dice: Random) -> None:
    _kill(arena, dice, arena.processes(_some_node(arena, dice)) + arena.processes(role="sequencer"))


def kill_two_nodes(arena: Arena, dice: Random) -> None:
    running = _running(arena)
    chosen = dice.sample(running, min(2, len(running)))
    _kill(arena, dice, [process for node in chosen for process in arena.processes(node)])


def kill_any_two(arena: Arena, dice: Random) -> None:
    """Any two processes: a lockd here and an array there, two lockds, ..."""
    running = arena.processes()
    _kill(arena, dice, dice.sample(running, min(2, len(running))))


def kill_all(arena: Arena, dice: Random) -> None:
    _kill(arena, dice, arena.processes())


def kill_copier(arena: Arena, dice: Random) -> None:
    """Copies crawl, a node dies, and a while later whoever copies for it dies as well."""
    speed = dice.choice(_SLOW_KIB_S)
    arena.say(f"copies are limited to {speed} KiB/s")
    for node in arena.nodes:
        arena.limit_speed(node, min(speed, 1000), speed)
    kill_node(arena, dice)

    def copier_dies() -> None:
        for node in _running(arena):
            if (mdstat := node.rundir.node_dir / "mdstat").exists() and "resync = " in mdstat.read_text():
                _kill(arena, dice, arena.processes(node, dice.choice(("array", "lockd", None))))
                return
        arena.say("  nobody copies")

    arena.later(dice.uniform(0.1, 2.0), "the copier is to die", copier_dies)


def leave_copies(arena: Arena, dice: Random) -> None:
    """Copies crawl, a node dies, and a while later whoever copies for it leaves, or all do."""
    for node in arena.nodes:
        arena.limit_speed(node, 1000, dice.choice(_SLOW_KIB_S))
    kill_node(arena, dice)
    arena.pass_time(dice.uniform(0.0, 1.5))
    leavers = _running(arena)
    for node in leavers if dice.random() < 0.3 else leavers[:1]:
        _leave(arena, node, force=True)


def look_closely(arena: Arena, dice: Random) -> None:
    arena.say("looking at the disks")
    arena.look_closely()


def stand_still(arena: Arena, dice: Random) -> None:
    """One process, a node, or the sequencer, for a moment or for too long."""
    kinds = [arena.processes(role="sequencer"), arena.processes()]
    node = _some_node(arena, dice)
    kinds += [arena.processes(node), arena.processes(node, "array"), arena.processes(node, "lockd")]
    chosen = [process for process in dice.choice(kinds) if process.pid not in arena.stopped]
    too_long = dice.random() < 0.4
    unresponsive_s = arena.plan.unresponsive_s
    seconds = unresponsive_s + dice.uniform(0.2, 2.5) if too_long else dice.uniform(0.02, unresponsive_s / 3)
    if chosen:
        arena.say(f"SIGSTOP {names(chosen)} for {seconds:.2f} s")
        arena.hold(chosen, seconds)


def leave(arena: Arena, dice: Random) -> None:
    """A node stops the array; it may come back soon."""
    node = _some_node(arena, dice)
    force = dice.random() < 0.5
    if not force:
        arena.ask_load_to_stop(node)
        arena.pass_time(dice.uniform(0.0, 0.5))
    _leave(arena, node, force)
    if dice.random() < 0.6:
        arena.later(dice.uniform(0.0, 2.0), f"-A on {node.name}", lambda: _join(arena, node))


def _leave(arena: Arena, node: Node, force: bool) -> None:
    process = arena.array(node)
    if process is not None:
        arena.excused.add(process.pid)
    arena.say(f"-S on {node.name}{' by force' if force else ''}")
    arena.command(node, "-S", "md0", *(["--force"] if force else []))


def _join(arena: Arena, node: Node) -> None:
    arena.assemble(node)


def join(arena: Arena, dice: Random) -> None:
    """A node that is down comes back."""
    down = [node for node in arena.nodes if arena.array(node) is None]
    if down:
        node = dice.choice(down)
        arena.say(f"-A on {node.name}")
        _join(arena, node)


def rejoin(arena: Arena, dice: Random) -> None:
    """A node, or only its array, dies and comes back at once."""
    node = _some_node(arena, dice)
    _kill(arena, dice, arena.processes(node, dice.choice(("array", None))))
    arena.say(f"-A on {node.name}")
    _join(arena, node)


def death_in_join(arena: Arena, dice: Random) -> None:
    """A node goes, comes back, and in the middle of its join something dies: it, its starter, or somebody else."""
    node = _some_node(arena, dice)
    _kill(arena, dice, arena.processes(node, dice.choice(("array", None))))
    arena.pass_time(dice.uniform(0.0, 0.5))
    arena.say(f"-A on {node.name}")
    command = arena.assemble(node)
    arena.pass_time(dice.uniform(0.0, 1.2))
    what = dice.choice(("starter", "array", "node", "sequencer", "other node", "other array", "other lockd"))
    others = [other for other in _running(arena) if other is not node]
    other = dice.choice(others or [node])
    if what == "starter":
        arena.say(f"SIGKILL -A of {node.name}")
        command.program.kill()
        process = arena.array(node)
        if process is not None:
            arena.excused.add(process.pid)
    elif what == "sequencer":
        _kill(arena, dice, arena.processes(role="sequencer"))
    elif what.startswith("other"):
        role = what.partition(" ")[2]
        _kill(arena, dice, arena.processes(other, None if role == "node" else role))
    else:
        _kill(arena, dice, arena.processes(node, None if what == "node" else "array"))


def ask(arena: Arena, dice: Random) -> None:
    """Somebody wants to know what goes on."""
    node = dice.choice(arena.nodes)
    arena.command(node, *dice.choice((["locks"], ["-D", "md0"], ["locks", "--json"])), bound_s=QUICK_S)


def wait_for_sync(arena: Arena, dice: Random) -> None:
    arena.command(_some_node(arena, dice), "-W", "md0")


def slow_copies(arena: Arena, dice: Random) -> None:
    node = dice.choice(arena.nodes)
    speed = dice.choice(_SLOW_KIB_S)
    arena.say(f"copies of {node.name} are limited to {speed} KiB/s")
    arena.limit_speed(node, min(speed, 1000), speed)


def more_load(arena: Arena, dice: Random) -> None:
    """Clients come back to every node that serves."""
    for node in _running(arena):
        held = any(process.pid in arena.stopped for process in arena.processes(node))
        if not held and arena.serves(node):
            arena.start_load(node)


_POINTS: dict[Fault, tuple[str, ...]] = {
    kill_node: (
        "array.lost", "cluster.lost", "dlm.start", "dlm.install", "dlm.fenced", "group.view", "group.fenced",
        "takeover.locked", "takeover.read", "takeover.merged", "takeover.own_stable", "takeover.source_cleared",
        "takeover.done", "metadata.token", "metadata.write", "metadata.written", "send.begin", "send.written",
        "send.acknowledged", "send.done", "recv.message", "recv.processed", "recv.done", "resync.right",
        "resync.begin", "resync.window", "resync.copied", "resync.finished", "resync.settled", "bitmap.flush",
        "bitmap.stable", "sweep.cleared",
    ),
    rejoin: (
        "group.view", "dlm.install", "join.member", "join.slot", "slot.loaded", "join.gathered", "array.serving",
        "takeover.read", "takeover.merged", "takeover.own_stable", "takeover.source_cleared", "metadata.token",
        "metadata.write", "metadata.written", "send.written", "send.acknowledged", "recv.message",
        "recv.processed",
    ),
    kill_sequencer: ("group.frozen", "dlm.freeze", "dlm.start", "dlm.install", "group.view", "dlm.apply"),
    leave: ("leave.announced", "leave.done", "sweep.cleared", "send.written", "recv.message", "takeover.locked",
            "takeover.merged", "resync.finished"),
}  # fmt: skip
"""What makes processes pass which points."""


def at_a_point(arena: Arena, dice: Random) -> None:
    """Something happens, and in the middle of a step of what follows a process stands still: and dies, or goes on
    late, or goes on after others have died."""
    cause = dice.choice(list(_POINTS))
    point = dice.choice(_POINTS[cause])
    node = dice.choice(arena.nodes) if dice.random() < 0.25 else None
    skip = dice.choice((0, 0, 0, 0, 0, 1, 1, 4))
    arena.say(f"to stop at {point}, {'anywhere' if node is None else node.name}, after {skip} times")
    arena.stop_at(point, node, skip)
    cause(arena, dice)
    stopped = arena.stopped_at_point()
    for _ in range(10):
        if stopped is None:
            arena.pass_time(0.3)
            stopped = arena.stopped_at_point()
    if stopped is None:
        arena.forget_point()
        return
    others = [process for process in arena.processes() if process.node != stopped.node]
    what = dice.choice(
        ("die", "die", "node dies", "other dies", "other dies", "both die", "sequencer dies", "late", "go on")
    )
    arena.say(f"{names([stopped])} stands still at {point}: {what}")
    if what == "late":
        arena.hold([stopped], arena.plan.unresponsive_s + dice.uniform(0.2, 2.0))
        return
    if what in ("die", "both die"):
        victims = [stopped] + (dice.sample(others, 1) if what == "both die" and others else [])
        _kill(arena, dice, victims)
    elif what == "node dies":
        _kill(arena, dice, [process for process in arena.processes() if process.node == stopped.node])
    elif what == "other dies" and others:
        other = dice.choice(others)
        whole = dice.random() < 0.5
        _kill(
            arena, dice, [process for process in others if process.node == other.node] if whole else [other]
        )
    elif what == "sequencer dies":
        _kill(arena, dice, arena.processes(role="sequencer"))
    arena.pass_time(dice.uniform(0.0, 0.6))
    arena.let_go([stopped])


ATLAS: tuple[tuple[Fault, int], ...] = (
    (kill_array, 6),
    (kill_lockd, 6),
    (kill_sequencer, 6),
    (kill_node, 8),
    (kill_node_and_sequencer, 3),
    (kill_two_nodes, 3),
    (kill_any_two, 4),
    (kill_all, 2),
    (kill_copier, 4),
    (leave_copies, 4),
    (look_closely, 8),
    (stand_still, 10),
    (leave, 7),
    (join, 10),
    (rejoin, 4),
    (death_in_join, 7),
    (at_a_point, 24),
    (ask, 10),
    (wait_for_sync, 3),
    (slow_copies, 3),
    (more_load, 8),
)


def draw(dice: Random) -> Fault:
    """The next fault."""
    faults, weights = zip(*ATLAS, strict=True)
    fault: Fault = dice.choices(faults, weights)[0]
    return fault


def gap_s(dice: Random) -> float:
    """How long until the next one: often no longer than a takeover takes."""
    return dice.uniform(0.0, 0.3) if dice.random() < 0.6 else dice.uniform(0.3, 3.0)
