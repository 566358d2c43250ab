"""The install point: who carries the state on, who is behind, new, foreign or gone. Pure (dlm.md 6.3).

Computed by every member from the same view and the same START messages, so all come to the same plan:

    authority   of those with state, one with the most applied entries in the newest epoch
    current     authority's equals: they go on at once
    behind      members of the authority's last installed view whose history is shorter: they get the missing tail
    fresh       members without state: they get a snapshot
    foreign     another configuration, another history, or declared lost by the authority: they must start anew

Where the order is not durable, memory is all there is, and a view may go on only if it surely knows what any
view before it showed to anybody (dlm.md 6.2, 6.6). It does if a majority of votes kept its state; or if those
who kept it have had quorum all the time, and everybody who is absent is proved dead (two_node,
last_man_standing). A remainder that is neither must start anew: the others may have gone on without it, and
ended. So must one whose companions who ended were a majority by themselves: they may have shown what it was not told
any more. (Those who had not got the state yet could show nothing.)

Nobody has state: an empty one begins, but only when every member known to be lost is proved dead. Until then
its locks, which nobody remembers, must be taken as held.

When a ring breaks, one side may have had messages that the other never gets. If both meet again before one of
them went on, their histories fork in one epoch. An entry that somebody showed was acknowledged by a
majority, all on one side of the fork; so the side that showed something past the fork is right, else one that
has a majority of votes; else no one knows until the absent are proved dead, and then either will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clustermd.dlm.machine import NodeKey
from clustermd.dlm.messages import Start
from clustermd.dlm.wire import pack
from clustermd.group.process_group import View

WENT_ON = (
    "the cluster went on without this node, which was cut off or declared lost; "
    "its locks are gone and its arrays must be assembled again"
)
NOBODY_KNOWS = (
    "the ring broke, and nobody who is left knows what the nodes that ended then had done last, so the lock state is "
    "lost; the arrays of this node must be assembled again"
)


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
) -> Install | str:
    """The plan for `view`, given a START of each member (None: of another version), or what must be waited for.

    `fenced_since` are the proofs that came in the order after the view. A plan without members means that all
    who have state must start anew, and the others wait for the view after that.
    """
    names = {member.key: member.name for member in view.members}
    foreign = dict.fromkeys(
        (key for key in names if starts[key] is None),
        "this node's lock manager has another version or configuration than the others; install the same one",
    )
    if len(foreign) * 2 > len(names) or (len(foreign) * 2 == len(names) and min(names) in foreign):
        # they are the majority, or as many with the lowest node number: then it is we who differ
        foreign = dict.fromkeys((key for key in names if starts[key] is not None), foreign[min(foreign)])
    able = {key: start for key in names if key not in foreign and (start := starts[key]) is not None}
    stateful = sorted(key for key, start in able.items() if start.has_state)
    gone_on = [key for key in stateful if any(_outlived(key, able[other]) for other in stateful)]
    foreign |= dict.fromkeys(gone_on, WENT_ON)
    stateful = [key for key in stateful if key not in gone_on]
    able = {key: start for key, start in able.items() if key not in gone_on}
    fenced = {(node, life): proof for start in able.values() for node, life, proof in start.fenced}
    left = sorted({key for start in able.values() for key in start.left})
    lost = (
        {key for start in able.values() for key in start.unfenced}
        - set(fenced)
        - set(fenced_since)
        - set(names)
    )
    votes = _votes(view)
    if not stateful:
        if lost:
            return _until_proved(lost, "nobody here knows which locks they hold")
    elif view.majority and sum(votes[key] for key in stateful) < view.majority:
        if lost:
            return _until_proved(lost, "those who are here are no majority")
        if not all(able[key].unbroken for key in stateful) or _majority_without(stateful, able, view):
            foreign |= dict.fromkeys(
                stateful,
                "the majority's lock state is lost, as too many nodes ended at once, and that of this node may be "
                "out of date; its arrays must be assembled again",
            )
            return _plan(names, (), (), (), None, foreign, able, b"")
    if not stateful:
        entry = _entry(1, able, names, left, fenced)
        return _plan(names, tuple(sorted(able)), (), (), None, foreign, able, entry)
    side = _side(stateful, able, votes, view.majority)
    if side is not None and (since := _began_anew_without(able[side[0]], stateful, votes, view.majority)):
        foreign |= dict.fromkeys((key for key in stateful if key not in since), WENT_ON)
        stateful = since
        side = _side(stateful, able, votes, view.majority)
    if side is None:
        if lost:
            return _until_proved(lost, "they alone know on which side of a broken ring the cluster went on")
        may = _may_have_shown(stateful, able, votes, view)
        if len(may) > 1:
            foreign |= dict.fromkeys(stateful, NOBODY_KNOWS)
            return _plan(names, (), (), (), None, foreign, able, b"")
        side = _side(may[0] if may else stateful, able, votes, 0)
        assert side is not None
    authority = side[0]
    best = able[authority]
    continuing = []
    for key in stateful:
        if key not in best.members:
            foreign[key] = WENT_ON
        elif _place(able[key]) >= _place(best) and _content(able[key]) != _content(best):
            foreign[key] = "the lock state of this node differs from that of the others"
        else:
            continuing.append(key)
    current = tuple(key for key in continuing if _place(able[key]) == _place(best))
    behind = tuple(key for key in continuing if key not in current)
    fresh = tuple(sorted(key for key, start in able.items() if not start.has_state))
    takers = sorted((*current, *behind, *fresh))
    entry = _entry(best.epoch + 1, takers, names, left, fenced)
    return _plan(names, current, behind, fresh, authority, foreign, able, entry)


def _plan(
    names: Mapping[NodeKey, str],
    current: tuple[NodeKey, ...],
    behind: tuple[NodeKey, ...],
    fresh: tuple[NodeKey, ...],
    authority: NodeKey | None,
    foreign: dict[NodeKey, str],
    able: Mapping[NodeKey, Start],
    entry: bytes,
) -> Install:
    applied = able[authority].applied if authority is not None else 0
    members = tuple(sorted((*current, *behind, *fresh)))
    return Install(
        epoch=1 + (able[authority].epoch if authority is not None else 0),
        authority=authority,
        sender=current[0] if current else None,
        members=members,
        current=current,
        behind=behind,
        fresh=fresh,
        foreign=foreign,
        applied={key: able[key].applied if able[key].has_state else applied for key in members},
        entry=entry,
    )


def _entry(
    epoch: int,
    members: Iterable[NodeKey],
    names: Mapping[NodeKey, str],
    left: list[NodeKey],
    fenced: Mapping[NodeKey, str],
) -> bytes:
    return pack(
        [
            "install",
            epoch,
            [[*key, names[key]] for key in sorted(members)],
            [list(key) for key in left],
            [[*key, proof] for key, proof in sorted(fenced.items())],
        ]
    )


def _outlived(key: NodeKey, other: Start) -> bool:
    """Whether `other`'s history began when that node's former one had ended, and does not know this life of it."""
    return key[0] in other.outlived and key not in other.members


def _majority_without(stateful: list[NodeKey], able: Mapping[NodeKey, Start], view: View) -> bool:
    """Whether the others of the last view could show something that those who kept its state do not know.

    Who is here in the life that it had there and has no state never had one, so nothing was shown by its word.
    """
    last = max((able[key] for key in stateful), key=lambda start: start.epoch).members
    apart = {node for node, life in last if (node, life) not in able} - {node for node, _ in stateful}
    return sum(votes for node, votes in view.all_votes if node in apart) >= view.majority


def _began_anew_without(
    best: Start, stateful: list[NodeKey], votes: Mapping[NodeKey, int], majority: int
) -> list[NodeKey]:
    """A majority with state that the longest history does not know as members, if there is one.

    Some node of it had a part in that history and has had a later life since. Had that one joined it, it would know a
    later epoch; so it began with others anew, when nobody remembered anything. Epochs count from 1 there, too.
    """
    apart = [key for key in stateful if key not in best.members]
    return apart if majority and sum(votes[key] for key in apart) >= majority else []


def _until_proved(lost: Iterable[NodeKey], why: str) -> str:
    nodes = ", ".join(str(node) for node in sorted({node for node, _ in lost}))
    return f"the end of node {nodes} is not proved, and {why}"


def _votes(view: View) -> dict[NodeKey, int]:
    """Each member's votes; one each where votes mean nothing."""
    keys = [member.key for member in view.members]
    return dict(zip(keys, view.votes or [1] * len(keys), strict=True))


