"""What a run is made of: the cluster, what clients do, and what goes wrong, as plain values that can be kept in a file.

A plan is drawn from a seed by the atlas and the workloads, or read from a kept regression. Times are virtual seconds
from the moment in which all nodes serve for the first time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is done at a time: `what` names it, `args` are its numbers and words."""

    at_s: float
    what: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `durable`: the group is of the `local` kind (`order`), else corosync's (`totem`).

    Where it is corosync's, `fence` says who makes sure of a lost node's end (`fencer`; "" is "storage" with
    `storage_fence`, else "power"), `lease_s` how long a node may act that nobody hears (0: no leases) and
    `device_bound_s` what is added for requests on their way. `votes` are the nodes' (one each if there are none),
    and with `last_man_standing` a cluster that lost nodes comes to expect no more votes than it has.
    `resync_kib_s`: how fast copies go at least and at most, in KiB/s.
    """

    seed: int = 0
    nodes: int = 3
    slots: int = 4
    members: int = 2
    raid_disks: int = 2
    durable: bool = True
    storage_fence: bool = False
    fence_after_s: float = 3.0
    fence: str = ""
    lease_s: float = 0.0
    device_bound_s: float = 0.0
    two_node: bool = False
    wait_for_all: bool = False
    votes: tuple[int, ...] = ()
    last_man_standing: bool = False
    late_s: tuple[float, ...] = (0.001, 0.05, 0.5, 4.0)
    data_offset_sectors: int = 256
    array_sectors: int = 2048
    chunk_bytes: int = 16384
    daemon_sleep_s: int = 1
    device_timeout_s: int = 5
    discard: bool = True
    resync_kib_s: tuple[int, int] = (1000, 200_000)
    work: tuple[Step, ...] = ()
    faults: tuple[Step, ...] = ()

    @property
    def votes_of(self) -> dict[int, int]:
        """Each node's votes."""
        return {number: self.votes[number - 1] if self.votes else 1 for number in range(1, self.nodes + 1)}

    @property
    def fencing(self) -> str:
        """Who makes sure of a lost node's end."""
        return self.fence or ("storage" if self.storage_fence else "power")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Raises TypeError for unknown or missing values."""
        plan = cls(**values)
        return replace(
            plan,
            late_s=tuple(plan.late_s),
            votes=tuple(plan.votes),
            resync_kib_s=(plan.resync_kib_s[0], plan.resync_kib_s[1]),
            work=tuple(Step(**step) for step in values.get("work", ())),
            faults=tuple(Step(**step) for step in values.get("faults", ())),
        )
