"""Stories of nodes that meet by corosync, in which the classic traps of a lock manager show (dlm.md 6.8)."""

from __future__ import annotations

from typing import Any

from flaw_stories import Scenario, at, kill, plan, reads, writes

from clustermd.testing.simulator.plan import Plan, Step


def cut(at_s: float, *nodes: int, for_s: float = 4.0) -> Step:
    return at(at_s, "partition", cut_off=list(nodes), for_s=for_s)


def meeting(seed: int, *faults: Step, **changes: Any) -> Plan:
    """Three nodes that write, read and lock all the time, and what befalls them."""
    nodes = changes.setdefault("nodes", 3)
    work = [step for region in range(nodes) for step in writes(region, begin_s=0, end_s=5, every_s=0.11)]
    work += reads(0, begin_s=0, end_s=5, every_s=0.2)
    return plan(seed, durable=False, work=work, faults=faults, **changes)


def come_and_go(seed: int) -> Plan:
    """Members die, are cut off and come back, with messages under way."""
    who = 1 + seed % 3
    first = at(0.5 + seed % 7 * 0.01, "kill-lockd", node=who, down_s=0.3, detect_s=0.002)
    return meeting(seed, first, cut(2.0 + seed % 5 * 0.01, 1 + (seed + 1) % 3))


def newcomer(seed: int) -> Plan:
    """One comes back without a state, while another one hears everything late."""
    who = 1 + seed % 3
    late = at(0.3, "slow-group", node=1 + (seed + 1) % 3, slow_s=0.1, for_s=4.0)
    return meeting(
        seed, late, *(at(at_s, "kill-lockd", node=who, down_s=0.05, detect_s=0.002) for at_s in (0.5, 2.0))
    )


def restarted_at_once(seed: int) -> Plan:
    """A lock daemon comes back while its node's requests are still on their way."""
    who = 1 + seed % 3
    slow = at(0.0, "slow-disk", node=who, box=0, slow_s=0.8, for_s=9.0)
    return meeting(seed, slow, at(1.0 + seed % 5 * 0.1, "kill-lockd", node=who, down_s=0.01, detect_s=0.002))


def cut_in_two(seed: int) -> Plan:
    return meeting(seed, cut(0.5 + seed % 7 * 0.01, 1 + seed % 3), storage_fence=True)


def two_cut(seed: int) -> Plan:
    return meeting(
        seed,
        cut(0.5 + seed % 7 * 0.01, 1),
        kill(0.6, node=1 + seed % 2, down_s=8.0)
        if seed % 3 == 2
        else at(0.6, "slow-group", node=1, slow_s=0.001, for_s=0.1),
        nodes=2,
        two_node=True,
        wait_for_all=True,
        fence="storage",
    )


def fresh_majority(seed: int) -> Plan:
    """One is cut off and lives; the two others lose their memory and come back."""
    kills = [
        kill(1.0 + node * 0.05, node=1 + (seed + node) % 3, down_s=0.2, detect_s=0.002) for node in (1, 2)
    ]
    return meeting(seed, cut(0.4, 1 + seed % 3, for_s=9.0), *kills)


def leases(seed: int) -> Plan:
    who = 1 + seed % 3
    return meeting(seed, cut(0.5 + seed % 7 * 0.01, who), fence="lease", lease_s=4.0, device_bound_s=12.0)


def two_minorities(seed: int) -> Plan:
    """Two of five are cut off, then the third goes over to them; who is left comes to expect no more votes."""
    cuts = cut(0.5, 4, 5, for_s=9.0), cut(2.0 + seed % 7 * 0.02, 3, for_s=6.0)
    return meeting(
        seed,
        *cuts,
        nodes=5,
        slots=5,
        fence="lease",
        lease_s=1.0,
        device_bound_s=0.5,
        last_man_standing=True,
    )


SCENARIOS = (
    Scenario("trap 1", "shown-before-majority", come_and_go, 4),
    Scenario("trap 2", "applied-outside-view", cut_in_two, 40),
    Scenario("trap 2b", "shown-history-forks|incompatible-grant", cut_in_two, 60),
    Scenario("trap 6", "incompatible-grant", fresh_majority, 20),
    Scenario("trap 7", "shown-before-majority", newcomer, 20),
    Scenario("trap 8", "shown-history-forks|incompatible-grant", two_cut, 20),
    Scenario("trap 9", "fenced-alive", restarted_at_once, 20),
    Scenario("trap 12", "fenced-alive", cut_in_two, 4),
    Scenario("dlm I29", "two-fencers", cut_in_two, 10),
    Scenario("lease-that-others-have", "shown-history-forks|fenced-alive", two_minorities, 20),
    Scenario("trap 32", "fenced-alive", leases, 20),
)
