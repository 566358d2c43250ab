"""docs/lock-manager.md names all traps and invariants, and every test, rule, plant and flaw that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import clustermd
from clustermd.testing.locks.rules import RULES
from clustermd.testing.simulator.flaws import all_flaws
from clustermd.testing.trace.judge import all_rules
from clustermd.testing.trace.lives import Lives

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "lock-manager.md").read_text()
SIMULATOR = Path(clustermd.__file__).parent / "testing" / "simulator"
TRAPS, INVARIANTS = 40, 30


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of a section's table, by the first one."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    return {cells[0].strip(): cells[1:] for cells in lines[2:]}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def known_tests() -> set[str]:
    return {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in functions(path)
        if node.name.startswith("test_")
    }


def plants() -> dict[str, set[str]]:
    """Each plant of the tests of lock rules, with the rules that it breaks."""
    found = {}
    for node in functions(TESTS / "unit" / "test_testing_locks.py"):
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "plants":
                found[node.name] = set(ast.literal_eval(mark.args[0]).split())
    return found


def words_of_the_simulator() -> set[str]:
    return {
        node.value
        for path in SIMULATOR.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_trap_is_there_with_tests_that_exist() -> None:
    table, known, flaws = rows("Traps"), known_tests(), all_flaws()
    assert list(table) == [str(number) for number in range(1, TRAPS + 1)]
    stories = (TESTS / "simulator" / "group_stories.py").read_text()
    for number, (trap, answer, shown) in table.items():
        tests = set(re.findall(r"(?<!: )`(test_\w+)`", shown))
        assert trap and answer and tests, number
        assert tests <= known, f"trap {number}: there is no {sorted(tests - known)}"
        for flaw in re.findall(r"simulator: `([^`]+)`", shown):
            assert flaw in flaws and f'Scenario("{flaw}"' in stories, flaw


def test_every_test_of_a_trap_stands_in_its_row() -> None:
    table = rows("Traps")
    for name in known_tests():
        if number := re.search(r"_trap_(\d+)$", name):
            assert f"`{name}`" in table[number[1]][2], name
    for flaw in all_flaws():
        if number := re.fullmatch(r"trap (\d+)\w?", flaw):
            assert f"simulator: `{flaw}`" in table[number[1]][2], flaw


def test_every_invariant_is_there_with_rules_that_exist_and_are_seen_to_fire() -> None:
    table = rows("Invariants")
    assert list(table) == [f"I{number}" for number in range(1, INVARIANTS + 1)]
    judges = {
        "locks": set(RULES),
        "trace": {rule.rule for rule in all_rules(Lives())},
        "simulator": words_of_the_simulator(),
    }
    planted, flaws = plants(), all_flaws()
    for number, (what, rules, fires) in table.items():
        named = re.findall(r"(locks|trace|simulator): `([a-z-]+)`", rules)
        assert what and named, number
        for judge, rule in named:
            assert rule in judges[judge], f"{number}: {judge} has no {rule}"
        seen = re.findall(r"plant `(\w+)`", fires)
        assert all(plant in planted for plant in seen), f"{number}: {fires}"
        of_locks = {rule for judge, rule in named if judge == "locks"}
        assert all(planted[plant] & of_locks for plant in seen), f"{number}: {fires}"
        fired = re.findall(r"simulator: `([^`]+)`", fires)
        assert set(fired) <= set(flaws) and (seen or fired), f"{number}: {fires}"


def test_every_rule_of_the_lock_manager_stands_at_its_invariant() -> None:
    table = rows("Invariants")
    for rule, spec in RULES.items():
        if number := re.search(r"\b(I\d+)$", spec):
            assert f"locks: `{rule}`" in table[number[1]][1], rule
    for judged in all_rules(Lives()):
        if number := re.fullmatch(r"dlm (I\d+)", judged.spec):
            assert f"trace: `{judged.rule}`" in table[number[1]][1], judged.rule