def _place(start: Start) -> tuple[int, int]:
    return start.epoch, start.applied


def _content(start: Start) -> tuple[bytes, bytes]:
    return start.chain, start.digest


def _side(
    stateful: list[NodeKey], able: Mapping[NodeKey, Start], votes: Mapping[NodeKey, int], majority: int
) -> list[NodeKey] | None:
    """The history that goes on, as its bearers, the authority first. None if a fork cannot be decided yet.

    `majority` 0: every fork is decided, by votes, length, and the lowest node.
    """
    newest = max(able[key].epoch for key in stateful)
    sides = _sides([key for key in stateful if able[key].epoch == newest], able)

    def weight(side: list[NodeKey]) -> tuple[bool, int, int, int]:
        head = able[side[0]]
        showed = any(
            max(able[key].shown for key in side) > _common(head, able[other[0]])
            for other in sides
            if other is not side
        )
        return showed, sum(votes[key] for key in side), head.applied, -min(side)[0]

    best = max(sides, key=weight)
    showed, own, _, _ = weight(best)
    if len(sides) > 1 and majority and not showed and own < majority:
        return None
    # bearers of one history that tell different states of it: most are right
    top = able[best[0]].applied
    heads = [key for key in best if able[key].applied == top]
    alike = {
        key: sum(votes[other] for other in heads if _content(able[other]) == _content(able[key]))
        for key in heads
    }
    first = min(heads, key=lambda key: (-alike[key], key))
    return [first, *(key for key in best if key != first)]


