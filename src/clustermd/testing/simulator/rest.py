"""Rest: what must hold once every fault is taken back, and after the last stop; and who waits where it does not come.

At rest every request is answered, every copy equal, every bit clear (unless a member is missing), nobody holds a
window or a takeover, and nodes and superblocks agree on the members. After the stop of an array none of its tasks and
buffers is left, after the last stop no lock. These are functions over a run; what does not hold is told to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clustermd.array.array import Array
from clustermd.testing.simulator.machine import ArrayProcess, Machine
from clustermd.testing.trace.events import Layer

if TYPE_CHECKING:
    from clustermd.testing.simulator.run import Run


def at_rest(run: Run, *, alone: bool = False) -> bool:
    """Whether all are; with `alone`, those whose array process lives."""
    if run.clients.pending or run.deaths.open or any(map(_lost, run.cluster.machines.values())):
        return False
    for machine in run.cluster.machines.values():
        array = machine.array
        if alone and (array is None or not array.process.alive):
            continue
        if array is None or array.array is None or not machine.serving:
            return False
        state = array.array.state
        if state.held or not state.settled or state.unpublished or state.parked:
            return False
        bitmap = state.bitmap
        if bitmap is None or bitmap.unreconciled or state.windows.any or array.submitter.in_flight:
            return False
        if not state.degraded and not bitmap.all_clean:
            return False
        if array.array.resync.status() is not None or tuple(array.array.coordinator.takeovers()):
            return False
    return True


def _lost(machine: Machine) -> list[str]:
    """The nodes whose end its lock daemon waits for: only then does anybody take over what they have left."""
    lockd = machine.lockd
    if lockd is None or not lockd.process.alive:
        return []
    return [node.name for node in lockd.replica._machine.nodes.values() if node.lost]


def check_rest(run: Run) -> None:
    """Members that are in sync are equal and hold what the model says; nodes and disks are of one opinion."""
    watch = run.watch
    if watch.differing:
        words = f"at rest, chunks {sorted(watch.differing)} differ"
        run.broken("members-differ", "9.1", Layer.ARRAY, words, "")
    for place in watch.in_sync:
        run.model.check_disk(f"box{place} at rest", watch.data_of(place))
    owned = set()
    good = sorted(run.cluster.boxes[place].name for place in watch.in_sync)
    powered = {box.name for box in run.cluster.boxes if box.powered}
    for machine in run.cluster.machines.values():
        if machine.array is None or machine.array.array is None or not machine.serving:
            continue
        state = machine.array.array.state
        owned.add(state.slot)
        # that a box has no power is known when somebody asks it for something
        counted = sorted(member.path for member in state.in_sync if member.path in powered)
        if counted != good:
            words = f"{machine.name} counts {counted} as in sync, the superblocks {good}"
            run.broken("roles-differ", "I11", Layer.CLUSTER, words, machine.name)
    left = sorted(set(watch.bits_left()) - owned)
    if left and owned:
        words = f"slots {left} have bits, and nobody who lives owns them"
        run.broken("bits-of-nobody", "I19", Layer.CLUSTER, words, "")


def check_left(run: Run, machine: Machine, array: ArrayProcess) -> None:
    """After its stop an array process has no task and no buffer."""
    tasks = [task.get_name() for task in array.process.tasks if not task.done() and task.get_name() != "stop"]
    if tasks:
        run.broken("tasks-left", "leak", Layer.ARRAY, f"after its stop {tasks} go on", machine.name)
    buffers = array.submitter.memory.out
    if buffers:
        words = f"after its stop {buffers} buffers were never given back"
        run.broken("buffers-left", "leak", Layer.ARRAY, words, machine.name)


def no_locks(run: Run) -> bool:
    """Whether no living lock daemon knows of a lockspace."""
    return not any(
        machine.lockd.replica._machine.engine.spaces
        for machine in run.cluster.machines.values()
        if machine.lockd is not None and machine.lockd.process.alive
    )


def check_stopped(run: Run) -> None:
    """All arrays have stopped: every sector of every member that counts is as the model says, and no bit is set."""
    watch = run.watch
    for place in watch.in_sync:
        run.model.check_disk(f"box{place} after the stop", watch.data_of(place))
    if watch.differing:
        run.broken("members-differ", "9.1", Layer.ARRAY, "after the stop members differ", "")
    left = watch.bits_left()
    if left and len(watch.in_sync) == run.plan.raid_disks:
        run.broken("bits-left", "I19", Layer.ARRAY, f"after all stops slots {sorted(left)} have bits", "")


# --- who waits --------------------------------------------------------------------------------------------------


def who_waits(run: Run, what: str) -> tuple[Layer, str]:
    """Whose fault it most likely is that `what` is not over, and words for whatever stands still."""
    said = []
    layer = Layer.ARRAY
    for machine in run.cluster.machines.values():
        words = _lockd_words(machine) + _array_words(machine)
        said.append(f"{machine.name}: {', '.join(words) or 'at rest'}")
        lockd = machine.lockd
        if lockd is not None and lockd.process.alive and not lockd.replica.installed:
            layer = Layer.LOCK_MANAGER
    if run.clients.pending:
        said.append(f"{len(run.clients.pending)} requests unanswered")
    if run.deaths.open:
        dead = [death.array.machine.name for death in run.deaths.open]
        said.append(f"deaths that not all know of: {dead}")
    return layer, f"{what} is not over after its bound; " + "; ".join(said)


def _lockd_words(machine: Machine) -> list[str]:
    lockd = machine.lockd
    if lockd is None or not lockd.process.alive:
        return ["no lockd"]
    if not lockd.replica.installed:
        return [f"lockd {lockd.replica._phase.value}"]
    return [f"lost: {', '.join(lost)}"] if (lost := _lost(machine)) else []


def _array_words(machine: Machine) -> list[str]:
    process = machine.array
    if process is None or not process.process.alive:
        return ["no array process"]
    if not process.serving:
        words = ["not serving" + (f" ({process.why})" if process.why else "")]
        if process.array is not None:
            words.append(f"held: {process.array.state.held}")
        return words
    return _state_words(process, process.array) if process.array is not None else []


def _state_words(process: ArrayProcess, array: Array) -> list[str]:
    state = array.state
    bitmap = state.bitmap
    table = (
        (state.held, f"held: {state.held}"),
        (not state.settled, "not settled"),
        (state.unpublished, "faults unpublished"),
        (state.parked, f"{len(state.parked)} requests parked"),
        (state.windows.any, f"windows {state.windows.all()}"),
        (process.submitter.in_flight, f"{process.submitter.in_flight} requests in flight"),
        (bitmap is None, "no bitmap"),
        (
            bitmap is not None and bitmap.unreconciled,
            f"{len(bitmap.unreconciled) if bitmap else 0} chunks to copy",
        ),
        (bitmap is not None and not state.degraded and not bitmap.all_clean, "bits left"),
        (tuple(array.coordinator.takeovers()), "takeovers outstanding"),
        (array.resync.status(), f"resync {array.resync.status()}"),
    )
    return [text for wrong, text in table if wrong]
