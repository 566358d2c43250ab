"""Transcripts of the channel: real channels over real lock sessions and replicas, one lock operation at a time.

The order of operations is a list in memory, time is virtual, and whatever is ready runs first come first served, so
nothing happens but by a command. A table has a line for every operation that the lock manager applied, and behind it
each node's modes of `token`, `message` and `ack` (md-cluster spec, Appendix C); `CR→EX` is a conversion that waits.
Lines with a star are what nodes do or hear between two operations. The rules of the lock engine are judged at every
operation, and all replicas are compared.

    start A B C           members, their channels armed
    send A RESYNCING 0 1024            node A broadcasts; nothing is ordered yet
    run [to words ...]    apply what the nodes ask for, in turn, until nothing moves or an operation has these words
    step B [count]        apply B's next operation only
    answer B EIO          B's processing fails from now on (`answer B 0`: succeeds)
    hold B                B does not come to an end processing      go B      it does
    join D                a new node enters
    kill A                A does nothing any more      lose A     the others notice     fence A     A is proved dead
    wait 30               seconds go by
    table                 the modes now
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import Any

from clustermd.cluster.channel import Channel
from clustermd.cluster.messages import LVB_BYTES, Message, MessageType, SlotBlock, sequence_of
from clustermd.cluster.slot_lock import OwnSlot
from clustermd.dlm.lockspace import Slot
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import Flag, Mode
from clustermd.dlm.replica import Replica
from clustermd.dlm.session import Session
from clustermd.dlm.wire import unpack
from clustermd.errors import Refused
from clustermd.group.process_group import Left, Member
from clustermd.testing.locks.invariants import Checker
from clustermd.testing.locks.order import MemoryGroup, Port, newcomer_reads_from_here
from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop
from clustermd.trace import Trace

SPACE = "array"
SLOTS = 4
SHOWN = {"token": "tok", "message": "msg", "ack": "ack"}
WIDTH = 48
CELL = 6
Frame = list[Any]


class ChannelNode:
    """One node: a replica, a session of it, and a channel. Implements ReplicaShell and LockspaceEvents."""

    def __init__(self, story: ChannelStory, name: str, incarnation: int) -> None:
        self.story = story
        self.name = name
        self.alive = True
        self.process = Process(name)
        self.result = 0
        self.held: asyncio.Event | None = None
        member = Member(ord(name) - ord("A") + 1, incarnation, name)
        self.port = Port(story.group, member, story.group.max_payload)
        newcomer_reads_from_here(story.group, self.port)
        story.group.ports[member] = self.port
        trace = Trace()
        trace.listen(self._traced)
        self.replica = Replica(self, trace)
        self.replica.attach(self.port)
        self.port.events = self.replica
        self.session = Session(self._send)
        self.number = self.replica.open_session("transcript", 1)
        self.channel: Channel

    @property
    def machine(self) -> Machine:
        return self.replica._machine

    def _send(self, frame: Frame) -> None:
        if self.alive:
            self.replica.session_frame(self.number, frame)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task of this node."""
        self.process.context.copy().run(self.story.loop.create_task, work)

    def says(self, what: str) -> None:
        self.story.notes.append(f"    * {self.name} {what}")

    async def enter(self) -> None:
        """Join as `cluster.life` does: armed with the token held, then the own slot, then answering."""
        space = await self.session.join(SPACE, self, lvb_bytes=LVB_BYTES, max_slots=SLOTS)
        self.channel = Channel(space, Trace(), self._handle)

        async def prepare() -> None:
            self.says("holds the token, reads the superblocks, and arms its ack")

        await self.channel.open(prepare)
        own = await OwnSlot.claim(space, self.channel.slot)
        self.channel.start(own)
        self.says(f"has md slot {self.channel.slot} and answers from now on")

    async def broadcast(self, message: Message) -> None:
        try:
            await self.channel.send(message)
        except Refused as error:
            self.says(f"fails to send, {error.code}: {error.message}")
        else:
            self.says(f"has sent {message.type.name}")

    async def _handle(self, message: Message) -> int:
        self.says(f"begins to process {words_of(message)}" if self.held else f"processes {words_of(message)}")
        if self.held is not None:
            await self.held.wait()
            self.says("has processed it")
        return self.result

    def _traced(self, name: str, fields: dict[str, Any]) -> None:
        if name == "dlm.apply" and self.alive and self is self.story.first():
            self.story.applied(fields["entry"])

    # --- ReplicaShell

    def to_session(self, session: int, frame: Frame) -> None:
        if not self.alive:
            return
        if frame[0] == "bast":
            self.story.asked(self.name, frame[1], Mode(frame[2]))
        self.process.context.copy().run(self.session.on_frame, frame)

    def must_restart(self, reason: str) -> None:
        raise AssertionError(reason)

    # --- LockspaceEvents, and the rest of ReplicaShell

    def recover_prep(self) -> None: ...

    def recover_slot(self, slot: Slot) -> None:
        self.says(f"hears that md slot {slot.slot - 1} ({slot.name}) is dead")

    def recover_done(self, slots: tuple[Slot, ...], our_slot: int, generation: int) -> None: ...

    def suspended(self, reason: str) -> None: ...

    def resumed(self) -> None: ...

    def lost(self, reason: str) -> None: ...


