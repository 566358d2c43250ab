"""Lock daemons in memory: replicas over a `MemoryGroup`, clients that remember what they were told, and the checks.

Checked after every step, whatever a test does (dlm.md 6.9):

    I1, I10 ...   the invariants of the engine, on every replica, after every entry it applies
    I2            what clients were shown and have not given back never excludes what another was shown
    I3            replicas that applied the same number of entries have the same history and the same state
    I17           no operation completes twice, nothing completes for a client that is lost
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import EUNLOCK, Flag, Mode
from clustermd.dlm.replica import Replica
from clustermd.group.process_group import Left, Member
from clustermd.testing.locks.invariants import Checker, is_down, may_coexist
from clustermd.testing.locks.order import MemoryGroup, Port
from clustermd.trace import Trace

Frame = list[Any]


@dataclass
class Client:
    """One session: every frame it sent and got, and what it believes to hold (lock -> mode, resource)."""

    node: Node
    number: int
    sent: dict[int, Frame] = field(default_factory=dict)
    got: list[Frame] = field(default_factory=list)
    done: dict[int, Frame] = field(default_factory=dict)
    locks: dict[int, bytes] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    freeing: set[int] = field(default_factory=set)
    requests: dict[int, int] = field(default_factory=dict)
    left: bool = False
    lost: bool = False
    ended: bool = False
    next_op: int = 1

    def send(self, *frame: Any) -> int:
        """Send [word, op, ...]; the op number is put in. Returns it."""
        op = self.next_op
        self.next_op += 1
        word, *rest = frame
        whole = [word, op, *rest]
        self.sent[op] = whole
        match whole:
            case ["convert", _, lock, mode, flags, _] if lock in self.held:
                self.pending.add(lock)
                if flags & Flag.CONVDEADLK:
                    self.held[lock] = Mode.NL
                elif is_down(self.held[lock], mode):
                    self.held[lock] = mode
                elif {self.held[lock], mode} == {Mode.PR, Mode.CW}:
                    self.held[lock] = Mode.CR  # what both allow: the old mode may be gone before he is told
            case ["leave", *_]:
                self.left = True
                self.held.clear()
            case ["unlock", _, lock, *_]:
                self.held.pop(lock, None)
                self.freeing.add(lock)
        self.node.replica.session_frame(self.number, whole)
        return op

    def hear(self, frame: Frame) -> None:
        assert not self.lost and not self.ended, f"I17: {frame} for a client that is gone"
        self.got.append(frame)
        match frame:
            case ["answer", op, rc, lock]:
                word = self.sent[op][0]
                if word == "request" and rc == 0:
                    self.locks[lock] = self.sent[op][3]
                    self.pending.add(lock)
                    self.requests[lock] = op
                else:
                    self._complete(op, frame)
                    if word == "convert":
                        self.pending.discard(lock)
            case ["cast", op, lock, status, _, _, mode]:
                if op:  # 0: the lock went with its lockspace, nothing of it was pending
                    self._complete(op, frame)
                self.pending.discard(lock)
                if mode == Mode.IV:
                    self.held.pop(lock, None)
                    if status == EUNLOCK:
                        self._freed(lock, op, frame)
                elif lock not in self.freeing and not self.left:
                    self.held[lock] = mode
            case ["refused", op, *_]:
                self._complete(op, frame)
            case ["done", space, *_]:
                for op, whole in self.sent.items():
                    if whole[0] == "join" and whole[2] == space and op not in self.done:
                        self.done[op] = frame
                        break

    def _freed(self, lock: int, op: int, frame: Frame) -> None:
        """Freeing a lock also ends what was pending on it, without a word of its own."""
        self.done.setdefault(self.requests[lock], frame)
        for other, whole in self.sent.items():
            if whole[0] == "convert" and whole[2] == lock and (other < op or op == 0):
                self.done.setdefault(other, frame)

    def _complete(self, op: int, frame: Frame) -> None:
        assert op in self.sent, f"a completion for nothing: {frame}"
        assert op not in self.done, f"I17: {frame} after {self.done[op]}"
        self.done[op] = frame

    def words(self, word: str) -> list[Frame]:
        return [frame for frame in self.got if frame[0] == word]


class Node:
    """One lock daemon: a replica, the shell around it, its clients."""

    def __init__(self, cluster: Cluster, port: Port) -> None:
        self.cluster = cluster
        self.port = port
        self.member = port.me
        self.clients: dict[int, Client] = {}
        self.events: list[str] = []
        self.restart = ""
        trace = Trace()
        trace.listen(self._traced)
        self.replica = Replica(self, trace)
        self.replica.attach(port)
        port.events = self.replica
        self._checker: Checker | None = None

    @property
    def machine(self) -> Machine:
        return self.replica._machine

    def _traced(self, name: str, fields: dict[str, Any]) -> None:
        if name == "dlm.apply":
            self.cluster.applied(self, fields["applied"])

    def client(self, label: str = "test") -> Client:
        number = self.replica.open_session(label, 1000 + self.member.node)
        client = self.clients[number] = Client(self, number)
        return client

    def lose_client(self, client: Client) -> None:
        client.lost = True
        self.replica.session_lost(client.number)

    def end_client(self, client: Client, *, clean: bool = False) -> None:
        client.ended = True
        if clean:
            client.held.clear()
        self.replica.session_end(client.number, "the test says so", clean)

    # ---- ReplicaShell

    def to_session(self, session: int, frame: Frame) -> None:
        self.clients[session].hear(frame)
        self.cluster.check_exclusion()

    def suspended(self, reason: str) -> None:
        self.events.append("suspended")

    def resumed(self) -> None:
        self.events.append("resumed")

    def must_restart(self, reason: str) -> None:
        self.restart = reason


class Cluster:
    """`size` daemons in one view. `checked` turns the engine invariants on."""

    def __init__(self, size: int, *, max_payload: int = 1 << 16, stable: bool = True) -> None:
        self.group = MemoryGroup(max_payload=max_payload, stable=stable)
        self.nodes: dict[Member, Node] = {}
        self.gone: list[Node] = []
        self.history: dict[int, tuple[bytes, bytes]] = {}
        self._life = 0
        for node in range(1, size + 1):
            self.start(node)
        self.group.view()

    def start(self, node: int) -> Node:
        """A new life of a node; it is a member from the next view on."""
        self._life += 1
        port = self.group.port(node, self._life)
        port.read = len(self.group.order)
        self.nodes[port.me] = started = Node(self, port)
        return started

    def settle(self) -> None:
        self.group.settle()

    def node(self, number: int) -> Node:
        return next(node for member, node in sorted(self.nodes.items()) if member.node == number)

    def lose(self, node: Node, reason: Left = Left.LOST) -> None:
        """A daemon is gone; its clients keep using what they were shown until it is fenced."""
        del self.nodes[node.member]
        self.gone.append(node)
        for client in node.clients.values():
            client.lost = True
        self.group.lose(node.member, reason)

    def fence(self, node: Node) -> None:
        """Proved dead: from now on its clients use nothing any more."""
        for client in node.clients.values():
            client.held.clear()
        self.gone.remove(node)
        self.group.fence(node.member)

    # ---- what must hold

    def applied(self, node: Node, applied: int) -> None:
        """A replica applied an entry. Its state must be that of whoever applied as many (I3)."""
        machine = node.machine
        state = (machine.chain, machine.digest())
        if applied == 1 and all(other.machine.applied <= 1 for other in self.nodes.values()):
            self.history.clear()  # nobody had a state: a history begins
        known = self.history.setdefault(applied, state)
        assert state == known, f"I3: {node.member.name} differs after {applied} entries"
        checker = Checker(machine.engine)
        checker.after([])

    def check_exclusion(self) -> None:
        """I2: no two clients hold, as far as they were told, what excludes each other."""
        held: dict[bytes, list[tuple[int, str]]] = {}
        for node in [*self.nodes.values(), *self.gone]:
            for client in node.clients.values():
                for lock, mode in client.held.items():
                    name = client.locks[lock]
                    who = f"{node.member.name}.{client.number}"
                    for other_mode, other in held.setdefault(name, []):
                        assert may_coexist(mode, other_mode), f"I2: {who} and {other} hold {name!r}"
                    held[name].append((mode, who))

    def check_quiet(self) -> None:
        """Everything delivered: all replicas equal, every operation done or visibly queued, none lost."""
        states = {(node.machine.applied, node.machine.digest()) for node in self.nodes.values()}
        assert len(states) == 1, f"I3: {states}"
        for node in self.nodes.values():
            assert not node.restart
            assert node.replica.installed
            engine = node.machine.engine
            for client in node.clients.values():
                if client.lost or client.ended:
                    continue
                for op, frame in client.sent.items():
                    if op not in client.done:
                        assert self._queued(engine, node, client, op, frame), f"I24: {frame} has no outcome"

    def _queued(self, engine: Any, node: Node, client: Client, op: int, frame: Frame) -> bool:
        key = (node.member.node, node.member.incarnation, client.number)
        if frame[0] == "join":
            return frame[2] in engine.spaces and engine.spaces[frame[2]].joiner(key) is not None
        for place in engine.locks.values():
            lock, resource = place.lock, place.resource
            if lock.session == key and lock.op == op:
                return lock in resource.waiting or lock in resource.converting
        return False
