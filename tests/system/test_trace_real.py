"""Traces of real processes: clean when nothing is wrong, and telling whose fault it is when something is.

One story is recorded: three nodes under load, one dies and is taken over by another while the third goes on writing.
Faults are planted twice: by changing what was recorded, and by processes with a flaw.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_kit import CREATE, LOAD, MIB, make_pair

from clustermd.testing.crash import crash
from clustermd.testing.load import Load
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.trace.file import read_traces
from clustermd.testing.trace.points import Reached

pytestmark = pytest.mark.system

PLANTED = Path(__file__).parent / "planted"
TRACED = {"CLUSTERMD_TRACE": "md0"}
Line = dict[str, Any]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The traces of node1, which died, node2 and node3."""
    with LocalCluster(TRACED) as cluster:
        pair = make_pair(cluster)
        three = cluster.node("node3")
        three.run("-A", "md0", *pair.disks)
        third = pair.load(pair.two).blocks[1]
        others = [pair.load(pair.two), Load(three, 3, third, third + 2048)]
        for load in others:
            load.start("--rate", "200", "--depth", "4", "--hot-blocks", "256")
        pair.load(pair.one).start(*LOAD)
        happened = crash(pair.load(pair.one), [pair.two, three], pair.disks)
        pair.wait_for_takeover(happened.slot)
        pair.one.run("-A", "md0", *pair.disks)
        for load in others:
            load.stop()
        pair.settle(pair.two)
        nodes = [pair.one, pair.two, three]
        for node in nodes:
            node.run("-S", "md0")
        kept = tmp_path_factory.mktemp("traces")
        yield [Path(shutil.copy(node.files().trace, kept / node.name)) for node in nodes]


def judged(node: Node, paths: list[Path], status: int) -> dict[str, Any]:
    """What `clustermd trace --json` says; it must end with `status`."""
    told: dict[str, Any] = json.loads(node.run("trace", "--json", *map(str, paths), expect=status))["trace"]
    return told


def planted(paths: list[Path], change: Callable[[dict[str, list[Line]]], None], to: Path) -> list[Path]:
    """The traces with a change: by node, their lines."""
    lines = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}
    change(lines)
    for node, points in lines.items():
        points.sort(key=lambda point: point["at_s"])
        (to / node).write_text("".join(json.dumps(point) + "\n" for point in points))
    return [to / node for node in lines]


def find(points: list[Line], name: str, **fields: Any) -> Line:
    return next(p for p in points if p["point"] == name and all(p.get(k) == v for k, v in fields.items()))


def test_a_takeover_under_load_breaks_no_rule(cluster: LocalCluster, recorded: list[Path]) -> None:
    told = judged(cluster.node("node1"), recorded, 0)
    assert told["violations"] == []
    assert told["nodes"] == ["node1", "node2", "node3"]
    assert told["events"] > 1000
    reached = Reached()
    for event in read_traces(recorded).events:
        reached.see(event.node, event.name, event.fields)
    assert {"1a", "1d", "2a", "3e", "3f", "4a", "4e", "5b", "5d", "7c"} <= set(reached.counts)


def test_a_grant_that_excludes_another_is_the_lock_managers_fault(
    cluster: LocalCluster, recorded: list[Path], tmp_path: Path
) -> None:
    def change(lines: dict[str, list[Line]]) -> None:
        owned = find(lines["node2"], "lock.granted", mode="PW", lock=find_own_lock(lines["node2"]))
        begun = find(lines["node2"], "write.begin")
        wrong = {**owned, "at_s": begun["at_s"], "lock": 999, "block": None}
        lines["node3"].append(wrong)

    told = judged(cluster.node("node1"), planted(recorded, change, tmp_path), 1)
    first = told["violations"][0]
    assert (first["rule"], first["layer"]) == ("incompatible-grant", "lock manager"), told


def find_own_lock(points: list[Line]) -> int:
    """The number of the lock of the own slot."""
    name = f"bitmap{find(points, 'join.slot')['slot']:04d}"
    return int(find(points, "lock.granted", mode="PW", resource=name)["lock"])


