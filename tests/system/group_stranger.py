"""A process that is no lockd in the lock daemons' group of corosync: it says what it is told, or nothing.

    python group_stranger.py NOISE COUNT

Prints "in" when it is a member, then multicasts `COUNT` messages of the kind NOISE ("garbage", "forged" or "none"),
prints "said", and stays until it is killed.
"""

from __future__ import annotations

import os
import random
import select
import sys

from clustermd.group.agreed.hello import ack, control, tagged
from clustermd.group.corosync.cpg import Cpg
from clustermd.group.corosync.group import GROUP


def noise(kind: str, dice: random.Random) -> bytes:
    if kind == "garbage":
        return dice.randbytes(dice.randrange(1, 3000))
    tag = (dice.randrange(12), dice.randrange(40), 1)
    return dice.choice(
        (
            control(["hello", 1, [[1, 1]], [1, 1], True, 1, [1, 7, "node1", "x"], "", True, [], [], [], []]),
            control(["hello", 99, {}, None]),
            control(["fenced", list(tag), [1, 0], "believe me"]),
            control(["fence-failed", list(tag), 1, "because"]),
            control(["without", [[1, 2]], [[1, 2]]]),
            control(["leave"]),
            control(["beat", list(tag), 1 << 60, [[1, 1 << 60]]]),
            tagged(tag, 1 << 60, True, b"\x93\x01"),
            ack(tag, 1 << 60, True),
        )
    )


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    dice = random.Random(os.getpid())
    cpg = Cpg(GROUP, lambda *_: None, lambda *_: None, lambda *_: None)
    while not cpg.join():
        select.select([], [], [], 0.01)
    print("in", flush=True)
    said = 0
    while True:
        if kind != "none" and said < count:
            said += cpg.send(noise(kind, dice))
            if said == count:
                print("said", flush=True)
        select.select([cpg], [], [], 0.002 if kind != "none" and said < count else None)
        cpg.dispatch()


if __name__ == "__main__":
    main()
