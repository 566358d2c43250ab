"""Lock daemons in memory: replicas over a `MemoryGroup`, clients that remember what they were told, and the checks.

Checked after every step, whatever a test does (dlm.md 6.9):

    the engine   every input, by `invariants`; every replica against the others, by `history`
    I2, I9       what clients were shown and have not given back excludes nothing that another was shown; slots too
    I5           what gives more rights is shown when its message is stable
    I4, I8       nothing is applied between a view and its install point; epochs are new
    I7, I28      only a proof or a goodbye takes a node's locks away; a snapshot is the state of its place
    I30          no operation of a client is done twice
    I17, I18     each client is shown exactly what the history has for it, in that order, and nothing after its end

and by `check_quiet` and `check_empty`, when everything is delivered: no operation was lost (I24), nothing is
left (I27).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clustermd.dlm.effects import Cast, Effect, RecoverDone, RecoverSlot, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.machine import Machine, NodeState
from clustermd.dlm.replica import Replica
from clustermd.dlm.wire import CLIENT_FRAMES, Frame, unpack
from clustermd.group.process_group import Left, Member, View
from clustermd.testing.locks.client import LOCAL_REFUSALS, Client
from clustermd.testing.locks.history import History
from clustermd.testing.locks.modes import may_coexist
from clustermd.testing.locks.order import MemoryGroup, Port
from clustermd.testing.locks.rules import LockRuleBroken
from clustermd.trace import Trace

NOT_YET = 1 << 62
"""The message after which something is stable, while no view is installed."""


class Node:
    """One lock daemon: a replica, the shell around it, its clients. `separated` once the others went on without it."""

    def __init__(self, cluster: Cluster, port: Port) -> None:
        self.cluster = cluster
        self.port = port
        self.member = port.me
        self.clients: dict[int, Client] = {}
        self.events: list[str] = []
        self.restart = ""
        self.separated = False
        self._frozen = True
        self._index = 0
        self._stable = 0
        trace = Trace()
        trace.listen(self._traced)
        self.replica = Replica(self, trace)
        self.replica.attach(port)
        port.events = self
        self._really_apply = self.machine.apply
        self._really_load = self.machine.load_sealed
        self._really_do = self.machine._op
        self._did: dict[SessionKey, int] = {}
        self.machine.apply = self._apply  # type: ignore[method-assign]  # every entry is judged
        self.machine.load_sealed = self._load  # type: ignore[method-assign]
        self.machine._op = self._do  # type: ignore[method-assign]

    @property
    def machine(self) -> Machine:
        return self.replica._machine

    def _apply(self, entry: bytes) -> Any:
        if self._frozen:
            raise LockRuleBroken("applied-while-frozen", f"{self.member.name} has installed no view")
        effects: list[Effect] = self.cluster.applied(self, entry)
        for effect in effects:
            if effect.session[:2] == self.member.key:
                rises = isinstance(effect, (RecoverSlot, RecoverDone))
                rises = rises or (isinstance(effect, Cast) and effect.rising)
                self.clients[effect.session[2]].caused.append(self._index if rises else 0)
        return effects

    def _load(self, data: bytes) -> None:
        self._really_load(data)
        self._did.clear()
        if self.cluster.judged and not self.separated:
            self.cluster.history.loaded(self.member.name, self.machine)

    def _do(self, node: NodeState, key: SessionKey, frame: Frame) -> None:
        """One operation of somebody's client; each numbers its own from 1."""
        if frame[0] in CLIENT_FRAMES:
            if frame[1] <= self._did.get(key, 0):
                raise LockRuleBroken("applied-twice", f"{self.member.name} does {frame} of {key} again")
            self._did[key] = frame[1]
        self._really_do(node, key, frame)

    def _traced(self, name: str, fields: dict[str, Any]) -> None:
        if name in ("dlm.start", "dlm.freeze"):
            self._frozen = True
        elif name == "dlm.install":
            self._frozen = False
            if self in self.cluster.apart or fields["epoch"] <= self.machine.epoch:
                raise LockRuleBroken("epoch-not-new", f"{self.member.name} installs {fields}")

    def client(self, label: str = "test") -> Client:
        number = self.replica.open_session(label, 1000 + self.member.node)
        key = (*self.member.key, number)
        due = self.cluster.history.frames.setdefault(key, [])
        name = f"{self.member.name}.{number}"
        client = Client(self, key, name, due)
        client.judged = not self.separated
        self.clients[number] = client
        return client

    def lose_client(self, client: Client) -> None:
        client.lost = True
        self.replica.session_lost(client.number)

    def end_client(self, client: Client, *, clean: bool = False) -> None:
        """It said goodbye, or is proved dead: it uses nothing any more."""
        client.ended = True
        client.release()
        self.replica.session_end(client.number, "the test says so", clean)

    # ---- GroupEvents: what the replica hears, and what is stable

    def on_view(self, view: View) -> None:
        self._stable = 0
        self._held_back(NOT_YET)
        self.replica.on_view(view)

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        self._index = index
        live = self.replica.installed
        self.replica.on_message(index, sender, payload)
        if self.replica.installed and not live:
            self._held_back(index)

    def _held_back(self, index: int) -> None:
        """What clients were not shown yet is stable with message `index`: indexes begin anew in each view."""
        for client in self.clients.values():
            caused = client.caused
            caused[client.heard :] = [after and index for after in caused[client.heard :]]

    def on_stable(self, index: int) -> None:
        self._stable = max(self._stable, index)
        self.replica.on_stable(index)

    def on_fenced(self, member: Member, proof: str, index: int = 0) -> None:
        live = self.replica.installed
        self.replica.on_fenced(member, proof, index)
        if self.replica.installed and not live:
            self._held_back(self._index)

    # ---- ReplicaShell

    def to_session(self, session: int, frame: Frame) -> None:
        client = self.clients[session]
        if self.cluster.listen is not None:
            self.cluster.listen(f"{client.name} is shown {frame!r}")
        lock = client.hear(frame)
        if not (frame[0] == "refused" and frame[2] in LOCAL_REFUSALS):
            after = client.caused[client.heard] if client.heard < len(client.caused) else 0
            client.heard += 1
            if after > self._stable:
                raise LockRuleBroken(
                    "rise-not-held-back", f"{client.name} is shown {frame} before it is stable"
                )
        if lock:
            self.cluster.check_exclusion(client, lock)
        elif frame[0] == "done":
            self.cluster.check_slot(client, frame[1])

    def suspended(self, reason: str) -> None:
        self.events.append("suspended")

    def resumed(self) -> None:
        self.events.append("resumed")

    def must_restart(self, reason: str) -> None:
        self.restart = reason


