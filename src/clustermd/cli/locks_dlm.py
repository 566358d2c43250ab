"""`clustermd locks --dlm-format`: the lock state in the words of `dlm_tool lockdebug` (dlm.md 3.9).

For scripts and eyes that know the kernel's lock manager. Every node is a replica of all lockspaces, so each resource is
shown as its master shows it: locks of this node plainly, those of others as `Remote:` with their node and lock
id. Ids are the same on all nodes, and never used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VALUE_BLOCK_INVALID = 0x2  # the resource flag VALNOTVALID as the kernel shows it
_LINE_BYTES = 16


def lockdebug(space: dict[str, Any], node: int) -> str:
    """A lockspace of a lockd's status, as `dlm_tool lockdebug` prints it on `node`."""
    lines = [line for resource in space["resources"].values() for line in _resource(resource, node)]
    return "".join(f"{line}\n" for line in [*lines, ""])


def _resource(resource: dict[str, Any], node: int) -> Iterator[str]:
    name = bytes.fromhex(resource["name_hex"])
    printable = all(0x20 <= byte < 0x7F for byte in name)
    yield ""
    yield f"Resource len {len(name):2d} " + (f' "{name.decode()}"' if printable else f"hex {name.hex(' ')}")
    flags = _VALUE_BLOCK_INVALID if resource["value_block_invalid"] else 0
    more = f"flags {flags:08x} first_lkid 0 root 0 recover 0 locks 0" if flags else ""
    yield f"{'Master':<16} {more}"
    if resource["value_block"] is not None:
        block = bytes.fromhex(resource["value_block"])
        yield f"LVB len {len(block)} seq {resource['value_block_sequence']}"
        for at in range(0, len(block), _LINE_BYTES):
            last = at + _LINE_BYTES >= len(block)
            yield block[at : at + _LINE_BYTES].hex(" ") + ("" if last else " ")
    for title, queue in (("Granted", "granted"), ("Convert", "converting"), ("Waiting", "waiting")):
        if resource[queue]:
            yield title
        for lock in resource[queue]:
            granted = "--" if lock["mode"] == "IV" else lock["mode"]
            wanted = f"({lock['wants']})" if "wants" in lock else ""
            remote = f"Remote: {lock['node']:3d} {lock['id']:08x}" if lock["node"] != node else ""
            yield f"{lock['id']:08x} {granted} {wanted:4} {remote:20} {'':9}"
