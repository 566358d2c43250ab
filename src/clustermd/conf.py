"""The configuration of a node: `/etc/clustermd.conf`, TOML, the same on all nodes of a cluster.

    engine = "corosync"            # or "local", the default: nodes of one machine
    fence = "agent"                # who vouches that a lost node writes no more; corosync needs a choice

    [fence_agent]
    agent = "fence_ipmilan"
    username = "admin"             # everything the agent itself understands

    [fence_agent.nodes.node1]
    ip = "10.0.0.1"

`CLUSTERMD_CONF` names another file, `CLUSTERMD_ENGINE` (and `--cluster-engine`) another engine. Without a file all
is as its default says. A file with a mistake is refused whole: one sentence that names the file, the key,
what is wrong, and what to write instead. A key that would have no effect is a mistake too, since whoever wrote it
relies on it. What the policies promise, and what T (`lease_s`) and D (`device_bound_s`) mean, says docs/fencing.md
(dlm.md 3.6, 6.2, 6.4).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clustermd.errors import Refused

PATH = "/etc/clustermd.conf"
PATH_VARIABLE = "CLUSTERMD_CONF"
ENGINE_VARIABLE = "CLUSTERMD_ENGINE"

ENGINES = ("local", "corosync")
FENCES: Mapping[str, str] = {
    "agent": "a fence-agents program switches the lost node off and verifies it ([fence_agent])",
    "stonith": "pacemaker fences it (stonith_admin)",
    "device": "a message on a small shared disk of its own makes it end itself (fence_device)",
    "lease": "nobody acts: the lost node's lease runs out, survivors wait lease_s + device_bound_s; unsafe"
    " without a watchdog or storage fencing",
    "none": "a lost node is believed to be dead at once; unsafe, for tests",
}
SELF_FENCES = ("kill", "reboot")
ACTIONS = ("off", "reboot")

_DAY_S = 86400.0
_OPTION = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class FenceAgent:
    """The table [fence_agent]. `options` go to the agent for every node, `nodes[name]` for that one besides.

    `timeout_s` bounds one run; after a failure it is run `retries` times more before the next node tries.
    """

    agent: str
    action: str = "off"
    timeout_s: float = 60.0
    retries: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conf:
    """All settings; `Conf.load` makes it. `fence` is one of `FENCES`, "" when none was chosen (`local` only).

    `lease_s` (T): how long a node may submit I/O after it heard a majority. `drift`: how much faster one node's
    clock may run than another's, as a fraction. `device_bound_s` (D): the longest pause of a process between its look
    at the lease and the kernel, plus the disk's own time for a request. `startup_s`: how long a fresh cluster waits
    for absent nodes before they are fenced. `watchdog_s`: how long a node does without its fence device.
    `stonith_action`: what pacemaker is asked for, one of `ACTIONS`, best its own cluster's `stonith-action`.
    """

    engine: str = "local"
    fence: str = ""
    fence_agent: FenceAgent | None = None
    stonith_action: str = "reboot"
    fence_device: str = ""
    watchdog_s: float = 5.0
    self_fence: str = "kill"
    lease_s: float = 10.0
    drift: float = 0.01
    device_bound_s: float = 30.0
    startup_s: float = 30.0
    unresponsive_s: float = 10.0
    path: str = PATH

    @property
    def clustered(self) -> bool:
        """Whether nodes are machines, so that leases and fencing count."""
        return self.engine != "local"

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Conf:
        """The configuration that file and environment give. Raises Refused ("bad-conf", "no-fence")."""
        path = environ.get(PATH_VARIABLE) or PATH
        engine = environ.get(ENGINE_VARIABLE) or None
        if engine is not None and engine not in ENGINES:
            raise Refused(
                "bad-conf",
                f"{ENGINE_VARIABLE} (or --cluster-engine) is {engine!r}: the engines are {_words(ENGINES)}",
                key=ENGINE_VARIABLE,
            )
        try:
            text = Path(path).read_bytes()
        except FileNotFoundError:
            if environ.get(PATH_VARIABLE):
                raise Refused(
                    "bad-conf",
                    f"{PATH_VARIABLE} names {path}, which does not exist: make it, or unset the variable",
                ) from None
            text = b""
        except OSError as error:
            raise Refused("bad-conf", f"{path} cannot be read: {error.strerror}", path=path) from error
        return cls.parse(text, path, engine)

    @classmethod
    def parse(cls, text: bytes, path: str = PATH, engine: str | None = None) -> Conf:
        """The configuration in `text`, with `engine` in place of the file's. Raises Refused."""
        try:
            table = tomllib.loads(text.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Refused("bad-conf", f"{path} is no TOML file: {error}", path=path) from None
        return _Reader(path, table).conf(engine)


class _Reader:
    """Takes keys out of the file's table, refusing what cannot be meant."""

    def __init__(self, path: str, table: dict[str, Any]) -> None:
        self._path = path
        self._table = table

    def conf(self, engine: str | None) -> Conf:
        defaults, given = Conf(), set(self._table)
        self._known(self._table, Conf.__dataclass_fields__.keys() - {"path"}, "")
        conf = Conf(
            engine=engine or self._choice("engine", ENGINES, defaults.engine),
            fence=self._choice("fence", FENCES, ""),
            fence_agent=self._agent(),
            stonith_action=self._choice("stonith_action", ACTIONS, defaults.stonith_action),
            fence_device=self._absolute("fence_device"),
            watchdog_s=self._number("watchdog_s", defaults.watchdog_s, 1, 600),
            self_fence=self._choice("self_fence", SELF_FENCES, defaults.self_fence),
            lease_s=self._number("lease_s", defaults.lease_s, 0.5, 600),
            drift=self._number("drift", defaults.drift, 0, 0.5),
            device_bound_s=self._number("device_bound_s", defaults.device_bound_s, 0, _DAY_S),
            startup_s=self._number("startup_s", defaults.startup_s, 0, _DAY_S),
            unresponsive_s=self._number("unresponsive_s", defaults.unresponsive_s, 0.5, _DAY_S),
            path=self._path,
        )
        if engine is not None and "engine" in given:
            self._choice("engine", ENGINES, "")  # a mistake is one even where it has no effect
        self._together(conf, given)
        return conf

    def _together(self, conf: Conf, given: set[str]) -> None:
        """What one key means for another."""
        if conf.clustered and not conf.fence:
            choices = "; ".join(f'"{name}": {what}' for name, what in FENCES.items())
            raise Refused(
                "no-fence",
                f"{self._path} does not say how a lost node is cut off from the disks, and corosync cannot run without:"
                f" write fence = with one of {choices}. docs/fencing.md compares them",
                path=self._path,
                choices=list(FENCES),
            )
        if conf.fence == "agent" and conf.fence_agent is None:
            raise self._bad("fence", 'is "agent", but there is no table [fence_agent] that names one')
        if conf.fence == "device" and not conf.fence_device:
            raise self._bad(
                "fence",
                'is "device", but fence_device names none: make one with'
                " `clustermd cluster fence-device --create PATH`",
            )
        for key, policy in (
            ("fence_agent", "agent"),
            ("stonith_action", "stonith"),
            ("fence_device", "device"),
            ("watchdog_s", "device"),
            ("self_fence", "device"),
        ):
            if key in given and conf.fence != policy:
                raise self._bad(
                    key, f'has no effect without fence = "{policy}": remove it or choose that policy'
                )

    def _agent(self) -> FenceAgent | None:
        if "fence_agent" not in self._table:
            return None
        table = self._table["fence_agent"]
        if not isinstance(table, dict):
            raise self._bad(
                "fence_agent", "is no table: write [fence_agent] and the agent's options below it"
            )
        rest = dict(table)
        where = "fence_agent."
        agent = rest.pop("agent", None)
        if not isinstance(agent, str) or not agent:
            raise self._bad(where + "agent", 'has to name a program, as in agent = "fence_ipmilan"')
        if "/" in agent and not os.path.isabs(agent):
            raise self._bad(where + "agent", f"is {agent!r}: give a name in /usr/sbin or an absolute path")
        action = rest.pop("action", "off")
        if action not in ACTIONS:
            raise self._bad(where + "action", f"is {action!r}: only {_words(ACTIONS)} end a node")
        timeout_s = self._within(where + "timeout_s", rest.pop("timeout_s", 60.0), 1, 3600)
        retries = rest.pop("retries", 1)
        if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= 100:
            raise self._bad(where + "retries", f"is {retries!r}: give a whole number from 0 to 100")
        nodes = rest.pop("nodes", {})
        if not isinstance(nodes, dict):
            raise self._bad(where + "nodes", "is no table: write [fence_agent.nodes.NAME] for each node")
        return FenceAgent(
            agent,
            action,
            timeout_s,
            retries,
            self._options(where, rest),
            {name: self._options(f"{where}nodes.{name}.", options) for name, options in nodes.items()},
        )

    def _options(self, where: str, options: object) -> dict[str, str]:
        """What an agent reads: words, numbers, and truth as 1 and 0."""
        if not isinstance(options, dict):
            raise self._bad(where[:-1], "is no table of the agent's options for that node")
        read: dict[str, str] = {}
        for name, value in options.items():
            if not _OPTION.fullmatch(name):
                raise self._bad(where + name, "is no name of an agent's option")
            if name in ("action", "nodename"):
                raise self._bad(where + name, "is not yours to set here: clustermd gives it to the agent")
            if isinstance(value, bool):
                read[name] = str(int(value))
            elif isinstance(value, str | int | float):
                read[name] = str(value)
            else:
                raise self._bad(
                    where + name, f"is {value!r}: an agent's option is a string, a number or true"
                )
            if "\n" in read[name]:
                raise self._bad(where + name, "has a line break: agents read one option a line")
        return read

    # values

    def _known(self, table: Iterable[str], known: Iterable[str], where: str) -> None:
        names = sorted(known)
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"the keys are {_words(names)}"
                raise self._bad(where + key, f"is no key of this file: {hint}")

    def _choice(self, key: str, allowed: Iterable[str], default: str) -> str:
        value = self._table.get(key, default)
        if key in self._table and value not in tuple(allowed):
            raise self._bad(key, f"is {value!r}: write one of {_words(allowed)}")
        return str(value)

    def _number(self, key: str, default: float, least: float, most: float) -> float:
        return self._within(key, self._table.get(key, default), least, most)

    def _within(self, key: str, value: object, least: float, most: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            unit = " seconds" if key.endswith("_s") else ""
            raise self._bad(key, f"is {value!r}: give{unit or ' a number'} from {least:g} to {most:g}")
        return float(value)

    def _absolute(self, key: str) -> str:
        value = self._table.get(key, "")
        if key in self._table and (not isinstance(value, str) or not os.path.isabs(value)):
            raise self._bad(key, f"is {value!r}: give an absolute path, /dev/disk/by-id/... for a disk")
        return str(value)

    def _bad(self, key: str, what: str) -> Refused:
        return Refused("bad-conf", f"{self._path}: {key} {what}", path=self._path, key=key)


def _words(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
