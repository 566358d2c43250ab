"""`clustermd cluster status`, `start` and `stop`: how this node's cluster is, and this node's part in it.

One lockd is asked, outside of any session, so it answers also while nothing else moves: that is when people ask.
Whatever waits is shown with what it waits for. The exit status is 0 when this node may act and nobody is waited
for, else 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

from clustermd.cli.command import UsageError
from clustermd.cli.output import show, show_json
from clustermd.errors import Refused
from clustermd.group.process import ended, start_time
from clustermd.lockd.client import connect, lockd_status
from clustermd.rundir import RunDir

_ANSWER_S = 5.0
_END_S = 30.0
_HELP = """\
Usage: clustermd cluster status [--json]   how the cluster of this node is, and what anything waits for
       clustermd cluster start             start this node's lockd, which takes it into the cluster
       clustermd cluster stop [--force]    end it; with --force also if arrays or locks of this node use it

status ends with 0 when this node may act and nobody is waited for, else with 1.
"""


def run(words: Sequence[str]) -> int:
    """The verbs; `words` begin with the subcommand. The exit status. Raises Refused, UsageError."""
    name, *rest = words
    allowed = {"status": {"--json"}, "start": set[str](), "stop": {"--force"}}[name] | {"-h", "--help"}
    unknown = [word for word in rest if word not in allowed]
    if unknown:
        raise UsageError(f"cluster {name} takes no {unknown[0]!r}")
    if "-h" in rest or "--help" in rest:
        show(_HELP)
        return 0
    rundir = RunDir.from_environment()
    if name == "start":
        return asyncio.run(_start(rundir))
    if name == "stop":
        return asyncio.run(_stop(rundir, force="--force" in rest))
    try:
        state = asyncio.run(lockd_status(rundir, _ANSWER_S))
    except Refused as refusal:
        if refusal.code == "not-running":
            raise Refused(
                "not-running",
                f"this node ({rundir.node}) takes no part in its cluster: start it with clustermd cluster start",
            ) from None
        raise
    if "--json" in rest:
        show_json(cluster=state)
    else:
        show(cluster_text(state))
    return 0 if healthy(state) else 1


async def _start(rundir: RunDir) -> int:
    try:
        connection = await connect(rundir, "clustermd cluster start", timeout_s=_ANSWER_S)
    except Refused as refusal:
        if refusal.code != "group-not-ready":
            raise
        waits = _waits(await lockd_status(rundir, _ANSWER_S)) or [refusal.message]
        show("\n  ".join((f"started; {rundir.node} is not in its cluster yet, it waits:", *waits)) + "\n")
        return 0
    show(f"{connection.name} is in its cluster\n")
    await connection.close()
    return 0


async def _stop(rundir: RunDir, *, force: bool) -> int:
    state = await lockd_status(rundir, _ANSWER_S)
    users = [f"{one['label']} (pid {one['pid']})" for one in state["sessions"]]
    if users and not force:
        raise Refused(
            "in-use",
            f"this node's lockd is in use by {', '.join(users)}: end them first (clustermd --stop for arrays), or "
            "give --force, and they lose their locks",
        )
    pid = int(state["pid"])
    started = start_time(pid)
    if started is None:
        return 0
    os.kill(pid, signal.SIGTERM)
    try:
        await asyncio.wait_for(ended(pid, started), _END_S)
    except TimeoutError:
        raise Refused(
            "still-running",
            f"lockd (process {pid}) does not end within {_END_S:g} s: see {rundir.node_dir / 'lockd.log'}",
        ) from None
    show(f"{state['name']} has left its cluster\n")
    return 0


def healthy(state: dict[str, Any]) -> bool:
    """Whether this node may act and nobody is waited for."""
    return bool(state["installed"]) and not state["suspended"] and not _waits(state)


def cluster_text(state: dict[str, Any]) -> str:
    """The page for the state that a lockd tells (`lockd.daemon.Lockd.status`)."""
    group, replica = state["group"], state["replica"]
    cluster = f"cluster {group['cluster']}" if group.get("cluster") else "the nodes of this machine"
    may = "may act" if state["installed"] and not state["suspended"] else "must wait"
    lines = [f"{cluster}: {state['name']} (node {state['node']}) {may}", ""]
    if group["engine"] == "corosync":
        lines += _corosync(group)
    if group.get("strangers"):
        lines.append(
            f"  strangers {_names(group['strangers'])}: in corosync's group of lock daemons without being one; "
            "changes of membership wait for them in vain"
        )
    lines.append(f"  members   {_names(name for _, name, _ in group['members']) or 'none'}")
    if replica.get("nodes"):
        zombies = [node["name"] for node in replica["nodes"] if node["lost"]]
        if zombies:
            lines.append(
                f"  zombies   {_names(zombies)}: lost, what they hold stays held until their end is proved"
            )
    lines.append(
        f"  phase     {replica['phase']}" + (f", {replica['suspended']}" if replica["suspended"] else "")
    )
    for name, space in replica["lockspaces"].items():
        seats = [f"{seat['slot']} {seat['name']}{_state(seat)}" for seat in space["slots"]]
        lines.append(f"  slots     {name}: {', '.join(seats) or 'none'}")
    if group["engine"] == "corosync":
        lines += _fencing(group)
    waits = _waits(state)
    if waits:
        lines += ["", "waits:", *(f"  {what}" for what in waits)]
    return "\n".join(lines) + "\n"


def _corosync(group: dict[str, Any]) -> list[str]:
    if "ring" not in group:
        return ["  ring      unknown yet"]
    sequence, lowest = group["ring"]
    absent = [node["name"] for node in group["nodes"] if not node["in_ring"]]
    here = [node["name"] for node in group["nodes"] if node["in_ring"]]
    votes = sum(node["votes"] for node in group["nodes"])
    majority = group["majority"]
    present = sum(node["votes"] for node in group["nodes"] if node["in_ring"])
    quorum = "yes" if group["quorate"] else "no"
    if group["quorate"] and present < majority:
        quorum += ", by corosync's rules (two_node, last_man_standing, auto_tie_breaker or a quorum device)"
    return [
        f"  ring      {sequence}.{lowest}: {_names(here)}"
        + (f"; absent: {_names(absent)}" if absent else ""),
        f"  quorum    {quorum}, {present} of {votes} votes, a majority is {majority}",
        f"  view      {'.'.join(map(str, group['view']))}",
    ]


def _fencing(group: dict[str, Any]) -> list[str]:
    lines = [
        f"  fencing   {group['fence']}" + (f"; UNSAFE: {group['unsafe']}" if group.get("unsafe") else "")
    ]
    if group.get("lease_left_s") is not None:
        lines.append(f"  lease     {max(0.0, group['lease_left_s'])} s left")
    return lines


def _state(seat: dict[str, Any]) -> str:
    return "" if seat["state"] == "member" else f" ({seat['state']})"


def _names(names: Any) -> str:
    return ", ".join(names)


def _waits(state: dict[str, Any]) -> list[str]:
    """Everything that is waited for, in words."""
    group, replica = state["group"], state["replica"]
    waits = []
    if group.get("frozen"):
        waits.append(f"the group stands still: {group['frozen']}")
    if group["engine"] == "corosync" and not group.get("quorate", True):
        absent = [node["name"] for node in group["nodes"] if not node["in_ring"]]
        waits.append(f"quorum: {_names(absent) or 'more votes'} must come")
    waits += [f"{name} has not said hello in the new membership" for name in group.get("awaiting_hello", [])]
    waits += [f"{one['name']} does not answer for {one['for_s']} s" for one in group.get("owing", [])]
    names = {node["node"]: node["name"] for node in group.get("nodes", [])}
    for lost in group.get("lost", []):
        actor = names.get(lost["actor"], f"node {lost['actor']}")
        doing = lost["waits"] or (f"{actor} fences it" if lost["actor"] is not None else "nobody can act")
        failed = "; ".join(
            f"failed at {names.get(int(node), node)}: {why}" for node, why in lost["failed"].items()
        )
        waits.append(
            f"{lost['name']} is lost for {lost['for_s']} s: {doing}" + (f" ({failed})" if failed else "")
        )
    for one in group.get("unproved", []):
        waits.append(f"the end of {one['node']}'s former life: {'; '.join(one['waiting']) or 'being proved'}")
    waits += [f"{name} to start the new membership" for name in replica.get("waiting_for_start", [])]
    if replica.get("waits"):
        waits.append(f"the lock manager: {replica['waits']}")
    for name, space in replica["lockspaces"].items():
        for seat in space["slots"]:
            if seat["state"] != "member":
                waits.append(f"slot {seat['slot']} of lockspace {name}: {seat['name']} is {seat['state']}")
    return waits
