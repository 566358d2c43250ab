"""What the sequencer must not forget: node numbers, and who lives with which witnesses.

`nodes` is text, one "number name" a line: a node keeps its number for ever. `incarnations.json` lists every
incarnation that may still do I/O, with its lockd's process and its witnesses. It is replaced atomically
and fsynced before the sequencer acknowledges what it says, so a new sequencer knows exactly whom to
wait for (design section 5). Entries of another boot are void: processes do not outlive the machine.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clustermd.errors import BadBytes
from clustermd.group.process_group import Member, Witness


@dataclass(slots=True)
class Incarnation:
    """One life of a node: its member, its lockd's process, and the witnesses of its I/O by key.

    `over` is not kept: a new sequencer finds out for itself.
    """

    member: Member
    pid: int
    pid_started: int
    witnesses: dict[str, Witness] = field(default_factory=dict)
    over: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.member.name} ({self.member.incarnation:016x})"

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.member.node,
            "name": self.member.name,
            "incarnation": f"{self.member.incarnation:016x}",
            "pid": self.pid,
            "pid_started": self.pid_started,
            "witnesses": [witness.to_wire() for witness in self.witnesses.values()],
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Incarnation:
        member = Member(int(entry["node"]), int(entry["incarnation"], 16), str(entry["name"]))
        witnesses = {str(wire[0]): Witness.from_wire(wire) for wire in entry["witnesses"]}
        return cls(member, int(entry["pid"]), int(entry["pid_started"]), witnesses)


class Incarnations:
    """The durable list, by incarnation. Change `living`, then `save()` before anybody is told."""

    def __init__(self, root: Path, boot_id: str) -> None:
        self._path = root / "incarnations.json"
        self._boot_id = boot_id
        self.living: dict[int, Incarnation] = {}

    def load(self) -> None:
        """Read it. Raises BadBytes ("bad-incarnations"): guessing could let two nodes write."""
        try:
            state = json.loads(self._path.read_text())
            if state["boot_id"] == self._boot_id:
                entries = map(Incarnation.from_json, state["living"])
                self.living = {entry.member.incarnation: entry for entry in entries}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadBytes(
                "bad-incarnations",
                f"{self._path} cannot be read ({error}), so nobody knows whose writes may still be on their "
                "way: end all processes of this cluster, then remove it",
                path=str(self._path),
            ) from None

    def save(self) -> None:
        """Make it durable."""
        state = {"boot_id": self._boot_id, "living": [entry.to_json() for entry in self.living.values()]}
        replace_durably(self._path, json.dumps(state, indent=1) + "\n")


class Nodes:
    """Numbers of nodes, given at first sight and kept."""

    def __init__(self, root: Path) -> None:
        self._path = root / "nodes"
        self._numbers: dict[str, int] = {}

    def load(self) -> None:
        """Read it. Raises BadBytes ("bad-nodes")."""
        try:
            for line in self._path.read_text().splitlines():
                number, name = line.split()
                self._numbers[name] = int(number)
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise BadBytes(
                "bad-nodes",
                f"{self._path} should have a number and a name in each line ({error}): correct it by hand",
            ) from None

    def number(self, name: str) -> int:
        """The number of `name`, from 1 on."""
        if name not in self._numbers:
            self._numbers[name] = max(self._numbers.values(), default=0) + 1
            replace_durably(
                self._path, "".join(f"{number} {node}\n" for node, number in self._numbers.items())
            )
        return self._numbers[name]


def replace_durably(path: Path, text: str) -> None:
    """Put `text` at `path` (0600): after a crash there is the old content or the new one."""
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
