"""Putting a flaw back: every test of a flaw runs twice, right and with the flaw, and must then fail.

A test of this kind is a story with assertions, inside `with flaw(flawed, shows, (owner, name, wrong), ...)`. As it
stands the story passes. With `flawed` each `owner.name` is replaced by `wrong`, which does what Linux does (or what
somebody might do here one day), and the story must fail by an assertion or a time-out whose words match `shows`. So a
test that cannot fail, or fails for another reason, is found out. Flaws that simulated runs find, too, are written down
once: `patches_of("F4")` gives those of `clustermd.testing.simulator.flaws`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clustermd.testing.simulator.flaws import Patch, all_flaws

both_ways = pytest.mark.parametrize("flawed", [False, True], ids=["right", "flaw-back"])


def patches_of(name: str) -> tuple[Patch, ...]:
    """The patches of a flaw of `all_flaws()`. Raises KeyError if there is none."""
    return all_flaws()[name].make()


@contextmanager
def flaw(flawed: bool, shows: str, *patches: Patch) -> Iterator[None]:
    """Run the story with the patches if `flawed`, and then expect it to fail with words that match `shows`."""
    if not flawed:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, wrong in patches:
            patch.setattr(owner, name, wrong, raising=False)
        try:
            yield
        except (AssertionError, TimeoutError) as error:
            words = str(error) or type(error).__name__
            if not re.search(shows, words):
                raise
            return
    pytest.fail(f"the flaw is back, and the story did not notice: it should have shown {shows!r}")


def patience(flawed: bool) -> float:
    """Seconds to wait for what comes only without the flaw."""
    return 0.7 if flawed else 15.0
