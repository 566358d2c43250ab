"""--cluster-engine: before any command and any verb, for this program and all that it starts."""

from __future__ import annotations

import os

import pytest

from clustermd.cli.command import UsageError
from clustermd.cli.grammar import parse
from clustermd.cli.main import main
from clustermd.cli.options import Mode


@pytest.mark.parametrize("words", [["--cluster-engine", "corosync"], ["--cluster-engine=corosync"]])
def test_it_stands_before_verbs_and_modes_and_among_options(words: list[str]) -> None:
    verb = parse([*words, "locks", "--json"])
    assert (verb.verb, verb.devices, verb.cluster_engine) == ("locks", ["--json"], "corosync")
    for line in ([*words, "-D", "md0"], ["-D", *words, "md0"], ["-D", "md0", *words]):
        command = parse(line)
        assert (command.mode, command.devices) == (Mode.MISC, ["md0"])
        assert command.cluster_engine == "corosync"


def test_without_it_the_environment_and_the_file_decide() -> None:
    assert parse(["locks"]).cluster_engine is None
    assert parse(["-D", "md0"]).cluster_engine is None


@pytest.mark.parametrize("words", [["--cluster-engine=ring", "locks"], ["--cluster-engine", "", "-D", "md0"]])
def test_another_engine_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="must be 'local' or 'corosync'"):
        parse(words)
    with pytest.raises(UsageError, match="requires an argument"):
        parse(["--cluster-engine"])


def test_it_reaches_what_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERMD_ENGINE", "local")
    assert main(["--cluster-engine=corosync", "--version"]) == 0
    assert os.environ["CLUSTERMD_ENGINE"] == "corosync"
