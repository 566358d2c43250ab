"""The vocabulary of traces is what the source says: docs, the steps of appendix D, and what rules ask for."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path

import pytest
from array_kit import clustered, until
from cluster_in_process import Node, cluster_of

import clustermd
from clustermd.node.recorder import BEGIN
from clustermd.testing.trace.events import Event
from clustermd.testing.trace.judge import Judge, all_rules
from clustermd.testing.trace.lives import Lives
from clustermd.testing.trace.points import BY_ID, STEPS, Reached

SOURCE = Path(clustermd.__file__).parent
DOCS = SOURCE.parent.parent / "docs" / "traces.md"
TOLD_BY_WHO_RECORDS = {BEGIN, "process.died", "process.drained"}
HELPERS = {
    ("cluster", "_point"): {"type", "sequence", "slot", "low", "high"},
    ("dlm", "lock"): {"space", "resource", "lock"},
}
"""Methods that add fields of their own: of the channel (by name) and of a lock (by what it is called on)."""


def points_in_source() -> dict[str, tuple[str, set[str]]]:
    """Each point of production code: its floor and the fields it has at any of its places."""
    found: dict[str, tuple[str, set[str]]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        floor = path.relative_to(SOURCE).parts[0]
        if floor == "testing":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("point", "_point")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                fields = {keyword.arg for keyword in node.keywords if keyword.arg}
                fields |= HELPERS.get((floor, node.func.attr), set())
                if ast.unparse(node.func.value) in ("self", "lock"):
                    fields |= HELPERS.get((floor, "lock"), set())
                found.setdefault(str(node.args[0].value), (floor, set()))[1].update(fields)
    return found


def rows_in_docs() -> dict[str, tuple[str, set[str], list[str]]]:
    """Each point of the tables: floor, fields, steps."""
    rows = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"`[a-z_]+\.[a-z_]+`", cells[0]):
            rows[cells[0].strip("`")] = (cells[2], set(re.findall(r"`(\w+)`", cells[1])), cells[3].split())
    return rows


def test_the_docs_name_every_point_with_its_floor_and_fields() -> None:
    source = points_in_source()
    docs = {name: (floor, fields) for name, (floor, fields, _) in rows_in_docs().items()}
    assert len(source) > 80
    assert docs == source


def test_the_docs_name_the_step_of_every_point() -> None:
    steps: dict[str, list[str]] = {}
    for step in STEPS:
        for point in step.points:
            steps.setdefault(point, []).append(step.id)
    assert {name: row[2] for name, row in rows_in_docs().items() if row[2]} == steps


def test_the_docs_name_every_rule_with_its_spec_and_layer() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for rule in all_rules(Lives()):
        assert f"| `{rule.rule}` | {rule.spec} | {rule.layer.value} |" in text


def test_every_step_of_appendix_d_that_exists_is_a_point_of_the_source() -> None:
    source = points_in_source()
    for step in STEPS:
        named = [*step.points, *step.until, *([step.since[0]] if step.since else [])]
        assert [name for name in named if name not in source] == [], step.id
    letters = {"1": "abcde", "2": "abc", "3": "abcdefg", "4": "abcdefg", "5": "abcde", "7": "abc"}
    assert list(BY_ID) == [number + letter for number, all_ in letters.items() for letter in all_]


def test_rules_ask_for_points_that_exist() -> None:
    known = set(points_in_source()) | TOLD_BY_WHO_RECORDS
    lives = Lives()
    for rule in (lives, *all_rules(lives)):
        assert set(rule.names) <= known, rule.rule


@pytest.mark.parametrize("reserved", ["at_s", "point"])
def test_no_field_has_a_name_that_a_line_of_a_trace_has(reserved: str) -> None:
    assert [name for name, (_, fields) in points_in_source().items() if reserved in fields] == []


def test_a_step_within_another_counts_only_there() -> None:
    reached = Reached()
    page = {"slot": 0, "member": 0, "good": True, "left": 1, "writes": 0}
    assert reached.see("one", "bitmap.member", page) == []
    reached.see("one", "takeover.merged", {"slot": 1})
    assert [step.id for step in reached.see("one", "bitmap.member", page)] == ["4c"]
    assert reached.see("two", "bitmap.member", page) == []
    reached.see("one", "takeover.own_stable", {"slot": 1})
    assert reached.see("one", "bitmap.member", page) == []
    reached.see("one", "takeover.merged", {"slot": 1})
    reached.gone("one")
    assert reached.see("one", "bitmap.member", page) == []
    assert reached.counts["4c"] == 1
    assert "4c" not in reached.missing() and "1a" in reached.missing()


def test_a_cluster_in_which_a_writer_dies_breaks_no_rule_and_comes_to_most_steps(tmp_path: Path) -> None:
    """Real arrays and lock replicas in one process, judged as they go."""
    paths = clustered(tmp_path)
    events: list[Event] = []
    judge, reached = Judge(), Reached()

    def listen_to(node: Node) -> None:
        name = f"node{node.number}"

        def listen(point: str, fields: dict[str, object]) -> None:
            events.append(Event(len(events), len(events) * 1e-3, name, point, dict(fields)))
            judge.see(events[-1])
            reached.see(name, point, fields)

        node.trace.listen(listen)

    async def story() -> None:
        async with cluster_of(0, paths) as cluster:
            for number in (1, 2, 3):
                node = cluster.add(number)
                listen_to(node)
                await asyncio.wait_for(node.assemble(paths), 20)
            one, two = cluster.nodes[1], cluster.nodes[2]
            for chunk in (0, 3, 7):
                await one.client.write(chunk * 65536, b"1" * 4096)
                await two.client.write(chunk * 65536 + 8192, b"2" * 4096)
            # so that whoever takes over has a bit to set that was not its own before
            await one.client.write(5 * 65536, b"1" * 4096)
            await cluster.kill(1)
            survivors = (two, cluster.nodes[3])
            await until(lambda: all("takeover.done" in node.names() for node in survivors))
            for node in survivors:
                await asyncio.wait_for(node.array.idle(), 20)
            for _ in range(3):
                await two.array.sweep.once()

    asyncio.run(asyncio.wait_for(story(), 60))
    assert judge.violations == []
    assert len(events) > 500
    expected = "1a 1b 1c 1d 1e 2a 2b 3a 3b 3c 3d 3e 3f 3g 4a 4b 4c 4d 4e 4f 4g 5a 5b 5c 5d 5e 7c"
    assert set(expected.split()) - set(reached.counts) == set()
