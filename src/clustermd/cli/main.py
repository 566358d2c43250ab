"""The program `clustermd`: parse, do, say, and leave with mdadm's exit status.

0 is success, 1 a refusal or failure, 2 a command line that cannot be understood (mdadm(8)); --test and --wait
have their own. Our verbs are loaded only when they are called.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from clustermd import __version__
from clustermd.cli import arrays, assemble, create, members
from clustermd.cli.command import Action, Command, UsageError
from clustermd.cli.grammar import parse
from clustermd.cli.help import help_text, options_text
from clustermd.cli.options import Mode
from clustermd.cli.output import PROGRAM, say, show, show_refusal
from clustermd.conf import ENGINE_VARIABLE
from clustermd.errors import DeviceRefused, Refused

USAGE = 2
INTERRUPTED = 130

_VERBS = {
    "cluster": "clustermd.cli.cluster",
    "demo": "clustermd.cli.demo",
    "lock": "clustermd.cli.lock",
    "locks": "clustermd.cli.locks",
    "simulate": "clustermd.cli.simulate",
    "trace": "clustermd.cli.trace",
}
"""Modules with `run(words) -> exit status`."""

_ACTIONS: dict[Action, Callable[[Command], int]] = {
    Action.DETAIL: arrays.detail,
    Action.EXAMINE: members.examine,
    Action.EXAMINE_BITMAP: members.examine_bitmap,
    Action.QUERY: members.query,
    Action.STOP: arrays.stop,
    Action.WAIT: arrays.wait,
    Action.ZERO_SUPERBLOCK: members.zero_superblock,
}


def run() -> None:
    """Entry point of the installed program."""
    sys.exit(main(sys.argv[1:]))


def main(words: Sequence[str]) -> int:
    """Do what `words` say. The exit status; never raises for what a person can get wrong."""
    try:
        command = parse(words)
    except UsageError as error:
        if error.message:
            say(error.message)
        if error.data.get("usage"):
            print(f"Usage: {PROGRAM} --help\n  for help", file=sys.stderr)
        return USAGE
    try:
        return _do(command)
    except Refused as refusal:
        show_refusal(refusal, command.json)
        return _refused_status(command, refusal)
    except BrokenPipeError:
        # Whoever reads our output has seen enough; nothing more is to be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def _do(command: Command) -> int:
    if command.cluster_engine is not None:
        # for this program and all that it starts
        os.environ[ENGINE_VARIABLE] = command.cluster_engine
    if command.verb is not None:
        status: int = importlib.import_module(_VERBS[command.verb]).run(command.devices)
        return status
    if command.version:
        show(f"{PROGRAM} - v{__version__}\n")
        return 0
    if command.help_options:
        show(options_text())
        return 0
    if command.help:
        show(help_text(command.mode))
        return 0
    if command.action is not None:
        return _ACTIONS[command.action](command)
    if command.mode is Mode.CREATE:
        return create.create(command)
    if command.mode is Mode.ASSEMBLE:
        return assemble.assemble(command)
    if command.mode is Mode.MANAGE:
        return members.query(command)
    raise Refused(
        "not-offered", f"{command.mode.value if command.mode else ''} mode is not offered by {PROGRAM}"
    )


def _refused_status(command: Command, refusal: Refused) -> int:
    """mdadm ends with 2 when -C cannot open a device, and with 1 when it refuses for another reason."""
    if command.mode is Mode.CREATE and isinstance(refusal, DeviceRefused) and refusal.code == "cannot-open":
        return USAGE
    return USAGE if isinstance(refusal, UsageError) or refusal.code in ("usage", "not-offered") else 1
