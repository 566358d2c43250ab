"""Small hand-made runs in which every step of appendix D of md-cluster's specification happens.

Each is a plan for a number of nodes, and what is done to the formatted boxes before the first start:

    death      writes and reads on all nodes, sweeps, a node that dies with bits set: takeover, resync, join
    stop       a clean stop in the middle of the resync that such a death asks for: BITMAP_NEEDS_SYNC
    degraded   one of three members fails; a stop then leaves bits, for the member that is away
    recovery   one member has a role and not yet its content: it is filled while everybody writes
    pages      bitmaps of two pages: a page may be on disk and the other not

Copies are slow on purpose, so that a resync has several windows. Nothing else is drawn: faults are for who uses this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.superblock import FeatureMap, Superblock
from clustermd.testing.simulator.boxes import SECTOR
from clustermd.testing.simulator.plan import Plan, Step
from clustermd.testing.simulator.workload import REGIONS

if TYPE_CHECKING:
    from clustermd.testing.simulator.run import Run

SUPERBLOCK_AT = 8 * SECTOR
SMALL_CHUNK_BYTES = 512
"""Less than mdadm makes, and allowed by the format: bitmaps of two pages on disks of some MiB."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """See the module. `plan(nodes)`; `prepare(run)` is called before anything starts."""

    name: str
    plan: Callable[[int], Plan]
    prepare: Callable[[Run], None] = lambda run: None


def _work(plan: Plan, over_s: float, every_s: float) -> tuple[Step, ...]:
    """Writes that go round all regions, and reads of what was written, one by one and in pairs."""
    size = plan.array_sectors // REGIONS
    steps = []
    for number in range(int(over_s / every_s)):
        at_s = round(number * every_s, 6)
        region = number * 7 % REGIONS
        place = {"region": region, "at": number * 24 % size, "sectors": 8}
        steps.append(Step(at_s, "write", place))
        if number % 3 == 0:
            again = {
                "region": region,
                "at": number * 24 % size + 4,
                "sectors": 8,
            }  # it overlaps, or is a neighbour
            steps.append(Step(at_s, "write", again))
        if number % 2:
            steps.append(Step(at_s, "read", place | {"node": number // 2}))
        if number % 8 == 5:
            steps.append(Step(at_s, "flush", {"node": number}))
    return tuple(steps)


def _base(nodes: int) -> Plan:
    return Plan(
        nodes=nodes,
        slots=max(nodes, 2),
        durable=nodes < 3,
        storage_fence=nodes == 2,
        fence_after_s=1.0,
        late_s=(0.0005, 0.01, 0.3),
        daemon_sleep_s=1,
        resync_kib_s=(1000, 1000),
    )


def _death(nodes: int) -> Plan:
    plan = _base(nodes)
    dies = Step(2.3, "kill", {"node": 1, "down_s": 1.2, "detect_s": 0.05})
    return replace(plan, work=_work(plan, 4.0, 0.08), faults=(dies,))


def _stop(nodes: int) -> Plan:
    plan = _base(nodes)
    dies = Step(1.0, "kill", {"node": nodes, "down_s": 1.5, "detect_s": 0.02})
    stops = tuple(
        Step(at_s, "stop", {"node": node, "down_s": 0.5, "leave": node == 1})
        for node, at_s in ((1, 1.12), (max(1, nodes - 1), 2.6))
    )
    return replace(plan, work=_work(plan, 3.4, 0.07), faults=(dies, *stops))


def _degraded(nodes: int) -> Plan:
    plan = replace(_base(nodes), members=3, raid_disks=3)
    fails = Step(0.4, "write-error", {"node": 1, "box": 1, "after": True, "times": 1})
    stops = Step(1.5, "stop", {"node": 1, "down_s": 0.4, "leave": False})
    return replace(plan, work=_work(plan, 2.6, 0.08), faults=(fails, stops))


def _recovery(nodes: int) -> Plan:
    plan = replace(_base(nodes), resync_kib_s=(500, 500))
    return replace(plan, work=_work(plan, 3.0, 0.1))


def _not_filled(run: Run) -> None:
    """The second member has a role, and other things where the array's data should be."""
    box = run.cluster.boxes[1]
    old = Superblock.from_bytes(
        bytes(box.data[SUPERBLOCK_AT : SUPERBLOCK_AT + 8 * SECTOR]),
        minor=2,
        at_sector=8,
        device_sectors=box.size_sectors,
    )
    new = replace(old, feature_map=old.feature_map | FeatureMap.RECOVERY_OFFSET, recovery_offset=0).to_bytes()
    box.data[SUPERBLOCK_AT : SUPERBLOCK_AT + len(new)] = new
    begin, end = old.data_offset * SECTOR, (old.data_offset + run.plan.array_sectors) * SECTOR
    box.data[begin:end] = b"\xee" * (end - begin)
    run.watch.begin(run.cluster.boxes, run.plan.chunk_bytes, run.plan.slots)


def _pages(nodes: int) -> Plan:
    plan = replace(_base(nodes), array_sectors=32768, chunk_bytes=4096, resync_kib_s=(1000, 200_000))
    steps = []
    for number in range(10):
        # the last region has the bits of the second page; its owner has others, too
        for region in (REGIONS - 1, (REGIONS - 1) % nodes):
            place = {"region": region, "at": number * 16, "sectors": 8}
            steps.append(Step(round(number * 0.07, 6), "write", place))
    dies = Step(4.0, "kill", {"node": 1 + (REGIONS - 1) % nodes, "down_s": 1.0, "detect_s": 0.05})
    late = {"region": REGIONS - 1, "at": 512, "sectors": 4}
    return replace(plan, work=(*steps, Step(3.8, "write", late)), faults=(dies,))


def _two_pages(run: Run) -> None:
    """Every slot gets a bitmap with a chunk of one sector."""
    plan = run.plan
    before = BitmapGeometry(plan.chunk_bytes, plan.array_sectors, plan.slots)
    after = BitmapGeometry(SMALL_CHUNK_BYTES, plan.array_sectors, plan.slots)
    for box in run.cluster.boxes:
        at = before.start_sector(8, 8, 0) * SECTOR
        header = replace(
            BitmapSuperblock.from_bytes(bytes(box.data[at : at + 256])), chunksize=SMALL_CHUNK_BYTES
        )
        for slot in range(plan.slots):
            at = after.start_sector(8, 8, slot) * SECTOR
            area = after.area_bytes(header)
            box.data[at : at + len(area)] = area
    run.watch.begin(run.cluster.boxes, SMALL_CHUNK_BYTES, plan.slots)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("death", _death),
        Scenario("stop", _stop),
        Scenario("degraded", _degraded),
        Scenario("recovery", _recovery, _not_filled),
        Scenario("pages", _pages, _two_pages),
    )
}
