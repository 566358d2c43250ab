"""What must hold when a round of a storm is over, and when a storm is over.

A round ends with everybody called back: every node serves again, within a bound and without help but `-A`. Then the
load ends, and the disks must tell one story: no bit is set, the halves are equal, every acknowledged write is
there, what clients read since the beginning is one history, the superblocks agree and no member was lost. Nobody
waits for a lock that nobody gives.
"""

from __future__ import annotations

import json
import signal
from random import Random
from typing import Any

from clustermd.errors import Refused
from clustermd.ondisk.superblock import ROLE_LIMIT
from clustermd.testing.disks import all_clear, differing_blocks, look, writers_of
from clustermd.testing.judge import judge, nbd_reader
from clustermd.testing.local_cluster import CommandFailed
from clustermd.testing.nbd_client import NbdClient
from clustermd.testing.register_history import History
from clustermd.testing.storm.arena import Arena, Command, Finding, names, sockets_left
from clustermd.testing.waiting import TimedOut, wait_until

COMMANDS_S = 60.0
SERVE_S = 60.0
LOAD_S = 30.0
CLEAR_S = 40.0
ENOUGH_RECORDS = 100


def await_(arena: Arena, condition: Any, what: str, timeout_s: float) -> None:
    try:
        wait_until(condition, what, timeout_s)
    except TimedOut as error:
        raise Finding(f"{error}\n{state_of(arena)}") from None


def state_of(arena: Arena) -> str:
    """Who runs, and what each node says of itself and of the locks: for a finding."""
    processes = arena.processes()
    lines = [f"{process.role} {process.node} {process.pid}" for process in processes]
    for process in processes:
        if process.role != "sequencer":
            process.send(signal.SIGUSR2)  # writes what its tasks wait for (`inside`)
    for node in arena.nodes:
        try:
            status = node.status()
            lines.append(f"{node.name}: held={status.held!r} sync={status.sync} bitmap={status.bitmap}")
        except Refused as refusal:
            lines.append(f"{node.name}: {refusal}")
        for words in (["locks"],):
            try:
                lines.append(node.run(*words, expect=None, timeout_s=12))
            except CommandFailed as error:
                lines.append(str(error)[:400])
    lines.append(f"dirty: {[look(disk).dirty for disk in arena.disks]}")
    return "\n".join(lines)


def call_back(arena: Arena, dice: Random) -> None:
    """Everybody serves again: what is out comes home, who is down is assembled, in any order, at once or in turn."""
    arena.calm()
    _commands_end(arena)
    order = dice.sample(arena.nodes, len(arena.nodes))
    at_once = dice.random() < 0.5
    tried: dict[str, Command] = {}

    def all_serve() -> bool:
        missing = False
        for node in order:
            out = [command for command in arena.commands if command.node is node]
            if not out and arena.array(node) is None:
                before = tried.get(node.name)
                if before is not None and "already running" not in before.text():
                    raise Finding(f"{before} ended with {before.status}: {before.text()}\n{state_of(arena)}")
                arena.say(f"-A on {node.name}")
                tried[node.name] = arena.assemble(node)
                missing = True
            elif out or not arena.serves(node):
                missing = True
            if missing and not at_once:
                break
        arena.watch_commands()
        return not missing

    await_(arena, all_serve, "every node to serve again", SERVE_S)


def _commands_end(arena: Arena) -> None:
    def over() -> bool:
        arena.watch_commands()
        return not arena.commands

    try:
        await_(arena, over, "commands to end", COMMANDS_S)
    except Finding as finding:
        said = [f"{command}: {command.text()}" for command in arena.commands]
        raise Finding(f"{finding}\nstill out: {'; '.join(said)}") from None


def clients_go_on(arena: Arena) -> None:
    """Each node answers its client, and then the client says goodbye."""
    for node in arena.nodes:
        arena.start_load(node)
    wanted = {node.name: arena.loads[node.name].records + ENOUGH_RECORDS for node in arena.nodes}
    for node in arena.nodes:
        load = arena.loads[node.name]
        await_(
            arena,
            lambda load=load, node=node: load.records >= wanted[node.name] or not load.running,
            f"the client of {node.name} to be served",
            LOAD_S,
        )
        if not load.running:
            raise Finding(f"the client of {node.name} ended in the calm\n{arena.cluster.logs()}")
        load.ask_to_stop()
    for node in arena.nodes:
        arena.take_report(node)


