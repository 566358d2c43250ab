"""Storms of faults with fixed seeds, and what storms found, each as a test of its own.

`python -m clustermd.testing.storm` is the same with free seeds, for as long as one likes.
"""

from __future__ import annotations

import signal
import time

import pytest
from cluster_kit import make_pair

from clustermd.testing.local_cluster import LocalCluster
from clustermd.testing.storm.storm import run
from clustermd.testing.waiting import wait_until

pytestmark = pytest.mark.system


@pytest.mark.parametrize("seed", [4])
def test_a_storm_loses_nothing(seed: int) -> None:
    print(run(seed, rounds=2, say=print, most_faults=8))


def test_locks_answers_while_the_group_stands_still(cluster: LocalCluster) -> None:
    """When nothing goes on is when people ask who waits for whom."""
    pair = make_pair(cluster)
    (sequencer,) = cluster.processes(role="sequencer")
    sequencer.send(signal.SIGSTOP)
    begun_s = time.monotonic()
    text = pair.one.run("locks")
    assert time.monotonic() - begun_s < 3
    assert "the sequencer does not answer" in text
    sequencer.send(signal.SIGCONT)


@pytest.mark.parametrize("cluster", [{"CLUSTERMD_UNRESPONSIVE_S": "1"}], indirect=True)
def test_a_sequencer_that_never_says_welcome_is_replaced(cluster: LocalCluster) -> None:
    """It stands still, and whoever knew it is dead: those who come to it wait for no more than the bound."""
    pair = make_pair(cluster)
    (sequencer,) = cluster.processes(role="sequencer")
    sequencer.send(signal.SIGSTOP)
    pair.cluster.kill(pair.one.processes() + pair.two.processes())
    pair.one.run("-A", "md0", *pair.disks, timeout_s=20)
    wait_until(lambda: not sequencer.alive, "the end of the sequencer that stood still")
    pair.one.run("-S", "md0")
