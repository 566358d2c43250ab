"""Lock daemons on a medium in memory: the replica over the agreed group, as on corosync, with nothing real below.

    ring, (one, two, three) = lockds(3)
    a = Program(one)
    op = a.ask(Mode.EX)
    ring.run()
    assert a.has(op)

What the medium does, a test says (`medium_kit`); every message is delivered to all by `ring.run()`.
"""

from __future__ import annotations

from typing import Any

from medium_kit import Node, Ring

from clustermd.dlm.modes import Flag, Mode
from clustermd.dlm.replica import Replica
from clustermd.group.process_group import Member, View
from clustermd.trace import Trace

SPACE = "array"


class Lockd:
    """One life of a node's lock daemon: a replica, and its member of the group on `node`."""

    def __init__(
        self, ring: Ring, number: int, incarnation: int = 1, boot: str = "boot", **options: Any
    ) -> None:
        self.node = Node(ring, number, incarnation, boot, **options)
        self.replica = Replica(self, Trace())
        self.replica.attach(self.node.group)
        self.frames: dict[int, list[list[Any]]] = {}
        self.fates: list[str] = []
        self.restart = ""
        ring.nodes.append(self.node)

    def join(self) -> None:
        self.node.group.join(self)

    @property
    def applied(self) -> int:
        return self.replica.applied

    # ---- StatefulEvents

    @property
    def has_state(self) -> bool:
        return self.replica.has_state

    @property
    def installed(self) -> bool:
        return self.replica.installed

    @property
    def awaited(self) -> int:
        return self.replica.awaited

    def on_view(self, view: View) -> None:
        self.node.on_view(view)
        self.replica.on_view(view)

    def on_message(self, index: int, sender: Member, payload: bytes) -> None:
        self.node.on_message(index, sender, payload)
        self.replica.on_message(index, sender, payload)

    def on_stable(self, index: int) -> None:
        self.node.on_stable(index)
        self.replica.on_stable(index)

    def on_fenced(self, member: Member, proof: str, index: int = 0) -> None:
        self.node.on_fenced(member, proof, index)
        self.replica.on_fenced(member, proof, index)

    # ---- ReplicaShell

    def to_session(self, session: int, frame: list[Any]) -> None:
        self.frames.setdefault(session, []).append(frame)

    def suspended(self, reason: str) -> None:
        self.fates.append("suspended")

    def resumed(self) -> None:
        self.fates.append("resumed")

    def must_restart(self, reason: str) -> None:
        self.restart = reason


class Program:
    """A session of `lockd` in the lockspace; what it asks for is delivered when the ring runs."""

    def __init__(self, lockd: Lockd, *, join: bool = True) -> None:
        self.lockd = lockd
        self.number = lockd.replica.open_session("test", 1)
        self._op = 0
        if join:
            self.send("join", SPACE, 16, 8)
            lockd.node.ring.run()
            assert self.heard("done")

    def send(self, word: str, *fields: Any) -> int:
        self._op += 1
        self.lockd.replica.session_frame(self.number, [word, self._op, *fields])
        return self._op

    def ask(self, mode: Mode, name: bytes = b"token", flags: Flag = Flag.NONE) -> int:
        """A request with a blocking callback. Returns its number."""
        return self.send("request", SPACE, name, int(mode), int(flags), True)

    def free(self, op: int) -> int:
        return self.send("unlock", self.lock(op), int(Flag.FORCEUNLOCK), None)

    def heard(self, word: str) -> list[list[Any]]:
        return [frame for frame in self.lockd.frames.get(self.number, []) if frame[0] == word]

    def has(self, op: int) -> bool:
        """Whether the grant of `op` was shown."""
        return any(frame[1] == op and frame[3] == 0 for frame in self.heard("cast"))

    def lock(self, op: int) -> int:
        return next(int(frame[3]) for frame in self.heard("answer") if frame[1] == op)


def lockds(count: int, quorate: Any = None, **options: Any) -> tuple[Ring, list[Lockd]]:
    """That many nodes with a lock daemon each, in one view."""
    ring = Ring(count)
    if quorate is not None:
        ring.quorate = quorate
    daemons = [Lockd(ring, number, **options) for number in range(1, count + 1)]
    ring.form(range(1, count + 1), joined=[daemon.node for daemon in daemons])
    for daemon in daemons:
        daemon.join()
    ring.run()
    assert all(daemon.installed for daemon in daemons)
    return ring, daemons


def start(ring: Ring, number: int, incarnation: int, boot: str = "boot", **options: Any) -> Lockd:
    """A new life of that node's lock daemon, which comes into the ring."""
    daemon = Lockd(ring, number, incarnation, boot, **options)
    ring.form([node.number for node in ring.nodes], joined=[daemon.node])
    daemon.join()
    ring.run()
    return daemon


def holders(lockd: Lockd, name: str = "token") -> list[tuple[str, str, bool]]:
    """(node, mode, zombie) of the granted locks, as that node knows them."""
    spaces = lockd.replica.status()["lockspaces"]
    granted = spaces.get(SPACE, {"resources": {}})["resources"].get(name, {"granted": []})["granted"]
    return [(lock["name"], lock["mode"], lock["zombie"]) for lock in granted]