class ChannelStory:
    """The nodes, the order of their operations, and time."""

    def __init__(self) -> None:
        self.loop = SimLoop(Dice(0, {}).stream("ready"), self._failed)  # type: ignore[abstract]
        self.group = MemoryGroup()
        self.nodes: dict[str, ChannelNode] = {}
        self.columns: list[str] = []
        self.notes: list[str] = []
        self.locks: dict[int, tuple[str, str]] = {}
        self.held: dict[int, Mode] = {}
        self.checker = Checker()
        self._watched: ChannelNode | None = None
        self._lives = 0
        self._turn = 0
        self._found = ""
        self._wanted = ""
        self._quiet = False
        self._shown: list[str] = []

    def begin(self) -> None:
        self._shown = []

    def close(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                self._end(node)
        self.loop.close()

    def _failed(self, context: dict[str, Any]) -> None:
        raise AssertionError(context["message"]) from context.get("exception")

    # --- commands

    def do_start(self, *names: str) -> list[str]:
        self._quiet = True
        for name in names:
            self.do_join(name)
            self.do_run()
        self._quiet = False
        return self.do_table()

    def do_join(self, name: str) -> list[str]:
        self._lives += 1
        node = self.nodes[name] = ChannelNode(self, name, self._lives)
        if name not in self.columns:
            self.columns.append(name)
        self.group.view()
        node.spawn(node.enter())
        return self._told(self._agree)

    def do_send(self, name: str, kind: str, lo: str = "0", hi: str = "0") -> list[str]:
        node = self.nodes[name]
        message = Message(MessageType[kind], node.channel.slot, int(lo), int(hi))
        node.spawn(node.broadcast(message))
        return self._told(self._idle)

    def do_run(self, to: str = "", *words: str) -> list[str]:
        self._wanted, self._found = " ".join(words), ""

        def run() -> None:
            while not self._found and (node := self._next()) is not None:
                self._apply(node)

        lines = self._told(run)
        assert not self._wanted or self._found, f"no operation had {self._wanted!r}: {lines}"
        self._wanted = ""
        return lines

    def do_step(self, name: str, count: str = "1") -> list[str]:
        def step() -> None:
            for _ in range(int(count)):
                assert self.nodes[name].port.sent, f"{name} asks for nothing now"
                self._apply(self.nodes[name])

        return self._told(step)

    def do_answer(self, name: str, result: str) -> None:
        self.nodes[name].result = getattr(errno, result) if result != "0" else 0

    def do_hold(self, name: str) -> None:
        self.nodes[name].held = asyncio.Event()

    def do_go(self, name: str) -> list[str]:
        node = self.nodes[name]
        assert node.held is not None
        node.held.set()
        node.held = None
        return self._told(self._idle)

    def do_kill(self, name: str) -> None:
        self._end(self.nodes[name])

    def do_lose(self, name: str) -> list[str]:
        self.group.lose(self.nodes[name].port.me, Left.LOST)
        return self._told(self._agree)

    def do_fence(self, name: str) -> list[str]:
        self.group.fence(self.nodes[name].port.me)
        return self._told(self._deliver)

    def do_wait(self, seconds: str) -> list[str]:
        until_s = self.loop.time() + float(seconds)

        def wait() -> None:
            alarm = self.loop.call_at(until_s, lambda: None)
            self.loop.run(lambda: False, until_s)
            assert alarm.when() == self.loop.time() == until_s

        return self._told(wait)

    def do_table(self) -> list[str]:
        return [*self._header(), self._row("")]

    # --- moving

    def first(self) -> ChannelNode | None:
        """The living node whose replica the table is read from."""
        return next((node for node in self.nodes.values() if node.alive and node.replica.installed), None)

    def _next(self) -> ChannelNode | None:
        """The next living node, in turn, that asks for something."""
        names = sorted(self.nodes)
        for place in range(self._turn, self._turn + len(names)):
            node = self.nodes[names[place % len(names)]]
            if node.alive and node.port.sent:
                self._turn = (place + 1) % len(names)
                return node
        return None

    def _apply(self, node: ChannelNode) -> None:
        self.group.accept(node.port.me)
        self._deliver()

    def _deliver(self) -> None:
        self._watch()
        for node in list(self.nodes.values()):
            while node.alive and self.group.deliver(node.port.me):
                pass
        self._same_everywhere()
        self._idle()

    def _same_everywhere(self) -> None:
        """All replicas hold the same state."""
        machines = [node.machine for node in self.nodes.values() if node.alive and node.replica.installed]
        for machine in machines:
            assert machine.digest() == machines[0].digest(), "replicas differ (I3)"

    def _idle(self) -> None:
        self.loop.run(lambda: True, 0)

    def _agree(self) -> None:
        """A new view: let the replicas tell what they have, and install it, before anything else is ordered."""
        self._deliver()
        living = [node for node in self.nodes.values() if node.alive]
        while not all(node.replica.installed for node in living):
            for node in living:
                self.group.accept(node.port.me)
            self._deliver()

    def _watch(self) -> None:
        """The rules of the lock engine are judged on the first living node's replica."""
        node = self.first() if self._watched is not None else next(iter(self.nodes.values()))
        if node is not None and node is not self._watched:
            self.checker = self.checker.clone()
            self.checker.watch(node.machine.engine)
            self._watched = node

    def _end(self, node: ChannelNode) -> None:
        node.alive = node.process.alive = False
        node.process.context.copy().run(node.session.on_lost, "the node is dead")
        self.loop.bury(node.process)

    # --- words

    def _told(self, work: Any) -> list[str]:
        """What `work()` made happen, under a header if there is a table."""
        self.notes = []
        work()
        notes = [] if self._quiet else self.notes
        rows = any(not note.startswith("    *") for note in notes)
        return [*(self._header() if rows else []), *notes]

    def asked(self, name: str, lock: int, mode: Mode) -> None:
        self.notes.append(f"    * {name} is told that somebody wants {self.locks[lock][1]} {mode.name}")

    def applied(self, entry: bytes) -> None:
        """An entry has become part of the state; its operations are lines of the table."""
        node = self.first()
        assert node is not None
        places = node.machine.engine.locks
        for number, place in places.items():
            name = self.columns_name(place.lock.session[0])
            self.locks[number] = (name, place.resource.name.decode())
        match unpack(entry):
            case ["ops", number, _, _, ops]:
                said = [what for op in ops if (what := self._operation(self.columns_name(number), op[1:]))]
            case ["fenced", number, _, _]:
                said = [f"{self.columns_name(number)} is proved dead, its locks are purged"]
            case ["install", _, members, _, _]:
                said = [f"members: {' '.join(sorted(name for _, _, name in members))}"]
        for what in said:
            self.notes.append(self._row(what))
            if self._wanted and self._wanted in what:
                self._found = what
        self.held = {number: Mode(place.lock.gr) for number, place in places.items()}

    def columns_name(self, number: int) -> str:
        return chr(ord("A") + number - 1)

    def _operation(self, who: str, frame: Frame) -> str:
        match frame:
            case ["request", _, _, name, mode, flags, _]:
                how = ", if it is free" if flags & Flag.NOQUEUE else ""
                return f"{who} {name.decode()} {Mode(mode).name}{how}"
            case ["convert", _, lock, mode, _, value]:
                name = self.locks[lock][1]
                before = self.held[lock]
                wrote = _written(name, before, mode, value)
                return f"{who} {name} {before.name}→{Mode(mode).name}{wrote}"
            case ["unlock", _, lock, *_]:
                return f"{who} {self.locks[lock][1]} freed"
            case ["cancel", _, lock, *_]:
                return f"{who} {self.locks[lock][1]} cancel"
            case ["join", *_]:
                return f"{who} joins the lockspace"
            case ["open", *_]:
                return ""
        return f"{who} {frame[0]}"

    def _header(self) -> list[str]:
        """The head of the table, unless this block has it already."""
        names = "".join(self._column_head(name) for name in self.columns)
        locks = "".join(f"{short:<{CELL}}" for short in SHOWN.values())
        header = [" " * WIDTH + names, " " * WIDTH + "".join(f"{locks}  " for _ in self.columns)]
        before, self._shown = self._shown, header
        return header if header != before else []

    def _column_head(self, name: str) -> str:
        node = self.nodes[name]
        return f"{name + ('' if node.alive else ' (dead)'):<{CELL * len(SHOWN) + 2}}"

    def _row(self, what: str) -> str:
        node = self.first()
        assert node is not None
        cells = {(name, lock): "-" for name in self.columns for lock in SHOWN}
        for number, place in node.machine.engine.locks.items():
            lock = place.lock
            if lock in place.resource.granted:
                mode = Mode(lock.gr).name
            else:
                mode = (Mode(lock.gr).name if lock.gr >= 0 else "") + "→" + Mode(lock.rq).name
            cells[self.locks[number]] = mode
        row = "".join(
            "".join(f"{cells[name, lock]:<{CELL}}" for lock in SHOWN) + "  " for name in self.columns
        )
        return f"{what:<{WIDTH}}{row}"


def words_of(message: Message) -> str:
    words = f"{message.type.name} #{message.sequence} of md slot {message.slot}"
    return words + (f" ({message.low} to {message.high})" if message.high else "")


def _written(name: str, before: int, mode: int, value: bytes | None) -> str:
    """What a conversion put into the value block, for people."""
    if value is None or before < Mode.PW or (before == Mode.PW and mode == Mode.EX):
        return ""
    if name == "message":
        return (
            f", writes {Message.from_bytes(value).type.name} #{sequence_of(value)}" if mode == Mode.CW else ""
        )
    block = SlotBlock.from_bytes(value)
    if not block.sequence:
        return ", clears it"
    return f", answers #{block.sequence} {errno.errorcode[block.result] if block.result else 'ok'}"
