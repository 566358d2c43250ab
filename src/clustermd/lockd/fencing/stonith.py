"""`fence = "stonith"`: pacemaker fences the lost node, with the devices it is configured with.

`stonith_admin --reboot NODE` (or `--fence`, which is off) asks the fencer daemon of this node, which finds a device,
tries the others' too, and ends with 0 only when the node was verified off (stonith_admin(8)). Names are those of
pacemaker's nodes, which are corosync's.

Pacemaker fences a lost node of its own accord, too. Its fencer makes one of two requests that are under way only where
both want the same action, and what we had fenced it takes for fenced: an `off` leaves the node dark either way. So the
action is `reboot` as pacemaker's `stonith-action` is, unless the configuration says otherwise.
"""

from __future__ import annotations

import logging
import re
import shutil

from clustermd.errors import Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.lockd.fencing.program import Outcome, run_program

STONITH_ADMIN = "stonith_admin"
_SEARCH = "/usr/sbin:/sbin:/usr/bin"
TIMEOUT_S = 120.0
_DISCONNECTED, _NO_SUCH_DEVICE = 102, 105  # exit statuses of pacemaker's programs
_NOTHING = re.compile(r"No devices|\b0 fence devices")
_CONFIGURE = "configure one (pcs stonith create)"
log = logging.getLogger("clustermd.lockd")


class StonithFencer:
    """`Fencer` over pacemaker. `action` is one of `conf.ACTIONS`; tests give another `program`."""

    policy = "stonith"
    unsafe = ""

    def __init__(self, action: str, program: str = STONITH_ADMIN, timeout_s: float = TIMEOUT_S) -> None:
        self._order = {"reboot": "--reboot", "off": "--fence"}[action]
        self._program = program
        self._timeout_s = timeout_s

    async def fence(self, victim: Victim) -> str:
        log.info("%s is fenced through pacemaker", victim.name)
        words = [self._order, victim.name, "--timeout", f"{self._timeout_s:.0f}"]
        outcome = await self._run(words, self._timeout_s + 10, "fence-failed")
        if outcome.status == 0:
            return f"pacemaker verified that {victim.name} is fenced"
        raise Refused(
            "fence-failed",
            f"pacemaker did not fence {victim.name}: {_failure(outcome, victim.name)}",
            policy=self.policy,
            node=victim.name,
        )

    async def check(self, node: str) -> str:
        """Which devices pacemaker would use, for this node or at all."""
        words = ["--list", node] if node else ["--list-registered"]
        outcome = await self._run(words, self._timeout_s, "fence-check-failed")
        if outcome.status != 0:
            raise Refused(
                "fence-check-failed",
                f"pacemaker answers no question: {_failure(outcome, node)}",
                node=node,
            )
        if _NOTHING.search(outcome.last_words):
            whom = node or "any node"
            raise Refused(
                "fence-check-failed",
                f"pacemaker has no device that fences {whom}: {_CONFIGURE}",
                node=node,
            )
        return f"pacemaker: {outcome.last_words or 'has a device'}"

    async def _run(self, words: list[str], timeout_s: float, code: str) -> Outcome:
        program = shutil.which(self._program, path=None if "/" in self._program else _SEARCH)
        if program is None:
            raise Refused(
                code,
                f'fence = "stonith" needs {self._program}, which is not installed: install pacemaker'
                ' (package pacemaker-cli-utils), or choose fence = "agent"',
                policy=self.policy,
            )
        return await run_program([program, *words], "", timeout_s)


def _failure(outcome: Outcome, node: str) -> str:
    """How it ended, its last words, and what to do."""
    how = "no answer in time" if outcome.status is None else f"{STONITH_ADMIN} ended with {outcome.status}"
    words = f"{how}; {outcome.last_words}" if outcome.last_words else how
    return f"{words} ({_remedy(outcome, node)})"


def _remedy(outcome: Outcome, node: str) -> str:
    if outcome.status == _DISCONNECTED:
        return "is pacemaker running on this node? systemctl start pacemaker"
    if outcome.status == _NO_SUCH_DEVICE:
        return _CONFIGURE
    return f"`{STONITH_ADMIN} --history '{node or '*'}'` and pacemaker's log say more"
