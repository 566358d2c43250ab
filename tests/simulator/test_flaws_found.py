"""Every flaw is found: its scenario passes as the code stands, and breaks the rule it should with the flaw put back.

The other way round, every rule that watches runs is broken by some flaw here: a rule that nothing makes fire
watches nothing. Which flaws the simulator does not find is said in `docs/flaws.md`.
"""

from __future__ import annotations

import ast
import inspect
import re
from types import ModuleType

import pytest
from flaw_stories import SCENARIOS as OTHERS
from flaw_stories import Scenario
from group_stories import SCENARIOS as OF_THE_GROUP

from clustermd.testing.simulator import cluster, disk_watch, log_watch, model, rest, run, workload
from clustermd.testing.simulator.flaws import all_flaws, patched
from clustermd.testing.simulator.flaws_found import FLAWS
from clustermd.testing.trace.events import Violation
from clustermd.testing.trace.judge import all_rules
from clustermd.testing.trace.lives import Lives

pytestmark = [
    pytest.mark.by_file,  # the last test looks at what all others found
    pytest.mark.filterwarnings(
        # a run that ends at its first violation leaves tasks in the middle of whatever they did
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore:coroutine .* was never awaited:RuntimeWarning",
    ),
]

NAME = re.compile(r"[a-z]+(-[a-z]+)+")
SCENARIOS = (*OTHERS, *OF_THE_GROUP)
NO_RULES = {"kill-at"}
FOUND: dict[str, Violation] = {}


def find(scenario: Scenario) -> tuple[int, Violation | None]:
    """The first seed in which the flaw breaks a rule that is meant, and what is said of it."""
    for seed in range(scenario.tries):
        violation = scenario.play(seed, *all_flaws()[scenario.flaw].make()).violation
        if violation is not None and violation.rule in scenario.rules.split("|"):
            return seed, violation
    return scenario.tries, None


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.flaw for scenario in SCENARIOS])
def test_the_flaw_is_found_and_nothing_without_it(scenario: Scenario) -> None:
    seed, violation = find(scenario)
    assert violation is not None, f"{scenario.flaw} is back, and {seed} runs broke none of {scenario.rules}"
    FOUND[scenario.flaw] = violation
    right = scenario.play(seed).violation
    assert right is None, f"without the flaw, seed {seed}: {right}"


def rules_of(module: ModuleType) -> set[str]:
    """The names of rules in a module's code: its words with hyphens, outside of docstrings."""
    tree = ast.parse(inspect.getsource(module))
    words = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {word for word in words if NAME.fullmatch(word)} - NO_RULES


def test_every_rule_is_seen_to_fire() -> None:
    watching = {rule.rule for rule in all_rules(Lives())}
    for module in (cluster, disk_watch, log_watch, model, rest, run, workload):
        watching |= rules_of(module)
    if len(FOUND) < len(SCENARIOS):
        pytest.skip("the scenarios were not all played in this process")
    missing = watching - {violation.rule for violation in FOUND.values()}
    assert not missing, f"nothing makes these rules fire: {sorted(missing)}"


def test_every_flaw_has_its_scenario() -> None:
    found = {flaw.name for flaw in FLAWS}  # these have kept runs: `test_bugs_found.py`
    assert {scenario.flaw for scenario in SCENARIOS} == set(all_flaws()) - found


@pytest.mark.parametrize(
    ("flaw", "layer"),
    [("dlm grants", "lock manager"), ("I8b", "cluster"), ("I1", "array"), ("a proof", "device")],
)
def test_the_layer_at_fault_is_named(flaw: str, layer: str) -> None:
    _, violation = find(next(scenario for scenario in SCENARIOS if scenario.flaw == flaw))
    assert violation is not None and violation.layer.value == layer


def test_patches_are_taken_back() -> None:
    class Some:
        there = 1

    with patched(((Some, "there", 2), (Some, "new", 3))):
        assert (Some.there, vars(Some)["new"]) == (2, 3)
    assert Some.there == 1 and "new" not in vars(Some)
