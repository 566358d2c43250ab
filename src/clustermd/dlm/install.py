"""The install point: who carries the state on, who is behind, new, foreign or gone. Pure (dlm.md 6.3).

Computed by every member from the same view and the same START messages, so all come to the same plan:

    authority   of those with state, the ones with the most applied entries in the newest epoch
    current     authority's equals: they go on at once
    behind      members of the authority's last installed view whose history is shorter: they get the missing tail
    fresh       members without state: they get a snapshot
    foreign     another configuration, another history, or declared lost by the authority: they must start anew

Nobody has state: an empty one begins, but only when every member known to be lost is proved dead. Until then
its locks, which nobody remembers, must be taken as held (dlm.md 6.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clustermd.dlm.machine import NodeKey
from clustermd.dlm.messages import Start
from clustermd.dlm.wire import pack
from clustermd.group.process_group import View


@dataclass(frozen=True, slots=True)
class Install:
    """The plan. `sender` is the member that sends tail and snapshot; `foreign` says why, by member."""

    epoch: int
    authority: NodeKey | None
    sender: NodeKey | None
    members: tuple[NodeKey, ...]
    current: tuple[NodeKey, ...]
    behind: tuple[NodeKey, ...]
    fresh: tuple[NodeKey, ...]
    foreign: dict[NodeKey, str]
    applied: dict[NodeKey, int]
    entry: bytes


def plan_install(
    view: View, starts: Mapping[NodeKey, Start | None], fenced_since: Mapping[NodeKey, str]
) -> Install | None:
    """The plan for `view`, given a START of each member (None: of another version).

    Returns None if nobody has state and the end of some lost member is not proved; `fenced_since` are the
    proofs that came in the order after the view.
    """
    names = {(member.node, member.incarnation): member.name for member in view.members}
    foreign = dict.fromkeys(
        (key for key in names if starts[key] is None),
        "this node's lock manager has another version or configuration than the others; install the same one",
    )
    if len(foreign) * 2 > len(names) or (len(foreign) * 2 == len(names) and min(names) in foreign):
        # they are the majority, or as many with the lowest node number: then it is we who differ
        foreign = dict.fromkeys((key for key in names if starts[key] is not None), foreign[min(foreign)])
    able = {key: start for key in names if key not in foreign and (start := starts[key]) is not None}
    stateful = sorted(key for key, start in able.items() if start.has_state)
    authority = _authority(stateful, able)
    fenced = {(node, life): proof for start in able.values() for node, life, proof in start.fenced}
    left = sorted({key for start in able.values() for key in start.left})
    if authority is None:
        lost = {key for start in able.values() for key in start.unfenced} - set(fenced) - set(fenced_since)
        if lost - set(names):
            return None
        current = tuple(sorted(able))
        behind: list[NodeKey] = []
        fresh: tuple[NodeKey, ...] = ()
        epoch = applied = 0
    else:
        best = able[authority]
        epoch, applied = best.epoch, best.applied
        continuing = []
        for key in stateful:
            if key not in best.members:
                foreign[key] = (
                    "the cluster went on without this node, which was cut off or declared lost; "
                    "its locks are gone and its arrays must be assembled again"
                )
            elif _place(able[key]) == _place(best) and _content(able[key]) != _content(best):
                foreign[key] = "the lock state of this node differs from that of the others"
            else:
                continuing.append(key)
        current = tuple(key for key in continuing if _place(able[key]) == _place(best))
        behind = [key for key in continuing if key not in current]
        fresh = tuple(sorted(key for key, start in able.items() if not start.has_state))
    members = tuple(sorted((*current, *behind, *fresh)))
    entry = pack(
        [
            "install",
            epoch + 1,
            [[*key, names[key]] for key in members],
            [list(key) for key in left],
            [[*key, proof] for key, proof in sorted(fenced.items())],
        ]
    )
    return Install(
        epoch=epoch + 1,
        authority=authority,
        sender=current[0] if current else None,
        members=members,
        current=current,
        behind=tuple(behind),
        fresh=fresh,
        foreign=foreign,
        applied={key: able[key].applied if able[key].has_state else applied for key in members},
        entry=entry,
    )


def _place(start: Start) -> tuple[int, int]:
    return start.epoch, start.applied


def _content(start: Start) -> tuple[bytes, bytes]:
    return start.chain, start.digest


def _authority(stateful: list[NodeKey], able: Mapping[NodeKey, Start]) -> NodeKey | None:
    """Of the members that are farthest, one whose content most of them have; the lowest node of these."""
    if not stateful:
        return None
    top = max(_place(able[key]) for key in stateful)
    farthest = [key for key in stateful if _place(able[key]) == top]
    votes = {key: sum(_content(able[other]) == _content(able[key]) for other in farthest) for key in farthest}
    return min(farthest, key=lambda key: (-votes[key], key))
