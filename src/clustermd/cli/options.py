"""The options the command line knows: mdadm's names and letters, and in which modes they count.

mdadm(8) gives one letter several meanings: `-b` is a bitmap for --create and "brief" for --detail, `-W`
waits in misc mode and is something else in create mode. So a letter is looked up with the mode that is set
so far; long names always mean the same. What mdadm has and this program does not offer is listed too, so
that its refusal can say so instead of "unrecognized option".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Mode(enum.Enum):
    """What the command line is about. Values are the words of mdadm's messages."""

    ASSEMBLE = "assemble"
    BUILD = "build"
    CREATE = "create"
    MANAGE = "manage"
    MISC = "misc"
    MONITOR = "monitor"
    GROW = "grow"
    INCREMENTAL = "incremental"


class Argument(enum.Enum):
    """Whether an option takes a value."""

    NONE = 0
    REQUIRED = 1


@dataclass(frozen=True, slots=True)
class Option:
    """`modes` is where it may be given; None means anywhere, before a mode too. `offered` False: refused."""

    name: str
    argument: Argument = Argument.NONE
    modes: frozenset[Mode] | None = None
    offered: bool = True


def _in(*modes: Mode) -> frozenset[Mode]:
    return frozenset(modes)


_CREATE = _in(Mode.CREATE)
_MAKE = _in(Mode.CREATE, Mode.BUILD, Mode.GROW)
_START = _in(Mode.CREATE, Mode.ASSEMBLE)
_MISC = _in(Mode.MISC)
_VALUE = Argument.REQUIRED

MODE_OPTIONS: dict[str, Mode] = {
    "assemble": Mode.ASSEMBLE,
    "build": Mode.BUILD,
    "create": Mode.CREATE,
    "follow": Mode.MONITOR,
    "grow": Mode.GROW,
    "incremental": Mode.INCREMENTAL,
    "manage": Mode.MANAGE,
    "misc": Mode.MISC,
    "monitor": Mode.MONITOR,
}

# Misc mode's actions: the first one given decides what is done with all devices.
ACTION_OPTIONS = (
    "detail",
    "examine",
    "examine-bitmap",
    "query",
    "stop",
    "wait",
    "zero-superblock",
)

# mdadm's own words that set a mode here only to be refused by name.
MANAGE_OPTIONS = (
    "add",
    "add-spare",
    "fail",
    "re-add",
    "remove",
    "replace",
    "set-faulty",
    "with",
    "cluster-confirm",
)
REFUSED_ACTIONS = (
    "action",
    "detail-platform",
    "dump",
    "examine-badblocks",
    "kill-subarray",
    "readwrite",
    "restore",
    "update-subarray",
    "wait-clean",
)

