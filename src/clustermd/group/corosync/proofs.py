"""Ends that this node proved while it was no majority, kept over its reboots: `fenced.json` in its state directory.

In a cluster of two, whoever fenced the other goes on alone. If it then reboots and the other one, which was only
cut off from the disks, is back with its old memory, nobody else could tell that this life was declared dead; going on
with it would undo what happened since. So a proof is written down before it is told (dlm.md 6.8, traps 8 and 11).
"""

from __future__ import annotations

import json
from pathlib import Path

from clustermd.errors import BadBytes
from clustermd.group.agreed.hello import Key
from clustermd.group.incarnations import replace_durably

MOST = 256


class Proofs:
    """The proofs, oldest first, `MOST` at most. Raises OSError where the directory cannot be written."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "fenced.json"
        self._proofs: dict[Key, str] = {}

    def load(self) -> list[tuple[Key, str]]:
        """Read them. Raises BadBytes ("bad-proofs"): without them a dead life might be believed."""
        try:
            told = json.loads(self._path.read_text())
            self._proofs = {(int(node), int(life, 16)): str(words) for node, life, words in told}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError) as error:
            raise BadBytes(
                "bad-proofs",
                f"{self._path} cannot be read ({error}), so nobody knows which lives of other nodes this node has "
                "fenced: make sure that all nodes of the cluster were started anew since, then remove it",
                path=str(self._path),
            ) from None
        return list(self._proofs.items())

    def keep(self, life: Key, words: str) -> None:
        """Make it durable that `life` was proved dead."""
        self._proofs[life] = words
        for old in list(self._proofs)[:-MOST]:
            del self._proofs[old]
        told = [[node, f"{incarnation:016x}", words] for (node, incarnation), words in self._proofs.items()]
        replace_durably(self._path, json.dumps(told, indent=1) + "\n")
