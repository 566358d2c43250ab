"""A cluster of lock replicas under the steps of a storm.

What keeps a storm survivable: someone always lives; what was shown because it was stable is not lost with all who knew
it; what a node hears alone completes no install; a node that was cut off comes back only to those who have gone on
without it in a later epoch, and nobody dies while it has not started anew.
In the end everything is mended, fenced, released and ended, and nothing may be left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from clustermd.dlm.modes import ECANCEL, Flag
from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster, Node
from clustermd.testing.locks.rules import LockRuleBroken
from clustermd.testing.locks.steps import (
    CLIENTS_MAX,
    LVB_BYTES,
    NAMES,
    SLOTS,
    SPACE,
    Step,
    draw_step,
)

ROUNDS_MAX = 64
"""Rounds of releasing everything until nobody waits: each grants at least one more."""


class Storm:
    """A cluster under steps."""

    def __init__(self, begin: Step, listen: Callable[[str], None]) -> None:
        _, size, max_payload, stable, *flags = begin
        self._join = ("join", SPACE, LVB_BYTES, SLOTS, *flags)
        self.cluster = Cluster(size, max_payload=max_payload, stable=stable)
        self.cluster.listen = listen
        self.broken = False
        self.uneven = False
        for node in self.cluster.nodes.values():
            node.client().send(*self._join)
        self._settle()

    def draw(self, draw: random.Random) -> Step:
        """A step that has a subject, if its kind has one now."""
        return draw_step(self.cluster, draw, stopped=self._stopped)

    def do(self, step: Step) -> bool:
        """Let one step happen. Returns whether it had a subject."""
        word, *args = step
        cluster, group = self.cluster, self.cluster.group
        match word, args:
            case ("settle", []):
                self._settle()
                return True
            case ("break" | "no quorum" | "mend", []):
                return self._stop_or_go(word)
            case (("fence" | "alone" | "heal"), [int(which)]):
                return self._outside(word, which)
            case ("start", [int(number)]):
                used = {member.node for member in cluster.nodes}
                if self.broken or number in used:
                    return False
                cluster.start(number)
                group.view(quorate=cluster.quorate)
                return True
        node = next((node for member, node in cluster.nodes.items() if member.node == args[0]), None)
        if node is None:
            return False
        if word in ("accept", "deliver"):
            return group.accept(node.member) if word == "accept" else group.deliver(node.member)
        if word in ("client", "send", "lost", "ended", "closed"):
            return self._session(word, node, args[1:])
        return self._node(word, node, args[1:])

    @property
    def _stopped(self) -> bool:
        return self.broken or not self.cluster.quorate

    def _coming_back(self) -> bool:
        return any(node.separated for node in self.cluster.nodes.values())

    def _may_die(self) -> bool:
        """Whether any node may be lost now: somebody else must live and know everything that was shown."""
        nodes = list(self.cluster.nodes.values())
        if self.uneven and all(node.replica.installed for node in nodes):
            self.uneven = len({node.machine.epoch for node in nodes}) > 1
        even = not self.uneven or not self.cluster.group.stable
        return even and len(nodes) > 1 and not self.broken and not self._coming_back()

    def _stop_or_go(self, word: str) -> bool:
        cluster, group = self.cluster, self.cluster.group
        if word == "mend":
            if not self._stopped:
                return False
            self.broken, cluster.quorate = False, True
            group.view()
            return True
        if self._stopped or self._coming_back():
            return False
        if word == "break":
            group.break_sequencer()
            self.broken = self.uneven = True
        else:
            cluster.quorate = False
            group.view(quorate=False)
        return True

    def _outside(self, word: str, which: int) -> bool:
        """What happens to nodes that are no members any more."""
        cluster = self.cluster
        some = [*cluster.gone, *cluster.apart] if word == "fence" else cluster.apart
        if not some or self.broken:
            return False
        node = some[which % len(some)]
        if word == "fence":
            cluster.fence(node)
        elif word == "alone":
            return cluster.group.deliver_alone(node.port)
        elif self._stopped or self._coming_back() or not node.machine.applied:
            return False
        elif any(member.node == node.member.node for member in cluster.nodes):
            return False  # its node has begun another life
        elif not all(
            other.replica.installed
            and node.member.key not in other.machine.members
            and other.machine.epoch > node.machine.epoch
            for other in cluster.nodes.values()
        ):
            return False  # nobody could tell it that they went on without it
        else:
            while cluster.group.deliver_alone(node.port):
                pass
            cluster.heal(node)
        return True

    def _node(self, word: str, node: Node, args: list[Any]) -> bool:
        cluster = self.cluster
        if word == "busy":
            node.port.limit = args[0]
        elif word == "stable":
            cluster.group.tell_stable(node.member)
        elif word == "bury":
            if not node.separated or not node.restart or self.broken:
                return False
            cluster.lose(node)
        elif not self._may_die():
            return False
        elif word == "cut":
            cluster.cut(node, args[0] if node.replica.installed else 0)
        else:
            cluster.lose(node)
        return True

    def _session(self, word: str, node: Node, args: list[Any]) -> bool:
        alive = [client for client in node.clients.values() if not client.ended]
        if word == "client":
            if len(alive) >= CLIENTS_MAX or node.restart:
                return False
            node.client().send(*self._join)
            return True
        if not alive or node.restart:
            return False
        client = alive[args[0] % len(alive)]
        if word == "send":
            return not client.lost and self._operation(client, args[1], args[2:])
        if word == "lost":
            if client.lost:
                return False
            node.lose_client(client)
        elif word == "ended":
            if not client.lost:
                return False
            node.end_client(client)
        elif client.lost:
            return False
        else:
            node.end_client(client, clean=True)
        return True

    def _operation(self, client: Client, word: str, args: list[Any]) -> bool:
        """One operation of a client: joined for locks, with a lock of its own if it needs one."""
        if word == "join":
            if client.left and len(client.done) < len(client.sent):
                return False  # what it hears might still be about its earlier membership
            client.send(*self._join)
            return True
        if SPACE not in client.slots:
            return False
        if word == "leave":
            client.send("leave", SPACE)
            return True
        if word == "recovered":
            client.send("recovered", SPACE, args[0], 1 << 40)
            return True
        if word == "request":
            name, mode, flags, bast = args
            client.send("request", SPACE, NAMES[name], mode, flags, bast)
            return True
        if word == "purge":
            client.send("purge", SPACE, *args)
            return True
        if word == "adopt":
            return _adopt(client, args)
        locks = [lock for lock in client.locks if lock in client.held or lock in client.pending]
        if not locks:
            return False
        if word == "convert":
            locks = [lock for lock in locks if lock not in client.pending] or locks
        lock, *rest = locks[args[0] % len(locks)], *args[1:]
        if word == "cancel":
            _cancel(client, lock, *rest)
        elif word == "unlock":
            flags, value = rest
            client.send("unlock", lock, flags, None if value is None else _value(value))
        elif lock in client.pending:
            return False
        else:
            mode, flags, value = rest
            client.send("convert", lock, mode, flags, _value(value))
        return True

    # ---- the end

    def _purge(self, living: list[Client]) -> bool:
        """Whoever is in the lockspace frees what others left behind. Returns whether there was anything."""
        members = [client for client in living if SPACE in client.slots and not client.left]
        owners = {
            orphan.lock.session[0]
            for node in self.cluster.nodes.values()
            for space in node.machine.engine.spaces.values()
            for orphan in space.orphans.by_id.values()
        }
        for number in sorted(owners) if members else ():
            members[0].send("purge", SPACE, number, 0)
        return bool(members and owners)

    def end(self) -> None:
        """Everything is mended and delivered, then released, then ended; each time nothing may be missing."""
        cluster = self.cluster
        if self._stopped:
            self._stop_or_go("mend")
        for node in cluster.nodes.values():
            node.port.limit = 1 << 30
        self._settle()
        for node in [node for node in cluster.nodes.values() if node.separated and node.restart]:
            cluster.lose(node)
        self._settle()
        if cluster.nobody_has_state():
            self._fence_all()  # nobody who knew the state is left: a new one begins when the dead are proved dead
        cluster.check_quiet()
        self._fence_all()
        self._release_all()
        for node in cluster.nodes.values():
            for client in node.clients.values():
                if not client.ended:
                    client.lost = True
                    node.end_client(client)
        self._settle()
        last = next(iter(cluster.nodes.values())).client()
        last.send(*self._join)
        self._settle()
        self._purge([last])
        last.send("leave", SPACE)
        self._settle()
        last.node.end_client(last, clean=True)
        self._settle()
        cluster.check_empty()

    def _settle(self) -> None:
        group = self.cluster.group
        group.settle()
        if not group.stable and not self.broken:
            for member in sorted(group.ports):
                group.tell_stable(member)
            group.settle()

    def _fence_all(self) -> None:
        for node in [*self.cluster.gone, *self.cluster.apart]:
            self.cluster.fence(node)
        self._settle()

    def _release_all(self) -> None:
        """Whoever waits is granted when those before let go (I24)."""
        for node in self.cluster.nodes.values():
            for client in node.clients.values():
                if client.lost and not client.ended:
                    node.end_client(client)
        for _ in range(ROUNDS_MAX):
            self._settle()
            self.cluster.check_quiet()
            living = [client for node in self.cluster.nodes.values() for client in node.clients.values()]
            living = [client for client in living if not client.ended]
            held = [(client, lock) for client in living for lock in client.held]
            if not held and not self._purge(living):
                break
            for client, lock in held:
                client.send("unlock", lock, int(Flag.FORCEUNLOCK), None)
        for client in living:
            for op, frame in client.sent.items():
                if op not in client.done and frame[0] != "join":
                    raise LockRuleBroken("completion-lost", f"{client.name}: {frame} waits for nobody")


def _adopt(client: Client, args: list[Any]) -> bool:
    """Ask for an orphan: mostly for one that its node has, in its mode; now and then for another one's or for none."""
    which, mode, flags, bast = args
    orphans = [
        orphan
        for space in client.node.machine.engine.spaces.values()
        for _, orphan in sorted(space.orphans.by_id.items())
    ]
    own = [orphan for orphan in orphans if orphan.lock.session[:2] == client.key[:2]]
    name = NAMES[which % len(NAMES)]
    if some := (own if which % 4 else orphans):
        orphan = some[which // 4 % len(some)]
        name, mode = orphan.resource.name, orphan.lock.gr if which % 3 else mode
    client.send("request", SPACE, name, mode, flags, bast)
    return True


def _cancel(client: Client, lock: int, status: int = ECANCEL) -> None:
    if status:
        client.send("cancel", lock, status)
    else:
        client.send("unlock", lock, int(Flag.CANCEL), None)


def _value(number: int) -> bytes:
    return number.to_bytes(LVB_BYTES, "big")
