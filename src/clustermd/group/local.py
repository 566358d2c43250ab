"""The process group of one machine, as a member has it: a client of the sequencer.

`connect` finds the sequencer or starts it and learns this node's number; `join` begins the membership. A
message that was delivered is in the order's log, so it is stable at once.

When the sequencer dies the member reads from the log what it had not been told yet, hears a view that
is not quorate ("frozen"), finds or starts a new sequencer by itself and rejoins as the same incarnation.
The next quorate view resumes. What was multicast and not delivered is sent again then, and the
sequencer recognises what it had ordered already: in the order exactly once, or never if the member
dies. `multicast` queues meanwhile and says `Busy` when `QUEUE_LIMIT` messages or `QUEUE_BYTES` wait.

A sequencer that is stopped or stuck would hang everybody: it is pinged, and killed through a pidfd
when it gives no answer for `unresponsive_s`; its successor goes on.

A member that cannot rejoin is expelled: `on_expelled(reason)` is called, nothing is delivered any more, and
its process should end (its former life is then proved dead by the sequencer).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from clustermd.clock import Clock, Random
from clustermd.errors import BadBytes, DeviceRefused, Refused
from clustermd.group.frames import Frame, FrameLink, bad_frame, open_link
from clustermd.group.liveness import Bounds, PeerWatch
from clustermd.group.order import Event, member_from_wire, member_to_wire, view_from_event
from clustermd.group.orderlog import missed
from clustermd.group.process import kill, start_time
from clustermd.group.process_group import (
    Busy,
    GroupEvents,
    Left,
    Member,
    View,
    Witness,
    check_size,
    not_a_member,
)
from clustermd.group.sequencer_protocol import PROTOCOL, SEQUENCER_MODULE
from clustermd.group.start import connect_or_start
from clustermd.group.tasks import Tasks
from clustermd.rundir import RunDir
from clustermd.trace import Trace

MAX_PAYLOAD_BYTES = 1 << 20
QUEUE_LIMIT = 4096
QUEUE_BYTES = 32 << 20
_RETRY_S = 1.0

log = logging.getLogger("clustermd.group")


class LocalGroup:
    """`ProcessGroup` on one machine. Call `connect`, then `join`; `leave` or `abandon` end it."""

    def __init__(
        self,
        rundir: RunDir,
        bounds: Bounds,
        clock: Clock,
        random: Random,
        trace: Trace,
        on_expelled: Callable[[str], None],
    ) -> None:
        self.me = Member(0, int.from_bytes(random.bytes(8), "big"), rundir.node)
        self.max_payload = MAX_PAYLOAD_BYTES
        self.view = View((0, 0), (), (), (), False)
        self.frozen = "not a member yet"
        self.unproved = ""  # the sequencer welcomes nobody before that
        self._rundir = rundir
        self._bounds = bounds
        self._clock = clock
        self._trace = trace
        self._on_expelled = on_expelled
        self._events: GroupEvents | None = None
        self._link: FrameLink | None = None
        self._sequencer = (0, 0)
        self._watch = PeerWatch(bounds)
        self._place: int | None = None
        self._welcome_place = 0
        self._members: dict[int, Member] = {}
        self._seq = 0
        self._unordered: deque[tuple[int, bytes]] = deque()
        self._unordered_bytes = 0
        self._request = 0
        self._asked: dict[int, tuple[Frame, asyncio.Future[None]]] = {}
        self._status: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._over = False
        self._joining = False
        self._tasks = Tasks()

    # --- ProcessGroup

    def multicast(self, payload: bytes) -> None:
        """As `ProcessGroup.multicast`; queues while frozen."""
        if self._over or self._events is None:
            raise not_a_member(self.me)
        check_size(payload, self.max_payload)
        if len(self._unordered) >= QUEUE_LIMIT or self._unordered_bytes >= QUEUE_BYTES:
            raise Busy(f"{len(self._unordered)} messages wait to be ordered")
        self._seq += 1
        self._unordered_bytes += len(payload)
        self._unordered.append((self._seq, payload))
        if not self.frozen and self._link is not None:
            self._link.send("send", self._seq, payload)

    async def register_witness(self, witness: Witness) -> None:
        """As `ProcessGroup.register_witness`. The locks must be held already: DeviceRefused
        ("witness-not-held") otherwise. Waits while the group is frozen."""
        await self._ask("witness", witness.to_wire())

    async def withdraw_witness(self, key: str) -> None:
        await self._ask("withdraw", key)

    async def leave(self) -> None:
        """As `ProcessGroup.leave`. Raises Refused ("not-clean") while witnesses are registered."""
        if self._events is not None and not self._over:
            await self._ask("leave", at_once=self._place is None)
        self.abandon("left")

    # --- life

    async def connect(self) -> None:
        """Find or start the sequencer and learn this node's number. Raises Refused."""
        await self._reach()
        self._tasks.spawn(self._tick())

    def join(self, events: GroupEvents) -> None:
        """Begin the membership; the first view comes to `events` when the group takes us."""
        self._events = events
        self._joining = True
        self.frozen = "waiting to join"
        if self._link is not None:
            self._link.send("join")

    def abandon(self, reason: str) -> None:
        """End without leaving: for a process that is about to end. Pending calls raise Refused."""
        self._over = True
        self.frozen = reason
        if self._link is not None:
            self._link.close()
            self._link = None
        self._tasks.cancel()
        for _, future in self._asked.values():
            if not future.done():
                future.set_exception(not_a_member(self.me, reason))
        self._asked.clear()

    def vouch(self, name: str, words: str) -> None:
        """As `NodeGroup.vouch`: on one machine every end is proved, nobody needs to believe an operator."""
        raise Refused(
            "not-offered",
            f"the nodes of this cluster are on one machine, where the end of {name} is proved: see clustermd locks "
            "for what is waited for",
        )

    async def status(self, within_s: float = 1.0) -> dict[str, Any]:
        """What this member knows of the group, and what the sequencer says of others if it answers."""
        state: dict[str, Any] = {
            "engine": "local",
            "ring": list(self.view.ring),
            "members": [[m.node, m.name, f"{m.incarnation:016x}"] for m in self.view.members],
            "frozen": self.frozen,
            "sequencer_silent_s": round(self._watch.silent_s, 1) if self._watch.shown else 0.0,
            "sequencer": None,
        }
        if self._link is not None:
            self._request += 1
            answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self._status[self._request] = answer
            request = self._request
            self._link.send("status", request)
            try:
                state["sequencer"] = await asyncio.wait_for(answer, within_s)
            except TimeoutError:
                pass
            finally:
                self._status.pop(request, None)
        return state

    # --- the sequencer's link

    async def _reach(self) -> None:
        async def attempt() -> None:
            welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            link = await open_link(
                self._rundir.sequencer_socket,
                lambda link, frame: self._frame(link, frame, welcome),
                lambda link, reason: self._lost(link, reason, welcome),
            )
            try:
                link.send("hello", PROTOCOL, self.me.name, self.me.incarnation, self._place)
                await self._hear(welcome, link)
            except BaseException:
                link.close()
                raise

        root = self._rundir.root
        await connect_or_start(attempt, SEQUENCER_MODULE, self._rundir, root / "sequencer.log", self._clock)

    async def _hear(self, welcome: asyncio.Future[None], link: FrameLink) -> None:
        """Wait for the welcome. A sequencer that gives none is killed like one that answers no ping."""
        watch = PeerWatch(self._bounds)
        process = link.peer_pid, start_time(link.peer_pid) or 0
        last_s = self._clock.monotonic_s()
        while not welcome.done():
            await asyncio.wait((welcome,), timeout=self._bounds.tick_s)
            now_s = self._clock.monotonic_s()
            elapsed_s, last_s = now_s - last_s, now_s
            if watch.tick(elapsed_s) and not welcome.done():
                log.error("the sequencer gave no welcome for %.1f s: it is killed", watch.silent_s)
                kill(*process)
                raise ConnectionResetError("the sequencer does not answer")
        welcome.result()

    def _welcomed(self, link: FrameLink, number: int, place: int) -> None:
        """From here on this is our link; events may follow in the very same bytes."""
        self._link = link
        self._sequencer = (link.peer_pid, start_time(link.peer_pid) or 0)
        self.me = Member(number, self.me.incarnation, self.me.name)
        self._welcome_place = place
        if self._joining and self._place is None:
            link.send("join")

    def _lost(self, link: FrameLink, reason: str, welcome: asyncio.Future[None]) -> None:
        if not welcome.done():
            welcome.set_exception(ConnectionResetError(reason))
        elif link is self._link:
            self._link_ended(reason)

    def _link_ended(self, reason: str) -> None:
        self._link = None
        if self._over:
            return
        log.info("the sequencer is gone: %s", reason)
        if self._joining:
            seen = self._welcome_place if self._place is None else self._place
            try:
                for event in missed(self._rundir.root, seen):
                    self._deliver(event)
            except (BadBytes, OSError) as error:
                self._expelled(f"the order's log cannot be read: {error}")
        if not self._ended():
            self._freeze("the sequencer has ended and is being replaced")
            self._tasks.spawn(self._return())

    def _ended(self) -> bool:
        return self._over

    async def _return(self) -> None:
        while not self._over:
            try:
                await self._reach()
            except (Refused, OSError) as error:
                if self._ended():
                    return
                self.frozen = f"no sequencer: {error}"
                log.error("%s", self.frozen)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    def _frame(self, link: FrameLink, frame: Frame, welcome: asyncio.Future[None]) -> None:
        self._watch.heard()
        match frame:
            case ["message" | "view" | "fenced", *_]:
                self._deliver(frame)
            case ["ping", int(number)]:
                link.send("pong", number, self._place or 0)
            case ["pong", int()]:
                pass
            case ["ok", int(request)]:
                self._answered(request, None)
            case ["refused", int(request), str(code), str(message), dict(data)]:
                kind = Refused if code in ("not-clean", "not-a-member") else DeviceRefused
                self._answered(request, kind(code, message, **data))
            case ["status", int(request), dict(state)]:
                answer = self._status.get(request)
                if answer is not None and not answer.done():
                    answer.set_result(state)
            case ["welcome", int(number), int(place), bool()] if not welcome.done():
                self._welcomed(link, number, place)
                welcome.set_result(None)
            case ["expelled", str(reason)]:
                if not welcome.done():
                    welcome.set_exception(Refused("expelled", reason))
                self._expelled(reason)
            case _:
                raise bad_frame(f"the sequencer says {frame[0]!r} in a way this lockd does not know")

    # --- the order

    def _deliver(self, event: Event) -> None:
        events = self._events
        if events is None or self._over:
            return
        if self._place is None:
            if event[0] != "view" or member_to_wire(self.me) not in event[4]:
                return  # in the log from before we joined
        elif event[1] != self._place + 1:
            self._expelled(f"place {event[1]} of the order came after place {self._place}")
            return
        self._place = event[1]
        match event:
            case ["message", _, index, _, incarnation, seq, payload]:
                if incarnation == self.me.incarnation:
                    assert self._unordered[0][0] == seq
                    self._unordered.popleft()
                    self._unordered_bytes -= len(payload)
                events.on_message(index, self._members[incarnation], payload)
                # stable: the log has it, and everybody reads the log before a new life begins
                events.on_stable(index)
            case ["view", *_]:
                self._view(view_from_event(event), events)
            case ["fenced", _, wire, proof]:
                member = member_from_wire(wire)
                self._trace.point("group.fenced", node=member.node, proof=proof)
                events.on_fenced(member, proof)

    def _view(self, view: View, events: GroupEvents) -> None:
        if (self.me, Left.LEFT) in view.left:
            # our sequencer died between the order of our leave and its answer
            for _, future in self._asked.values():
                if not future.done():
                    future.set_result(None)
            self.abandon("left")
            return
        if self.me not in view.members:
            self._expelled("the group has declared this node lost")
            return
        self.view = view
        self._members = {member.incarnation: member for member in view.members}
        self._trace.point("group.view", ring=view.ring, members=[member.node for member in view.members])
        thawed, self.frozen = self.frozen, ""
        if thawed:
            self._send_again()  # before on_view: what that sends must follow
        events.on_view(view)

    def _send_again(self) -> None:
        if self._link is None:
            return
        for seq, payload in self._unordered:
            self._link.send("send", seq, payload)
        for frame, _ in list(self._asked.values()):
            self._link.send(*frame)

    def _freeze(self, reason: str) -> None:
        if self.frozen:
            return
        self.frozen = reason
        self._trace.point("group.frozen", reason=reason)
        self.view = View(self.view.ring, self.view.members, (), (), False)
        if self._events is not None:
            self._events.on_view(self.view)

    def _expelled(self, reason: str) -> None:
        if not self._over:
            log.error("expelled: %s", reason)
            self.abandon(reason)
            self._on_expelled(reason)

    # --- requests

    async def _ask(self, word: str, *arguments: Any, at_once: bool = False) -> None:
        if self._over:
            raise not_a_member(self.me, self.frozen)
        self._request += 1
        request = self._request
        frame: Frame = [word, request, *arguments]
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked[request] = (frame, future)
        if self._link is not None and (at_once or not self.frozen):
            self._link.send(*frame)
        try:
            await future
        finally:
            self._asked.pop(request, None)

    def _answered(self, request: int, error: Refused | None) -> None:
        asked = self._asked.pop(request, None)
        if asked is None or asked[1].done():
            return
        if error is None:
            asked[1].set_result(None)
        else:
            asked[1].set_exception(error)

    # --- time

    async def _tick(self) -> None:
        last_s = self._clock.monotonic_s()
        number = 0
        while True:
            await asyncio.sleep(self._bounds.tick_s)
            now_s = self._clock.monotonic_s()
            elapsed_s, last_s = now_s - last_s, now_s
            if self._link is None:
                continue
            number += 1
            self._link.send("ping", number)
            if self._watch.tick(elapsed_s):
                log.error("the sequencer has not answered for %.1f s: it is killed", self._watch.silent_s)
                kill(*self._sequencer)
                self._watch.heard()
