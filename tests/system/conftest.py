"""Fixtures of the system tests: real clusters of real processes, ended and checked after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clustermd.testing.local_cluster import LocalCluster


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """An empty cluster in a directory of its own; nothing of it may remain when the test is over.

    `@pytest.mark.parametrize("cluster", [{"VARIABLE": "value"}], indirect=True)` adds to its environment.
    """
    with LocalCluster(getattr(request, "param", None)) as cluster:
        yield cluster
        left = [line for line in cluster.leftovers() if "(pid " not in line]
    assert not left, "the test left behind: " + "; ".join(left)
    assert not cluster.leftovers(), "not even SIGKILL ended " + "; ".join(cluster.leftovers())
