"""The page of `clustermd locks`: what is stuck first, then everything by lockspace.

People look at it when something hangs, so the answer comes first: which requests wait, the longest first, each with
whom it waits for, and which of them wait for each other. Below, the resources in the same order: those that are
waited for, those that the dead still hold, the quiet rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clustermd.lockd.who import Wait, age, circles, process, seconds, stuck_rank, waits, who


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
    found = waits(replica)
    if found:
        lines += ["", "waiting, the longest first", *(f"  {wait_text(wait)}" for wait in found)]
        lines += [f"  in a circle: {circle_text(ring)}" for ring in circles(found)]
    by_lock = {wait.lock["id"]: wait for wait in found}
    for name, space in sorted(replica["lockspaces"].items(), key=_lockspace_rank):
        lines += ["", f"lockspace {name}", *_space(space, by_lock)]
    return "\n".join(lines) + "\n"


def wait_text(wait: Wait) -> str:
    """A wait in one line."""
    return f"{wait.lockspace} {wait.resource}: {who(wait.lock)} wants {wait.lock['wants']}{_waits_for(wait)}"


def circle_text(ring: list[Wait]) -> str:
    """ "A waits for B (token), B waits for A (ack)" """
    after = [*ring[1:], ring[0]]
    return ", ".join(
        f"{who(wait.lock)} waits for {who(following.lock)} ({wait.resource})"
        for wait, following in zip(ring, after, strict=True)
    )


def _troubles(state: dict[str, Any]) -> list[str]:
    if "sequencer" not in state["group"]:
        return []
    sequencer = state["group"]["sequencer"]
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
    lines += [
        f"  session {one['label']} (pid {one['pid']}) is lost for {one['lost_for_s']} s and not proved dead: "
        f"{'; '.join(one['waiting']) or 'proving'}"
        for one in state.get("sessions", [])
        if one["lost_for_s"] is not None
    ]
    return lines


def _lockspace_rank(item: tuple[str, dict[str, Any]]) -> tuple[tuple[int, float], str]:
    name, space = item
    return min((stuck_rank(resource) for resource in space["resources"].values()), default=(2, 0.0)), name


def _space(space: dict[str, Any], waits_by_lock: dict[int, Wait]) -> Iterator[str]:
    for seat in space["slots"]:
        state = "" if seat["state"] == "member" else f" ({seat['state']})"
        yield f"  slot {seat['slot']}: {who(seat)}{state}"
    for joiner in space["joining"]:
        reasons = [f"slot {one['slot']} of {one['name']} ({one['state']})" for one in joiner["waits_for"]]
        yield f"  joining: {who(joiner)}{' waits for ' + ', '.join(reasons) if reasons else ''}"
    ordered = sorted(space["resources"].items(), key=lambda item: (stuck_rank(item[1]), item[0]))
    for name, resource in ordered:
        yield f"  {name}{' (the value block is invalid)' if resource['value_block_invalid'] else ''}"
        for lock in resource["granted"]:
            yield f"    {lock['mode']} {who(lock)}{age(lock)}"
        for lock in resource["converting"]:
            wants = f"wants {lock['wants']}{_waits_for(waits_by_lock[lock['id']])}"
            yield f"    {lock['mode']} {who(lock)}{age(lock)} {wants}"
        for lock in resource["waiting"]:
            yield f"    -- {who(lock)} wants {lock['wants']}{_waits_for(waits_by_lock[lock['id']])}"


def _waits_for(wait: Wait) -> str:
    long = f" {seconds(wait.waits_s)}" if wait.waits_s else ""
    return f", waits{long} for {wait.for_whom() or 'the lock manager'}"


def wait_json(wait: Wait) -> dict[str, Any]:
    """A wait for programs."""
    return {
        "lockspace": wait.lockspace,
        "resource": wait.resource,
        "lock": wait.lock,
        "waits_s": wait.waits_s,
        "for": "holders" if not wait.ahead else "turn",
        "blockers": list(wait.blockers),
    }


def circle_json(ring: list[Wait]) -> list[dict[str, Any]]:
    """A circle for programs: its processes in order, each waiting for the next."""
    return [
        {
            "node": process(wait.lock)[0],
            "who": who(wait.lock),
            "resource": wait.resource,
            "wants": wait.lock["wants"],
        }
        for wait in ring
    ]
