"""The shape all fencing policies have.

A policy answers one question: from when on is it sure that a lost node writes nothing more? It does not decide
who acts, nor how often it is tried; whoever calls it does (dlm.md 6.4). A policy that cannot be sure says
so by raising, and the lost node's locks stay: waiting is visible and can be ended by an operator, a
second writer cannot be taken back.
"""

from __future__ import annotations

from typing import Protocol

from clustermd.group.agreed.fencing import Victim


class Fencer(Protocol):
    """One policy. `policy` is its name in the configuration.

    `unsafe` says why people should not trust it, "" when its proof is as good as its hardware.
    """

    policy: str
    unsafe: str

    async def fence(self, victim: Victim) -> str:
        """Return when no lost life of `victim`'s node can write anything more: the proof, in words.

        Raises Refused ("fence-failed") with the reason; nothing is known then. May take minutes and be cancelled.
        """

    async def check(self, node: str) -> str:
        """Whether fencing the node of this name would work, without harm to it: what was seen, in words.

        An empty name asks about the policy as a whole. Raises Refused ("fence-check-failed").
        """
