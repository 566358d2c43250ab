"""A lockd that machines depend on runs before ordinary processes, and says so where it may not."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys

import pytest

from clustermd.lockd.realtime import PRIORITY, ask_for_realtime

CHILDREN = """
import os, subprocess, sys
from clustermd.lockd.realtime import ask_for_realtime
own = ask_for_realtime(), os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
say = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
child = subprocess.run(say, capture_output=True, text=True)
print(*own, child.stdout)
"""


@pytest.mark.needs("root")
def test_it_is_realtime_and_its_children_are_not() -> None:
    said = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, check=True).stdout
    real = os.SCHED_RR | os.SCHED_RESET_ON_FORK
    assert said.split() == ["True", str(real), str(PRIORITY), str(os.SCHED_OTHER)]


def test_where_it_may_not_it_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with caplog.at_level(logging.WARNING):
        assert not ask_for_realtime()
    assert "Operation not permitted" in caplog.text and "LimitRTPRIO" in caplog.text
