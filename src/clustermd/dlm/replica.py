"""One lock daemon's replica: the state machine driven by a process group.

Between two views all members apply the same messages in the same order. At a view they agree anew (dlm.md
6.3): everything delivered from the view on is *held*; each member multicasts START with what it has;
the delivery of the last START is the *install point*, the same for all. There each computes from the same
STARTs who carries the state on (the *authority*: most entries applied), who is gone, who is new. The
entry that says so is applied, then what was held.

    away       no quorate view: nothing delivered counts, clients wait
    starting   the STARTs of the view are being collected
    fetching   installed by the others; our state (a newcomer) or the entries that we missed are on their way
    live       entries are applied as they come
    over       this state belongs to no history that goes on; the daemon must start anew (`must_restart`)

A newcomer gets the state as it was at the install point. A member that missed the last entries of the
common history, because whatever ordered them died between two deliveries, gets just these and
applies them itself: its clients lose no completion. Somebody whose history is not a part of the authority's
(it went on elsewhere, or was declared lost) starts anew, and all its clients' sessions are lost.

What our clients ask for is numbered and kept until seen applied, and sent again after each install;
repeats are harmless (`machine`). What gives a client more rights is shown to it only when the
message that caused it is stable (dlm.md 6.2).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from clustermd.dlm import report
from clustermd.dlm.agreement import ACK_EVERY, DIGEST_EVERY, Agreement
from clustermd.dlm.effects import Answer, Cast, Effect, RecoverDone, RecoverSlot
from clustermd.dlm.install import Install, plan_install
from clustermd.dlm.machine import Machine, NodeKey, chain_after
from clustermd.dlm.messages import CONFIG, Start, decode, in_parts, ops_message
from clustermd.dlm.outbox import Outbox
from clustermd.dlm.shown import AT_ONCE, NOT_YET, Shown
from clustermd.dlm.wire import Frame, check_client_frame, effect_frame, frame_op, pack, unpack
from clustermd.errors import BadBytes, Refused
from clustermd.group.process_group import Busy, Left, Member, ProcessGroup, View
from clustermd.trace import Trace

RECENT = 512
"""How many hashes of the last entries are told at a view, so that forked histories are recognised."""
TEXT_MOST = 512
"""Characters of a text for people: with it every operation fits in one message of the group."""


class ReplicaShell(Protocol):
    """The daemon around a replica: it carries frames to clients and acts when the group or the state is lost."""

    def to_session(self, session: int, frame: Frame) -> None: ...

    def suspended(self, reason: str) -> None: ...

    def resumed(self) -> None: ...

    def must_restart(self, reason: str) -> None:
        """The state belongs to no history that goes on: all sessions are lost, a new incarnation is needed."""


class Phase(enum.Enum):
    AWAY = "away"
    STARTING = "starting"
    FETCHING = "fetching"
    LIVE = "live"
    OVER = "over"


class Replica:
    """See the module. Methods are synchronous and never block; events of the group must not be called within them.

    `soon(call)` calls it soon: what clients ask for until then goes out in one message.
    """

    def __init__(
        self,
        shell: ReplicaShell,
        trace: Trace,
        soon: Callable[[Callable[[], None]], object] = lambda call: call(),
    ) -> None:
        self._shell = shell
        self._trace = trace
        self._group: ProcessGroup | None = None
        self._machine = Machine()
        self._has_state = False
        self._phase = Phase.AWAY
        self._was_live = False
        self._unbroken = True
        self._suspended = "this node has not joined its group yet"
        self._over = ""
        self._view: View | None = None
        self._starts: dict[NodeKey, Start | None] = {}
        self._held: list[bytes] = []
        self._install: Install | None = None
        self._parts: dict[int, bytes] = {}
        self._left: set[NodeKey] = set()
        self._fenced: dict[NodeKey, str] = {}
        self._unfenced: set[NodeKey] = set()
        self._index = 0
        self._awaited = 0
        self._waits = ""
        self._shown = 0
        self._unstable: deque[tuple[int, int]] = deque()
        self._agreement = Agreement()
        self._acked = 0
        self._clients = Shown(shell.to_session)
        self._next_session = 1
        self._outbox = Outbox()
        self._soon = soon
        self._flushing = self._busy = False
        self._to_send: deque[bytes] = deque()

    # ---- for the daemon

    @property
    def has_state(self) -> bool:
        """Whether it kept what former views agreed on."""
        return self._has_state

    @property
    def installed(self) -> bool:
        """Whether operations are being applied: a state, a quorate view, nothing missing."""
        return self._phase is Phase.LIVE

    @property
    def awaited(self) -> int:
        """The last message of this view by which any client, here or elsewhere, gains a right: it is to be stable."""
        return self._awaited

    def attach(self, group: ProcessGroup) -> None:
        """Use `group`, whose events must come here."""
        self._group = group

    def open_session(self, label: str, pid: int) -> int:
        """A new client, `label` and `pid` for people. Returns its number, by which the shell knows it."""
        number = self._next_session
        self._next_session += 1
        self._clients.open(number)
        self._submit([number, "open", label[:TEXT_MOST], pid])
        return number

    def session_frame(self, session: int, frame: Frame) -> None:
        """A frame from that client. A malformed one is answered "refused" and goes no further."""
        try:
            check_client_frame(frame)
            if not self._clients.listens(session):
                raise Refused("no-session", "this lock session has ended; connect again")
            self._outbox.check_room(session, frame[0])
        except Refused as refusal:
            answer = ["refused", frame_op(frame), refusal.code, refusal.message, refusal.data]
            self._shell.to_session(session, answer)
            return
        self._submit([session, *frame])

    def session_lost(self, session: int) -> None:
        """The client's socket ended; its I/O may be in flight. It keeps its granted locks until `session_end`."""
        if self._clients.listens(session):
            self._clients.lost(session)
            self._submit([session, "lost"])

    def session_end(self, session: int, proof: str, clean: bool) -> None:
        """The client is proved dead, or said goodbye (`clean`): what it holds is purged."""
        if self._clients.close(session):
            self._submit([session, "end", proof[:TEXT_MOST], clean])

    @property
    def applied(self) -> int:
        """How many entries have been applied: while it stands still no lock changes."""
        return self._machine.applied

    def modes(self) -> Iterator[tuple[int, int, int]]:
        """(lock id, granted mode, wanted mode or IV) of every lock now."""
        return report.modes(self._machine)

    def status(self) -> dict[str, Any]:
        """Who holds and awaits what, as plain JSON values (`report`)."""
        state: dict[str, Any] = {"phase": self._phase.value, "suspended": self._suspended}
        if self._view is not None:
            state["waiting_for_start"] = [
                member.name
                for member in self._view.members
                if self._phase is Phase.STARTING and member.key not in self._starts
            ]
            if self._phase is Phase.STARTING and self._waits:
                state["waits"] = self._waits
        if self._over:
            state["over"] = self._over
        return state | report.describe(self._machine)

    # ---- events of the group

    def on_view(self, view: View) -> None:
        if self._phase is Phase.OVER:
            return
        if self._phase is not Phase.AWAY:
            self._was_live = self._phase is Phase.LIVE
        self._hear_late(view.late)
        self._keep_in_mind(view)
        for member, reason in view.left:
            if reason is Left.LEFT:
                self._left.add(member.key)
                self._unfenced.discard(member.key)
            else:
                # the group knows no proof: one of former views was of a state that is gone, or this node's alone
                self._fenced.pop(member.key, None)
                self._unfenced.add(member.key)
        # who was missed and is back needs no proof, not even when it leaves in peace later
        self._unfenced.difference_update(member.key for member in view.members)
        self._view = view
        self._starts = {}
        self._held = []
        self._install = None
        self._parts = {}
        self._to_send.clear()
        self._waits = ""
        self._awaited = 0
        self._unstable.clear()
        self._clients.new_ring()
        if view.quorate and self._me in (member.key for member in view.members):
            self._phase = Phase.STARTING
            self._trace.point("dlm.start", ring=view.ring, applied=self._machine.applied)
            self._to_send.append(pack(["start", CONFIG, list(view.ring), self._start().to_wire()]))
            self._flush()
        else:
            self._phase = Phase.AWAY
            self._trace.point("dlm.freeze", ring=view.ring)
            if self._has_state and not self._suspended:
                self._suspended = "the group has no quorum or lost what orders its messages"
                self._shell.suspended(self._suspended)

    def _keep_in_mind(self, view: View) -> None:
        """A view that came to no install does not make up for the quorum that was lost before it."""
        self._unbroken = self._unbroken and view.unbroken

    def _hear_late(self, late: tuple[tuple[Member, bytes | str], ...]) -> None:
        """The end of the last view's order: others may have shown what it gave them, counting on us to know it.

        Where we had no part in that view's state, nobody counted on us; but a proof is one, and is told once.
        """
        for member, word in late:
            if isinstance(word, str):
                entry = self._proved(member, word)
                if self._was_live:
                    self._apply(entry)
            elif self._was_live:
                match self._decoded(member, word):
                    case ["ops", _, first, ops]:
                        self._apply(pack(["ops", *member.key, first, ops]))

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        self._index = index
        if self._phase in (Phase.AWAY, Phase.OVER):
            return
        message = self._decoded(sender, payload)
        if message is None:
            return
        key = sender.key
        match message:
            case ["start", config, ring, start]:
                self._on_start(key, config, tuple(ring), start)
            case ["ops", applied, first, ops]:
                self._agreement.told(key, applied)
                self._entry(pack(["ops", *key, first, ops]))
            case ["ack", applied, digest_at, digest]:
                self._agreement.told(key, applied)
                self._on_ack(key, digest_at, digest)
            case [word, ring, number, count, data]:
                self._on_part(word, key, tuple(ring), number, count, data)
        self._flush()

    def on_stable(self, index: int) -> None:
        before = self._shown
        while self._unstable and self._unstable[0][0] <= index:
            self._shown = self._unstable.popleft()[1]
        if self._shown != before and self._trace.on:
            self._trace.point("dlm.stable", applied=self._shown, chain=self._machine.chain_at(self._shown))
        self._clients.stable(index)

    def on_fenced(self, member: Member, proof: str, index: int = 0) -> None:
        self._index = index or self._index
        if self._phase is Phase.OVER:
            return
        self._entry(self._proved(member, proof))
        if self._phase is Phase.STARTING:
            self._try_install()
        self._flush()

    def _decoded(self, sender: Member, payload: bytes) -> list[Any] | None:
        """The message in `payload`; None, and a trace point, if there is none."""
        try:
            return decode(payload)
        except BadBytes as error:
            self._trace.point("dlm.bad_message", sender=sender.node, why=error.message)
            return None

    def _proved(self, member: Member, proof: str) -> bytes:
        """Keep a proof for the next install. Returns the entry that it is."""
        self._unfenced.discard(member.key)
        self._fenced[member.key] = proof
        self._trace.point("dlm.fenced", node=member.node, proof=proof)
        return pack(["fenced", *member.key, proof])

    # ---- the install point

    @property
    def _me(self) -> NodeKey:
        assert self._group is not None, "attach() comes before the group's events"
        return self._group.me.key

    def _start(self) -> Start:
        machine = self._machine
        return Start(
            has_state=self._has_state,
            epoch=machine.epoch,
            applied=machine.applied,
            chain=machine.chain,
            digest=machine.digest() if self._has_state else b"",
            members=machine.members,
            left=tuple(sorted(self._left)),
            fenced=tuple((*key, proof) for key, proof in sorted(self._fenced.items())),
            unfenced=tuple(sorted(self._unfenced)),
            shown=self._shown,
            recent=() if self._view is None or not self._view.majority else machine.recent(RECENT),
            unbroken=self._unbroken,
            outlived=tuple(sorted(machine.outlived)),
        )

    def _on_start(self, key: NodeKey, config: bytes, ring: tuple[Any, ...], wire: Any) -> None:
        if self._phase is not Phase.STARTING or self._view is None or ring != self._view.ring:
            return  # it answers an older view
        try:
            self._starts[key] = Start.from_wire(wire) if config == CONFIG else None
        except BadBytes:
            self._starts[key] = None
        self._try_install()

    def _try_install(self) -> None:
        assert self._view is not None
        if any(member.key not in self._starts for member in self._view.members):
            return
        plan = plan_install(self._view, self._starts, self._fenced)
        if isinstance(plan, str):
            self._waits = plan
            self._trace.point("dlm.wait_fenced", ring=self._view.ring, why=plan)
            return
        reason = plan.foreign.get(self._me)
        if reason is not None:
            self._end(reason)
            return
        if self._me not in plan.members:
            self._waits = "the nodes that kept an old lock state start anew"
            return
        self._trace.point("dlm.install", epoch=plan.epoch, members=plan.members, authority=plan.authority)
        self._agreement.begin(plan.applied)
        self._install = plan
        if self._me in plan.current:
            tail = self._tail_for(plan) if plan.sender == self._me else b""
            self._enter()
            if plan.sender == self._me:
                group = self._group
                assert group is not None
                if plan.behind:
                    self._to_send.extend(in_parts("tail", self._view.ring, tail, group.max_payload))
                if plan.fresh:
                    state = self._machine.dump_sealed()
                    self._to_send.extend(in_parts("snapshot", self._view.ring, state, group.max_payload))
        else:
            self._phase = Phase.FETCHING
            if self._me in plan.fresh:
                self._held = []  # what was delivered before the install point is inside the snapshot

    def _tail_for(self, plan: Install) -> bytes:
        first = (
            max(min(plan.applied[key] for key in plan.behind), self._machine.log_start) if plan.behind else 0
        )
        return (
            pack([first, self._machine.chain_at(first) or b"", self._machine.tail(first)])
            if plan.behind
            else b""
        )

    def _enter(self) -> None:
        """Apply the install entry and what was held, then go on live. Our state is the authority's."""
        plan = self._install
        assert plan is not None
        held, self._held = self._held, []
        self._phase = Phase.LIVE
        self._has_state = self._unbroken = True
        self._left.clear()
        self._fenced.clear()
        if self._me not in plan.fresh or plan.authority is None:
            self._apply(plan.entry)
        for entry in held:
            self._apply(entry)
        self._resume()

    def _resume(self) -> None:
        state = self._machine.nodes.get(self._me)
        self._outbox.send_again_after(state.last_op if state is not None else 0)
        self._awaited = self._index
        self._clients.installed(self._index)
        if self._suspended:
            self._suspended = ""
            self._shell.resumed()

    def _on_part(
        self, word: str, key: NodeKey, ring: tuple[Any, ...], number: int, count: int, data: bytes
    ) -> None:
        plan = self._install
        if self._phase is not Phase.FETCHING or plan is None or self._view is None:
            return
        wanted = "snapshot" if self._me in plan.fresh else "tail"
        if word != wanted or key != plan.sender or ring != self._view.ring:
            return
        self._parts[number] = data
        if len(self._parts) < count:
            return
        whole = b"".join(self._parts[place] for place in range(count))
        self._parts = {}
        try:
            if word == "snapshot":
                self._machine.load_sealed(whole)
                self._trace.point("dlm.loaded", applied=self._machine.applied, chain=self._machine.chain)
            else:
                self._catch_up(whole)
        except BadBytes as error:
            self._end(error.message)
            return
        self._acked = 0
        self._enter()

    def _catch_up(self, whole: bytes) -> None:
        """Apply the entries that we missed, if our history is a part of theirs. Raises BadBytes."""
        machine = self._machine
        try:
            first, chain, entries = unpack(whole)
        except (ValueError, TypeError):
            raise BadBytes("bad-frame", "the missing entries of the lock history cannot be read") from None
        known = machine.applied - first
        if known < 0 or machine.chain != chain_after(chain, entries[:known]):
            raise BadBytes(
                "other-history",
                "the lock state of this node is not a part of the one that the cluster goes on with",
            )
        for entry in entries[known:]:
            self._apply(entry)

    def _end(self, reason: str) -> None:
        self._phase = Phase.OVER
        self._over = reason
        self._trace.point("dlm.over", reason=reason)
        self._clients.clear()
        self._outbox.clear()
        self._shell.must_restart(reason)

    # ---- applying

    def _entry(self, entry: bytes) -> None:
        if self._phase is Phase.LIVE:
            self._apply(entry)
        elif self._phase in (Phase.STARTING, Phase.FETCHING):
            self._held.append(entry)

    def _apply(self, entry: bytes) -> None:
        machine = self._machine
        try:
            effects = machine.apply(entry)
        except BadBytes as error:
            self._trace.point("dlm.bad_message", why=error.message)
            return
        self._trace.point("dlm.apply", applied=machine.applied, chain=machine.chain, entry=entry)
        self._unstable.append((self._index, machine.applied))
        self._emit(effects)
        state = machine.nodes.get(self._me)
        if state is not None:
            self._outbox.applied(state.last_op)
        if machine.applied % DIGEST_EVERY == 0:
            self._say_ack(machine.applied, machine.digest())
        elif machine.applied - self._acked >= ACK_EVERY:
            self._say_ack(0, b"")

    def _emit(self, effects: list[Effect]) -> None:
        """Show our clients what concerns them.

        The answer to a request that is granted at once waits for the grant: nobody is woken for half of it.
        """
        risen = self._index if self._phase is Phase.LIVE else NOT_YET
        answer: Answer | None = None
        for effect in effects:
            granted = isinstance(effect, Cast) and effect.rising
            rises = granted or isinstance(effect, (RecoverSlot, RecoverDone))
            if rises:
                self._awaited = self._index
            if answer is not None:
                self._show(answer, risen if granted and _is_of(answer, effect) else AT_ONCE)
                answer = None
            if isinstance(effect, Answer) and effect.rc == 0:
                answer = effect
            else:
                self._show(effect, risen if rises else AT_ONCE)
        if answer is not None:
            self._show(answer, AT_ONCE)

    def _show(self, effect: Effect, after: int) -> None:
        node, incarnation, number = effect.session
        if (node, incarnation) == self._me:
            self._clients.put(number, after, effect_frame(effect))

    # ---- agreement

    def _say_ack(self, digest_at: int, digest: bytes) -> None:
        self._acked = self._machine.applied
        self._to_send.append(pack(["ack", self._machine.applied, digest_at, digest]))

    def _on_ack(self, key: NodeKey, digest_at: int, digest: bytes) -> None:
        if self._phase is not Phase.LIVE:
            return
        members = self._machine.members
        self._machine.trim(self._agreement.everybody_has(members))
        if digest_at and self._me in self._agreement.digest(key, digest_at, digest, members):
            self._end(f"the lock state of this node differs from that of the others after {digest_at} inputs")

    # ---- sending

    def _submit(self, op: Frame) -> None:
        self._outbox.add(op)
        if not self._flushing and not self._busy:
            self._flushing = True
            self._soon(self._flush)

    def _flush(self) -> None:
        """Send what waits. A busy group is asked again at the next delivery, a lost one after the next install."""
        self._flushing = self._busy = False
        group = self._group
        if group is None:
            return
        try:
            while self._to_send:
                group.multicast(self._to_send[0])
                self._to_send.popleft()
            while self._phase is Phase.LIVE:
                first, ops = self._outbox.next_batch(group.max_payload)
                if not ops:
                    return
                group.multicast(ops_message(self._machine.applied, first, ops))
                self._outbox.sent = first + len(ops) - 1
        except Busy:
            self._busy = True
        except Refused as error:
            self._trace.point("dlm.not_sent", why=error.message)


def _is_of(answer: Answer, effect: Effect) -> bool:
    """Whether that completion is of the operation that was answered."""
    return isinstance(effect, Cast) and (effect.session, effect.op) == (answer.session, answer.op)
