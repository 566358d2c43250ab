"""A simulated cluster: boxes, machines, their group, and who proves the ends of the lost.

Every fault is a method here; what they may do to each other is the atlas's business. The proof of an end follows
`group/proof.py`: a member that is lost is fenced when nothing of its array process can land any more. One that does not
come to that by itself is killed after `fence_after_s`, and where the plan has storage fencing, cut off from the boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clustermd.ondisk.create import BitmapKind, NewMember, plan_create
from clustermd.testing.simulator.boxes import Box, Watcher
from clustermd.testing.simulator.clock import SimClock
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Crashed, Process, SimLoop
from clustermd.testing.simulator.machine import ArrayProcess, Lockd, Machine
from clustermd.testing.simulator.order import Port, SimGroup
from clustermd.testing.simulator.plan import Plan

PROOF_POLL_S = 0.02
AUDIT_S = 2.0
GRACE_S = (0.01, 0.5, 3.0, 9.0)
"""How long an excluded process goes on before somebody ends it."""
RESTART_S = 0.2
START_AGAIN_S = 1.0

Listener = Callable[[Machine, str, dict[str, Any]], None]


class SimCluster:
    """See the module. `point(...)` tells `listener` of every trace point that a living process passes."""

    def __init__(self, plan: Plan, dice: Dice, loop: SimLoop, watcher: Watcher, listener: Listener) -> None:
        self.plan = plan
        self.dice = dice
        self.loop = loop
        self.clock = SimClock(loop)
        self.watcher = watcher
        self.listener = listener
        self.pipes = dice.stream("pipes")
        self.fate = dice.stream("cluster")
        self.group = SimGroup(loop, dice, plan.nodes, durable=plan.durable)
        self.group.on_state_lost = self._state_lost
        self.group.on_lost = lambda: loop.later(0.0, self.watch_lost)
        self.boxes = [
            Box(f"box{number}", plan.data_offset_sectors + plan.array_sectors, dice, watcher)
            for number in range(plan.members)
        ]
        self.machines = {number: Machine(self, number) for number in range(1, plan.nodes + 1)}
        self.on_started: Callable[[ArrayProcess], None] = lambda array: None
        self.on_gone: Callable[[ArrayProcess], None] = lambda array: None
        self.on_ended: Callable[[ArrayProcess], None] = lambda array: None  # proved, however it came
        # alive, and the boxes refuse it
        self.on_excluded: Callable[[ArrayProcess], None] = lambda array: None
        self.restarts = True
        self._cut: set[int] = set()
        self._incarnation = 0
        self._serial = 0
        self._arrays: list[ArrayProcess] = []
        self._graves: list[Process] = []
        self._format()
        self.loop.later(AUDIT_S, self.audit)

    def _format(self) -> None:
        plan = self.plan
        made = plan_create(
            devices=[NewMember(box.name, box.size_sectors) for box in self.boxes],
            raid_disks=plan.raid_disks,
            name="md0",
            set_uuid=b"U" * 16,
            device_uuids=[bytes([number + 1]) * 16 for number in range(len(self.boxes))],
            now=1_700_000_000,
            bitmap=BitmapKind.CLUSTERED,
            nodes=plan.slots,
            cluster_name="simulated",
            bitmap_chunk_bytes=plan.chunk_bytes,
            daemon_sleep=plan.daemon_sleep_s,
            assume_clean=True,
            minor=2,
            data_offset_sectors=plan.data_offset_sectors,
        )
        for box, member in zip(self.boxes, made.members, strict=True):
            for sector, content in member.writes:
                box.data[sector * 512 : sector * 512 + len(content)] = content

    # --- points -----------------------------------------------------------------------------------------

    def point(self, machine: Machine, process: Process, name: str, fields: dict[str, Any]) -> None:
        if not process.alive:
            return
        array = machine.array
        if array is not None and array.excluded and process is array.process:
            return  # what it believes counts for nobody
        self.listener(machine, name, fields)
        if not process.alive:
            raise Crashed(name)

    # --- machines ----------------------------------------------------------------------------------------

    def start_lockd(self, machine: Machine) -> None:
        if machine.up:
            return
        self._incarnation += 1
        machine.lockd = Lockd(machine, self._incarnation)
        self.group.join(machine.lockd.port)

    def start_array(self, machine: Machine) -> None:
        if machine.array is not None and machine.array.process.alive:
            return
        self._serial += 1
        machine.array = ArrayProcess(machine, self._serial)
        self._arrays.append(machine.array)

    def start(self, machine: Machine) -> None:
        machine.powered = True
        self.start_lockd(machine)
        self.start_array(machine)

    def array_not_started(self, array: ArrayProcess) -> None:
        """The start was refused; an operator tries again."""
        self._end_process(array.process)
        self.on_gone(array)
        if self.restarts:
            self.loop.later(START_AGAIN_S, self._start_array_if_up, array.machine)

    def _start_array_if_up(self, machine: Machine) -> None:
        if machine.powered and not machine.paused and self.restarts:
            self.start(machine)  # whoever needs a lock daemon starts it

    def stop_array(self, machine: Machine, then: Callable[[], None]) -> None:
        """A clean stop of the array; its lock daemon stays."""
        array = machine.array
        if array is None or not array.process.alive or array.stopping:
            return

        def done() -> None:
            self.loop.later(0.0, finished)

        def finished() -> None:
            self._end_process(array.process)
            self.on_gone(array)
            then()

        array.stop(done)

    def leave(self, machine: Machine) -> None:
        """The lock daemon of a machine whose array is stopped says goodbye."""
        lockd = machine.lockd
        if lockd is None or not lockd.process.alive or lockd.sessions:
            return
        self._end_process(lockd.process)
        self.group.leave(lockd.port)

    # --- deaths ---------------------------------------------------------------------------------------------

    def kill_array(self, machine: Machine) -> None:
        array = machine.array
        if array is None or not array.process.alive:
            return
        self._end_process(array.process)
        array.killed = True
        if array.broken_s < 0:
            array.broken_s = self.loop.time()
        array.submitter.process_died(self.plan.late_s)
        for link in array.links:
            link.array_died()
        self.on_gone(array)

    def kill_lockd(self, machine: Machine, detect_s: float) -> None:
        """Its sessions end at once, its death is noticed after `detect_s`."""
        lockd = machine.lockd
        if lockd is None or not lockd.process.alive:
            return
        self._end_process(lockd.process)
        for attached in lockd.sessions.values():
            for link in attached.array.links:
                if link._lockd is lockd:
                    link.lockd_died()
            if attached.array.broken_s < 0:
                attached.array.broken_s = self.loop.time()
        self.loop.later(detect_s, self._lost, lockd)

    def kill(self, machine: Machine, detect_s: float) -> None:
        """The machine loses power."""
        machine.powered = False
        self.kill_array(machine)
        self.kill_lockd(machine, detect_s)
        machine.paused = False

    def lockd_over(self, lockd: Lockd, reason: str) -> None:
        """A lock daemon ends by itself: its state belongs to no history that goes on. It is started anew."""
        machine = lockd.machine
        self.kill_lockd(machine, 0.001)
        self.loop.later(RESTART_S, self._start_lockd_again, machine)

    def _start_lockd_again(self, machine: Machine) -> None:
        if self.restarts and machine.powered:
            self.start_lockd(machine)

    def pause(self, machine: Machine) -> None:
        """The whole machine stands still; its requests on the way go on."""
        machine.paused = True
        for process in machine.processes():
            self.loop.pause(process)

    def resume(self, machine: Machine) -> None:
        machine.paused = False
        for process in machine.processes():
            if process.paused:
                self.loop.resume(process)

    def _end_process(self, process: Process) -> None:
        if process.alive:
            process.alive = False
            process.paused = False
            self._graves.append(process)
            self.loop.later(0.0, self._bury, process)

    def _bury(self, process: Process) -> None:
        for array in self._arrays:
            if array.process is process:
                process.context.copy().run(array.let_go)
        self.loop.bury(process)

    # --- being lost and fenced ---------------------------------------------------------------------------------

    def _state_lost(self, port: Port) -> None:
        """Most of those that kept the state of the lock manager are gone: what is left of it counts no more."""
        for machine in self.machines.values():
            lockd = machine.lockd
            if lockd is not None and lockd.port is port and lockd.process.alive:
                self.loop.later(RESTART_S, self._over_if_alone, lockd)

    def _over_if_alone(self, lockd: Lockd) -> None:
        component = lockd.port.component
        if lockd.process.alive and (component is None or not component.quorate):
            self.lockd_over(lockd, "the majority that knew the state of the locks is gone")

    def _lost(self, lockd: Lockd) -> None:
        self.group.lose(lockd.port)

    def cut_off(self, numbers: set[int]) -> None:
        """These nodes and the others do not hear each other any more."""
        self._cut |= numbers
        self.group.partition(self._cut)

    def heal(self, numbers: set[int]) -> None:
        """They hear each other again."""
        if self._cut & numbers:
            self._cut -= numbers
            self.group.partition(self._cut)

    def thaw(self) -> None:
        self.group.thaw()

    def audit(self) -> None:
        """Whoever some living replica takes for lost is proved dead again: the proof may be known only to the dead."""
        self.loop.later(AUDIT_S, self.audit)
        present = {port.me for port in self.group.ports()}
        by_key = {
            (lockd.port.me.node, lockd.port.me.incarnation): lockd.port.me
            for machine in self.machines.values()
            for lockd in machine.lockds
        }
        for machine in self.machines.values():
            lockd = machine.lockd
            if lockd is None or not lockd.process.alive or not lockd.replica.installed:
                continue
            for key, node in lockd.replica._machine.nodes.items():
                if node.lost and by_key[key] not in present:
                    self.group.lost.setdefault(by_key[key], "")
        self.watch_lost()

    def watch_lost(self) -> None:
        """Begin to prove the end of every member that is lost."""
        for machine in self.machines.values():
            for lockd in machine.lockds:
                if self.group.lost.get(lockd.port.me) == "" and not lockd.proving:
                    lockd.proving = True
                    self._prove(lockd, self.loop.time())

    def _prove(self, lockd: Lockd, since_s: float) -> None:
        member = lockd.port.me
        if self.group.lost.get(member) != "":
            lockd.proving = False  # it is back
            return
        waited_s = self.loop.time() - since_s
        over = not lockd.process.alive or self._fences_at_boxes
        if over and all(attached.drained() for attached in lockd.witnesses):
            for attached in lockd.witnesses:
                if not attached.released:
                    attached.array.submitter.life_over = True
            for attached in lockd.witnesses:
                self.on_ended(attached.array)
            lockd.proving = False
            self.group.fence(member, "nothing of it can land any more")
            return
        if waited_s >= self.plan.fence_after_s:
            self._fence(lockd)
        self.loop.later(PROOF_POLL_S, self._prove, lockd, since_s)

    def _fence(self, lockd: Lockd) -> None:
        """Make an end that does not come by itself: kill what lives, or let the boxes take nothing of it any more.

        In the second case it may well live on, as a node that slept through its own exclusion does: whatever it still
        tries is refused. Somebody ends it after a while.
        """
        for attached in lockd.witnesses:
            array = attached.array
            if attached.drained():
                continue
            if not self._fences_at_boxes:
                if array.process.alive:
                    self.kill_array(array.machine)
                    self.loop.later(START_AGAIN_S, self._start_array_if_up, array.machine)
                if self.plan.storage_fence:
                    array.cut_off()
            elif array.process.alive:
                array.cut_off()
                self.on_excluded(array)
                self.loop.later(GRACE_S[self.fate.below(len(GRACE_S))], self._end_excluded, array)
            else:
                array.cut_off()
        if lockd.process.alive and not self._fences_at_boxes:
            self.kill_lockd(lockd.machine, 0.001)

    @property
    def _fences_at_boxes(self) -> bool:
        """A sequencer on the same machine kills; only machines apart need the boxes' help."""
        return self.plan.storage_fence and not self.plan.durable

    def _end_excluded(self, array: ArrayProcess) -> None:
        machine = array.machine
        if array.process.alive and machine.array is array:
            self.kill_array(machine)
            self.loop.later(START_AGAIN_S, self._start_array_if_up, machine)

    # --- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing goes on."""
        for machine in self.machines.values():
            for process in machine.processes():
                process.alive = False
                self._graves.append(process)
        for process in self._graves:
            self._bury(process)