def one_story(arena: Arena) -> None:
    """The disks, when all is quiet."""
    await_(arena, lambda: all_clear(arena.disks), "every bit to be clear", CLEAR_S)
    await_(arena, lambda: all(node.status().sync is None for node in arena.nodes), "copies to end", CLEAR_S)
    if differing := differing_blocks(arena.disks):
        raise Finding(f"the halves differ in blocks {differing[:20]} ({len(differing)})")
    logs = [load.log for load in arena.loads.values()]
    for node in arena.nodes:
        with NbdClient(node.socket()) as client:
            verdict = judge(logs, nbd_reader(client))
        if not verdict.good:
            raise Finding(f"through {node.name}: {verdict}")
    if faults := History.read_from_logs(logs).check(mirrored=True):
        raise Finding("clients saw no one history:\n" + "\n".join(map(str, faults[:5])))
    disks = [look(disk) for disk in arena.disks]
    events = {disk.superblock.events for disk in disks}
    roles = {tuple(role for role in disk.superblock.dev_roles if role < ROLE_LIMIT) for disk in disks}
    if len(events) > 1 or roles != {tuple(range(arena.plan.members))}:
        raise Finding(f"the superblocks tell different stories: events {events}, roles {roles}")
    for disk in disks:
        if any(slot.header is None for slot in disk.slots):
            raise Finding(f"{disk.path}: a slot's bitmap has no valid superblock")
    for node in arena.nodes:
        status = node.status()
        if status.degraded or any(member.faulty or not member.in_sync for member in status.members):
            raise Finding(f"{node.name} has lost a member: {status.members}")
        if status.events not in events:
            raise Finding(f"{node.name} is at event {status.events}, the disks at {events}")


def nobody_waits(arena: Arena) -> None:
    """One process of each kind, no lock waited for, no slot of a dead node."""
    roles = sorted(f"{process.role} {process.node}" for process in arena.processes())
    wanted = ["sequencer "] + [f"{role} {node.name}" for role in ("array", "lockd") for node in arena.nodes]
    if roles != sorted(wanted):
        raise Finding(f"these processes run: {', '.join(roles)}")
    if ends := arena.unasked_ends():
        raise Finding(f"nobody asked these to end: {names(ends)} ({[end.pid for end in ends]})")

    def settled() -> bool:
        for node in arena.nodes:
            locks = json.loads(node.run("locks", "--json"))["locks"]
            spaces = locks["replica"]["lockspaces"].values()
            for space in spaces:
                seats = [seat["state"] for seat in space["slots"]]
                waits = [lock for r in space["resources"].values() for lock in r["converting"] + r["waiting"]]
                if seats != ["member"] * len(arena.nodes) or waits or space["joining"]:
                    return False
            if len(spaces) != 1:
                return False
        return True

    await_(arena, settled, "the locks to come to rest", 10.0)


def nothing_left(arena: Arena, dice: Random) -> None:
    """Every node stops; daemons that nobody needs end by themselves; then there is nothing."""
    out: list[Command] = []
    for node in dice.sample(arena.nodes, len(arena.nodes)):
        process = arena.array(node)
        assert process is not None
        arena.excused.add(process.pid)
        out.append(arena.command(node, "-S", "md0"))
        if dice.random() < 0.5:
            _commands_end(arena)
    _commands_end(arena)
    if failed := [f"{command}: {command.text()}" for command in out if command.status]:
        raise Finding(f"the array cannot be stopped: {'; '.join(failed)}")
    await_(arena, lambda: not arena.processes(), "the daemons to end", 4 * arena.plan.linger_s + 10)
    if ends := arena.unasked_ends():
        raise Finding(f"not a clean end: {names(ends)} ({[end.pid for end in ends]})")
    if left := sockets_left(arena.cluster.run_directory) + arena.cluster.leftovers():
        raise Finding(f"left over: {left}")
    if held := [disk for disk in arena.disks if writers_of(disk)]:
        raise Finding(f"locks are left on {held}")
    if not all_clear(arena.disks) or differing_blocks(arena.disks):
        raise Finding("bits or differences are left after the stop")