@pytest.mark.parametrize("told_of_it", [True, False])
def test_a_write_in_a_foreign_window_is_the_fault_of_who_knew_it(
    cluster: LocalCluster, recorded: list[Path], tmp_path: Path, told_of_it: bool
) -> None:
    def change(lines: dict[str, list[Line]]) -> None:
        copying, other = ("node2", "node3") if has(lines["node2"], "resync.read") else ("node3", "node2")
        window = find(lines[copying], "resync.window")
        if not told_of_it:
            lines[other] = [p for p in lines[other] if p["point"] != "window.set"]
        for number, name in enumerate(("write.issue", "write.done")):
            point = {"at_s": window["at_s"] + (number + 1) * 1e-7, "point": name}
            point |= {"lo": window["lo"], "hi": window["lo"] + 8, "chunks": [], "members": [0, 1]}
            lines[other].append(point | {"error": 0, "missed": [], "needed": False})

    told = judged(cluster.node("node1"), planted(recorded, change, tmp_path), 1)
    (broken,) = told["violations"]
    assert (broken["rule"], broken["layer"]) == (
        "write-in-foreign-window",
        "array" if told_of_it else "cluster",
    )


def has(points: list[Line], name: str) -> bool:
    return any(point["point"] == name for point in points)


def test_data_that_is_sent_before_its_bit_is_the_arrays_fault(
    cluster: LocalCluster, recorded: list[Path], tmp_path: Path
) -> None:
    def change(lines: dict[str, list[Line]]) -> None:
        begun = find(lines["node2"], "write.begin", stable=False)
        issued = find(lines["node2"], "write.issue", lo=begun["lo"])
        issued["at_s"] = begun["at_s"] + 1e-7

    traces = planted(recorded, change, tmp_path)
    told = judged(cluster.node("node1"), traces, 1)
    first = told["violations"][0]
    assert (first["rule"], first["layer"]) == ("data-before-bit", "array"), told
    drawn = cluster.node("node1").run("trace", *map(str, traces), expect=1)
    assert "at fault: the array" in drawn and "node2" in drawn and "write.issue" in drawn, drawn


def test_a_file_that_is_no_trace_is_refused_by_name_and_line(
    cluster: LocalCluster, recorded: list[Path], tmp_path: Path
) -> None:
    lines = recorded[1].read_text().splitlines(keepends=True)
    bad = tmp_path / "bad"
    bad.write_text("".join([*lines[:5], "rubbish\n", *lines[5:]]))
    assert f"{bad}, line 6" in cluster.node("node1").run("trace", str(bad), expect=2)
    assert "No such file" in cluster.node("node1").run("trace", str(tmp_path / "none"), expect=2)


def run_with(flaw: str) -> LocalCluster:
    return LocalCluster({**TRACED, "PYTHONPATH": str(PLANTED), "PLANTED": flaw})


def verdict_on(cluster: LocalCluster) -> dict[str, Any]:
    """The first violation in the traces of a cluster, whose nodes run or not."""
    nodes = [cluster.node(name) for name in ("node1", "node2")]
    told = judged(nodes[0], [node.files().trace for node in nodes], 1)
    first: dict[str, Any] = told["violations"][0]
    return first


def two_nodes(cluster: LocalCluster, *options: str) -> tuple[Node, Node]:
    disks = cluster.images(2, 64 * MIB)
    one, two = cluster.node("node1"), cluster.node("node2")
    one.run("-CR", "md0", *CREATE, *options, *disks)
    two.run("-A", "md0", *disks)
    return one, two


def write_a_while(node: Node, records: int = 300) -> None:
    """Everywhere in the array, so that what moves through it is met."""
    blocks = 60 * MIB // 4096
    load = Load(node, 1, 0, blocks)
    load.start("--rate", "400", "--depth", "4", "--hot-blocks", str(blocks))
    load.wait_for_records(load.records + records)
    load.stop()


def test_a_lock_manager_that_grants_too_much_is_found_out() -> None:
    with run_with("locks") as cluster:
        one, _ = two_nodes(cluster, "--assume-clean")
        write_a_while(one)
        first = verdict_on(cluster)
    assert (first["rule"], first["layer"]) == ("incompatible-grant", "lock manager"), first
    assert "bitmap0000" in first["message"]


def test_an_array_that_writes_in_windows_is_found_out() -> None:
    with run_with("windows") as cluster:
        one = cluster.node("node1")
        one.rundir.node_dir.mkdir(parents=True, exist_ok=True)
        (one.rundir.node_dir / "speed_limit_max").write_text("4000\n")
        _, two = two_nodes(cluster)
        write_a_while(two, 2000)
        first = verdict_on(cluster)
    assert (first["rule"], first["layer"]) == ("write-in-foreign-window", "array"), first


def test_an_array_that_does_not_wait_for_bits_is_found_out() -> None:
    with run_with("bits") as cluster:
        one, _ = two_nodes(cluster, "--assume-clean")
        write_a_while(one)
        first = verdict_on(cluster)
    assert (first["rule"], first["layer"]) == ("data-before-bit", "array"), first
