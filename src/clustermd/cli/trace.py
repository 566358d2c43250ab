"""`clustermd trace`: judge what real nodes recorded, and draw what breaks a rule.

With `CLUSTERMD_TRACE` set an array writes every step it takes to `trace` in its run directory. Given the traces of all
nodes this tells whether each rule held, and if not, whose fault it is: the lock manager's, the cluster layer's, or the
array's. Exit status 0 means that every rule held, 1 that one did not, 2 that a trace cannot be read.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clustermd.cli.command import UsageError
from clustermd.cli.output import say, show, show_json
from clustermd.errors import BadBytes

if TYPE_CHECKING:
    from clustermd.testing.trace.events import Violation
    from clustermd.testing.trace.file import Recorded

BROKEN = 1
UNREADABLE = 2
_DRAWN = 5
_NARROWEST, _WIDEST = 80, 160
_HELP = """\
Usage: clustermd trace FILE... [--json] [--all]

Judges the traces of one array that nodes recorded (`trace` in the array's run directory, written when
CLUSTERMD_TRACE=1, or =md0,md1 for some arrays, is set where the array is started), draws what breaks a rule,
and says in which layer the fault is. Give the traces of all nodes: a rule between nodes needs both.

  --all     draw the whole trace, broken or not
  --json    one JSON object

Exit status: 0 all rules hold, 1 one is broken, 2 a trace cannot be read.
"""


def run(words: Sequence[str]) -> int:
    """The verb. The exit status."""
    if "-h" in words or "--help" in words:
        show(_HELP)
        return 0
    options = {word for word in words if word.startswith("-")}
    unknown = sorted(options - {"--json", "--all"})
    if unknown:
        raise UsageError(f"trace takes no {unknown[0]!r}")
    paths = [Path(word) for word in words if not word.startswith("-")]
    if not paths:
        raise UsageError("trace needs the files to judge, for example $CLUSTERMD_RUN/*/md0/trace")

    from clustermd.testing.trace.file import read_traces
    from clustermd.testing.trace.judge import judge_all

    try:
        recorded = read_traces(paths)
    except (BadBytes, OSError) as error:
        say(error.message if isinstance(error, BadBytes) else f"{error.filename}: {error.strerror}")
        return UNREADABLE
    judge = judge_all(recorded.events)
    if "--json" in options:
        _show_json(recorded, judge.violations)
    else:
        _show(recorded, judge.violations, len(judge.rules), everything="--all" in options)
    return BROKEN if judge.violations else 0


def _show_json(recorded: Recorded, violations: Sequence[Violation]) -> None:
    from clustermd.testing.trace.verdict import to_wire

    show_json(
        trace={
            "nodes": list(recorded.nodes),
            "arrays": list(recorded.arrays),
            "events": len(recorded.events),
            "cut": list(recorded.cut),
            "violations": [to_wire(violation) for violation in violations],
        }
    )


def _show(recorded: Recorded, violations: Sequence[Violation], rules: int, *, everything: bool) -> None:
    from clustermd.testing.trace.table import interesting, table
    from clustermd.testing.trace.verdict import verdict

    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((118, 40)).columns - 2))
    events = recorded.events
    if everything:
        marked = [number for violation in violations for number in violation.events]
        show(table(list(interesting(events)), marked, width) + "\n")
    for violation in violations[:_DRAWN]:
        show(verdict(violation, events, width) + "\n")
    if len(violations) > _DRAWN:
        show(f"... and {len(violations) - _DRAWN} more, which may only follow from these\n\n")
    for line in recorded.cut:
        show(f"{line} was cut short by a kill and is left out\n")
    seconds = events[-1].time_s - events[0].time_s
    what = f"{len(events)} events of {', '.join(recorded.nodes)} in {seconds:.1f} s"
    if violations:
        layers = dict.fromkeys(violation.layer.value for violation in violations)
        show(f"{what}: {len(violations)} violations, first in the {next(iter(layers))} layer\n")
    else:
        show(f"{what}: all {rules} rules hold\n")
