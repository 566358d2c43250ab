"""What `clustermd lock` can be told, and what it tells."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clustermd.cli.command import UsageError
from clustermd.cli.locks import parse_seconds
from clustermd.cli.output import SCHEMA, say
from clustermd.dlm.modes import Mode

LOCKSPACE = "clustermd-lock"
NOT_GRANTED = 1
LOST = 75
CLUSTER_S = 10.0
GRACE_S = 5.0
_NAME_BYTES_MAX = 64
_MODES = {mode.name: mode for mode in Mode if mode is not Mode.IV}

HELP = f"""\
Usage: clustermd lock NAME [--mode MODE] [--lockspace NAME] [--nonblock | --timeout SECONDS] [--json] -- COMMAND ...

Runs COMMAND while this node has lock NAME, which all nodes of the cluster know: flock(1) for a cluster.

  --mode MODE        what goes together with whom (default EX)
                       EX alone   PW with CR   PR with PR, CR   CW with CW, CR   CR with all but EX   NL with all
  --lockspace NAME   where the lock lives (default {LOCKSPACE}); locks of two lockspaces have nothing to do with
                     each other
  --nonblock         do not wait for anybody who has it (for the cluster to answer at all: {CLUSTER_S:g} s)
  --timeout SECONDS  wait no longer than this for everything
  --json             one JSON object a line on standard error, in place of messages

While it waits for longer than a second it says for whom. The lock ends with the command, and the command with the
lock: if this program is killed, so are the command and all that it started; if the lock is lost (this node's lockd
died, the node was cut off), the command gets SIGTERM and, {GRACE_S:g} s later, it and all that it started SIGKILL.
Nobody else gets the lock before they are gone. What the command leaves running when it ends by itself does not keep
the lock.

Exit status: that of COMMAND (128 + its signal if it was killed, 126 it cannot be run, 127 it is not there),
{NOT_GRANTED} the lock was not granted, 2 not understood, {LOST} the lock was lost while the command ran.
"""


@dataclass(slots=True)
class Options:
    """A command line of `clustermd lock`."""

    name: str = ""
    mode: Mode = Mode.EX
    lockspace: str = LOCKSPACE
    nonblock: bool = False
    timeout_s: float | None = None
    json: bool = False
    command: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What people see of this process in `clustermd locks`."""
        return f"lock {self.name}: {os.path.basename(self.command[0])}"

    def tell(self, event: str, message: str, **data: Any) -> None:
        """Something for a person, or with --json for a program. Standard output belongs to the command."""
        if self.json:
            what = {"schema": SCHEMA, "event": event, "lock": self.name, "message": message, **data}
            print(json.dumps(what, default=str), file=sys.stderr, flush=True)
        else:
            say(message)


def parse(words: Sequence[str]) -> Options:
    """The words behind `lock`. Raises UsageError."""
    if "--" not in words:
        raise UsageError("lock needs -- and a command: clustermd lock NAME -- COMMAND ...")
    split = list(words).index("--")
    options = Options(command=list(words[split + 1 :]))
    rest = list(words[:split])
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--mode", "--lockspace", "--timeout"):
            if not equals:
                if not rest:
                    raise UsageError(f"lock {name} needs a value")
                value = rest.pop(0)
            _set(options, name, value)
        elif word == "--nonblock":
            options.nonblock = True
        elif word == "--json":
            options.json = True
        elif word.startswith("-"):
            raise UsageError(f"lock takes no {word!r} before --")
        elif options.name:
            raise UsageError(f"lock takes one NAME, not {options.name!r} and {word!r}")
        else:
            options.name = word
    _check(options)
    return options


def _set(options: Options, name: str, value: str) -> None:
    if name == "--lockspace":
        options.lockspace = value
    elif name == "--timeout":
        options.timeout_s = parse_seconds(value, "lock --timeout")
    elif value.upper() in _MODES:
        options.mode = _MODES[value.upper()]
    else:
        raise UsageError(f"lock --mode is one of {', '.join(_MODES)}, not {value!r}")


def _check(options: Options) -> None:
    if not options.name:
        raise UsageError("lock needs the NAME of a lock")
    if not options.command:
        raise UsageError("lock needs a command behind --")
    if len(options.name.encode(errors="surrogateescape")) > _NAME_BYTES_MAX:
        raise UsageError(f"a lock's name has at most {_NAME_BYTES_MAX} bytes")
    if not 1 <= len(options.lockspace) <= _NAME_BYTES_MAX:
        raise UsageError(f"a lockspace's name has 1 to {_NAME_BYTES_MAX} characters")
    try:
        (options.name + options.lockspace).encode()
    except UnicodeEncodeError:
        raise UsageError("names of locks and lockspaces are UTF-8") from None
    if options.nonblock and options.timeout_s is not None:
        raise UsageError("lock takes --nonblock or --timeout, not both")