class Cluster:
    """`size` daemons in one view. Without `judged` replicas may differ: for tests that make them differ.

    `listen` is told what happens, as lines for people.
    """

    def __init__(self, size: int, *, max_payload: int = 1 << 16, stable: bool = True) -> None:
        self.group = MemoryGroup(max_payload=max_payload, stable=stable)
        self.nodes: dict[Member, Node] = {}
        self.gone: list[Node] = []
        self.apart: list[Node] = []
        self.history = History(undo=not stable)
        self.judged = True
        self.listen: Callable[[str], None] | None = None
        self.quorate = True
        self._life = 0
        for node in range(1, size + 1):
            self.start(node)
        self.group.view()

    def start(self, node: int) -> Node:
        """A new life of a node; it is a member from the next view on."""
        self._life += 1
        port = self.group.port(node, self._life)
        self.nodes[port.me] = started = Node(self, port)
        return started

    def settle(self) -> None:
        self.group.settle()

    def node(self, number: int) -> Node:
        return next(node for member, node in sorted(self.nodes.items()) if member.node == number)

    def everybody(self) -> list[Node]:
        """All whose clients may still use what they were shown."""
        return [*self.nodes.values(), *self.gone, *self.apart]

    def lose(self, node: Node, reason: Left = Left.LOST) -> None:
        """A daemon is gone; its clients keep using what they were shown until it is fenced."""
        del self.nodes[node.member]
        self.gone.append(node)
        for client in node.clients.values():
            client.lost = True
        if reason is Left.LEFT:
            self.history.ended.left.add(node.member.key)
        self.group.lose(node.member, reason, quorate=self.quorate)

    def cut(self, node: Node, own: int = 0) -> None:
        """A daemon is cut off from the others, and lives on; `MemoryGroup.cut`."""
        del self.nodes[node.member]
        self.apart.append(node)
        node.separated = True
        for client in node.clients.values():
            client.judged = False  # what it hears from now on may never have happened for the others
        self.group.cut(node.member, own, quorate=self.quorate)

    def heal(self, node: Node) -> None:
        """It meets the others again, and must start anew. To lose all of them before it does would lose the state."""
        self.apart.remove(node)
        self.nodes[node.member] = node
        self.group.heal(node.port, quorate=self.quorate)

    def fence(self, node: Node) -> None:
        """Proved dead: from now on its clients use nothing any more."""
        for client in node.clients.values():
            client.lost = True
            client.release()
        (self.apart if node in self.apart else self.gone).remove(node)
        self.history.ended.proved.add(node.member.key)
        self.group.fence(node.member)

    # ---- what must hold

    def applied(self, node: Node, entry: bytes) -> Any:
        """A replica applies an entry: by the rules, and with the outcome that it has for all (I3)."""
        machine = node.machine
        if self.listen is not None:
            self.listen(f"{node.member.name} applies {machine.applied + 1}: {unpack(entry)!r}")
        if not self.judged or node.separated:
            return node._really_apply(entry)
        if self.nobody_has_state():
            self.history.clear()  # another one begins
        if not self.group.stable and self.history.differs(machine, entry):
            living = [other for other in self.nodes.values() if not other.separated]
            if all(other.machine.applied <= machine.applied for other in living):
                self.history.roll_back(machine.applied)  # all who applied what is known are lost
        return self.history.apply(node.member.name, machine, node._really_apply, entry)

    def nobody_has_state(self) -> bool:
        """Whether all who knew the history are gone."""
        return not any(node.machine.applied for node in self.nodes.values() if not node.separated)

    def check_exclusion(self, client: Client, lock: int) -> None:
        """I2: no two clients hold, as far as they were told, what excludes each other. `client` was shown `lock`."""
        mode, name = client.held[lock], client.locks[lock]
        for node in self.everybody():
            for other in node.clients.values():
                for other_lock, other_mode in other.held.items():
                    if may_coexist(mode, other_mode) or other.locks[other_lock] != name:
                        continue
                    if other is client and other_lock == lock:
                        continue
                    raise LockRuleBroken(
                        "excluding-modes-shown",
                        f"{client.name} holds {name} in {mode}, {other.name} in {other_mode}",
                    )

    def check_slot(self, client: Client, space: str) -> None:
        """I9, as clients see it: whoever was told a slot has it alone."""
        slot = client.slots.get(space)
        for node in self.everybody():
            for other in node.clients.values():
                if slot is not None and other is not client and other.slots.get(space) == slot:
                    raise LockRuleBroken(
                        "slot", f"{client.name} and {other.name} have slot {slot} of {space}"
                    )

    def check_quiet(self) -> None:
        """Everything delivered: all replicas equal, every operation done or visibly queued, none lost."""
        for node in self.nodes.values():
            if node.restart or not node.replica.installed:
                raise LockRuleBroken("must-restart", f"{node.member.name}: {node.restart or 'not installed'}")
        states = {(node.machine.applied, node.machine.digest()) for node in self.nodes.values()}
        if len(states) != 1:
            raise LockRuleBroken("replicas-differ", f"at rest: {sorted(states)}")
        for node in self.nodes.values():
            engine = node.machine.engine
            for client in node.clients.values():
                if client.lost or client.ended:
                    continue
                if client.judged and client.shown != len(client.due):
                    due = client.due[client.shown]
                    raise LockRuleBroken("completion-lost", f"{client.name} was never shown {due}")
                for op, frame in client.sent.items():
                    if op not in client.done and not _queued(engine, client, op, frame):
                        raise LockRuleBroken("completion-lost", f"{client.name}: {frame} has no outcome")

    def check_empty(self) -> None:
        """Everybody has ended, and nothing is left anywhere."""
        for node in self.nodes.values():
            engine = node.machine.engine
            left = (engine.spaces, engine.locks, engine.sessions)
            if any(left) or any(state.lost for state in node.machine.nodes.values()):
                raise LockRuleBroken("left-over", f"{node.member.name} keeps {left}")


def _queued(engine: Engine, client: Client, op: int, frame: Frame) -> bool:
    if frame[0] == "join":
        return frame[2] in engine.spaces and engine.spaces[frame[2]].joiner(client.key) is not None
    for place in engine.locks.values():
        lock, resource = place.lock, place.resource
        if lock.session == client.key and lock.op == op:
            return lock in resource.waiting or lock in resource.converting
    return False
