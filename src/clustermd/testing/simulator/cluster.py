"""A simulated cluster: boxes, machines, their group, and who proves the ends of the lost.

Every fault is a method here; what they may do to each other is the atlas's business. The proof of an end follows
`group/proof.py`: a member that is lost is fenced when nothing of its array process can land any more. One that does not
come to that by itself is killed after `fence_after_s`, and where the plan has storage fencing, cut off from the boxes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from clustermd.group.process_group import Left, View
from clustermd.ondisk.create import BitmapKind, NewMember, plan_create
from clustermd.testing.simulator.agreed import LOOK_S, AgreedPort, NodeClock
from clustermd.testing.simulator.boxes import Box, Watcher
from clustermd.testing.simulator.clock import SimClock
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Crashed, Process, SimLoop
from clustermd.testing.simulator.machine import ArrayProcess, Lockd, Machine
from clustermd.testing.simulator.order import Port, SimGroup
from clustermd.testing.simulator.plan import Plan
from clustermd.testing.simulator.totem import Totem

PROOF_POLL_S = 0.02
AUDIT_S = 2.0
GRACE_S = (0.01, 0.5, 3.0, 9.0)
"""How long an excluded process goes on before somebody ends it."""
RESTART_S = 0.2
CLOCKS_DIFFER = 0.0004
SWITCHED_OFF_S = 0.05
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
        self.group: SimGroup | None = None
        self.totem: Totem | None = None
        if plan.durable:
            self.group = SimGroup(loop, dice)
            self.group.on_lost = lambda: loop.later(0.0, self.watch_lost)
        else:
            self.totem = Totem(
                loop,
                dice,
                plan.votes_of,
                two_node=plan.two_node,
                wait_for_all=plan.wait_for_all,
                last_man_standing=plan.last_man_standing,
            )
        self.counts: Counter[str] = Counter()
        self.boxes = [
            Box(f"box{number}", plan.data_offset_sectors + plan.array_sectors, dice, watcher)
            for number in range(plan.members)
        ]
        self.machines = {number: Machine(self, number) for number in range(1, plan.nodes + 1)}
        self.on_started: Callable[[ArrayProcess], None] = lambda array: None
        self.on_gone: Callable[[ArrayProcess], None] = lambda array: None
        self.on_ended: Callable[[ArrayProcess], None] = lambda array: None  # proved, however it came
        self.on_wrong: Callable[[str, str], None] = lambda rule, words: None
        # alive, and the boxes refuse it
        self.on_excluded: Callable[[ArrayProcess], None] = lambda array: None
        self.restarts = True
        self.mended = False  # no fault is at work any more
        self._cut: set[int] = set()
        self._incarnation = 0
        self._serial = 0
        self._arrays: list[ArrayProcess] = []
        self._graves: list[Process] = []
        self._clocks = {
            number: NodeClock(loop.time, 1000.0 * number, 1 + (number % 3 - 1) * CLOCKS_DIFFER)
            for number in self.machines
        }
        self._lockds: dict[tuple[int, int], Lockd] = {}
        self._format()
        if plan.durable:
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
        if array is not None and (array.excluded or array.outlawed) and process is array.process:
            return  # what it believes counts for nobody
        if name == "group.view" and array is not None and array.excluded and fields["quorate"]:
            self._end_excluded(array)  # no disk works for it, and now others hear what it says
        if name == "group.fenced":
            self._declared_dead(machine, fields["node"], int(fields["incarnation"], 16), fields["proof"])
        self.listener(machine, name, fields)
        if not process.alive:
            raise Crashed(name)

    # --- machines ----------------------------------------------------------------------------------------

    def start_lockd(self, machine: Machine) -> None:
        if machine.up:
            assert machine.lockd is not None
            machine.lockd.wanted_again = machine.lockd.leaving
            return
        self._incarnation += 1
        lockd = machine.lockd = Lockd(machine, self._incarnation)
        self._lockds[machine.number, self._incarnation] = lockd
        if isinstance(lockd.port, Port):
            lockd.port.group.join(lockd.port)
        else:
            machine.refused = machine.fenced_off = False
            self._enter(lockd, lockd.port)

    def _enter(self, lockd: Lockd, port: AgreedPort) -> None:
        """It becomes a member when corosync works there, and when its node's former lives are over."""
        machine = lockd.machine
        assert self.totem is not None
        if not lockd.process.alive:
            return
        former = [other for other in machine.lockds if other is not lockd]
        if not self.landed(machine, former) or not self.totem.up(machine.number) or lockd.process.paused:
            self.loop.later(LOOK_S, self._enter, lockd, port)
            return
        for other in former:
            if not other.followed:
                other.followed = True
                for attached in other.witnesses:
                    self.on_ended(attached.array)  # perhaps nobody is left whom a proof could be told
        lockd.boot = machine.boots  # it may have been wanted before the machine was started
        ended = [
            (other.port.me.incarnation, "nothing of it is left on its node")
            for other in former
            if other.boot == machine.boots
        ]
        pid = 100 + len([other for other in machine.lockds if other.boot == machine.boots])
        boot = f"{machine.name} start {machine.boots}"
        lockd.process.context.copy().run(port.enter, pid, boot, ended, machine.fenced)

    def landed(self, machine: Machine, former: list[Lockd]) -> bool:
        """Whether nothing is left of what these lock daemons' sessions and the machine's dead processes sent."""
        return all(attached.drained() for other in former for attached in other.witnesses) and not any(
            array.submitter.in_flight for array in self.arrays_of(machine.number) if not array.process.alive
        )

    def start_array(self, machine: Machine) -> None:
        if machine.array is not None and machine.array.process.alive:
            return
        self._serial += 1
        machine.array = ArrayProcess(machine, self._serial)
        self._arrays.append(machine.array)

    def start(self, machine: Machine) -> None:
        if not machine.powered:
            machine.powered = True
            machine.boots += 1
            if self.totem is not None:
                self.totem.start(machine.number)
        self.start_lockd(machine)
        self.start_array(machine)

    def array_not_started(self, array: ArrayProcess) -> None:
        """The start was refused; an operator tries again. Who is refused by the boxes and by nobody else was fenced by
        a cluster that has ended since: its machine is started anew."""
        self._ended_in_order(array)
        machine = array.machine
        member = machine.lockd is not None and machine.lockd.replica.installed
        if not self.restarts:
            return
        if self.mended and machine.refused and member:
            self.switch_off(machine.number)
        else:
            self.loop.later(START_AGAIN_S, self._start_array_if_up, machine)

    def _ended_in_order(self, array: ArrayProcess) -> None:
        self._end_process(array.process)
        self.on_gone(array)
        if array.excluded:
            self.on_ended(array)  # its session said goodbye, so nobody proves that it is over

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
            self._ended_in_order(array)
            then()

        array.stop(done)

    def leave(self, machine: Machine) -> None:
        """The lock daemon of a machine whose array is stopped says goodbye."""
        lockd = machine.lockd
        if lockd is None or not lockd.process.alive or lockd.sessions:
            return
        port = lockd.port
        if isinstance(port, Port):
            self._end_process(lockd.process)
            port.group.leave(port)
        else:
            leaving = lockd
            leaving.leaving = True
            port.process.context.copy().run(
                port.say_goodbye, lambda: self.loop.later(0.0, self._lockd_left, leaving)
            )

    def _lockd_left(self, lockd: Lockd) -> None:
        self._end_process(lockd.process)
        array = lockd.machine.array
        if lockd.wanted_again or (array is not None and array.process.alive):
            self.loop.later(RESTART_S, self._start_lockd_again, lockd.machine)

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
        if isinstance(lockd.port, Port):
            self.loop.later(detect_s, lockd.port.group.lose, lockd.port)
        else:
            lockd.port.died(detect_s)

    def kill(self, machine: Machine, detect_s: float) -> None:
        """The machine loses power."""
        machine.powered = False
        if self.totem is not None:
            self.totem.kill(machine.number, detect_s)
        self.kill_array(machine)
        self.kill_lockd(machine, detect_s)
        machine.paused = False

    def kill_corosync(self, machine: Machine, detect_s: float) -> None:
        assert self.totem is not None
        self.totem.kill(machine.number, detect_s)

    def stop_corosync(self, machine: Machine) -> None:
        assert self.totem is not None
        self.totem.stop(machine.number)

    def start_corosync(self, machine: Machine) -> None:
        if machine.powered and self.totem is not None:
            self.totem.start(machine.number)

    def lockd_over(self, lockd: Lockd, reason: str) -> None:
        """A lock daemon ends by itself: its state belongs to no history that goes on. It is started anew."""
        machine = lockd.machine
        self.kill_lockd(machine, 0.001)
        self.loop.later(RESTART_S, self._start_lockd_again, machine)

    def _start_lockd_again(self, machine: Machine) -> None:
        # where machines meet by corosync it is a service of the machine, also when no array needs it any more
        if machine.powered and (self.restarts or not self.plan.durable):
            if self.mended:
                self.start_corosync(machine)  # the others had it ended
            self.start_lockd(machine)

    def pause(self, machine: Machine, detect_s: float) -> None:
        """The whole machine stands still; its requests on the way go on."""
        machine.paused = True
        if self.totem is not None:
            self.totem.pause(machine.number, detect_s)
        for process in machine.processes():
            self.loop.pause(process)

    def resume(self, machine: Machine) -> None:
        machine.paused = False
        if self.totem is not None:
            self.totem.resume(machine.number)
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

    def cut_off(self, numbers: set[int]) -> None:
        """These nodes and the others do not hear each other any more."""
        self._cut |= numbers
        if self.totem is not None:
            self.totem.cut(self._cut)

    def heal(self, numbers: set[int]) -> None:
        """They hear each other again."""
        if self._cut & numbers:
            self._cut -= numbers
            if self.totem is not None:
                self.totem.cut(self._cut)

    def thaw(self) -> None:
        if self.group is not None:
            self.group.thaw()

    def audit(self) -> None:
        """Whoever some living replica takes for lost is proved dead again: the proof may be known only to the dead."""
        self.loop.later(AUDIT_S, self.audit)
        assert self.group is not None
        present = {port.me for port in self.group.ports()}
        by_key = {
            lockd.port.me.key: lockd.port.me for machine in self.machines.values() for lockd in machine.lockds
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
        assert self.group is not None
        for machine in self.machines.values():
            for lockd in machine.lockds:
                if self.group.lost.get(lockd.port.me) == "" and not lockd.proving:
                    lockd.proving = True
                    self._prove(lockd, self.loop.time())

    def _prove(self, lockd: Lockd, since_s: float) -> None:
        assert self.group is not None
        member = lockd.port.me
        if self.group.lost.get(member) != "":
            lockd.proving = False  # it is back
            return
        waited_s = self.loop.time() - since_s
        if not lockd.process.alive and all(attached.drained() for attached in lockd.witnesses):
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
        """Make an end that does not come by itself: kill what lives, as a sequencer on the same machine does."""
        for attached in lockd.witnesses:
            array = attached.array
            if attached.drained():
                continue
            if array.process.alive:
                self.kill_array(array.machine)
                self.loop.later(START_AGAIN_S, self._start_array_if_up, array.machine)
            if self.plan.storage_fence:
                array.cut_off()
        if lockd.process.alive:
            self.kill_lockd(lockd.machine, 0.001)

    # --- fencing of nodes by nodes (`fencer`) ------------------------------------------------------------------

    def clock_of(self, node: int) -> NodeClock:
        return self._clocks[node]

    def counted(self, what: str) -> None:
        self.counts[what] += 1

    def arrays_of(self, node: int) -> list[ArrayProcess]:
        """All array processes that ever ran there."""
        return [array for array in self._arrays if array.machine.number == node]

    def goes_on_with(self, machines: list[Machine]) -> bool:
        """Whether these may go on though nobody else starts: who was refused at the boxes waits for who did that, and
        who needs leases for a majority of all votes."""
        if self.totem is None:
            return True
        able = [machine.number for machine in machines if not machine.refused]
        votes = self.plan.votes_of
        majority = 2 * sum(votes[number] for number in able) > sum(votes.values())
        return self.totem.quorate_with(able) and (majority or not self.plan.lease_s)

    def refused_at_boxes(self, node: int) -> bool:
        return self.machines[node].refused

    def fence_at_boxes(self, node: int) -> None:
        """The boxes take nothing more of what runs there now, nor what it has on its way.

        It may well live on, as a node that slept through its own exclusion does: whatever it still tries is refused.
        Somebody ends it after a while.
        """
        self.machines[node].refused = True
        for array in self.arrays_of(node):
            if array.excluded or not (array.process.alive or array.submitter.in_flight):
                continue
            array.cut_off()
            if array.process.alive:
                self.on_excluded(array)
                if all(link.over for link in array.links):
                    self.on_ended(array)  # it was no member, so nobody else will say so
                self.loop.later(GRACE_S[self.fate.below(len(GRACE_S))], self._end_excluded, array)

    def switch_off(self, node: int) -> None:
        """The machine loses power, if it had any; it comes back after a while."""
        machine = self.machines[node]
        if machine.powered:
            self.kill(machine, SWITCHED_OFF_S)
            self.loop.later(START_AGAIN_S, self._start_again, machine)

    def _start_again(self, machine: Machine) -> None:
        if self.restarts and not machine.powered:
            self.start(machine)

    def nothing_can_land(self, arrays: list[ArrayProcess]) -> bool:
        """Whether nothing of these can land any more."""
        return all(
            array.excluded or (not array.process.alive and not array.submitter.in_flight) for array in arrays
        )

    def _declared_dead(self, machine: Machine, node: int, incarnation: int, proof: str) -> None:
        """A member was told that a life is proved to be over: it must be."""
        if incarnation:
            if self._overtaken(machine, (node, incarnation)):
                return
            lives = [self._lockds[node, incarnation]]
        else:
            # whatever was there when it was fenced, also a life that goes on without its disks; but whom the group
            # misses by name is told by name
            fenced = proof.startswith(f"{self.plan.fencing}:")
            missed = self._missed_by(machine)
            lives = [
                lockd
                for lockd in self.machines[node].lockds
                if lockd.port.me.key not in missed
                and (
                    not lockd.process.alive
                    or (fenced and all(attached.drained() for attached in lockd.witnesses))
                )
            ]
        for lockd in lives:
            if lockd.declared_dead:
                continue
            # one that lives and was not named may become a member yet, with sessions whose ends are proved later
            lockd.declared_dead = bool(incarnation) or not lockd.process.alive
            port = lockd.port
            for attached in lockd.witnesses:
                array = attached.array
                if not attached.drained():
                    lapsed = isinstance(port, AgreedPort) and not port.lease.valid()
                    if not lapsed or array.submitter.in_flight:
                        self.on_wrong(
                            "fenced-alive",
                            f"{machine.name} is told that a life of node{node} is over ({proof}); it can still write",
                        )
                    self._outlaw(array)
                if not attached.released:
                    array.submitter.life_over = True
                self.on_ended(array)

    def _overtaken(self, machine: Machine, life: tuple[int, int]) -> bool:
        """Whether a majority has gone on with that life in a later view, which this machine has not heard of yet.

        What it is told in its own view then is never stable, so nobody is shown anything by it.
        """
        told = _view_of(machine)
        views = [view for other in self.machines.values() if (view := _view_of(other)) is not None]
        return told is not None and any(
            view.ring > told.ring
            and 2 * sum(view.votes) > sum(votes for _, votes in view.all_votes)
            and life in {member.key for member in view.members}
            for view in views
        )

    @staticmethod
    def _missed_by(machine: Machine) -> set[tuple[int, int]]:
        """The lives that were lost and not proved dead when this machine's present view of the group began."""
        view = _view_of(machine)
        return set() if view is None else {member.key for member, how in view.left if how is Left.LOST}

    def _outlaw(self, array: ArrayProcess) -> None:
        """It lives on without a lease; for all others it is dead, until it comes back as somebody new."""
        array.outlawed = True
        if array.broken_s < 0:
            array.broken_s = self.loop.time()
        self.listener(array.machine, "process.died", {})
        self.listener(array.machine, "process.drained", {})

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


def _view_of(machine: Machine) -> View | None:
    """The present view of the agreed group, as the machine's newest lock daemon knows it."""
    port = machine.lockd.port if machine.lockd is not None else None
    return port.agreed.view if isinstance(port, AgreedPort) and port.agreed is not None else None
