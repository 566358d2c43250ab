"""Where a node keeps its sockets and its small /proc: `$CLUSTERMD_RUN/$CLUSTERMD_NODE/`.

Everything there is private to the user: directories 0700, sockets and files 0600.
Without root the default is `$XDG_RUNTIME_DIR/clustermd` (design section 3 and 9).
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from clustermd.errors import Refused

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class RunDir:
    """The run directory of one cluster on this machine (`root`) and of one node in it (`node`)."""

    root: Path
    node: str

    @classmethod
    def from_environment(cls) -> RunDir:
        """The run directory that the environment names. Raises Refused for a bad node name."""
        root = os.environ.get("CLUSTERMD_RUN")
        if not root:
            if os.geteuid() == 0:
                root = "/run/clustermd"
            else:
                root = os.path.join(
                    os.environ.get("XDG_RUNTIME_DIR", f"/tmp/clustermd-{os.geteuid()}"), "clustermd"
                )
        node = os.environ.get("CLUSTERMD_NODE") or socket.gethostname().split(".")[0]
        if not _NODE_NAME.fullmatch(node):
            raise Refused(
                "bad-node-name",
                f"{node!r} cannot be a node name: set CLUSTERMD_NODE to letters, digits, '.', '_' or '-'",
            )
        return cls(Path(root).absolute(), node)

    @property
    def node_dir(self) -> Path:
        return self.root / self.node

    @property
    def sequencer_socket(self) -> Path:
        return self.root / "sequencer.sock"

    @property
    def lockd_socket(self) -> Path:
        return self.node_dir / "lockd.sock"

    @property
    def lease(self) -> Path:
        """Until when this node may submit I/O (`device.lease`)."""
        return self.node_dir / "lease"

    @property
    def state_dir(self) -> Path:
        """What this node must know after a reboot: in /var/lib, or beside everything else that was moved."""
        base = Path("/var/lib/clustermd") if self.root == Path("/run/clustermd") else self.root / "state"
        return base / self.node

    def array_dir(self, array: str) -> Path:
        return self.node_dir / array

    def make(self, path: Path | None = None) -> Path:
        """Create `path` (default: the node's directory) and its parents, private to the user."""
        path = path or self.node_dir
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path
