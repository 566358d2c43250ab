"""Trace files: what an array process writes is read again, merged, and refused when it is no trace."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from trace_story import Story

from clustermd.cli.main import main
from clustermd.errors import BadBytes
from clustermd.node.recorder import now_s, record, this_boot, wanted
from clustermd.testing.trace.file import read_traces
from clustermd.trace import Trace


def written(path: Path, node: str, *points: tuple[float, str], boot: str = "boot", **fields: Any) -> Path:
    lines: list[dict[str, Any]] = [
        {"at_s": points[0][0], "point": "trace.begin", "node": node, "array": "md0", "boot": boot}
    ]
    lines += [{"at_s": at_s, "point": point, **fields} for at_s, point in points]
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    return path


def from_story(tmp_path: Path, story: Story) -> list[str]:
    """A story as one file a node."""
    nodes: dict[str, list[dict[str, Any]]] = {}
    for event in story.events:
        begin = {"at_s": 0.0, "point": "trace.begin", "node": event.node, "array": "md0", "boot": "b"}
        lines = nodes.setdefault(event.node, [begin])
        lines.append({"at_s": 1 + event.time_s, "point": event.name, **event.fields})
    for node, lines in nodes.items():
        (tmp_path / node).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / node) for node in nodes]


@pytest.mark.parametrize(
    ("value", "recorded"), [("", False), ("1", True), ("all", True), ("md1,md0", True), ("md1 md00", False)]
)
def test_a_trace_is_switched_on_per_array(value: str, recorded: bool) -> None:
    assert wanted({"CLUSTERMD_TRACE": value}, "md0") is recorded
    assert not wanted({}, "md0")


def test_what_a_process_records_is_read_again(tmp_path: Path) -> None:
    trace, path = Trace(), tmp_path / "trace"
    record(trace, path, "node1", "md0")
    trace.point("takeover.read", slot=1, dirty=2, chunks=[3, 4])
    trace.point("cluster.lost", slot=1, node="node2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    recorded = read_traces([path])
    assert (recorded.nodes, recorded.arrays, recorded.cut) == (("node1",), ("md0",), ())
    assert [event.name for event in recorded.events] == ["trace.begin", "takeover.read", "cluster.lost"]
    assert recorded.events[1].fields == {"slot": 1, "dirty": 2, "chunks": [3, 4]}
    assert recorded.events[2].node == "node1" and recorded.events[2].fields["node"] == "node2"


def test_the_next_process_goes_on_behind_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record(first := Trace(), path, "node1", "md0")
    first.point("gate.open")
    with path.open("a") as file:
        file.write('{"at_s": 12.5, "poi')
    record(second := Trace(), path, "node1", "md0")
    second.point("gate.shut", reason="x")
    recorded = read_traces([path])
    names = ["trace.begin", "gate.open", "trace.begin", "gate.shut"]
    assert [event.name for event in recorded.events] == names
    assert recorded.cut == (f"{path}, line 3",)


def test_what_running_arrays_record_after_the_reading_began_is_left_out(tmp_path: Path) -> None:
    """Of two files one is read first: what the other one says of later has its cause in lines that were not read."""
    boot, at_s = this_boot(), now_s()
    written(tmp_path / "one", "node1", (at_s, "gate.open"), boot=boot)
    written(tmp_path / "two", "node2", (at_s, "gate.open"), (at_s + 1000, "gate.shut"), boot=boot)
    recorded = read_traces([tmp_path / "one", tmp_path / "two"])
    assert [event.name for event in recorded.events].count("gate.open") == 2
    assert recorded.events[-1].name == "gate.open" and recorded.nodes == ("node1", "node2")


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a", "one", (1.0, "gate.open"))
    path.write_text(path.read_text() + '{"at_s": 2.0, "point": "ga')
    recorded = read_traces([path])
    assert [event.name for event in recorded.events] == ["trace.begin", "gate.open"]
    assert recorded.cut == (f"{path}, line 3",)


def test_several_files_become_one_order(tmp_path: Path) -> None:
    one = written(tmp_path / "1", "one", (1.0, "gate.open"), (3.0, "gate.held"))
    two = written(tmp_path / "2", "two", (2.0, "gate.open"), (4.0, "gate.held"))
    recorded = read_traces([one, two])
    assert recorded.nodes == ("one", "two")
    assert [event.number for event in recorded.events] == list(range(6))
    assert [event.node for event in recorded.events if event.name != "trace.begin"] == ["one", "two"] * 2


@pytest.mark.parametrize(
    "rubbish", ["rubbish", "[1, 2]", "{}", '{"point": "gate.open"}', '{"at_s": "x"}', "7"]
)
def test_rubbish_is_refused_with_file_and_line(tmp_path: Path, rubbish: str) -> None:
    path = written(tmp_path / "a", "one", (1.0, "gate.open"), (2.0, "gate.held"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], rubbish, *lines[2:]]) + "\n")
    with pytest.raises(BadBytes, match=f"{path}, line 3"):
        read_traces([path])


def test_what_begins_in_the_middle_or_goes_back_in_time_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", "one", (1.0, "gate.open"))
    path.write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(BadBytes, match=r"line 1.*of no node"):
        read_traces([path])
    back = written(tmp_path / "b", "one", (2.0, "gate.open"), (1.0, "gate.held"))
    with pytest.raises(BadBytes, match=r"line 3.*time"):
        read_traces([back])
    (tmp_path / "c").write_text("")
    with pytest.raises(BadBytes, match="no points"):
        read_traces([tmp_path / "c"])


def test_traces_of_different_boots_are_not_merged(tmp_path: Path) -> None:
    one = written(tmp_path / "1", "one", (1.0, "gate.open"))
    two = written(tmp_path / "2", "two", (1.0, "gate.open"), boot="another")
    with pytest.raises(BadBytes) as refused:
        read_traces([one, two])
    assert refused.value.code == "traces-differ"


def test_a_file_that_spans_boots_counts_from_the_last_one_on(tmp_path: Path) -> None:
    path = written(tmp_path / "1", "one", (100.0, "gate.open"), boot="first")
    written(path, "one", (1.0, "gate.held"), boot="second")
    assert [event.name for event in read_traces([path]).events] == ["trace.begin", "gate.held"]


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_says_that_all_rules_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *from_story(tmp_path, Story().pair().lives_on("one"))]) == 0
    assert "of one, two" in (told := capsys.readouterr().out) and "rules hold" in told


def test_the_command_draws_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = Story().pair().granted("one", "token", "EX").granted("two", "token", "EX").lives_on("one")
    paths = from_story(tmp_path, story)
    assert main(["trace", *paths]) == 1
    told = capsys.readouterr().out
    assert "incompatible-grant (dlm I2) is broken on two" in told
    assert "at fault: the lock manager" in told and "lock.granted token EX" in told
    assert main(["trace", "--json", *paths]) == 1
    (violation,) = json.loads(capsys.readouterr().out)["trace"]["violations"]
    assert (violation["rule"], violation["layer"]) == ("incompatible-grant", "lock manager")
    assert main(["trace", "--all", *paths]) == 1
    assert "array.assembled" in capsys.readouterr().out


def test_the_command_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_text("x\ny\n")
    assert main(["trace", str(tmp_path / "bad")]) == 2
    assert f"{tmp_path / 'bad'}, line 1" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["trace"]) == 2
    assert main(["trace", "--loud", "x"]) == 2
    assert main(["trace", "--help"]) == 0
