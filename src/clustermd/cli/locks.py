"""`clustermd locks`: who holds which lock, who waits for whom, across the whole cluster.

Every node's lockd is a replica of the lock manager and knows all of it, so one is asked: this node's. It is asked
outside of any session, so it answers also while the group stands still, which is when people ask. A wait is
shown with the holders whose modes it does not go together with, a node that is silent or whose end is not proved yet
with what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from clustermd.cli.command import UsageError
from clustermd.cli.output import show, show_json
from clustermd.dlm.modes import Mode, compatible
from clustermd.lockd.client import lockd_status
from clustermd.rundir import RunDir

_ANSWER_S = 5.0
_HELP = (
    "Usage: clustermd locks [--json]\n\nWho holds and awaits which lock, in the whole cluster of this node.\n"
)


def run(words: Sequence[str]) -> int:
    """The verb. The exit status. Raises Refused when this node's lockd is not running or does not answer."""
    unknown = [word for word in words if word not in ("--json", "-h", "--help")]
    if unknown:
        raise UsageError(f"locks takes no {unknown[0]!r}")
    if "-h" in words or "--help" in words:
        show(_HELP)
        return 0
    state = asyncio.run(lockd_status(RunDir.from_environment(), _ANSWER_S))
    if "--json" in words:
        show_json(locks=state)
    else:
        show(locks_text(state))
    return 0


def locks_text(state: dict[str, Any]) -> str:
    """The page for the state that a lockd tells (`lockd.daemon.Lockd.status`)."""
    lines = [f"node {state['name']} (number {state['node']}, lockd process {state['pid']})"]
    if state["suspended"]:
        lines.append(f"  suspended: {state['suspended']}")
    if state["group"].get("frozen"):
        lines.append(f"  the group stands still: {state['group']['frozen']}")
    lines += _troubles(state)
    replica = state["replica"]
    for node in replica["nodes"]:
        lines.append(f"  member {node['name']}{' (lost, not yet proved dead)' if node['lost'] else ''}")
    for name in replica.get("waiting_for_start", []):
        lines.append(f"  waiting for {name} to start the new membership")
    for name, space in replica["lockspaces"].items():
        lines += ["", f"lockspace {name}", *_space(space)]
    return "\n".join(lines) + "\n"


def _troubles(state: dict[str, Any]) -> list[str]:
    sequencer = state["group"].get("sequencer")
    if sequencer is None:
        return ["  the sequencer does not answer"]
    lines = [
        f"  {one['node']} (process {one['pid']}) has been silent for {one['silent_s']} s"
        for one in sequencer["unresponsive"]
    ]
    lines += [f"  {one['node']} is awaited for {one['for_s']} s to rejoin" for one in sequencer["awaited"]]
    lines += [
        f"  {one['node']} is lost for {one['for_s']} s and not proved dead: {'; '.join(one['waiting']) or 'proving'}"
        for one in sequencer["unproved"]
    ]
    return lines


def _space(space: dict[str, Any]) -> list[str]:
    lines = [
        f"  slot {seat['slot']}: {_who(seat)}{'' if seat['state'] == 'member' else ' (' + seat['state'] + ')'}"
        for seat in space["slots"]
    ]
    for joiner in space["joining"]:
        reasons = [f"slot {one['slot']} of {one['name']} ({one['state']})" for one in joiner["waits_for"]]
        lines.append(f"  joining: {_who(joiner)}{' waits for ' + ', '.join(reasons) if reasons else ''}")
    for name, resource in space["resources"].items():
        lines.append(f"  {name}")
        holders = resource["granted"] + resource["converting"]
        lines += [f"    {lock['mode']} {_who(lock)}" for lock in resource["granted"]]
        for lock in resource["converting"]:
            lines.append(f"    {lock['mode']} {_who(lock)} wants {lock['wants']}{_for_whom(lock, holders)}")
        for lock in resource["waiting"]:
            lines.append(f"    -- {_who(lock)} wants {lock['wants']}{_for_whom(lock, holders)}")
    return lines


def _who(owner: dict[str, Any]) -> str:
    name = owner.get("name") or f"node {owner['node']}"
    label = f" {owner['label']}" if owner.get("label") else ""
    pid = f" (pid {owner['pid']})" if owner.get("pid") else ""
    return f"{name}{label}{pid}{' ZOMBIE' if owner.get('zombie') else ''}"


def _for_whom(waiter: dict[str, Any], holders: list[dict[str, Any]]) -> str:
    wanted = Mode[waiter["wants"]]
    blocking = [
        _who(lock)
        for lock in holders
        if lock["id"] != waiter["id"] and not compatible(Mode[lock["mode"]], wanted)
    ]
    long = f" {waiter['waits_s']} s" if waiter.get("waits_s") else ""
    return f", waits{long} for {', '.join(blocking)}" if blocking else f", waits{long} in the queue"
