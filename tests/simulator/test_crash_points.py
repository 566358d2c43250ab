"""A node dies at every step of appendix D of md-cluster's specification, then a second one in the recovery from that.

This is the sample that still reaches every step; all of it is `clustermd simulate --crash-points`. What broke a rule
once is kept as a story of its own in `BROKE`.
"""

from __future__ import annotations

import json

import pytest

from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.testing.simulator.crash_points import crash_points, second_kills
from clustermd.testing.simulator.crash_report import PENDING, Report
from clustermd.testing.simulator.crash_stories import FLIGHTS, Kill, Passed, Story, play_story
from clustermd.testing.simulator.flaws import put_back
from clustermd.testing.simulator.run import Run
from clustermd.testing.simulator.scenarios import SMALL_CHUNK_BYTES
from clustermd.testing.trace.points import STEPS

BROKE = (
    # A stop that is cut short while nobody else lives: the lockspace begins anew, with empty value blocks.
    Story("stop", 2, (Kill("7c", "node1", "leave.unlocking", 1, (1,)),)),
    # The owner of the lowest slot dies in its first join, and who took that slot over dies at the end of doing so.
    Story(
        "death",
        3,
        (
            Kill("3b", "node1", "metadata.header", 1, (1,)),
            Kill("4g", "node3", "takeover.done", 2, (3,), "others", down_s=3.0, detect_s=0.4),
        ),
    ),
)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_somebody_dies_at_every_step_and_nothing_breaks(nodes: int) -> None:
    report = crash_points((nodes,), depth=0)
    assert report.good, report.text()
    assert {step.id for step in STEPS} | {"6e", "6f"} <= {step for _, step in report.firsts} | (
        {"3f", "4b", "4c", "4d", "4e", "4g", "7a", "7b"} if nodes == 1 else set()
    )
    assert nodes == 1 or report.all_died > 10


@pytest.mark.parametrize("story", BROKE, ids=str)
def test_what_broke_once_holds(story: Story) -> None:
    """Should code or dice change so much that a death does not come about any more, the story is worth nothing."""
    told = play_story(story)
    assert told.outcome.violation is None
    assert told.fired == list(story.kills)


def test_every_step_of_the_appendix_is_a_point_or_waits_for_its_operation() -> None:
    appendix = {1: "abcde", 2: "abc", 3: "abcdefg", 4: "abcdefg", 7: "abc"}
    named = {step.id for step in STEPS}
    assert {f"{number}{letter}" for number, letters in appendix.items() for letter in letters} <= named
    assert {f"5{letter}" for letter in "abcde"} <= named
    assert all(place in PENDING for place in ("6a", "6b", "6c", "6d", "8"))


def places(scenario: str, nodes: int, step: str, *, flight: bool = False) -> list[Passed]:
    told = play_story(Story(scenario, nodes))
    assert told.outcome.violation is None
    return [place for place in told.passed if place.step == step and place.flight == flight]


def kill(place: Passed, lands: str = "none") -> Kill:
    return Kill(place.step, place.node, place.point, place.nth, place.victims[0], lands, place.flight)


def test_a_story_is_one_run_and_can_be_kept() -> None:
    story = Story("death", 3, (kill(places("death", 3, "4c", flight=True)[0], "first"),))
    told = play_story(story, keep_events=True)
    again = play_story(Story.from_json(json.loads(json.dumps(story.to_json()))), keep_events=True)
    assert told.fired == again.fired == list(story.kills)
    assert told.outcome.decisions == again.outcome.decisions
    assert told.outcome.events == again.outcome.events
    assert {"4a", "4b", "5a", "J1", "J5"} <= {kill.step for kill in second_kills(told, 0, both=True)}


@pytest.mark.parametrize("lands", ["none", "first", "others", "all"])
def test_what_is_in_flight_lands_as_told(lands: str) -> None:
    """The data of a first write is on its way to both boxes: each combination comes about."""
    place = places("death", 2, "1d", flight=True)[0]
    seen: list[tuple[bool, ...]] = []

    def look(run: Run, kill: Kill) -> None:
        seen.append(tuple(any(run.watch.data_of(box)) for box in range(2)))

    told = play_story(Story("death", 2, (kill(place, lands),)), died=look)
    assert told.outcome.violation is None
    assert seen == [
        {
            "none": (False, False),
            "first": (True, False),
            "others": (False, True),
            "all": (True, True),
        }[lands]
    ]


@pytest.mark.parametrize("lands", ["rest", "none", "all"])
def test_a_later_page_is_cleared_alone_only_after_events_cleared_is_stable(lands: str) -> None:
    """2c: two pages of cleared bits are on their way. If the first does not land, its header must be right already."""
    swept = [place for place in places("pages", 2, "2b", flight=True) if place.node == "node2"]
    seen: list[tuple[bool, bool, bool]] = []

    def look(run: Run, kill: Kill) -> None:
        geometry = BitmapGeometry(SMALL_CHUNK_BYTES, run.plan.array_sectors, run.plan.slots)
        array = run.cluster.machines[2].array
        assert array is not None and array.array is not None
        state = array.array.state
        for box in run.cluster.boxes:
            at = geometry.start_sector(8, 8, state.slot) * 512
            header = BitmapSuperblock.from_bytes(bytes(box.data[at : at + 256]))
            first = any(box.data[at + 256 : at + 4096])
            later = any(box.data[at + 4096 : at + geometry.bytes_per_node])
            seen.append((first, later, header.events_cleared == state.events))

    story = Story("pages", 2, (kill(swept[0], lands),))
    assert play_story(story, died=look).outcome.violation is None
    stays = {"rest": (True, False), "none": (True, True), "all": (False, False)}[lands]
    assert seen == [(*stays, True)] * 2


def test_a_flaw_between_two_steps_is_found() -> None:
    """F4: the source is cleared before the own bits are stable. Only a death between the two shows it."""
    with put_back("F4"):
        report = crash_points((3,), depth=0, scenarios=("death",))
    assert not report.good
    assert {violation.spec for _, violation in report.violations} & {"I5", "9.1", "I4"}, report.text()


def test_a_step_where_nobody_died_is_a_failure() -> None:
    report = crash_points((1,), depth=0, scenarios=("death",))
    assert not report.violations and not report.not_fired
    assert not report.good
    assert "6e with 1 nodes" in report.missing()
    assert "nobody died at 6e with 1 nodes" in report.text()


def test_a_death_that_does_not_come_about_is_a_failure() -> None:
    story = Story("death", 1, (Kill("1a", "node1", "write.begin", 10_000, (1,)),))
    report = Report((1,))
    report.add(play_story(story))
    assert report.not_fired == [story]
    assert not report.good


def test_steps_on_some_members_have_a_moment_in_flight() -> None:
    assert {step.id for step in FLIGHTS} == {"1b", "1d", "2b", "3c", "4c", "4d", "5c"}
