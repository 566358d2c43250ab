"""A change of membership, worked out from what all members said. Pure: all come to the same result.

Every process in the medium's membership says `Hello`. At the place of the order where the last of them is delivered
each computes the same `Change` from the same words (dlm.md 6.3):

    members     who takes part: same configuration, not proved dead before
    expelled    who may not, with the reason
    quorate     all of them have quorum in this ring
    left        who was a member and is gone: LEFT said goodbye, LOST may act still until its end is proved
    proved      the ends that are proved now: by fencing that some have not heard of, by a reboot, by the word of
                the node's next lockd, or because the node is here

When nobody kept a state, every configured node that is absent counts as lost, as incarnation 0: a remainder of a
former life of the cluster may still work there (dlm.md 6.6).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from clustermd.group.agreed.hello import Hello, Key, Life, Peer
from clustermd.group.process_group import Left, Member


@dataclass(frozen=True, slots=True)
class Configured:
    """A node of the cluster's configuration."""

    number: int
    name: str
    votes: int


@dataclass(frozen=True, slots=True)
class Change:
    """See the module."""

    members: tuple[Life, ...]
    peers: dict[Peer, Member]
    joined: tuple[Member, ...]
    quorate: bool
    left: tuple[tuple[Life, Left], ...]
    proved: dict[Key, tuple[Life, str]]
    expelled: dict[Key, str]
    fresh: bool


def work_out(hellos: Mapping[Peer, Hello], configured: Iterable[Configured]) -> Change:
    """The change that these words make."""
    nodes = {node.number: node for node in configured}
    proofs = {(node, life): words for hello in hellos.values() for node, life, words in hello.proofs}
    expelled = _other_configuration(hellos, nodes)
    for hello in hellos.values():
        if hello.life.key in proofs:
            expelled[hello.life.key] = (
                "this life of the node was declared dead while it was away "
                f"({proofs[hello.life.key]}); its locks are gone and its arrays must be assembled again"
            )
        elif hello.life.member.node not in nodes:
            expelled[hello.life.key] = (
                f"node {hello.life.member.node} is not in the cluster's configuration: add it to the nodelist of "
                "corosync.conf on all nodes"
            )
    expelled |= _second_of_its_node(hellos, expelled)
    accepted = {peer: hello for peer, hello in hellos.items() if hello.life.key not in expelled}
    present = {hello.life.key: hello.life for hello in accepted.values()}
    by_node = {life.member.node: life for life in present.values()}
    former = {life.key: life for hello in accepted.values() for life in (*hello.last, *hello.lost)}
    goodbyes = {key for hello in accepted.values() for key in hello.left}
    fresh = not any(hello.has_state for hello in accepted.values())
    if fresh:
        for node in nodes.values():
            if node.number not in by_node:
                former.setdefault((node.number, 0), Life(Member(node.number, 0, node.name), ""))
    left: list[tuple[Life, Left]] = []
    proved: dict[Key, tuple[Life, str]] = {}
    for key, life in sorted(former.items()):
        if key in present:
            continue
        proof = proofs.get(key) or _proof_by_presence(life, by_node.get(key[0]))
        if key[1] == 0 and not fresh:
            proof = proof or "the state of the cluster is known"
        if proof:
            proved[key] = (life, proof)
        elif key in goodbyes:
            left.append((life, Left.LEFT))
        else:
            left.append((life, Left.LOST))
    known = {life.key for hello in accepted.values() for life in hello.last}
    return Change(
        members=tuple(sorted(present.values())),
        peers={peer: hello.life.member for peer, hello in accepted.items()},
        joined=tuple(life.member for key, life in sorted(present.items()) if key not in known),
        quorate=bool(accepted) and all(hello.quorate for hello in accepted.values()),
        left=tuple(left),
        proved=proved,
        expelled=expelled,
        fresh=fresh,
    )


def _proof_by_presence(life: Life, now: Life | None) -> str:
    """What the node's present life proves of a former one.

    The same boot proves nothing by itself: processes may live on. The lockd that follows another one on
    the same boot brings proofs of the former ones' ends with it.
    """
    if now is None:
        return ""
    if life.member.incarnation == 0:
        return "its node has joined the group"
    if life.boot != now.boot:
        return "its machine was started anew"
    return ""


def _other_configuration(hellos: Mapping[Peer, Hello], nodes: Mapping[int, Configured]) -> dict[Key, str]:
    """Who has another configuration than most votes; of as many votes the side with the lowest node is right."""
    sides: dict[str, list[Key]] = {}
    for hello in hellos.values():
        sides.setdefault(hello.config, []).append(hello.life.key)
    if len(sides) < 2:
        return {}

    def weight(config: str) -> tuple[int, Key]:
        votes = sum(nodes[node].votes for node, _ in sides[config] if node in nodes)
        return -votes, min(sides[config])

    right = min(sides, key=weight)
    return {
        key: f"its configuration ({config}) differs from that of the cluster ({right}): make them alike"
        for config, keys in sides.items()
        if config != right
        for key in keys
    }


def _second_of_its_node(hellos: Mapping[Peer, Hello], expelled: Container[Key]) -> dict[Key, str]:
    """Lives of a node that speak beside another one of it: each node takes part once, a member before a newcomer."""
    members = {life.key for hello in hellos.values() for life in hello.last}
    first: dict[int, Key] = {}
    second: dict[Key, str] = {}
    lives = {hello.life.key: (peer[1], hello.life.member.name) for peer, hello in hellos.items()}
    for key in sorted(lives.keys(), key=lambda key: (key not in members, key)):
        if key in expelled:
            continue
        if key[0] in first:
            (pid, name) = lives[first[key[0]]]
            second[key] = (
                f"another lock daemon of {name} takes part already (process {pid}): end one of them; the two have "
                "different run directories (CLUSTERMD_RUN)"
            )
        first.setdefault(key[0], key)
    return second