def _may_have_shown(
    stateful: list[NodeKey], able: Mapping[NodeKey, Start], votes: Mapping[NodeKey, int], view: View
) -> list[list[NodeKey]]:
    """The sides of a fork that were a majority together with the members of their last view that are absent."""
    newest = max(able[key].epoch for key in stateful)
    forked = [key for key in stateful if able[key].epoch == newest]
    all_votes = dict(view.all_votes)
    absent = {member for key in forked for member in able[key].members} - able.keys()
    gone = sum(all_votes.get(node, 0) for node, _ in absent)
    return [side for side in _sides(forked, able) if gone + sum(votes[key] for key in side) >= view.majority]


def _sides(bearers: list[NodeKey], able: Mapping[NodeKey, Start]) -> list[list[NodeKey]]:
    """Those whose histories are parts of one another, together; the farthest of each first."""
    sides: list[list[NodeKey]] = []
    for key in sorted(bearers, key=lambda key: (-able[key].applied, key)):
        start = able[key]
        for side in sides:
            if able[side[0]].chain_at(start.applied) in (start.chain, None):
                side.append(key)  # too far behind to tell: the tail that it gets is checked
                break
        else:
            sides.append([key])
    return sides


def _common(one: Start, other: Start) -> int:
    """After how many entries two forked histories were still the same, as far as they tell."""
    applied = min(one.applied, other.applied)
    while applied > 0:
        here, there = one.chain_at(applied), other.chain_at(applied)
        if here is None or there is None or here == there:
            break
        applied -= 1
    return applied
