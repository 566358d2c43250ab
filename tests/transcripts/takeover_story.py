"""Transcripts of takeovers: whole arrays on shared disks in memory, and after every step what is on the disks.

Array, cluster protocol, lock sessions and replicas are the production code; the order of messages is a list, disks are
byte arrays, time is virtual, and whatever is ready runs first come first served. A line is a step that a node took.
Behind it stand the chunks whose bits are set on the disks, slot by slot, and those in which the two disks differ at
that moment. `3|-` is a bit that only the first disk has. No line may show a chunk that differs without a bit in some
slot: that is checked at every line (md-cluster spec 9).

    start A B        array processes, one after the other; the lowest free slot is theirs
    members A B      the same in few words
    write A 3 9      A's client writes these chunks, and gets its answers
    tear A 9         A's client writes chunk 9; the first disk gets it, on its way to the second it is delayed
    kill A           A is gone, and so is what had not reached a disk
    die B POINT      B will be gone at that point of its trace
    lose A           the group notices      fence A     A's end is proved      stop A     a clean stop
    run              three seconds go by
    disks            what is on the disks now         lock 0     who holds and wants the lock of slot 0
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from clustermd.array.array import Array
from clustermd.array.assemble import load_members
from clustermd.array.request import Kind, Request
from clustermd.cluster.cluster import Cluster
from clustermd.cluster.slot_lock import slot_lock_name
from clustermd.device.member_device import Op
from clustermd.dlm.lockspace import Lockspace, LockspaceEvents
from clustermd.dlm.modes import Mode
from clustermd.dlm.replica import Replica
from clustermd.dlm.session import Session
from clustermd.group.process_group import Left, Member
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.create import BitmapKind, NewMember, plan_create
from clustermd.ondisk.superblock import Superblock, find
from clustermd.testing.locks.order import MemoryGroup, Port, newcomer_reads_from_here
from clustermd.testing.simulator.boxes import Box, Path, Trouble, Watcher
from clustermd.testing.simulator.clock import SimClock
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Crashed, Process, SimLoop
from clustermd.testing.simulator.submitter import SimSubmitter
from clustermd.trace import Trace

SLOTS = 3
CHUNK = 16 << 10
BLOCK = 4096
DATA_OFFSET_SECTORS = 256
ARRAY_SECTORS = 2048
STEP_S = 3.0
NEVER_S = 1000.0
UNLIMITED = 1 << 40
"""KiB a second: a copy never waits for its turn, so how fast one is has no part in a story."""
WIDTH = 48
CELL = 9

STEPS = {
    "slot.loaded": "loads its own slot {slot}: {dirty} dirty",
    "array.serving": "serves",
    "cluster.lost": "hears that {node} (slot {slot}) is dead",
    "leave.announced": "tells all that slot {slot} has bits left",
    "leave.done": "has left",
    "takeover.locked": "gets the lock of slot {slot}",
    "takeover.read": "reads slot {slot}: {dirty} dirty",
    "takeover.merged": "has merged them in memory",
    "takeover.own_stable": "its own bits are on all disks",
    "takeover.source_cleared": "slot {slot} is clear on all disks",
    "takeover.done": "lets the lock of slot {slot} go",
    "resync.right": "has the resync right",
    "resync.window": "announces sectors {lo} to {hi}, copies there",
    "resync.copied": "is through with sectors {lo} to {hi}",
    "resync.finished": "ends its window",
    "resync.settled": "finds nothing left to copy",
    "sweep.cleared": "sweeps, clears the bits of {chunks}",
}
Frame = list[Any]


class TakeoverNode:
    """One node. Implements ReplicaShell, the Link of its cluster, and owns its client's requests."""

    def __init__(self, story: TakeoverStory, name: str, incarnation: int) -> None:
        self.story = story
        self.name = name
        self.alive = True
        self.buried = False
        self.process = Process(name)
        member = Member(ord(name) - ord("A") + 1, incarnation, name)
        self.port = Port(story.group, member, story.group.max_payload)
        newcomer_reads_from_here(story.group, self.port)
        story.group.ports[member] = self.port
        self.trace = Trace()
        self.trace.listen(self._step)
        self.replica = Replica(self, Trace())
        self.replica.attach(self.port)
        self.port.events = self.replica
        self.submitter = SimSubmitter(story.loop, self.process, story.dice, Watcher())
        self.paths = {box.name: Path(box, False) for box in story.boxes}
        self.session = Session(self._send)
        self.number = 0
        self.array: Array
        self.dies_at = ""
        self.answers = 0

    def within(self, what: Callable[..., object], *args: Any) -> None:
        """Call something as this node: what it starts dies with it."""
        self.process.context.copy().run(what, *args)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.within(self.story.loop.create_task, work)

    async def assemble(self) -> None:
        assembly = await load_members(list(self.paths), self.paths.__getitem__, self.submitter)
        coordinator = Cluster("array", self._connect, self.trace)
        clock = SimClock(self.story.loop)
        self.array = Array(
            "md0",
            assembly,
            coordinator,
            self.submitter,
            clock,
            self.trace,
            limits=lambda: (UNLIMITED, UNLIMITED),
        )
        self.submitter.array = self.array
        await self.array.start()

    def _step(self, name: str, fields: dict[str, Any]) -> None:
        if not self.alive:
            return
        if name == self.dies_at:
            self.story.steps.append(self.story.row(f"{self.name}: dies at {name}"))
            self.die()
            raise Crashed(name)
        if name in STEPS:
            self.story.steps.append(self.story.row(f"{self.name}: {STEPS[name].format(**fields)}"))

    def die(self) -> None:
        self.alive = self.process.alive = False
        self.submitter.process_died((0.0,))

    # --- the client

    def write(self, chunk: int) -> None:
        buffer = self.submitter.pool.take(BLOCK)
        buffer.view[:BLOCK] = self.name.encode() * BLOCK
        request = Request(Kind.WRITE, chunk * CHUNK, BLOCK, buffer, self, chunk, False, False)
        self.within(self.array.submit, [request])

    def completed(self, request: Request) -> None:
        assert not request.error
        self.answers += 1

    # --- Link

    async def _connect(self) -> TakeoverNode:
        self.number = self.replica.open_session("md0", 1)
        self.session = Session(self._send)
        return self

    def _send(self, frame: Frame) -> None:
        if self.alive:
            self.replica.session_frame(self.number, frame)
            self.story.pump_soon()

    async def join(self, name: str, events: LockspaceEvents, max_slots: int) -> Lockspace:
        return await self.session.join(name, events, max_slots=max_slots)

    async def close(self) -> None:
        if self.alive:
            self.replica.session_end(self.number, "closed", True)
            self.story.pump_soon()
        self.session.on_lost("closed")

    # --- ReplicaShell

    def to_session(self, session: int, frame: Frame) -> None:
        if self.alive:
            self.within(self.session.on_frame, frame)

    def suspended(self, reason: str) -> None:
        self.within(self.session.on_suspended, reason)

    def resumed(self) -> None:
        self.within(self.session.on_resumed)

    def must_restart(self, reason: str) -> None:
        raise AssertionError(reason)


