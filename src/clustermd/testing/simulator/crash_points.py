"""The systematic mode: a node is killed at every step of appendix D, then a second one in what that sets off.

**First**, each scenario is played without a kill and every step that some node comes to is noted: which node, which
point, the how many-eth time. **Second**, the run is played again up to that very moment and the node dies.
What is in flight then lands as told, not as drawn: nothing, everything, the first box's share, the others' share, in
parts, or late. Where a step is "on some members", the node also dies a moment after its requests went out, so that each
combination happens on purpose. Then all come back and the run is judged as any other. **Third**, in runs with a first
kill, the steps of the recovery that it set off are where a second machine dies, or all of them.

A `Story` names all of that, and `play_story` plays one again. The report says how often a machine died at each step;
a step where none did is a failure of the mode itself.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from clustermd.testing.simulator.campaign import BATCH, workers
from clustermd.testing.simulator.crash_report import RECOVERY, Report
from clustermd.testing.simulator.crash_stories import (
    FLIGHTS,
    LANDINGS,
    Kill,
    Passed,
    Story,
    Told,
    play_story,
)
from clustermd.testing.simulator.scenarios import SCENARIOS

COMEBACKS = ((1.5, 0.05), (0.3, 0.002), (3.0, 0.4))
"""(how long a machine is down, after how long that is noticed), in seconds, in turn."""

SECOND_LATEST_S = 6.0
PARTLY = frozenset(step.id for step in FLIGHTS)


# --- which stories -------------------------------------------------------------------------------------------


def _spread(passed: Sequence[Passed], count: int) -> Iterator[Passed]:
    """`count` of them, from the first to the last."""
    if count == 1 or len(passed) <= count:
        yield from passed[:count]
        return
    for number in range(count):
        yield passed[number * (len(passed) - 1) // (count - 1)]


def _groups(passed: Iterable[Passed], *, by_node: bool) -> dict[tuple[Any, ...], list[Passed]]:
    groups: dict[tuple[Any, ...], list[Passed]] = {}
    for place in passed:
        key = (place.step, place.point, place.flight, place.node if by_node else "")
        groups.setdefault(key, []).append(place)
    return groups


def _kill(place: Passed, victims: tuple[int, ...], lands: str, turn: int) -> Kill:
    down_s, detect_s = COMEBACKS[turn % len(COMEBACKS)]
    return Kill(
        place.step, place.node, place.point, place.nth, victims, lands, place.flight, down_s, detect_s
    )


def first_kills(
    passed: Sequence[Passed], occurrences: int, landings: tuple[str, ...] = LANDINGS
) -> list[Kill]:
    """A kill at every step, by every node that comes there, at so many of its occurrences, with each landing.

    With 0 occurrences: one by one node, and only with the landings that make the step what it is.
    """
    kills: list[Kill] = []
    for group in _groups(passed, by_node=occurrences > 0).values():
        for place in _spread(group, max(1, occurrences)):
            for victims in place.victims:
                lands = landings
                if place.step not in PARTLY:
                    lands = (LANDINGS[len(kills) % len(LANDINGS)],)
                elif not occurrences:
                    lands = ("first", "others") if place.flight else ("none",)
                kills += [_kill(place, victims, land, len(kills)) for land in lands]
    return kills


def second_kills(told: Told, turn: int, both: bool) -> list[Kill]:
    """Kills at each step of the recovery after the first one: of who passes it, or of all nodes, or one of each."""
    since_s = next((place.time_s for place in told.passed if place.kills), 0.0)
    after = [
        place
        for place in told.passed
        if place.kills and place.step in RECOVERY and place.time_s < since_s + SECOND_LATEST_S
    ]
    everybody = tuple(range(1, told.story.nodes + 1))
    kills = []
    for group in _groups(after, by_node=False).values():
        place = group[turn % len(group)]
        choices = (place.victims[turn % len(place.victims)], everybody)
        for victims in choices if both else (choices[turn % 2],):
            kills.append(_kill(place, victims, LANDINGS[turn % len(LANDINGS)], turn))
        turn += 1
    return kills


# --- playing them ---------------------------------------------------------------------------------------------

Progress = Callable[[Report, int], None]
"""the report so far, and how many runs are known to be made in all (it grows)"""

Play = Callable[[Iterable[Story]], Iterator[Told]]
"""plays stories and tells of them in their order"""


def crash_points(
    nodes: Sequence[int] = (1, 2, 3),
    *,
    depth: int = 1,
    scenarios: Sequence[str] = tuple(SCENARIOS),
    jobs: int = 0,
    progress: Progress = lambda report, known: None,
) -> Report:
    """Play the whole mode, in `jobs` processes (0: in this one); the report is the same however many they are.

    `depth` 0 is a sample that still reaches every step (hundreds of runs). 1 has every step of every scenario by every
    node with every landing, and every pair of a first step and a step of the recovery (thousands). More means so many
    occurrences of each step, and pairs for each scenario.
    """
    report = Report(tuple(nodes))
    known = len(scenarios) * len(report.nodes)

    def add(told: Told) -> Told:
        report.add(told)
        progress(report, known)
        return told

    with _players(jobs) as play:
        quiet = [add(told) for told in play(Story(name, count) for count in nodes for name in scenarios)]
        firsts = _first_stories(quiet, depth)
        known += len(firsts)
        seconds = []
        for story in _second_stories((add(told) for told in play(firsts)), depth):
            seconds.append(story)
            known += 1
        for told in play(seconds):
            add(told)
    return report


@contextmanager
def _players(jobs: int) -> Iterator[Play]:
    if jobs == 0:
        yield lambda stories: map(play_story, stories)
        return
    pool = workers(jobs)
    try:
        yield lambda stories: pool.map(_play_apart, stories, chunksize=BATCH)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _play_apart(story: Story) -> Told:
    """What a worker sends back: all but the decisions, which nobody asks for and which are most of it."""
    told = play_story(story)
    told.outcome.decisions = {}
    gc.collect()  # a run is one web of cycles; they must not pile up
    return told


def _first_stories(quiet: Iterable[Told], depth: int) -> list[Story]:
    """Where somebody dies: at what each scenario, played without a kill, comes to."""
    stories: list[Story] = []
    seen: dict[int, set[tuple[Any, ...]]] = {}
    for told in quiet:
        name, nodes = told.story.scenario, told.story.nodes
        passed = told.passed
        if not depth:  # each step in the first scenario that has it
            mine = _groups(passed, by_node=False)
            before = seen.setdefault(nodes, set())
            passed = [place for key, group in mine.items() if key not in before for place in group]
            before |= set(mine)
        landings = (*LANDINGS, "rest") if name == "pages" else LANDINGS
        stories += [Story(name, nodes, (kill,)) for kill in first_kills(passed, depth, landings)]
    return stories


def _second_stories(firsts: Iterable[Told], depth: int) -> Iterator[Story]:
    """Who dies in the recovery from a first death, once for each of its steps and each step of the recovery."""
    paired: set[tuple[Any, ...]] = set()
    chosen: Counter[tuple[int, str]] = Counter()
    for number, told in enumerate(firsts):
        story = told.story
        if story.nodes == 1 or told.outcome.violation is not None or len(told.fired) != 1:
            continue
        key = (story.nodes, story.kills[0].step, story.scenario if depth > 1 else "")
        if key in paired:
            continue
        paired.add(key)
        kills = second_kills(told, number, depth > 1)
        if not depth:  # those that are the rarest so far
            kills.sort(key=lambda kill: chosen[story.nodes, kill.step])
            del kills[2:]
        chosen.update((story.nodes, kill.step) for kill in kills)
        yield from (replace(story, kills=(*story.kills, kill)) for kill in kills)
