"""The replicated state machine: the engine, who runs it, and the history that all replicas share.

The state changes by *entries* only, each a few bytes that every replica applies in the same place of the
order:

    ["ops", node, incarnation, first, [[session, word, ...], ...]]    what the clients of one member asked for
    ["fenced", node, incarnation, proof]                              the proved end of a lost member
    ["install", epoch, members, left, fenced]                         a membership, at its install point

`applied` counts them, and `chain` is a hash over all of them: two replicas with the same chain have the same
history, and a replica is behind another if its chain is one that the other had. So whether two states belong to
one history is checked, never assumed (dlm.md 6.3, 6.8).

Each member numbers its operations 1, 2, 3 ... The machine takes an operation only if it is the next of
its member: repeats, and what comes after something that was lost, change nothing (dlm.md 6.1, I30).
A member may therefore send again whatever it has not seen applied.

`log` keeps the entries that some member may not have yet; a member that missed the last ones (its
sequencer died between two deliveries) gets them and applies them itself, so that no completion is lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

from clustermd.dlm.effects import Answer, Effect, SessionKey
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import Flag
from clustermd.dlm.orphans import NODE_SESSION
from clustermd.dlm.snapshot import dump_engine, load_engine
from clustermd.dlm.wire import Frame, check_client_frame, pack, unpack
from clustermd.errors import BadBytes

NodeKey = tuple[int, int]
"""One life of a node: its number and its incarnation."""

LOG_LIMIT = 1 << 16
_FATES = ("open", "end", "lost")
DIGEST_BYTES = 16


@dataclass(slots=True)
class NodeState:
    """A member of an installed view: its name, its last operation, its last session; `lost` until fenced."""

    name: str
    last_op: int = 0
    last_session: int = 0
    lost: bool = False


class Machine:
    """State, entries applied and their hash. Starts empty; `load` replaces everything by a snapshot."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.nodes: dict[NodeKey, NodeState] = {}
        self.members: tuple[NodeKey, ...] = ()
        self.outlived: set[int] = set()
        """Nodes proved dead when this history began that have not joined since."""
        self.epoch = 0
        self.applied = 0
        self.chain = bytes(16)
        self._log: deque[tuple[bytes, bytes]] = deque()
        self._log_chain = self.chain

    # ---- history

    def apply(self, entry: bytes) -> list[Effect]:
        """Apply the next entry. Returns its effects in order. Raises BadBytes (nothing changed) if it is none."""
        word, *fields = _entry(entry)
        self.chain = _link(self.chain, entry)
        self.applied += 1
        self._log.append((entry, self.chain))
        if len(self._log) > LOG_LIMIT:
            self.trim(self.log_start + 1)
        if word == "ops":
            self._ops(*fields)
        elif word == "fenced":
            self._fenced(fields[0], fields[1])
        else:
            self._install(*fields)
        return self.engine.take_effects()

    def trim(self, applied: int) -> None:
        """Forget log entries up to `applied`: every member has them."""
        while self._log and self.log_start < applied:
            self._log_chain = self._log.popleft()[1]

    @property
    def log_start(self) -> int:
        """The number of entries applied before the first one in the log."""
        return self.applied - len(self._log)

    def tail(self, applied: int) -> list[bytes]:
        """The entries after number `applied`, which the log must have."""
        return [entry for entry, _ in list(self._log)[applied - self.log_start :]]

    def chain_at(self, applied: int) -> bytes | None:
        """The hash after `applied` entries, or None if the log does not reach back to it."""
        if applied == self.log_start:
            return self._log_chain
        place = applied - self.log_start - 1
        return self._log[place][1] if 0 <= place < len(self._log) else None

    def recent(self, most: int) -> tuple[bytes, ...]:
        """The hashes after the last entries but the very last one, newest last; `most` of them at most."""
        entries = islice(reversed(self._log), 1, None)
        hashes = [chain for _, chain in islice(entries, most)]
        if self._log and len(hashes) < most:
            hashes.append(self._log_chain)
        return tuple(reversed(hashes))

    # ---- snapshots

    def dump(self) -> bytes:
        """Everything that influences behaviour, in one canonical form."""
        nodes = [
            [node, incarnation, state.name, state.last_op, state.last_session, state.lost]
            for (node, incarnation), state in sorted(self.nodes.items())
        ]
        members = [list(key) for key in self.members]
        outlived = sorted(self.outlived)
        return pack(
            [self.epoch, self.applied, self.chain, members, nodes, outlived, dump_engine(self.engine)]
        )

    def digest(self) -> bytes:
        return blake2b(self.dump(), digest_size=DIGEST_BYTES).digest()

    def load(self, data: bytes) -> None:
        """Become the state that `dump` told. Raises BadBytes if it does not."""
        try:
            self.epoch, self.applied, self.chain, members, nodes, outlived, engine = unpack(data)
            self.outlived = {int(node) for node in outlived}
            self.members = tuple((node, incarnation) for node, incarnation in members)
            self.nodes = {
                (node, incarnation): NodeState(name, last_op, last_session, lost)
                for node, incarnation, name, last_op, last_session, lost in nodes
            }
            self.engine = load_engine(engine)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BadBytes("bad-snapshot", f"a snapshot of the lock state cannot be read: {error}") from None
        self._log.clear()
        self._log_chain = self.chain

    def dump_sealed(self) -> bytes:
        """`dump` behind its digest, for a way on which bytes may be damaged."""
        state = self.dump()
        return blake2b(state, digest_size=DIGEST_BYTES).digest() + state

    def load_sealed(self, data: bytes) -> None:
        """Become the state that `dump_sealed` told. Raises BadBytes, with nothing changed, if it is not that."""
        digest, state = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if blake2b(state, digest_size=DIGEST_BYTES).digest() != digest:
            raise BadBytes(
                "bad-snapshot",
                f"a snapshot of the lock state ({len(state)} bytes) was damaged on its way: its digest differs",
            )
        self.load(state)

    # ---- entries

    def _ops(self, node: int, incarnation: int, first: int, ops: list[Frame]) -> None:
        state = self.nodes.get((node, incarnation))
        if state is None or state.lost:
            return
        for number, op in enumerate(ops, first):
            if number == state.last_op + 1:
                state.last_op = number
                self._op(state, (node, incarnation, op[0]), op[1:])

    def _op(self, node: NodeState, key: SessionKey, frame: Frame) -> None:
        engine = self.engine
        if key[2] == NODE_SESSION:
            return  # no client has it
        if frame[0] in _FATES:
            match frame:
                case ["open", str(label), int(pid)]:
                    if key[2] > node.last_session:
                        node.last_session = key[2]
                        engine.open_session(key, node.name, label, pid)
                case ["end", _, clean]:
                    engine.end_sessions([key], clean=clean)
                case ["lost"]:
                    engine.lose_sessions([key])
            return
        if not engine.alive(key):
            return
        try:
            check_client_frame(frame)
        except BadBytes:
            return
        rc, lock, answered = 0, 0, False
        op = frame[1]
        match frame:
            case ["request", _, space, name, mode, flags, bast]:
                rc, lock = engine.request(key, op, space, name, mode, flags, bast)
            case ["convert", _, lock, mode, flags, lvb]:
                rc, lock = engine.convert(key, op, lock, mode, flags, lvb)
            case ["unlock", _, lock, flags, lvb]:
                rc, lock = engine.unlock(key, op, lock, flags, lvb)
                answered = bool(flags & Flag.CANCEL)
            case ["cancel", _, lock, *status]:
                rc, lock = engine.cancel(key, lock, *status)
                answered = True
            case ["purge", _, space, of_node, pid]:
                rc, answered = engine.purge(key, space, of_node, pid), True
            case ["join", _, space, lvb_bytes, max_slots, *flags]:
                engine.join(key, op, space, lvb_bytes, max_slots, *flags)
            case ["leave", _, space]:
                rc, answered = engine.leave(key, space), True
            case ["recovered", _, space, slot, generation]:
                rc, answered = engine.recovered(key, space, slot, generation), True
        if rc or answered:
            engine.callbacks.out.append(Answer(key, op, rc, lock))

    def _sessions_of(self, key: NodeKey) -> list[SessionKey]:
        return sorted(session for session in self.engine.sessions if session[:2] == key)

    def _fenced(self, node: int, incarnation: int) -> None:
        key = (node, incarnation)
        state = self.nodes.get(key)
        if incarnation == 0 and all(member != node for member, _ in self.members):
            self.outlived.add(node)
        if state is None or not state.lost:
            return  # stale, a repeat, or the new life of that node (dlm.md 6.4)
        del self.nodes[key]
        self.engine.end_sessions(self._sessions_of(key), clean=False, node_died=True)

    def _install(
        self, epoch: int, members: list[list[Any]], left: list[NodeKey], fenced: list[list[Any]]
    ) -> None:
        self.epoch = epoch
        self.members = tuple((node, incarnation) for node, incarnation, _ in members)
        self.outlived -= {node for node, _ in self.members}
        gone_cleanly = {(node, incarnation) for node, incarnation in left}
        present = set(self.members)
        for key in sorted(self.nodes):
            if key in present:
                continue
            if key in gone_cleanly and not self.nodes[key].lost:
                del self.nodes[key]
                self.engine.end_sessions(self._sessions_of(key), clean=True, node_left=True)
            elif not self.nodes[key].lost:
                self.nodes[key].lost = True
                self.engine.lose_sessions(self._sessions_of(key))
        for node, incarnation, name in members:
            known = self.nodes.get((node, incarnation))
            if known is None or known.lost:
                # one that was lost before it had a state never asked for anything, and begins now
                self.nodes[node, incarnation] = NodeState(name)
        for node, incarnation, _ in sorted(fenced):
            self._fenced(node, incarnation)


def chain_after(chain: bytes, entries: list[bytes]) -> bytes:
    """The hash of a history that goes on from `chain` with `entries`."""
    for entry in entries:
        chain = _link(chain, entry)
    return chain


def _link(chain: bytes, entry: bytes) -> bytes:
    return blake2b(chain + entry, digest_size=DIGEST_BYTES).digest()


def _entry(entry: bytes) -> list[Any]:
    """The fields of an entry, checked as far as applying it relies on them."""
    fields: list[Any] = unpack(entry)
    match fields:
        case ["ops", int(), int(), int(), list(ops)]:
            if all(type(op) is list and len(op) >= 2 and type(op[0]) is int for op in ops):
                return fields
        case ["fenced", int(), int(), str()] | ["install", int(), list(), list(), list()]:
            return fields
    raise BadBytes("bad-entry", "an entry of the lock history is none that this version knows")