class TakeoverStory:
    """Two disks, the nodes, and time."""

    def __init__(self) -> None:
        self.dice = Dice(0, {})
        self.loop = SimLoop(self.dice.stream("ready"), self._failed)  # type: ignore[abstract]
        self.group = MemoryGroup()
        size = DATA_OFFSET_SECTORS + ARRAY_SECTORS
        self.boxes = [Box(f"disk{number}", size, self.dice, Watcher()) for number in range(2)]
        self.nodes: dict[str, TakeoverNode] = {}
        self.steps: list[str] = []
        self.wrong: list[str] = []
        self._lives = 0
        self._pumping = False
        self._header_told = False
        self._format()

    def begin(self) -> None:
        self._header_told = False

    def close(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.die()
        self._bury()
        self.loop.close()

    def _failed(self, context: dict[str, Any]) -> None:
        raise AssertionError(context["message"]) from context.get("exception")

    def _format(self) -> None:
        made = plan_create(
            devices=[NewMember(box.name, box.size_sectors) for box in self.boxes],
            raid_disks=2,
            name="md0",
            set_uuid=b"U" * 16,
            device_uuids=[b"1" * 16, b"2" * 16],
            now=1_700_000_000,
            bitmap=BitmapKind.CLUSTERED,
            nodes=SLOTS,
            cluster_name="transcript",
            bitmap_chunk_bytes=CHUNK,
            daemon_sleep=5,
            assume_clean=True,
            minor=2,
            data_offset_sectors=DATA_OFFSET_SECTORS,
        )
        for box, member in zip(self.boxes, made.members, strict=True):
            for sector, content in member.writes:
                box.data[sector * 512 : sector * 512 + len(content)] = content
        box = self.boxes[0]
        self.superblock: Superblock = find(
            lambda sector, count: bytes(box.data[sector * 512 : (sector + count) * 512]), box.size_sectors
        )
        first = (self.superblock.super_offset + self.superblock.bitmap_offset) * 512
        self.geometry = BitmapGeometry.of(BitmapSuperblock.from_bytes(bytes(box.data[first : first + 256])))

    # --- commands

    def do_start(self, *names: str) -> list[str]:
        for name in names:
            self._lives += 1
            node = self.nodes[name] = TakeoverNode(self, name, self._lives)
            self.group.view()
            self.pump_soon()
            node.spawn(node.assemble())
            self._run(0.5)
        return self._told()

    def do_members(self, *names: str) -> list[str]:
        self.do_start(*names)
        self._header_told = False
        return self._rows(f"{', '.join(names)} serve")

    def do_write(self, name: str, *chunks: str) -> list[str]:
        node = self.nodes[name]
        wanted = node.answers + len(chunks)
        for chunk in chunks:
            node.write(int(chunk))
        self._run(0.5)
        assert node.answers == wanted, f"{wanted - node.answers} writes of {name} were not answered"
        return [*self._told(), *self._rows(f"{name}: has written")]

    def do_tear(self, name: str, *chunks: str) -> list[str]:
        node = self.nodes[name]
        delay = Trouble(ops=(Op.WRITE,), lo=self.superblock.data_offset, slow_s=NEVER_S)
        node.paths["disk1"].troubles.append(delay)
        for chunk in chunks:
            node.write(int(chunk))
        self._run(0.5)
        return [*self._told(), *self._rows(f"{name}: has half written")]

    def do_kill(self, name: str) -> list[str]:
        self.nodes[name].die()
        return self._rows(f"{name}: is gone")

    def do_die(self, name: str, point: str) -> None:
        self.nodes[name].dies_at = point

    def do_lose(self, name: str) -> list[str]:
        self.group.lose(self.nodes[name].port.me, Left.LOST)
        self.pump_soon()
        self._run(0)
        return self._told()

    def do_fence(self, name: str) -> list[str]:
        self.group.fence(self.nodes[name].port.me)
        self.pump_soon()
        self._run(0)
        return self._told()

    def do_stop(self, name: str) -> list[str]:
        node = self.nodes[name]
        node.spawn(node.array.stop())
        self._run(STEP_S)
        return self._told()

    def do_run(self) -> list[str]:
        self._run(STEP_S)
        return self._told()

    def do_disks(self) -> list[str]:
        return self._rows("")

    def do_lock(self, slot: str) -> list[str]:
        node = next(node for node in self.nodes.values() if node.alive)
        space = node.replica._machine.engine.spaces["array"]
        name = slot_lock_name(int(slot))
        resource = space.resources.get(name.encode())
        if resource is None:
            return [f"{name}: nobody has it"]
        held = [f"{_who(lock.session)} {Mode(lock.gr).name}" for lock in resource.granted]
        waits = [
            f"{_who(lock.session)} waits for {Mode(lock.rq).name}"
            for lock in (*resource.converting, *resource.waiting)
        ]
        return [f"{name}: {', '.join([*held, *waits])}"]

    # --- moving

    def pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        for node in self.nodes.values():
            if not node.alive:
                node.port.sent.clear()
                node.port.read = len(self.group.order)
        self.group.settle()

    def _run(self, seconds: float) -> None:
        until_s = self.loop.time() + seconds
        self.loop.call_at(until_s, lambda: None)
        self.loop.run(lambda: False, until_s)
        self._bury()
        assert not self.wrong, self.wrong[0]

    def _bury(self) -> None:
        """Let the tasks of the dead unwind; nothing they do counts."""
        for node in self.nodes.values():
            if not node.alive and not node.buried:
                node.buried = True
                node.within(node.session.on_lost, "the node is dead")
                node.within(node.submitter.let_go)
                self.loop.bury(node.process)

    # --- words

    def _told(self) -> list[str]:
        steps, self.steps = self.steps, []
        return [*(self._header() if steps else []), *steps]

    def _rows(self, what: str) -> list[str]:
        return [*self._header(), self.row(what)]

    def _header(self) -> list[str]:
        if self._header_told:
            return []
        self._header_told = True
        slots = "".join(f"{f'slot {slot}':<{CELL}}" for slot in range(SLOTS))
        return [f"{'':<{WIDTH}}{slots}differ"]

    def row(self, what: str) -> str:
        """What is on the disks now. Chunks that differ and that no bit covers are remembered in `wrong`."""
        slots = [[self._bits(box, slot) for box in self.boxes] for slot in range(SLOTS)]
        differ = self._differ()
        covered = {chunk for both in slots for bits in both for chunk in bits}
        if not covered.issuperset(differ):
            # an error raised here would be one of the node's, which tries again
            self.wrong.append(f"{what}: {differ} differ, bits only cover {sorted(covered)}")
        cells = [
            _numbers(first) if first == second else f"{_numbers(first)}|{_numbers(second)}"
            for first, second in slots
        ]
        return f"{what:<{WIDTH}}{''.join(f'{cell:<{CELL}}' for cell in cells)}{_numbers(differ)}"

    def _bits(self, box: Box, slot: int) -> list[int]:
        where, geometry = self.superblock, self.geometry
        start = geometry.start_sector(where.super_offset, where.bitmap_offset, slot) * 512
        return geometry.dirty_chunks(bytes(box.data[start : start + geometry.bytes_per_node]))

    def _differ(self) -> list[int]:
        start = self.superblock.data_offset * 512
        one, two = (memoryview(box.data)[start:] for box in self.boxes)
        chunks = range(len(one) // CHUNK)
        return [
            chunk
            for chunk in chunks
            if bytes(one[chunk * CHUNK : (chunk + 1) * CHUNK])
            != bytes(two[chunk * CHUNK : (chunk + 1) * CHUNK])
        ]


def _numbers(chunks: list[int]) -> str:
    return " ".join(map(str, chunks)) or "-"


def _who(session: tuple[int, int, int]) -> str:
    return chr(ord("A") + session[0] - 1)
