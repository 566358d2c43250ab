"""`fence = "none"`: who is lost counts as dead at once. For tests, and for nodes whose death is sure otherwise."""

from __future__ import annotations

from clustermd.group.agreed.fencing import Victim


class NoFencer:
    """`Fencer` that believes."""

    policy = "none"
    unsafe = (
        "nothing makes sure that a lost node is dead: one that is only cut off, or slow, goes on writing beside"
        " those who took over from it, and the mirror's halves and the file system on it are damaged"
    )

    async def fence(self, victim: Victim) -> str:
        return f'nobody made sure of it: fence = "none", so {victim.name} is believed to be dead'

    async def check(self, node: str) -> str:
        return f"nothing to check: {node or 'a lost node'} is believed to be dead"
