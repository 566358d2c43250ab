"""From words to a `Command`: mdadm's grammar, as a pure function.

`parse` reads the words from left to right. A mode option (-A, -C, ...) or an action of misc mode (-D, -E,
-S ...) sets the mode; a device before any option means manage mode; any other option must come after the
mode, because its letter may mean something else in another one. Options may be bundled (`-CR`), carry their
value with or without a space or `=`, and long ones may be shortened as far as they stay unique.

What cannot be understood is a `UsageError`, worded as mdadm words it; it ends the program with status 2.
Whether devices exist or levels are offered is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clustermd.cli.command import Action, Command, UsageError, parse_size, parse_uuid
from clustermd.cli.options import (
    ACTION_OPTIONS,
    MANAGE_OPTIONS,
    MODE_OPTIONS,
    REFUSED_ACTIONS,
    SYNONYMS,
    Argument,
    Mode,
    Option,
    by_letter,
    by_name,
)
from clustermd.conf import ENGINES

VERBS = ("cluster", "demo", "lock", "locks", "simulate", "trace")
"""Our own verbs: the first word, and the rest is theirs. Only --cluster-engine may stand before it."""

_LEVELS = {
    "linear": -1,
    "-1": -1,
    "0": 0,
    "raid0": 0,
    "stripe": 0,
    "1": 1,
    "raid1": 1,
    "mirror": 1,
    "4": 4,
    "raid4": 4,
    "5": 5,
    "raid5": 5,
    "6": 6,
    "raid6": 6,
    "10": 10,
    "raid10": 10,
}
_METADATA = {"1": "1.2", "1.0": "1.0", "1.1": "1.1", "1.2": "1.2", "default": "1.2"}
_NAME_MAX = 32


def parse(words: Sequence[str]) -> Command:
    """The command that `words` (without the program's name) mean. Raises UsageError."""
    parser = _Parser()
    rest = parser.engine(words)
    if rest and rest[0] in VERBS:
        parser.command.verb, *parser.command.devices = rest
        return parser.command
    parser.read(rest)
    parser.check()
    return parser.command


class _Parser:
    """Reads words, keeps the mode, and fills one Command."""

    def __init__(self) -> None:
        self.command = Command()
        self._action_letter = ""
        self._seen: dict[str, str] = {}

    def engine(self, words: Sequence[str]) -> list[str]:
        """Take --cluster-engine from the front; what follows."""
        rest = list(words)
        while rest and rest[0].partition("=")[0] == "--cluster-engine":
            self._long(rest.pop(0)[2:], rest)
        return rest

    def read(self, words: Sequence[str]) -> None:
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                for device in rest:
                    self._device(device)
                return
            if word.startswith("--"):
                self._long(word[2:], rest)
            elif word.startswith("-") and len(word) > 1:
                self._letters(word[1:], rest)
            else:
                self._device(word)

    def _device(self, word: str) -> None:
        if self.command.mode is None:
            self.command.mode = Mode.MANAGE
        self.command.devices.append(word)

    def _long(self, word: str, rest: list[str]) -> None:
        name, equals, value = word.partition("=")
        found = by_name(name)
        if not found:
            raise UsageError(f"unrecognized option '--{name}'", "unknown-option", usage=True)
        if len(found) > 1:
            names = " ".join(f"'--{option.name}'" for option in found)
            raise UsageError(
                f"option '--{name}' is ambiguous; possibilities: {names}", "unknown-option", usage=True
            )
        option = found[0]
        if option.argument is Argument.NONE:
            if equals:
                raise UsageError(f"option '--{option.name}' doesn't allow an argument", usage=True)
        elif not equals:
            if not rest:
                raise UsageError(f"option '--{option.name}' requires an argument", usage=True)
            value = rest.pop(0)
        self._take(option, value, f"--{option.name}")

    def _letters(self, letters: str, rest: list[str]) -> None:
        while letters:
            letter, letters = letters[0], letters[1:]
            option = by_letter(letter, self.command.mode)
            if option is None:
                raise UsageError(f"invalid option -- '{letter}'", "unknown-option", usage=True)
            value = ""
            if option.argument is Argument.REQUIRED:
                if letters:
                    value, letters = letters, ""
                elif rest:
                    value = rest.pop(0)
                else:
                    raise UsageError(f"option requires an argument -- '{letter}'", usage=True)
                value = value.removeprefix("=")
            self._take(option, value, f"-{letter}")

    def _take(self, option: Option, value: str, given: str) -> None:
        self._set_mode(option, given)
        mode = self.command.mode
        if option.modes is not None and mode is None:
            raise UsageError(f"{given} does not set the mode, and so cannot be the first option.")
        if option.modes is not None and mode not in option.modes:
            shown = f":option {given}" if given.startswith("--") else f"option {given}"
            raise UsageError(f"{shown} not valid in {mode.value if mode else ''} mode", "wrong-mode")
        if not option.offered:
            raise UsageError(f"{given} of mdadm is not offered by clustermd", "not-offered")
        name = SYNONYMS.get(option.name, option.name)
        if name in _SETTERS:
            _SETTERS[name](self, value)
        self._seen[name] = given

    def _set_mode(self, option: Option, given: str) -> None:
        command = self.command
        new: Mode | None = None
        if option.name in MODE_OPTIONS:
            new = MODE_OPTIONS[option.name]
        elif option.name in ACTION_OPTIONS or option.name in REFUSED_ACTIONS:
            # Stopping is a manage option too: `clustermd /dev/md0 --stop`.
            new = Mode.MANAGE if option.name == "stop" and command.mode is Mode.MANAGE else Mode.MISC
        elif option.name in MANAGE_OPTIONS and command.mode is None:
            new = Mode.MANAGE
        elif option.name in ("run", "readonly") and command.mode is None:
            new = Mode.MISC
        if new is None:
            return
        if command.mode is not None and command.mode is not new:
            raise UsageError(
                f'{given} would set clustermd mode to "{new.value}", '
                f'but it is already set to "{command.mode.value}".',
                "mode-conflict",
            )
        command.mode = new
        if option.name in ACTION_OPTIONS:
            action = Action(option.name)
            if command.action not in (None, action):
                letter = by_letter(given[1], command.mode) if len(given) == 2 else None
                both = f"--{option.name}/{given}" if letter else given
                raise UsageError(f"{both} cannot be given with {self._action_letter}", "action-conflict")
            command.action = action
            self._action_letter = given

    def check(self) -> None:
        """What can only be judged when all words are known."""
        command = self.command
        if command.help or command.version or command.help_options:
            return
        if command.mode is None:
            raise UsageError("", "no-mode", usage=True)
        if command.mode in (Mode.CREATE, Mode.ASSEMBLE) and not command.devices and not command.scan:
            raise UsageError("an md device must be given in this mode", "no-array")
        if command.mode is Mode.CREATE and command.nodes is not None and command.bitmap != "clustered":
            raise UsageError("--nodes argument only compatible with --bitmap=clustered")
        if command.mode is Mode.MISC and command.action is None:
            given = self._seen.get("run") or self._seen.get("readonly") or "--misc"
            if given == "--misc":
                raise UsageError("--misc needs an action such as --detail, --examine or --stop", "no-action")
            raise UsageError(
                f"{given} of mdadm is not offered by clustermd for running arrays", "not-offered"
            )
        if command.mode is Mode.MISC and not command.devices and not self._may_lack_devices():
            what = "No devices to examine" if command.action is Action.EXAMINE else "No devices given."
            raise UsageError(what, "no-devices")

    def _may_lack_devices(self) -> bool:
        return self.command.scan and self.command.action in (Action.DETAIL, Action.STOP, Action.WAIT)

    # What each option does. Each refuses a value it does not understand in mdadm's words.

    def once(self, name: str, message: str) -> None:
        if name in self._seen:
            raise UsageError(message, "set-twice")

    def level(self, value: str) -> None:
        self.once("level", f"raid level may only be set once.  Second value is {value}.")
        if value not in _LEVELS:
            raise UsageError(f"invalid raid level: {value}")
        self.command.level = _LEVELS[value]

    def raid_devices(self, value: str) -> None:
        self.once("raid-devices", f"raid-devices set twice: {self.command.raid_devices} and {value}")
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
        if number < 1:
            raise UsageError(f"invalid number of raid devices: {value}")
        if number == 1 and not self.command.force:
            raise UsageError(
                "'1' is an unusual number of drives for an array, so it is probably\n"
                "     a mistake.  If you really mean it you will need to specify --force before\n"
                "     setting the number of drives."
            )
        self.command.raid_devices = number

    def spare_devices(self, value: str) -> None:
        self.once("spare-devices", f"spare-devices set twice: {self.command.spare_devices} and {value}")
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise UsageError(f"invalid number of spare-devices: {value}")
        self.command.spare_devices = int(value)

    def size(self, value: str) -> None:
        self.once("size", f"size may only be specified once.  Second value is {value}.")
        sectors = 0 if value == "max" else parse_size(value)
        if sectors is None or (sectors == 0 and value != "max"):
            raise UsageError(f"invalid size: {value}")
        self.command.size_sectors = sectors

    def chunk(self, value: str) -> None:
        self.once("chunk", f"chunk/rounding may only be specified once.  Second value is {value}.")
        sectors = parse_size(value)
        if not sectors or sectors % 8:
            raise UsageError(f"invalid chunk/rounding value: {value}")
        self.command.chunk_sectors = sectors

    def data_offset(self, value: str) -> None:
        self.once(
            "data-offset", "data-offset may only be specified one time.  Second value is " + value + "."
        )
        sectors = parse_size(value)
        if sectors is None:
            raise UsageError(f"invalid data-offset: {value}")
        self.command.data_offset_sectors = sectors

    def metadata(self, value: str) -> None:
        if value not in _METADATA:
            raise UsageError(f"unrecognised metadata identifier: {value}")
        self.command.metadata = _METADATA[value]

    def bitmap(self, value: str) -> None:
        if self.command.mode is Mode.ASSEMBLE:
            if value in ("internal", "clustered"):
                raise UsageError(
                    "no need to specify --bitmap when assembling arrays with internal or clustered bitmap"
                )
            raise UsageError("bitmap files are not offered by clustermd", "not-offered")
        self.once("bitmap", f"bitmap cannot be set twice. Second value: {value}.")
        if "/" in value:
            raise UsageError(
                f"bitmap files ({value}) are not offered by clustermd: use internal, clustered or none",
                "not-offered",
            )
        if value not in ("internal", "clustered", "none"):
            raise UsageError(f"bitmap must be 'internal', or 'clustered', or 'none'\n       not '{value}'")
        self.command.bitmap = value

    def bitmap_chunk(self, value: str) -> None:
        sectors = parse_size(value)
        if not sectors or sectors & (sectors - 1):
            raise UsageError(f"invalid bitmap chunksize: {value}")
        self.command.bitmap_chunk_bytes = sectors * 512

    def delay(self, value: str) -> None:
        if not (value.isascii() and value.isdigit() and 0 < len(value) < 9 and int(value) >= 1):
            raise UsageError(f"invalid delay: {value}")
        self.command.delay_s = int(value)

    def nodes(self, value: str) -> None:
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
        if number < 2:
            raise UsageError(f"clustered array needs two nodes at least: {value}")
        self.command.nodes = number

    def home_cluster(self, value: str) -> None:
        if len(value.encode()) > 64 or not value:
            raise UsageError("Cluster name too big." if value else "Cluster name is empty.")
        self.command.home_cluster = value

    def set_name(self, value: str) -> None:
        self.once("name", f"name cannot be set twice.   Second value {value}.")
        if len(value.encode()) > _NAME_MAX:
            raise UsageError(f"name '{value}' is too long, {_NAME_MAX} chars max.")
        self.command.name = value

    def uuid(self, value: str) -> None:
        self.once("uuid", f"uuid cannot be set twice.  Second value {value}.")
        self.command.uuid = parse_uuid(value)

    def config(self, value: str) -> None:
        self.once("config", f"configfile cannot be set twice.  Second value is {value}.")
        if value not in ("none", "partitions"):
            raise UsageError(f"configuration files ({value}) are not offered by clustermd", "not-offered")
        self.command.config = value

    def flag(self, name: str) -> None:
        setattr(self.command, name, True)

    def verbose(self, _value: str) -> None:
        self.command.verbose += 1

    def layout(self, value: str) -> None:
        self.command.layout = value

    def homehost(self, value: str) -> None:
        self.command.homehost = value

    def cluster_engine(self, value: str) -> None:
        if value not in ENGINES:
            raise UsageError(f"cluster-engine must be 'local' or 'corosync', not '{value}'")
        self.command.cluster_engine = value

    def prefer(self, value: str) -> None:
        self.command.prefer = value


def _flag(name: str) -> Callable[[_Parser, str], None]:
    return lambda parser, _value: parser.flag(name)


_SETTERS: dict[str, Callable[[_Parser, str], None]] = {
    "bitmap": _Parser.bitmap,
    "bitmap-chunk": _Parser.bitmap_chunk,
    "chunk": _Parser.chunk,
    "cluster-engine": _Parser.cluster_engine,
    "config": _Parser.config,
    "data-offset": _Parser.data_offset,
    "delay": _Parser.delay,
    "home-cluster": _Parser.home_cluster,
    "homehost": _Parser.homehost,
    "layout": _Parser.layout,
    "level": _Parser.level,
    "metadata": _Parser.metadata,
    "name": _Parser.set_name,
    "nodes": _Parser.nodes,
    "prefer": _Parser.prefer,
    "raid-devices": _Parser.raid_devices,
    "size": _Parser.size,
    "spare-devices": _Parser.spare_devices,
    "uuid": _Parser.uuid,
    "verbose": _Parser.verbose,
    "assume-clean": _flag("assume_clean"),
    "help-options": _flag("help_options"),
    **{
        name: _flag(name)
        for name in (
            "brief",
            "export",
            "force",
            "help",
            "json",
            "quiet",
            "readonly",
            "run",
            "scan",
            "test",
            "version",
        )
    },
}
