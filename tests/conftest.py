"""What all tests share: saying what they need of the machine.

A test that needs root, FUSE, a loop device or a program says so:

    @pytest.mark.needs("root", "loop", "fio")

Where the machine lacks it the test is skipped with a line that says why. With `CI` set in the
environment such a skip is a failure: a test nobody runs proves nothing.

`CI` itself is taken out of the environment: with it, pytest explains a failed comparison of two disks by a difference
of all their bytes, which takes it hours.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

MUST_RUN = "CLUSTERMD_TESTS_MUST_RUN"
if os.environ.pop("CI", None):
    os.environ[MUST_RUN] = "1"  # pytest's worker processes hear of it this way


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", 'needs(*what): "root", "loop", "fuse", "throttle" or a program this test cannot do without'
    )


TOGETHER = ("test_cli_arrays", "test_fence_agents", "test_golden_assemble", "test_ondisk_mdadm")
"""System tests that measure no time and kill nobody: any of them may run beside any other."""


LONGEST = ("test_corosync_partition", "test_crash_takeover")
"""One test of two minutes in each: who works beside it has no more to do when it begins last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        if item.path.parent.name == "system" and item.path.stem not in TOGETHER:
            item.add_marker("machines" if "corosync" in item.path.stem else "by_file")


def pytest_runtest_setup(item: pytest.Item) -> None:
    lacking = [
        reason
        for mark in item.iter_markers("needs")
        for what in mark.args
        if (reason := lack_of(what)) is not None
    ]
    if not lacking:
        return
    message = "; ".join(lacking)
    if os.environ.get(MUST_RUN):
        pytest.fail(f"cannot run here, and CI is set: {message}", pytrace=False)
    pytest.skip(message)


def lack_of(what: str) -> str | None:
    """Why `what` cannot be used on this machine, or None when it can."""
    if what == "root":
        return None if os.geteuid() == 0 else "needs root"
    if what == "loop":
        usable = os.geteuid() == 0 and os.access("/dev/loop-control", os.R_OK | os.W_OK)
        return None if usable else "needs loop devices: root and /dev/loop-control"
    if what == "fuse":
        usable = os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("fusermount3") is not None
        return None if usable else "needs FUSE: /dev/fuse and fusermount3 (Debian package fuse3)"
    if what == "throttle":
        group = Path("/sys/fs/cgroup")
        usable = (group / "blkio/cgroup.procs").exists() or "io" in read(group / "cgroup.controllers").split()
        return (
            None
            if usable and os.geteuid() == 0
            else "needs the block I/O controller of control groups, and root"
        )
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return (
        None
        if shutil.which(what, path=path)
        else f"needs the program {what} (see DEBIAN_PACKAGES in the Makefile)"
    )


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
