"""The classic traps of a lock manager over corosync, walked into (dlm.md 6.8; the numbers are its).

Where nodes meet by corosync a lock manager is only as good as what it makes of a medium that is neither safe nor
durable and serves minorities too. Each flaw here is one of the traps, put into the production code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from clustermd.dlm import replica as replica_module
from clustermd.dlm.install import Install, plan_install
from clustermd.dlm.replica import Replica
from clustermd.group.agreed import group as group_module
from clustermd.group.agreed.change import Change, Configured, work_out
from clustermd.group.agreed.fencing import Fencing
from clustermd.group.agreed.group import AgreedGroup
from clustermd.group.agreed.hello import Hello, Key, Peer
from clustermd.group.agreed.stability import Stability
from clustermd.group.process_group import Left, View
from clustermd.testing.simulator import fencer as fencer_module
from clustermd.testing.simulator.cluster import SimCluster
from clustermd.testing.simulator.flaws import flaw

_told, _look, _on_view = Stability.told, Stability.look, Replica.on_view
_on_quorum, _work_out, _plan_install = AgreedGroup.on_quorum, work_out, plan_install
_fencing_view = Fencing.view


def _own_is_enough(self: Stability, everybody_else_proved: bool) -> int | None:
    """What this node has, everybody has."""
    index = max((told for told, _ in self._told.values()), default=0)
    if index <= self.stable:
        return None
    self.stable = index
    return index


def _goes_on(self: AgreedGroup, reason: str) -> None:
    """A change of membership ends nothing."""


def _hears_no_loss_of_quorum(self: Replica, view: View) -> None:
    if view.quorate:
        _on_view(self, view)


def _always_quorate(self: AgreedGroup, quorate: bool, ring: tuple[int, int]) -> None:
    _on_quorum(self, True, ring)


def _absent_hold_nothing(hellos: Mapping[Peer, Hello], configured: Iterable[Configured]) -> Change:
    """Nobody here knows of the absent, so there are none."""
    change = _work_out(hellos, configured)
    left = tuple((life, reason) for life, reason in change.left if life.member.incarnation)
    return replace(change, left=left)


def _gone_is_dead(hellos: Mapping[Peer, Hello], configured: Iterable[Configured]) -> Change:
    """Who is lost is purged at once."""
    change = _work_out(hellos, configured)
    lost = {life.key: (life, "it is gone") for life, reason in change.left if reason is Left.LOST}
    left = tuple((life, reason) for life, reason in change.left if reason is not Left.LOST)
    return replace(change, left=left, proved={**change.proved, **lost})


def _all_have_state(self: Stability, member: Key, index: int, keeps: bool) -> None:
    """Who has no state yet counts as well."""
    _told(self, member, index, True)


def _never_blocked(self: Stability, everybody_else_proved: bool) -> int | None:
    """The other of two nodes may be alive; this one goes on."""
    return _look(self, True)


def _votes_prove_enough(view: View, *what: Any) -> Install | str:
    """Quorum alone says who goes on."""
    return _plan_install(replace(view, majority=0), *what)


def _everybody_acts(self: Fencing, node: int) -> int | None:
    """Whoever sees the loss fences."""
    return self._me if self._nodes and self._of(node) else None


def _unseen(*_: Any) -> bool:
    return True


def _never_outvoted(self: Fencing, *said: Any, outvoted: bool = False, **how: Any) -> None:
    _fencing_view(self, *said, **how)


def _unwaited(lost_at_s: float, lease_s: float, drift: float, device_bound_s: float) -> float:
    return lost_at_s


FLAWS = (
    flaw("trap 1", "shows what only this node has", (Stability, "look", _own_is_enough)),
    flaw(
        "trap 2",
        "applies what is delivered without quorum",
        (AgreedGroup, "_pause", _goes_on),
        (Replica, "on_view", _hears_no_loss_of_quorum),
    ),
    flaw("trap 2b", "takes every ring for quorate", (AgreedGroup, "on_quorum", _always_quorate)),
    flaw(
        "trap 6",
        "a majority without a state begins anew over a minority that lives",
        (group_module, "work_out", _absent_hold_nothing),
    ),
    flaw(
        "trap 7",
        "counts members without a state as witnesses",
        (Stability, "told", _all_have_state),
        (Replica, "awaited", 1 << 62),
    ),
    flaw(
        "trap 8",
        "of two nodes each goes on before the other is fenced",
        (Stability, "look", _never_blocked),
        (replica_module, "plan_install", _votes_prove_enough),
    ),
    flaw(
        "trap 9",
        "a restarted lockd vouches for processes it has not seen end",
        (SimCluster, "landed", _unseen),
    ),
    flaw("trap 12", "purges who is lost", (group_module, "work_out", _gone_is_dead)),
    flaw("dlm I29", "all members of a view fence at the same time", (Fencing, "_actor", _everybody_acts)),
    flaw(
        "lease-that-others-have",
        "a quorate remainder waits for the end of leases that the others, who are the majority, renew",
        (Fencing, "view", _never_outvoted),
    ),
    flaw("trap 32", "does not wait for a lost node's lease", (fencer_module, "harmless_at_s", _unwaited)),
)
