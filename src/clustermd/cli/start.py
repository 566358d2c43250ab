"""What -C and -A share: start the array process and tell what it said."""

from __future__ import annotations

from typing import Any

from clustermd.cli.output import say
from clustermd.node.config import ArrayConfig
from clustermd.node.spawn import start_array_process
from clustermd.rundir import RunDir


def start(config: ArrayConfig, rundir: RunDir) -> dict[str, Any]:
    """Start `config` and wait until it serves I/O. What the process says of itself. Raises Refused."""
    return start_array_process(config, rundir, lambda text: say(f"{config.name}: {text}"))
