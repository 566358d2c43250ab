"""What an array process is told to run, as one line of JSON from its starter.

And the rules for an array's name: it is the basename of what follows the mode (`/dev/md0`, `md0`,
`/dev/md/home`), and a directory in the node's run directory, so it must be a plain file name.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from clustermd.errors import Refused

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,31}")


@dataclass(frozen=True, slots=True)
class ArrayConfig:
    """One array to run on this node.

    `paths` are absolute. `uuid` is 32 hexadecimal digits, and every member found must have it ("" for any).
    `cluster_name` was given by hand, and only then an array of another cluster is taken ("" if not given).
    `run` starts with fewer members than expected, `force` with members that are out of date. `created`: these
    members were just made by -C.
    """

    name: str
    paths: tuple[str, ...]
    uuid: str = ""
    read_only: bool = False
    cluster_name: str = ""
    run: bool = False
    force: bool = False
    created: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ArrayConfig:
        """Raises Refused when `text` is not what `to_json` writes."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise TypeError("not an object")
            unknown = set(values) - {known.name for known in fields(cls)}
            if unknown:
                raise TypeError(f"unknown fields {sorted(unknown)}")
            values["paths"] = tuple(str(path) for path in values["paths"])
            config = cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(
                "bad-config", f"the array process was started with a malformed configuration: {error}"
            ) from error
        check_name(config.name)
        return config


def array_name(word: str) -> str:
    """The array's name from a word of the command line. Raises Refused for one that cannot be a name."""
    return check_name(word.rstrip("/").rpartition("/")[2])


def check_name(name: str) -> str:
    """`name`, if an array may have it. Raises Refused."""
    if not _NAME.fullmatch(name) or name in RESERVED or name.endswith((".sock", ".lock", ".log")):
        raise Refused(
            "bad-array-name",
            f"{name!r} cannot be the name of an array:"
            " use up to 32 letters, digits, '_', '.', ':', '+' or '-', as in md0",
            name=name,
        )
    return name


def device_name(name: str) -> str:
    """How Linux would call the array's device: /dev/md0, /dev/md/home."""
    return f"/dev/{name}" if re.fullmatch(r"md_?\d+|md_[a-z]\w*", name) else f"/dev/md/{name}"


RESERVED = frozenset({"mdstat", "speed_limit_min", "speed_limit_max", "lockd", "sequencer", "nodes"})


def refusal_to_wire(refusal: Refused) -> dict[str, Any]:
    """A refusal for JSON: code, message, data."""
    return {"code": refusal.code, "message": refusal.message, "data": refusal.data}


def refusal_from_wire(wire: dict[str, Any]) -> Refused:
    data = wire.get("data")
    clean = {str(key): value for key, value in data.items()} if isinstance(data, dict) else {}
    return Refused(
        str(wire.get("code", "refused")), str(wire.get("message", "refused without a reason")), **clean
    )
