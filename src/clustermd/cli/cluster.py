"""`clustermd cluster`: make a cluster of machines, see how it is, and help where a person must decide.

Each subcommand is loaded only when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from clustermd.cli.command import UsageError
from clustermd.cli.output import show

_FENCE = "clustermd.cli.cluster_fence"
_STATUS = "clustermd.cli.cluster_status"
SUBCOMMANDS = {
    "setup": "clustermd.cli.cluster_setup",
    "status": _STATUS,
    "start": _STATUS,
    "stop": _STATUS,
    "fence-ack": _FENCE,
    "fence-test": _FENCE,
    "fence-device": _FENCE,
}
"""Modules with `run(words) -> exit status`; the one of several subcommands gets the subcommand as its first
word.
"""

_HELP = """\
Usage: clustermd cluster setup NODE=ADDRESS[,ADDRESS2] ...   write a corosync.conf and an authkey
       clustermd cluster status [--json]                     ring, quorum, members, fencing, and why anything waits
       clustermd cluster start                               take this node into its cluster
       clustermd cluster stop [--force]                      take it out
       clustermd cluster fence-ack NODE                      say that a lost node is switched off: you looked
       clustermd cluster fence-test [NODE]                   would fencing work?
       clustermd cluster fence-device --create PATH          make the disk of fence = "device"

For its options: clustermd cluster SUBCOMMAND --help
"""


def run(words: Sequence[str]) -> int:
    """The verb. The exit status. Raises Refused as its subcommands do."""
    if not words or words[0] in ("-h", "--help"):
        if not words:
            raise UsageError(f"cluster needs one of: {', '.join(SUBCOMMANDS)}")
        show(_HELP)
        return 0
    name, *rest = words
    if name not in SUBCOMMANDS:
        raise UsageError(f"cluster knows no {name!r}, only: {', '.join(SUBCOMMANDS)}")
    module = importlib.import_module(SUBCOMMANDS[name])
    status: int = module.run([name, *rest] if SUBCOMMANDS[name] in (_FENCE, _STATUS) else rest)
    return status
