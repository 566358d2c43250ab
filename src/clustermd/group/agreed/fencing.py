"""Who is lost, and whose task it is to have that proved.

Every member of a view keeps the same table of the lost. The lowest node of the view acts: its `Fencer`
(an agent, a lease, a disk) makes sure that the lost node is off and says so in words, and the group orders
these as the proof. When it fails, the next node tries; when all have failed, the first one again, for ever, and
visibly (dlm.md 3.6, 6.4). All lost lives of one node are one task, whatever ran there.

Nobody is fenced that is in the medium's membership: its lockd has only ended, and the next one there brings the proof;
it is waited for by name. At the start of a cluster the absent are given `startup_s` to come (dlm.md 6.6).

Where both sides of a cut cluster are quorate (two_node) both would switch each other off at the same moment, and nobody
be left. There the side with the lowest node goes first: the other one, should it live, follows `race_s` later.
Where nodes act by leases, quorum without a majority of votes (last_man_standing) proves nothing: the lost ones may be
the majority, and have leases. Then nobody acts, until a majority is here or an operator gives his word.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Protocol

from clustermd.group.agreed.hello import Key, Life
from clustermd.trace import Trace


@dataclass(frozen=True, slots=True)
class Victim:
    """A node that is to be fenced, and since when (boot clock of the actor) it is known to be lost.

    Fencing ends this `incarnation`, never the node's next one (dlm.md 6.8, 10 and 11).
    """

    node: int
    name: str
    incarnation: int
    lost_at_boottime_s: float


class FenceShell(Protocol):
    """What starts and stops this node's attempts. Each ends by `AgreedGroup.fence_done` or `fence_failed`."""

    def begin(self, victim: Victim) -> None: ...

    def cancel(self, node: int) -> None: ...


@dataclass(slots=True)
class Lost:
    """A lost life: since when, by the clock of this node, and which nodes failed to fence it in this round."""

    life: Life
    since_s: float
    failed: dict[int, str] = field(default_factory=dict)
    rounds: int = 0