_TABLE: tuple[Option, ...] = (
    *(Option(name) for name in MODE_OPTIONS),
    *(Option(name, modes=_in(Mode.MISC, Mode.MANAGE)) for name in ACTION_OPTIONS),
    # anywhere
    Option("brief"),
    Option("cluster-engine", _VALUE),
    Option("config", _VALUE),
    Option("export"),
    Option("help"),
    Option("help-options"),
    Option("homehost", _VALUE),
    Option("json"),
    Option("prefer", _VALUE),
    Option("quiet"),
    Option("verbose"),
    Option("version"),
    # in any mode, but not before it
    Option("force", modes=frozenset(Mode)),
    Option("test", modes=frozenset(Mode)),
    # to make an array
    Option("assume-clean", modes=_MAKE),
    Option("bitmap", _VALUE, _MAKE | _START),
    Option("bitmap-chunk", _VALUE, _MAKE),
    Option("chunk", _VALUE, _MAKE),
    Option("rounding", _VALUE, _MAKE),
    Option("data-offset", _VALUE, _MAKE),
    Option("delay", _VALUE, _MAKE | _in(Mode.MONITOR)),
    Option("layout", _VALUE, _MAKE),
    Option("parity", _VALUE, _MAKE),
    Option("level", _VALUE, _MAKE),
    Option("metadata", _VALUE, _START | _MISC),
    Option("nodes", _VALUE, _MAKE),
    Option("raid-devices", _VALUE, _MAKE),
    Option("raid-disks", _VALUE, _MAKE),
    Option("size", _VALUE, _MAKE),
    Option("spare-devices", _VALUE, _MAKE),
    Option("spare-disks", _VALUE, _MAKE),
    # to make or start one
    Option("home-cluster", _VALUE, _START),
    Option("name", _VALUE, _START | _in(Mode.GROW)),
    Option("uuid", _VALUE, _START),
    Option("run", modes=_START | _MISC | _in(Mode.MANAGE, Mode.INCREMENTAL)),
    Option("readonly", modes=_START | _MISC | _in(Mode.MANAGE)),
    Option("scan", modes=_MISC | _in(Mode.ASSEMBLE, Mode.MONITOR, Mode.INCREMENTAL)),
    # known from mdadm, not offered
    Option("array-size", _VALUE, _in(Mode.GROW), offered=False),
    Option("auto", _VALUE, _START | _in(Mode.BUILD), offered=False),
    Option("backup-file", _VALUE, _in(Mode.GROW, Mode.ASSEMBLE), offered=False),
    Option("consistency-policy", _VALUE, _MAKE, offered=False),
    Option("failfast", modes=_MAKE | _in(Mode.MANAGE), offered=False),
    Option("no-degraded", modes=_in(Mode.ASSEMBLE), offered=False),
    Option("sparc2.2", modes=_MISC, offered=False),
    Option("super-minor", _VALUE, _in(Mode.ASSEMBLE), offered=False),
    Option("symlinks", _VALUE, _START, offered=False),
    Option("update", _VALUE, _in(Mode.ASSEMBLE, Mode.MANAGE), offered=False),
    Option("write-behind", modes=_MAKE, offered=False),
    Option("write-journal", _VALUE, _CREATE, offered=False),
    Option("write-mostly", modes=_MAKE | _in(Mode.MANAGE), offered=False),
    *(Option(name, modes=_in(Mode.MANAGE), offered=False) for name in MANAGE_OPTIONS),
    *(Option(name, modes=_in(Mode.MISC, Mode.MANAGE), offered=False) for name in REFUSED_ACTIONS),
)

OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}

# One thing under two names in mdadm(8).
SYNONYMS = {
    "raid-disks": "raid-devices",
    "spare-disks": "spare-devices",
    "rounding": "chunk",
    "parity": "layout",
}

_LETTERS = {
    "A": "assemble",
    "B": "build",
    "C": "create",
    "D": "detail",
    "E": "examine",
    "F": "monitor",
    "G": "grow",
    "I": "incremental",
    "N": "name",
    "Q": "query",
    "R": "run",
    "S": "stop",
    "U": "update",
    "V": "version",
    "W": "wait",
    "X": "examine-bitmap",
    "Y": "export",
    "Z": "array-size",
    "a": "add",
    "b": "brief",
    "c": "config",
    "d": "delay",
    "e": "metadata",
    "f": "force",
    "h": "help",
    "k": "consistency-policy",
    "l": "level",
    "m": "super-minor",
    "n": "raid-devices",
    "o": "readonly",
    "p": "layout",
    "q": "quiet",
    "r": "remove",
    "s": "scan",
    "t": "test",
    "u": "uuid",
    "v": "verbose",
    "w": "readwrite",
    "x": "spare-devices",
    "z": "size",
}
_LETTERS_IN_MAKE = {"a": "auto", "b": "bitmap", "c": "chunk", "W": "write-mostly"}
_LETTERS_IN_ASSEMBLE = {"a": "auto", "b": "bitmap"}
_LETTERS_IN_MANAGE = {"f": "fail", "W": "write-mostly"}


def by_letter(letter: str, mode: Mode | None) -> Option | None:
    """The option a letter means in `mode`, None for an unknown letter. mdadm(8), "OPTIONS"."""
    own: dict[str, str] = {}
    if mode in (Mode.CREATE, Mode.BUILD, Mode.GROW):
        own = _LETTERS_IN_MAKE
    elif mode is Mode.ASSEMBLE:
        own = _LETTERS_IN_ASSEMBLE
    elif mode is Mode.MANAGE:
        own = _LETTERS_IN_MANAGE
    name = own.get(letter) or _LETTERS.get(letter)
    return OPTIONS[name] if name else None


def by_name(name: str) -> list[Option]:
    """The option with this long name, or all of which it is an abbreviation (as getopt_long has it)."""
    if name in OPTIONS:
        return [OPTIONS[name]]
    return [option for option in _TABLE if option.name.startswith(name)]
