"""One storm: a cluster drawn from a seed, rounds of faults, and after each round the proof that nothing is lost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from clustermd.testing.disks import all_clear, look
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.storm import checks
from clustermd.testing.storm.arena import MIB, Arena, Finding, Plan
from clustermd.testing.storm.faults import draw, gap_s
from clustermd.testing.storm.instant import Ledger
from clustermd.testing.waiting import wait_until

NODES = 3
STALL_BOUND_S = 20.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a storm that found nothing did."""

    faults: int
    changed_blocks: int
    writes: int
    longest_stall_s: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.faults} faults, {self.changed_blocks} blocks made to differ, {self.writes} writes acknowledged,"
            f" longest wait of a client {self.longest_stall_s:.1f} s, {self.seconds:.0f} s"
        )


def plan_of(seed: int) -> Plan:
    """The cluster of a seed."""
    dice = Random(f"plan/{seed}")
    return Plan(
        seed=seed,
        members=dice.choice((2, 2, 3)),
        slots=dice.choice((3, 4, 4)),
        disk_mib=32,
        rate=dice.choice((300, 600, 1500)),
        depth=dice.choice((16, 32, 64)),
        hot_blocks=dice.choice((64, 256, 512)),
        chunk_kib=dice.choice((64, 64, 256, 4096)),
        side_by_side=dice.random() < 0.6,
        unresponsive_s=3.0,
        linger_s=2.0,
        threads=dice.random() < 0.5,
        slow_ms=dice.choice((0, 3, 20, 60)),
    )


def run(
    seed: int,
    rounds: int,
    say: Callable[[str], None],
    *,
    base: str = "/tmp",
    keep: Path | None = None,
    most_faults: int = 12,
) -> Outcome:
    """Run the storm of `seed`. Raises Finding; the cluster's files are then copied to `keep`, if given."""
    begun_s = time.monotonic()
    plan = plan_of(seed)
    dice = Random(f"storm/{seed}")
    faults = 0
    with LocalCluster(plan.environment, base) as cluster:
        story = (cluster.directory / "storm.log").open("w", buffering=1)

        def tell(text: str) -> None:
            line = f"{time.monotonic() - begun_s:8.3f} {text}"
            story.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            say(line)

        arena = Arena(plan, cluster, tell)
        try:
            tell(f"seed {seed}: {plan}")
            _create(arena)
            for number in range(1, rounds + 1):
                tell(f"round {number}")
                faults += _round(arena, dice, most_faults)
            checks.nothing_left(arena, dice)
        except AssertionError as error:
            tell(f"FOUND {type(error).__name__}: {error}")
            if keep is not None:
                shutil.rmtree(keep, ignore_errors=True)
                arena.cluster.kill(arena.processes())
                shutil.copytree(cluster.directory, keep, ignore=_only_files)
            if isinstance(error, Finding):
                raise
            raise Finding(str(error)) from error
        finally:
            story.close()
        stalls = [report.longest_stall_s(arena.held_ns) for _, report in arena.reports]
        writes = sum(report.writes for _, report in arena.reports)
        return Outcome(faults, arena.changes, writes, max(stalls), time.monotonic() - begun_s)


def _only_files(directory: str, found: list[str]) -> list[str]:
    """Sockets cannot be copied."""
    return [name for name in found if Path(directory, name).is_socket()]


def _create(arena: Arena) -> None:
    plan, cluster = arena.plan, arena.cluster
    arena.disks = cluster.images(plan.members, plan.disk_mib * MIB)
    arena.nodes = [cluster.node(f"node{number + 1}") for number in range(NODES)]
    first, *others = arena.nodes
    options = ["-l1", f"-n{plan.members}", "-b", "clustered", f"--nodes={plan.slots}", "--delay=1"]
    options += [f"--bitmap-chunk={plan.chunk_kib}K", "--assume-clean"]
    first.run("-CR", "md0", *options, *arena.disks)
    for node in others:
        node.run("-A", "md0", *arena.disks)
    wait_until(lambda: all_clear(arena.disks), "the bits of creation to be cleared", 30)
    blocks = look(arena.disks[0]).size_bytes // 4096
    share = blocks // NODES
    for number, node in enumerate(arena.nodes):
        low, high = (0, blocks) if plan.side_by_side else (number * share, (number + 1) * share)
        load = arena.loads[node.name] = Load(node, number + 1, low, high)
        arena.ledgers[node.name] = Ledger(load.log, load.number)


def _round(arena: Arena, dice: Random, most_faults: int) -> int:
    for node in arena.nodes:
        arena.start_load(node)
    arena.pass_time(dice.uniform(0.3, 1.5))
    faults = dice.randint(2, most_faults)
    for _ in range(faults):
        draw(dice)(arena, dice)
        arena.pass_time(gap_s(dice))
    arena.say("calm")
    checks.call_back(arena, dice)
    checks.clients_go_on(arena)
    checks.one_story(arena)
    checks.nobody_waits(arena)
    stall_s = max(report.longest_stall_s(arena.held_ns) for _, report in arena.reports)
    if stall_s > STALL_BOUND_S:
        raise Finding(f"a client waited for {stall_s:.1f} s")
    return faults