class Fencing:
    """The table, and this node's part in it."""

    def __init__(self, me: int, shell: FenceShell, startup_s: float, race_s: float, trace: Trace) -> None:
        self._me = me
        self._trace = trace
        self._shell = shell
        self._startup_s = startup_s
        self._race_s = race_s
        self._contested = False
        self._outvoted = False
        self.lost: dict[Key, Lost] = {}
        self._nodes: tuple[int, ...] = ()
        self._in_ring: frozenset[int] = frozenset()
        self._at_work: dict[int, frozenset[Key]] = {}
        self._failing: set[int] = set()  # attempts that failed here, which is not in the order yet
        self._proofs: dict[Key, str] = {}

    def view(
        self,
        lost: list[Life],
        nodes: tuple[int, ...],
        now_s: float,
        were_here: Container[Key] = (),
        *,
        contested: bool = False,
        outvoted: bool = False,
        unbroken: bool = True,
    ) -> None:
        """A quorate view of `nodes` has begun in which these lives are lost and not proved dead.

        Whoever of them was in the last view of some member (`were_here`) is lost since now, though this node may have
        missed it longer: it may have had a lease meanwhile. Which nodes failed to fence is forgotten, so that all know
        the same of it. `contested`: those here are no majority, so the lost ones may be quorate as well; `outvoted`:
        they may have leases, too. While that was so, or quorum was gone (not `unbroken`), a node that is here now may
        have made the lost ones a majority, and not remember it: they are lost since now.
        """
        anew = self._outvoted or not unbroken
        self._contested = contested
        self._outvoted = outvoted
        before = self.lost
        self.lost = {}
        for life in lost:
            known = before.get(life.key)
            if known is None or anew or life.key in were_here:
                self.lost[life.key] = Lost(life, now_s)
            else:
                self.lost[life.key] = Lost(life, known.since_s, rounds=known.rounds)
        self._proofs = {key: words for key, words in self._proofs.items() if key in self.lost}
        self._nodes = nodes
        self._failing.clear()
        self.act(now_s)

    def suspend(self) -> None:
        """No view: nobody acts."""
        self._nodes = ()
        for node in list(self._at_work):
            self._stop(node)

    def ring(self, nodes: frozenset[int], now_s: float) -> None:
        """The nodes in the medium's membership, whether they take part or not."""
        self._in_ring = nodes
        self.act(now_s)

    def failed(self, node: int, actor: int, why: str, now_s: float) -> None:
        """In the order: `actor` could not fence `node`."""
        if actor == self._me:
            self._failing.discard(node)
        for lost in self._of(node):
            lost.failed[actor] = why
            if all(other in lost.failed for other in self._nodes):
                lost.rounds += 1
                last = lost.failed
                lost.failed = {}
                # kept for people: what the last round came to
                lost.failed.update({-actor: why for actor, why in last.items() if actor > 0})
        self.act(now_s)

    def proved(self, key: Key) -> Lost | None:
        """In the order: that life has ended."""
        lost = self.lost.pop(key, None)
        self._proofs.pop(key, None)
        if lost is not None and not self._of(key[0]):
            self._stop(key[0])
        return lost

    def done(self, node: int, words: str) -> None:
        """This node's attempt at `node` succeeded: whatever was lost when it began has ended."""
        self._over(node, "done")
        for key in self._at_work.pop(node, frozenset()) & self.lost.keys():
            self._proofs[key] = words

    def vouched(self, node: int, words: str) -> None:
        """An operator knows that `node` is off now."""
        self._proofs.update(dict.fromkeys((key for key in self.lost if key[0] == node), words))

    def given_up(self, node: int) -> None:
        """This node's attempt at `node` failed."""
        self._over(node, "failed")
        if self._at_work.pop(node, None) is not None:
            self._failing.add(node)

    def to_say(self) -> list[tuple[Key, str]]:
        """Proofs that this node has and that are not in the order yet."""
        return sorted(self._proofs.items())

    def act(self, now_s: float) -> None:
        """Begin what is this node's task by now, stop what is not any more."""
        for node in sorted({key[0] for key in self.lost} | set(self._at_work)):
            mine = (
                self._actor(node) == self._me
                and node not in self._failing
                and not self._waits(node, now_s)
                and not self._proofs.keys() >= {key for key in self.lost if key[0] == node}
            )
            if mine and node not in self._at_work:
                # of several lives the one lost last: its lease runs longest
                last = max(self._of(node), key=lambda lost: lost.since_s)
                victim = Victim(node, last.life.member.name, last.life.member.incarnation, last.since_s)
                self._at_work[node] = frozenset(key for key in self.lost if key[0] == node)
                self._trace.point("group.fencing", node=node)
                self._shell.begin(victim)
            elif not mine and node in self._at_work:
                self._stop(node)

    def _stop(self, node: int) -> None:
        self._over(node, "cancelled")
        if self._at_work.pop(node, None) is not None:
            self._shell.cancel(node)

    def _over(self, node: int, how: str) -> None:
        if node in self._at_work:
            self._trace.point("group.fencing_over", node=node, how=how)

    def _of(self, node: int) -> list[Lost]:
        return [lost for key, lost in sorted(self.lost.items()) if key[0] == node]

    def _actor(self, node: int) -> int | None:
        failed = {actor for lost in self._of(node) for actor in lost.failed}
        return min((other for other in self._nodes if other not in failed and self._of(node)), default=None)

    def _waits(self, node: int, now_s: float) -> str:
        """Why `node` is not fenced yet, or nothing."""
        if node in self._nodes:
            return "its present lockd says when the former one's processes have ended"
        if node in self._in_ring:
            return "it is in the cluster, but no lockd of clustermd runs there: start it (clustermd cluster start)"
        left_s = max(
            (lost.since_s + self._startup_s - now_s for lost in self._of(node) if lost.life.key[1] == 0),
            default=0.0,
        )
        if left_s > 0:
            return f"it has {left_s:.0f} s more to come before it is fenced"
        if self._outvoted:
            return (
                "those who are here are no majority of all votes, so the others may be one, and have leases:"
                " if it is off, say so (clustermd cluster fence-ack)"
            )
        if self._contested and self._nodes and node < min(self._nodes):
            left_s = max((lost.since_s + self._race_s - now_s for lost in self._of(node)), default=0.0)
            if left_s > 0:
                return f"if only the link is cut it may fence this side first: {left_s:.0f} s more"
        return ""

    def words(self, now_s: float) -> str:
        """For people: each lost node and what is done about it, in a sentence; or nothing."""
        told = []
        for node in sorted({key[0] for key in self.lost}):
            lost = self._of(node)
            name = lost[0].life.member.name
            how = self._waits(node, now_s) or (
                "it is being fenced" if node in self._at_work else "another node fences it"
            )
            failures = [why for each in lost for why in each.failed.values()]
            last = f" (last failure: {failures[-1]})" if failures else ""
            told.append(f"nobody knows yet that {name} writes nothing: {how}{last}")
        return "; ".join(told)

    def status(self, now_s: float) -> list[dict[str, Any]]:
        """For people: who is lost, since when, who acts, what failed, what is waited for."""
        return [
            {
                "node": node,
                "name": self._of(node)[0].life.member.name,
                "for_s": round(now_s - min(lost.since_s for lost in self._of(node)), 1),
                "incarnations": [f"{lost.life.member.incarnation:016x}" for lost in self._of(node)],
                "actor": self._actor(node),
                "waits": self._waits(node, now_s),
                "failed": {
                    str(abs(actor)): why for lost in self._of(node) for actor, why in lost.failed.items()
                },
                "rounds": max(lost.rounds for lost in self._of(node)),
            }
            for node in sorted({key[0] for key in self.lost})
        ]
