"""The examples of `docs/locks.md` are run as they stand there, and say what is said there; `...` is anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lock_kit import CLUSTERMD, PATIENCE_S

from clustermd.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.system

PAGE = Path(__file__).parents[2] / "docs" / "locks.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def run(cluster: LocalCluster, command: list[str], text: str | None = None) -> tuple[int, str]:
    """Exit status and output of a program as node1, in the cluster's directory."""
    environment = os.environ | cluster.node("node1").environment | {"CLUSTERMD_LINGER_S": "60"}
    environment["PATH"] = f"{Path(CLUSTERMD).parent}:{environment['PATH']}"
    out = cluster.directory / "out"
    with out.open("wb") as file:
        done = subprocess.run(
            command,
            input=None if text is None else text.encode(),
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cluster.directory,
            timeout=2 * PATIENCE_S,
            check=False,
        )
    return done.returncode, out.read_text()


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_the_programs_of_the_page(code: str) -> None:
    with LocalCluster() as cluster:
        assert run(cluster, [sys.executable, "-W", "error", "-c", code]) == (0, "")


def script(page: str) -> str:
    """A shell script that says each command and waits, behind one that goes to the background, for what it says."""
    lines = [""]
    awaited = 0
    for line in page.splitlines():
        if line.startswith("$ "):
            lines += [
                _until(awaited),
                f"echo '{line.replace(chr(39), chr(39) + chr(92) + chr(39) * 2)}'",
                line[2:],
            ]
            awaited = -1 if line.endswith("&") else 0
        elif awaited < 0 or awaited > 0:
            awaited = max(awaited, 0) + 1
    return "\n".join([*lines, _until(awaited)])


def _until(awaited: int) -> str:
    """Wait until the output has as many lines more as the page shows behind a command in the background."""
    if awaited <= 0:
        return "seen=$(wc -l < out)"
    return f"while [ $(wc -l < out) -lt $((seen + 1 + {awaited})) ]; do sleep 0.05; done; seen=$(wc -l < out)"


def test_the_commands_of_the_page() -> None:
    page = "".join(code for kind, code in BLOCKS if kind == "console")
    with LocalCluster() as cluster:
        status, said = run(cluster, ["sh", "-s"], script(page))
    said = re.sub(r" +$", "", said, flags=re.MULTILINE)  # dlm_tool fills its lines up with blanks
    pattern = re.escape(page).replace(re.escape("..."), r"\S.*")
    assert status == 0 and re.fullmatch(pattern, said), said
