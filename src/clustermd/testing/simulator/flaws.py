"""Flaws put back into the production code, to see what the simulator finds.

A `Flaw` is a name, what it does wrong in one sentence, and patches: an attribute of a production class or module, and
what stands there instead. F1 to F40 are the flaws of Linux's clustered md (`docs/flaws.md`), in our code done as Linux
does it, or as somebody might do it here one day. Those named after a rule break one of the design's rules. The last
ones break what a rule of the simulator or of the trace judge watches, so that every one of those is seen to fire.
Those in `flaws_found` were our own once: simulated runs found them.

    with put_back("F4"):
        outcome = run_seed(17)
        print(outcome.violation)

The patches are in six files: `flaws_takeover`, `flaws_cluster`, `flaws_array`, `flaws_group`, `flaws_planted`,
`flaws_found`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Patch = tuple[object, str, Any]
"""owner, attribute, wrong implementation"""


@dataclass(frozen=True, slots=True)
class Flaw:
    """One flaw. `make()` gives patches with a state of their own, so that one run leaves nothing for the next."""

    name: str
    says: str
    make: Callable[[], tuple[Patch, ...]]


@contextmanager
def patched(patches: tuple[Patch, ...]) -> Iterator[None]:
    """With these attributes replaced; they are put right again in any case."""
    before: list[Patch] = []
    missing = object()
    try:
        for owner, name, wrong in patches:
            before.append((owner, name, vars(owner).get(name, missing)))
            setattr(owner, name, wrong)
        yield
    finally:
        for owner, name, right in reversed(before):
            if right is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, right)


@contextmanager
def put_back(name: str) -> Iterator[None]:
    """Run with the flaw `name` of `all_flaws()`. Raises KeyError if there is none."""
    with patched(all_flaws()[name].make()):
        yield


def all_flaws() -> dict[str, Flaw]:
    """All flaws by name, those of Linux first."""
    from clustermd.testing.simulator import (
        flaws_array,
        flaws_cluster,
        flaws_found,
        flaws_group,
        flaws_planted,
        flaws_takeover,
    )

    flaws = [
        *flaws_takeover.FLAWS,
        *flaws_cluster.FLAWS,
        *flaws_array.FLAWS,
        *flaws_planted.FLAWS,
        *flaws_group.FLAWS,
        *flaws_found.FLAWS,
    ]
    return {flaw.name: flaw for flaw in flaws}


def flaw(name: str, says: str, *patches: Patch) -> Flaw:
    """A flaw whose patches keep no state."""
    return Flaw(name, says, lambda: patches)
