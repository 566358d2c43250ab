"""`clustermd locks`: who holds which lock, who waits for whom, across the whole cluster.

Every node's lockd is a replica of the lock manager and knows all of it, so one is asked: this node's. It is asked
outside of any session, so it answers also while the group stands still, which is when people ask. A wait is
shown with the holders whose modes it does not go together with, a node that is silent or whose end is not proved yet
with what is waited for (`cli.locks_page`).

The exit status is 0 when the question was answered; with --check it is 1 when something waits longer than --over.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clustermd.cli.command import UsageError
from clustermd.cli.locks_dlm import lockdebug
from clustermd.cli.locks_page import circle_json, circle_text, locks_text, wait_json, wait_text
from clustermd.cli.output import show, show_json
from clustermd.errors import Refused
from clustermd.lockd.client import lockd_status
from clustermd.lockd.who import circles, waits
from clustermd.rundir import RunDir

STUCK = 1
OVER_S = 10.0
_ANSWER_S = 5.0
_HELP = f"""\
Usage: clustermd locks [--lockspace NAME] [--json | --dlm-format | --check [--over SECONDS]]

Who holds and awaits which lock, in the whole cluster of this node: what waits longest first, then what the dead
still hold, then the rest. Ages are known from the moment on when this node's lockd saw a lock.

  --lockspace NAME   only this one (an array's is named by its UUID, that of `clustermd lock` is clustermd-lock)
  --json             everything, for programs; `waits` is sorted, `circles` are waits that go round
  --dlm-format       as `dlm_tool lockdebug` prints it; without --lockspace a line says which one follows
  --check            only what waits longer than --over ({OVER_S:g} s); the exit status is {STUCK} if anything does
  --over SECONDS     the bound of --check

Exit status: 0 answered (with --check: nothing waits longer), {STUCK} something does, or no lockd answers,
             2 not understood.
"""


@dataclass(slots=True)
class _Options:
    lockspace: str | None = None
    shape: str = ""
    over_s: float | None = None


def run(words: Sequence[str]) -> int:
    """The verb. The exit status. Raises Refused when this node's lockd is not running or does not answer."""
    if "-h" in words or "--help" in words:
        show(_HELP)
        return 0
    options = _parse(words)
    state = asyncio.run(lockd_status(RunDir.from_environment(), _ANSWER_S))
    if options.lockspace is not None:
        state = _only(state, options.lockspace)
    match options.shape:
        case "--json":
            found = waits(state["replica"])
            show_json(
                locks=state,
                waits=[wait_json(wait) for wait in found],
                circles=[circle_json(ring) for ring in circles(found)],
            )
        case "--dlm-format":
            show(dlm_text(state, named=options.lockspace is None))
        case "--check":
            text = check_text(state, OVER_S if options.over_s is None else options.over_s)
            show(text)
            return STUCK if text else 0
        case _:
            show(locks_text(state))
    return 0


def dlm_text(state: dict[str, Any], *, named: bool) -> str:
    """All lockspaces as `dlm_tool lockdebug` prints each; `named`: behind a line with its name."""
    return "".join(
        (f"lockspace {name}\n" if named else "") + lockdebug(space, state["node"])
        for name, space in sorted(state["replica"]["lockspaces"].items())
    )


def check_text(state: dict[str, Any], over_s: float) -> str:
    """A line for each request that has been waiting for `over_s` or longer, and for the circles among these."""
    found = [wait for wait in waits(state["replica"]) if wait.waits_s >= over_s]
    lines = [wait_text(wait) for wait in found]
    lines += [f"in a circle: {circle_text(ring)}" for ring in circles(found)]
    return "".join(f"{line}\n" for line in lines)


def _only(state: dict[str, Any], lockspace: str) -> dict[str, Any]:
    spaces = state["replica"]["lockspaces"]
    if lockspace not in spaces:
        raise Refused(
            "no-such-lockspace",
            f"nobody is in a lockspace {lockspace!r} now; there are: {', '.join(sorted(spaces)) or 'none'}",
            lockspaces=sorted(spaces),
        )
    return {**state, "replica": {**state["replica"], "lockspaces": {lockspace: spaces[lockspace]}}}


def _parse(words: Sequence[str]) -> _Options:
    options = _Options()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--lockspace", "--over"):
            if not equals:
                if not rest:
                    raise UsageError(f"locks {name} needs a value")
                value = rest.pop(0)
            if name == "--lockspace":
                options.lockspace = value
            else:
                options.over_s = parse_seconds(value, "locks --over")
        elif word in ("--json", "--dlm-format", "--check"):
            if options.shape not in ("", word):
                raise UsageError(f"locks takes {options.shape} or {word}, not both")
            options.shape = word
        else:
            raise UsageError(f"locks takes no {word!r}")
    if options.over_s is not None and options.shape != "--check":
        raise UsageError("locks --over is the bound of --check")
    return options


def parse_seconds(text: str, what: str) -> float:
    """A number of seconds, 0 or more. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0 or not math.isfinite(value):
        raise UsageError(f"{what} takes seconds, 0 or more, not {text!r}")
    return value
