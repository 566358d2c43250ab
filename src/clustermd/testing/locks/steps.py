"""The steps of a storm over lock replicas: what they are, and how they are drawn.

A step is a plain list, so that it can be kept and happen again:

    ["begin", nodes, max_payload, stable, flags]   the group: small payloads cut snapshots into parts; messages may be
                                             lost with their readers unless `stable`; how lockspaces are joined (0)
    ["client", node]  ["lost"|"ended"|"closed", node, client]        sessions come, vanish, are proved dead, say goodbye
    ["send", node, client, word, ...]                                an operation of a session
    ["accept", node]  ["deliver", node]  ["stable", node]  ["settle"]      one message ordered, one event read, ...
    ["lose", node]  ["fence", which]  ["start", node]                deaths, late proofs, new lives
    ["cut", node, own]  ["alone", which]  ["heal", which]  ["bury", node]   one lives on alone, and comes back
    ["break"]  ["no quorum"]  ["mend"]                               the sequencer dies; nobody has quorum; a new view
    ["busy", node, limit]                                            the group takes so many messages of it

A step whose subject is not there does nothing.
"""

from __future__ import annotations

import random
from typing import Any

from clustermd.dlm.modes import ECANCEL, EDEADLK, ETIMEDOUT, Flag
from clustermd.testing.locks.replicas import Cluster

Step = list[Any]

SPACE = "array"
NAMES = (b"token", b"message", b"bitmap0000")
LVB_BYTES = 16
SLOTS = 4
NODES_MAX = 5
CLIENTS_MAX = 3

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
        Flag.PERSISTENT,
        Flag.PERSISTENT,
        Flag.PERSISTENT | Flag.VALBLK,
        Flag.PERSISTENT | Flag.VALBLK,
        Flag.NODLCKWT,
        Flag.NODLCKBLK | Flag.TIMEOUT,
    )
)
ADOPT_FLAGS = tuple(
    int(Flag.ORPHAN | flags)
    for flags in (Flag.NONE, Flag.VALBLK, Flag.PERSISTENT, Flag.VALBLK | Flag.PERSISTENT)
)
STATUSES = (ECANCEL, ECANCEL, ETIMEDOUT, EDEADLK, 0)
"""Why something is cancelled; 0: by an unlock with CANCEL."""
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
        Flag.PERSISTENT,
        Flag.NODLCKBLK,
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
    "closed": 1,
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


def draw_step(cluster: Cluster, draw: random.Random, *, stopped: bool) -> Step:
    """A step that has a subject, if its kind has one now."""
    while True:
        word = draw.choices(_WORDS, _ODDS)[0]
        numbers = sorted(member.node for member in cluster.nodes)
        node = draw.choice(numbers)
        if word == "send":
            return _draw_operation(draw, node)
        elif word in ("accept", "deliver", "lose", "bury", "client", "stable"):
            if word != "stable" or not cluster.group.stable:
                return [word, node]
        elif word in ("lost", "ended", "closed"):
            return [word, node, draw.randrange(CLIENTS_MAX)]
        elif word == "start" and len(numbers) < NODES_MAX:
            return [word, draw.choice([free for free in range(1, NODES_MAX + 1) if free not in numbers])]
        elif word == "cut":
            return [word, node, draw.randrange(4)]
        elif word == "fence" and (gone := len(cluster.gone) + len(cluster.apart)):
            return [word, draw.randrange(gone)]
        elif word in ("alone", "heal") and cluster.apart:
            return [word, draw.randrange(len(cluster.apart))]
        elif word == "busy":
            return [word, node, draw.choice((1, 2, 1 << 30))]
        elif word in ("settle", "break", "no quorum") or (word == "mend" and stopped):
            return [word]


def _draw_operation(draw: random.Random, number: int) -> Step:
    kind = draw.choices(
        ("request", "convert", "unlock", "cancel", "recovered", "leave", "join", "adopt", "purge"),
        (4, 10, 2, 1.5, 0.7, 0.2, 0.4, 1, 0.1),
    )[0]
    client = draw.randrange(CLIENTS_MAX)
    head = ["send", number, client, kind]
    which, value = draw.randrange(8), draw.randrange(1 << 16)
    if kind == "request":
        mode = draw.randrange(6)
        flags = int(Flag.EXPEDITE) if mode == 0 and draw.random() < 0.7 else draw.choice(REQUEST_FLAGS)
        return [*head, draw.choice((0, 0, 0, 1, 2)), mode, flags, draw.random() < 0.7]
    if kind == "convert":
        return [*head, which, draw.randrange(6), draw.choice(CONVERT_FLAGS), value]
    if kind == "unlock":
        flags = draw.choice((int(Flag.FORCEUNLOCK), 0, int(Flag.VALBLK), int(Flag.IVVALBLK)))
        return [*head, which, flags, value if draw.random() < 0.7 else None]
    if kind == "cancel":
        return [*head, which, draw.choice(STATUSES)]
    if kind == "adopt":
        # mostly in the mode in which something was left behind, if anything was
        return [*head, which, draw.randrange(6), draw.choice(ADOPT_FLAGS), draw.random() < 0.8]
    if kind == "purge":
        return [*head, draw.randrange(NODES_MAX + 1), draw.choice((0, 0, 1001, 1002, 1003))]
    if kind == "recovered":
        return [*head, draw.randrange(1, SLOTS + 1)]
    return head
