"""`fence = "agent"`: any program of the fence-agents project switches the lost node off.

The contract is theirs (FenceAgentAPI, dlm.md 3.6): options as `key=value` lines on standard input, `action=off` or
`reboot`, exit status 0 only when the agent has *verified* that the node is off. Every other end, a time-out
included, proves nothing. The victim is named as `nodename`, and as `plug` and `port` where the configuration names
neither: agents know the one or the other.
"""

from __future__ import annotations

import logging
import os
import shutil

from clustermd.conf import FenceAgent
from clustermd.errors import Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.lockd.fencing.program import Outcome, run_program

AGENT_PATH = "/usr/sbin:/usr/local/sbin:/sbin"
_STATUS_OFF = 2  # FenceAgentAPI: what `status` ends with for a node that is off
log = logging.getLogger("clustermd.lockd")


class AgentFencer:
    """`Fencer` over a fence agent. `path` is the file of the configuration, for messages."""

    policy = "agent"
    unsafe = ""

    def __init__(self, agent: FenceAgent, path: str) -> None:
        self._agent = agent
        self._path = path

    async def fence(self, victim: Victim) -> str:
        agent = self._agent
        text = self._input(agent.action, victim.name, "fence-failed")
        program = self._program("fence-failed")
        failures: list[str] = []
        while True:
            log.info("%s is fenced with %s action=%s", victim.name, program, agent.action)
            outcome = await self._run(program, text, "fence-failed")
            if outcome.status == 0:
                return f"{agent.agent} verified action={agent.action} for {victim.name}"
            failures.append(self._failure(outcome))
            log.error("%s could not be fenced: %s %s", victim.name, agent.agent, failures[-1])
            if len(failures) > agent.retries:
                break
        tries = f" ({len(failures)} tries)" if len(failures) > 1 else ""
        raise Refused(
            "fence-failed",
            f"{agent.agent} did not fence {victim.name}{tries}: it {failures[-1]}",
            policy=self.policy,
            node=victim.name,
        )

    async def check(self, node: str) -> str:
        """`status` of the node, or `monitor` of the fencing device itself."""
        agent = self._agent
        action = "status" if node else "monitor"
        text = self._input(action, node, "fence-check-failed")
        outcome = await self._run(self._program("fence-check-failed"), text, "fence-check-failed")
        if outcome.status == 0:
            return f"{agent.agent} action={action} succeeded" + (": the node is on" if node else "")
        if node and outcome.status == _STATUS_OFF:
            return f"{agent.agent} action={action} succeeded: the node is off"
        raise Refused(
            "fence-check-failed", f"{agent.agent} action={action} {self._failure(outcome)}", node=node
        )

    async def _run(self, program: str, text: str, code: str) -> Outcome:
        try:
            return await run_program([program], text, self._agent.timeout_s)
        except Refused as refusal:
            raise Refused(code, f"{refusal.message} ({self._path}: fence_agent.agent)") from refusal

    def _program(self, code: str) -> str:
        name = self._agent.agent
        found = shutil.which(name, path=None if os.path.isabs(name) else AGENT_PATH)
        if found is None:
            raise Refused(
                code,
                f"the fence agent {name} is no program{'' if os.path.isabs(name) else f' in {AGENT_PATH}'}:"
                f" install it (package fence-agents), or correct fence_agent.agent in {self._path}",
                agent=name,
            )
        return found

    def _input(self, action: str, node: str, code: str) -> str:
        """What the agent reads. A node that the configuration forgot is refused: the common options alone may
        lead to the wrong machine.
        """
        agent = self._agent
        if node and agent.nodes and node not in agent.nodes:
            raise Refused(
                code,
                f"{self._path} says nothing of how {node} is fenced: add a table [fence_agent.nodes.{node}]"
                f" (there are {', '.join(sorted(agent.nodes))})",
                node=node,
            )
        options = {**agent.options, **(agent.nodes.get(node, {}))}
        if node:
            if "plug" not in options and "port" not in options:
                options["plug"] = options["port"] = node
            options["nodename"] = node
        options["action"] = action
        return "".join(f"{key}={value}\n" for key, value in options.items())

    def _failure(self, outcome: Outcome) -> str:
        if outcome.status is None:
            how = f"did not end within {self._agent.timeout_s:g} s and was killed"
        elif outcome.status < 0:
            how = f"was ended by signal {-outcome.status}"
        else:
            how = f"ended with status {outcome.status}"
        return (
            f"{how}; its last words: {outcome.last_words}" if outcome.last_words else f"{how}, without a word"
        )
