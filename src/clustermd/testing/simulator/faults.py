"""What each fault does to a run. `atlas.KINDS` says how it is drawn; a docstring's `Limit` keeps the run survivable.

A fault is a function of the run and the values that were drawn. One that means a machine, path or array process that
is not there at its time does nothing. Whatever ends by itself says when as it begins; `take_back_all` ends the others.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clustermd.device.member_device import Op
from clustermd.testing.simulator.boxes import Box, Path, Trouble
from clustermd.testing.simulator.machine import Lockd, Machine

if TYPE_CHECKING:
    from clustermd.testing.simulator.run import Run

MISSED_DETECT_S = 0.001
MISSED_DOWN_S = 1.0
CLEAN_STOP_S = 1.0
BLACKOUT_DETECT_S = 0.01


# --- machines and processes ---------------------------------------------------------------------------------


def kill(run: Run, args: dict[str, Any]) -> None:
    """A machine loses power; it comes back. Limit: none, all may be down at once, quorum comes back with them."""
    machine = run.cluster.machines[args["node"]]
    if machine.up:
        run.cluster.kill(machine, args["detect_s"])
        run.later(args["down_s"], start, run, machine)


def kill_array(run: Run, args: dict[str, Any]) -> None:
    """SIGKILL of the array process alone; somebody starts it again."""
    machine = run.cluster.machines[args["node"]]
    if machine.array is not None and machine.array.process.alive and not machine.paused:
        run.cluster.kill_array(machine)
        run.later(args["down_s"], _start_array, run, machine)


def kill_lockd(run: Run, args: dict[str, Any]) -> None:
    """SIGKILL of the lock daemon; the array process lives on without membership until a new one is there."""
    machine = run.cluster.machines[args["node"]]
    if machine.up and not machine.paused:
        run.cluster.kill_lockd(machine, args["detect_s"])
        run.later(args["down_s"], _start_lockd, run, machine)


def kill_at(run: Run, args: dict[str, Any]) -> None:
    """A machine loses power exactly at a step of the protocol, the next time some machine comes there."""
    run.ambush.waits.append(Wait(args["point"], args["skip"], args["down_s"], args["detect_s"]))


@dataclass(slots=True, eq=False)
class Wait:
    """A `kill-at` that has not come about: so many more machines may pass the point before one dies there."""

    point: str
    skip: int
    down_s: float
    detect_s: float


class Ambush:
    """Every `kill-at` that waits for a machine to come to its point."""

    def __init__(self, run: Run) -> None:
        self.waits: list[Wait] = []
        self._run = run

    def passed(self, machine: Machine, name: str) -> None:
        """`machine` is at the point `name`: one of those that wait may strike."""
        for wait in self.waits:
            if wait.point != name:
                continue
            if wait.skip:
                wait.skip -= 1
                continue
            self.waits.remove(wait)
            self._run.faults["kill-at " + name] += 1
            self._run.cluster.kill(machine, wait.detect_s)
            self._run.later(wait.down_s, start, self._run, machine)
            return


def stop(run: Run, args: dict[str, Any]) -> None:
    """A clean stop, and a start after it. With `leave`, the lock daemon says goodbye as well."""
    machine = run.cluster.machines[args["node"]]

    def stopped() -> None:
        if args["leave"] and run.playing:
            run.cluster.leave(machine)
        run.later(args["down_s"], start, run, machine)

    if machine.serving and not machine.paused:
        run.cluster.stop_array(machine, stopped)


def pause(run: Run, args: dict[str, Any]) -> None:
    """A machine stands still (SIGSTOP, a stalled hypervisor). The group gives it up after a while. One that slept
    through its own exclusion goes on for a while, too. Limit: before anybody relies on its end it is killed, or fenced
    at the boxes."""
    machine = run.cluster.machines[args["node"]]
    if machine.up and not machine.paused:
        run.cluster.pause(machine, args["detect_s"])
        if run.plan.durable:
            run.later(args["detect_s"], _miss, run, machine, machine.lockd)
        run.later(args["for_s"], _resume, run, machine, machine.lockd)


def _miss(run: Run, machine: Machine, lockd: Lockd | None) -> None:
    """The sequencer gives a paused machine up."""
    if machine.paused and machine.lockd is lockd:
        # its sequencer kills what owes it an answer
        run.cluster.kill(machine, MISSED_DETECT_S)
        run.later(MISSED_DOWN_S, start, run, machine)


def _resume(run: Run, machine: Machine, lockd: Lockd | None) -> None:
    if machine.paused and machine.lockd is lockd:
        run.cluster.resume(machine)


# --- starting again -------------------------------------------------------------------------------------------


def start(run: Run, machine: Machine) -> None:
    """Machine, lock daemon and array process, as far as they are down and may start now."""
    if not machine.paused and _may_start(run, machine):
        run.cluster.start(machine)


def _start_array(run: Run, machine: Machine) -> None:
    if machine.up and not machine.paused and _may_start(run, machine):
        run.cluster.start_array(machine)


def _start_lockd(run: Run, machine: Machine) -> None:
    if not machine.paused and _lockd_may_start(run, machine):
        run.cluster.start_lockd(machine)


def _may_start(run: Run, machine: Machine) -> bool:
    array = machine.array
    return run.cluster.restarts and (run.restarting or (array is not None and array.process.alive))


def _lockd_may_start(run: Run, machine: Machine) -> bool:
    """Where machines meet by corosync it is a service of the machine, whatever needs it."""
    return _may_start(run, machine) or (machine.powered and not run.plan.durable)


# --- the group ------------------------------------------------------------------------------------------------


def freeze(run: Run, args: dict[str, Any]) -> None:
    """The sequencer dies: nobody may act until there is a new one. Limit: it comes back."""
    group = run.cluster.group
    if group is not None and not group.frozen:
        group.freeze()
        run.later(args["for_s"], run.cluster.thaw)


def partition(run: Run, args: dict[str, Any]) -> None:
    """Some nodes do not hear the others. Limit: it heals."""
    run.cluster.cut_off(set(args["cut_off"]))
    run.later(args["for_s"], run.cluster.heal, set(args["cut_off"]))


def kill_corosync(run: Run, args: dict[str, Any]) -> None:
    """SIGKILL of corosync: its lock daemon and the memberships of its arrays end with it. Limit: it is started
    again."""
    machine = run.cluster.machines[args["node"]]
    if machine.powered and not machine.paused:
        run.cluster.kill_corosync(machine, args["detect_s"])
        run.later(args["down_s"], run.cluster.start_corosync, machine)


def stop_corosync(run: Run, args: dict[str, Any]) -> None:
    """A clean stop of corosync below a lock daemon that works. Limit: it is started again."""
    machine = run.cluster.machines[args["node"]]
    if machine.powered and not machine.paused:
        run.cluster.stop_corosync(machine)
        run.later(args["down_s"] + CLEAN_STOP_S, run.cluster.start_corosync, machine)


def pause_lockd(run: Run, args: dict[str, Any]) -> None:
    """A lock daemon stands still; corosync, its arrays and their locks do not. Limit: it goes on, or the others have
    its corosync ended."""
    machine = run.cluster.machines[args["node"]]
    lockd = machine.lockd
    if lockd is not None and machine.up and not machine.paused and not lockd.process.paused:
        run.loop.pause(lockd.process)
        run.later(args["for_s"], _resume_lockd, run, lockd)


def _resume_lockd(run: Run, lockd: Lockd) -> None:
    if lockd.process.paused and not lockd.machine.paused:
        run.loop.resume(lockd.process)


def pause_corosync(run: Run, args: dict[str, Any]) -> None:
    """corosync stands still, and finds itself alone when it goes on. Limit: it goes on."""
    totem = run.cluster.totem
    if totem is not None and not run.cluster.machines[args["node"]].paused:
        totem.pause(args["node"], args["detect_s"])
        run.later(args["for_s"], _resume_corosync, run, args["node"])


def _resume_corosync(run: Run, node: int) -> None:
    if run.cluster.totem is not None and not run.cluster.machines[node].paused:
        run.cluster.totem.resume(node)


def slow_group(run: Run, args: dict[str, Any]) -> None:
    """One node hears everything late."""
    lockd = run.cluster.machines[args["node"]].lockd
    if lockd is not None:
        lockd.port.set_slow(args["slow_s"])
        run.later(args["for_s"], lockd.port.set_slow, 0.0)


# --- disks ------------------------------------------------------------------------------------------------------


def _paths(run: Run, box: int, node: int | None = None) -> list[Path]:
    """The living ways to a box."""
    found = []
    for number, machine in run.cluster.machines.items():
        if node is None or number == node:
            array = machine.array
            if array is not None and array.process.alive:
                found.append(array.paths[box])
    return found


def _trouble(run: Run, args: dict[str, Any], trouble: Trouble) -> None:
    for path in _paths(run, args["box"], args.get("node")):
        path.troubles.append(replace(trouble))
        if args.get("for_s"):
            run.later(args["for_s"], _well, run, path)


def _well(run: Run, path: Path) -> None:
    path.troubles.clear()
    _release(run, path)


def _release(run: Run, path: Path) -> None:
    """What is stuck on this way goes on."""
    for machine in run.cluster.machines.values():
        if machine.array is not None and path in machine.array.paths:
            machine.array.submitter.release(path)


def slow(run: Run, args: dict[str, Any]) -> None:
    """A box is slow for one node, less than what counts as no answer."""
    _trouble(run, args, Trouble(slow_s=args["slow_s"]))


def stuck(run: Run, args: dict[str, Any]) -> None:
    """A box answers one node not at all for a while; what it owes lands late. Limit: a victim, since a time-out fails
    it."""
    _trouble(run, args, Trouble(ops=(Op.WRITE, Op.READ, Op.FLUSH, Op.DISCARD), stuck=True))


def write_error(run: Run, args: dict[str, Any]) -> None:
    """Writes of one node fail, before or after some sectors have landed. Limit: a victim."""
    _trouble(
        run,
        args,
        Trouble(ops=(Op.WRITE,), error=errno.EIO, after=args["after"], times=args["times"]),
    )


def flush_error(run: Run, args: dict[str, Any]) -> None:
    """A flush fails: what it should have covered is in doubt, the member is failed. Limit: a victim."""
    _trouble(run, args, Trouble(ops=(Op.FLUSH,), error=errno.EIO, times=1))


def bad_sectors(run: Run, args: dict[str, Any]) -> None:
    """Latent read errors in the data, until they are written. Limit: on victims only, and few enough to be repaired."""
    box = run.cluster.boxes[args["box"]]
    first = run.cluster.plan.data_offset_sectors + args["at"]
    box.bad_sectors.update(range(first, min(first + args["sectors"], box.size_sectors)))


def lost_path(run: Run, args: dict[str, Any]) -> None:
    """One node loses its way to a box, the others keep theirs. Limit: a victim; the path comes back at the end."""
    machine = run.cluster.machines[args["node"]]
    name = run.cluster.boxes[args["box"]].name
    machine.lost_paths.add(name)
    for path in _paths(run, args["box"], args["node"]):
        path.lost_path = True
        _release(run, path)


def box_power(run: Run, args: dict[str, Any]) -> None:
    """One box loses power, with what nothing had covered. Limit: a victim, and it does not come back; in the end every
    node that serves uses it once, for where nobody has noticed, who starts is told that others use it."""
    box: Box = run.cluster.boxes[args["box"]]
    if not box.powered:
        return
    box.powered = False
    box.lose_power()
    run.watch.read_again()
    for path in _paths(run, args["box"]):  # what was on its way there fails
        _release(run, path)


def gate_pause(run: Run, args: dict[str, Any]) -> None:
    """Requests that have passed the gate take their time to the medium. Limit: less than what counts as no answer."""
    array = run.cluster.machines[args["node"]].array
    if array is not None and array.process.alive:
        array.submitter.pause_s = args["slow_s"]
        run.later(args["for_s"], setattr, array.submitter, "pause_s", 0.0)


def blackout(run: Run, args: dict[str, Any]) -> None:
    """All machines and all boxes lose power at once and come back. Limit: what flush and FUA covered must be there."""
    for machine in run.cluster.machines.values():
        run.cluster.kill(machine, BLACKOUT_DETECT_S)
        if machine.array is not None:
            machine.array.submitter.cut_off()
    for box in run.cluster.boxes:
        box.lose_power()
    run.model.power_lost()
    run.watch.read_again()
    for machine in run.cluster.machines.values():
        run.later(args["down_s"], start, run, machine)


# --- the end of them ----------------------------------------------------------------------------------------------


def take_back_all(run: Run) -> None:
    """Partitions heal, who is paused goes on, ways to boxes are well again; what is without power stays so."""
    cluster = run.cluster
    cluster.mended = True
    run.ambush.waits.clear()
    cluster.thaw()
    for machine in cluster.machines.values():
        if machine.paused:
            cluster.resume(machine)
        if cluster.totem is not None and machine.powered:
            cluster.totem.resume(machine.number)
            cluster.start_corosync(machine)
        if machine.lockd is not None:
            _resume_lockd(run, machine.lockd)
    cluster.heal(set(cluster.machines))
    for machine in cluster.machines.values():
        machine.lost_paths.clear()
        if machine.lockd is not None:
            machine.lockd.port.set_slow(0.0)
        array = machine.array
        if array is not None:
            array.submitter.pause_s = 0.0
            for path in array.paths:
                path.lost_path = False
                path.troubles.clear()
                array.submitter.release(path)
