"""Seeded storms over replicas of the lock manager: thousands a minute, each judged after every step.

A storm is a list of plain *steps*: what clients ask, who reads how far, who dies, is cut off, fenced, suspended. `run`
draws them from one seed and records them; `replay` takes them from a list, so a kept storm means the same after
the drawing has changed. A step whose subject is not there does nothing, so steps may be taken out of a list (`shrink`).

    ["begin", nodes, max_payload, stable]    the group: small payloads cut snapshots into parts; messages may be lost
                                             with their readers unless `stable`
    ["client", node]  ["lost"|"ended"|"closed", node, client]        sessions come, vanish, are proved dead, say goodbye
    ["send", node, client, word, ...]                                an operation (`_operation`)
    ["accept", node]  ["deliver", node]  ["stable", node]  ["settle"]      one message ordered, one event read, ...
    ["lose", node]  ["fence", which]  ["start", node]                deaths, late proofs, new lives
    ["cut", node, own]  ["alone", which]  ["heal", which]  ["bury", node]   one lives on alone, and comes back
    ["break"]  ["no quorum"]  ["mend"]                               the sequencer dies; nobody has quorum; a new view
    ["busy", node, limit]                                            the group takes so many messages of it

What keeps a storm survivable: someone always lives; what was shown because it was stable is not lost with all who knew
it; what a node hears alone completes no install; a node that was cut off comes back only to those who have gone on
without it, and nobody dies while it has not started anew.
In the end everything is mended, fenced, released and ended, and nothing may be left.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from clustermd.dlm.modes import Flag
from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster, Node
from clustermd.testing.locks.rules import RULES, LockRuleBroken
from clustermd.testing.trace.events import Layer

SPACE = "array"
NAMES = (b"token", b"message", b"bitmap0000")
LVB_BYTES = 16
SLOTS = 4
NODES_MAX = 5
CLIENTS_MAX = 3
STEPS = 120
LINES_KEPT = 40
ROUNDS_MAX = 64
"""Rounds of releasing everything until nobody waits: each grants at least one more."""

REQUEST_FLAGS = tuple(
    int(flags)
    for flags in (
        Flag.NONE,
        Flag.NONE,
        Flag.VALBLK,
        Flag.VALBLK,
        Flag.NOQUEUE | Flag.VALBLK,
        Flag.NOQUEUE | Flag.NOQUEUEBAST,
        Flag.HEADQUE | Flag.VALBLK,
        Flag.NOORDER,
        Flag.ALTPR,
        Flag.ALTCW | Flag.VALBLK,
    )
)
CONVERT_FLAGS = tuple(
    int(flags)
    for flags in (
        Flag.NONE,
        Flag.VALBLK,
        Flag.VALBLK,
        Flag.VALBLK | Flag.NOQUEUE,
        Flag.QUECVT,
        Flag.CONVDEADLK | Flag.VALBLK,
        Flag.NODLCKWT,
        Flag.IVVALBLK,
        Flag.HEADQUE | Flag.VALBLK,
        Flag.NOORDER,
    )
)
WEIGHTS = {
    "send": 60,
    "accept": 50,
    "deliver": 90,
    "stable": 20,
    "settle": 10,
    "client": 3,
    "lost": 1,
    "ended": 6,
    "closed": 0.5,
    "lose": 1,
    "fence": 3,
    "start": 3,
    "cut": 1,
    "alone": 3,
    "heal": 3,
    "bury": 6,
    "break": 1,
    "no quorum": 0.7,
    "mend": 12,
    "busy": 2,
}
_WORDS, _ODDS = tuple(WEIGHTS), tuple(WEIGHTS.values())

Step = list[Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """What broke: the rule, where it is written, whose bug it is, at which step, and the last lines of the trace."""

    rule: str
    spec: str
    layer: Layer
    text: str
    step: int
    lines: tuple[str, ...]


@dataclass(slots=True)
class Outcome:
    """One storm: its steps, what happened how often, a digest of every line of its trace, and what broke."""

    seed: int | None
    steps: list[Step]
    seen: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    failure: Failure | None = None

    def report(self) -> str:
        """The failure for people; an empty string if there is none."""
        if self.failure is None:
            return ""
        failure = self.failure
        head = f"seed {self.seed}, step {failure.step} of {len(self.steps)}: {failure.rule} ({failure.spec})"
        last = [f"  {step}" for step in self.steps[max(0, failure.step - 9) : failure.step + 1]]
        return "\n".join(
            [
                head,
                f"layer: {failure.layer.value}",
                failure.text,
                "trace:",
                *(f"  {line}" for line in failure.lines),
                "last steps:",
                *last,
            ]
        )


def run(seed: int, steps: int = STEPS) -> Outcome:
    """Draw a storm of so many steps from `seed`, and let it pass."""
    draw = random.Random(seed)
    begin: Step = ["begin", draw.randint(2, NODES_MAX), draw.choice((1024, 1 << 16)), draw.random() < 0.5]
    outcome = Outcome(seed, [begin])
    _pass(outcome, lambda storm: storm.draw(draw) if len(outcome.steps) <= steps else None)
    return outcome


def replay(steps: Sequence[Step]) -> Outcome:
    """Let recorded steps happen again."""
    left = deque(steps)
    outcome = Outcome(None, [left.popleft()])
    _pass(outcome, lambda _: left.popleft() if left else None)
    return outcome


def shrink(steps: Sequence[Step], rule: str, *, replays: int = 3000) -> list[Step]:
    """Fewer steps with which the same rule breaks: ever smaller pieces are taken out while it does."""
    best = list(steps)
    failure = replay(best).failure
    if failure is not None:
        best = best[: failure.step + 1]
    piece = max(1, len(best) // 2)
    while replays > 0:
        removed = False
        place = len(best) - piece
        while place > 0 and replays > 0:
            candidate = best[:place] + best[place + piece :]
            replays -= 1
            failure = replay(candidate).failure
            if failure is not None and failure.rule == rule:
                best, removed = candidate, True
            place -= piece
        if piece == 1 and not removed:
            break
        piece = max(1, piece // 2)
    return best


def _pass(outcome: Outcome, next_step: Callable[[Storm], Step | None]) -> None:
    """Steps from `next_step` until it has none, then the end of the storm."""
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    digest = blake2b(digest_size=16)

    def listen(line: str) -> None:
        lines.append(line)
        digest.update(line.encode())
        digest.update(b"\n")

    number = 0
    try:
        storm = Storm(outcome.steps[0], listen)
        while (step := next_step(storm)) is not None:
            number = len(outcome.steps)
            outcome.steps.append(step)
            listen(f"-- {step!r}")
            if storm.do(step):
                outcome.seen[step[0] if step[0] != "send" else step[3]] += 1
        number = len(outcome.steps)
        storm.end()
    except LockRuleBroken as broken:
        outcome.failure = Failure(
            broken.rule, broken.spec, Layer.LOCK_MANAGER, broken.text, number, tuple(lines)
        )
    except Exception as error:  # whatever the lock manager raises is a finding, and the storm must be told
        text = f"{type(error).__name__}: {error}"
        outcome.failure = Failure(
            "exception", RULES["exception"], Layer.LOCK_MANAGER, text, number, tuple(lines)
        )
    outcome.digest = digest.hexdigest()


class Storm:
    """A cluster under steps."""

    def __init__(self, begin: Step, listen: Callable[[str], None]) -> None:
        _, size, max_payload, stable = begin
        self.cluster = Cluster(size, max_payload=max_payload, stable=stable)
        self.cluster.listen = listen
        self.broken = False
        self.uneven = False
        for node in self.cluster.nodes.values():
            node.client().send("join", SPACE, LVB_BYTES, SLOTS)
        self._settle()

    # ---- drawing

    def draw(self, draw: random.Random) -> Step:
        """A step that has a subject, if its kind has one now."""
        while True:
            word = draw.choices(_WORDS, _ODDS)[0]
            numbers = sorted(member.node for member in self.cluster.nodes)
            node = draw.choice(numbers)
            if word == "send":
                if (step := self._draw_operation(draw, node)) is not None:
                    return step
            elif word in ("accept", "deliver", "lose", "bury", "client", "stable"):
                if word != "stable" or not self.cluster.group.stable:
                    return [word, node]
            elif word in ("lost", "ended", "closed"):
                return [word, node, draw.randrange(CLIENTS_MAX)]
            elif word == "start" and len(numbers) < NODES_MAX:
                return [word, draw.choice([free for free in range(1, NODES_MAX + 1) if free not in numbers])]
            elif word == "cut":
                return [word, node, draw.randrange(4)]
            elif word == "fence" and (gone := len(self.cluster.gone) + len(self.cluster.apart)):
                return [word, draw.randrange(gone)]
            elif word in ("alone", "heal") and self.cluster.apart:
                return [word, draw.randrange(len(self.cluster.apart))]
            elif word == "busy":
                return [word, node, draw.choice((1, 2, 1 << 30))]
            elif word in ("settle", "break", "no quorum") or (word == "mend" and self._stopped):
                return [word]

    def _draw_operation(self, draw: random.Random, number: int) -> Step | None:
        kind = draw.choices(
            ("request", "convert", "unlock", "cancel", "recovered", "leave", "join"),
            (4, 10, 2, 1.5, 0.7, 0.1, 0.3),
        )[0]
        client = draw.randrange(CLIENTS_MAX)
        head = ["send", number, client, kind]
        which, value = draw.randrange(8), draw.randrange(1 << 16)
        if kind == "request":
            mode = draw.randrange(6)
            flags = int(Flag.EXPEDITE) if mode == 0 and draw.random() < 0.7 else draw.choice(REQUEST_FLAGS)
            return [*head, draw.choice((0, 0, 0, 1, 2)), mode, flags, draw.random() < 0.8]
        if kind == "convert":
            return [*head, which, draw.randrange(6), draw.choice(CONVERT_FLAGS), value]
        if kind == "unlock":
            flags = draw.choice((int(Flag.FORCEUNLOCK), 0, int(Flag.VALBLK), int(Flag.IVVALBLK)))
            return [*head, which, flags, value if draw.random() < 0.7 else None]
        if kind == "cancel":
            return [*head, which]
        if kind == "recovered":
            return [*head, draw.randrange(1, SLOTS + 1)]
        return head

    # ---- doing

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
            and _member_key(node) not in other.machine.members
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
            node.client().send("join", SPACE, LVB_BYTES, SLOTS)
            return True
        if not alive or node.restart:
            return False
        client = alive[args[0] % len(alive)]
        if word == "send":
            return not client.lost and _operation(client, args[1], args[2:])
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

    # ---- the end

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
            if not held:
                break
            for client, lock in held:
                client.send("unlock", lock, int(Flag.FORCEUNLOCK), None)
        for client in living:
            for op, frame in client.sent.items():
                if op not in client.done and frame[0] != "join":
                    raise LockRuleBroken("completion-lost", f"{client.name}: {frame} waits for nobody")


def _operation(client: Client, word: str, args: list[Any]) -> bool:
    """One operation of a client: joined for locks, with a lock of its own if it needs one."""
    if word == "join":
        if client.left and len(client.done) < len(client.sent):
            return False  # what it hears might still be about its earlier membership
        client.send("join", SPACE, LVB_BYTES, SLOTS)
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
    locks = [lock for lock in client.locks if lock in client.held or lock in client.pending]
    if not locks:
        return False
    if word == "convert":
        locks = [lock for lock in locks if lock not in client.pending] or locks
    lock, *rest = locks[args[0] % len(locks)], *args[1:]
    if word == "cancel":
        client.send("cancel", lock)
    elif word == "unlock":
        flags, value = rest
        client.send("unlock", lock, flags, None if value is None else _value(value))
    elif lock in client.pending:
        return False
    else:
        mode, flags, value = rest
        client.send("convert", lock, mode, flags, _value(value))
    return True


def _member_key(node: Node) -> tuple[int, int]:
    return node.member.node, node.member.incarnation


def _value(number: int) -> bytes:
    return number.to_bytes(LVB_BYTES, "big")
