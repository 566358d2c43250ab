"""Fixtures of several unit tests."""

from __future__ import annotations

import pytest

from clustermd.array import faults, resync
from clustermd.cluster import life


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    for module in (faults, resync, life):
        monkeypatch.setattr(module, "RETRY_S", 0.02)
