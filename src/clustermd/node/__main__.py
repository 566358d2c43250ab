"""`python -m clustermd.node`: the array process. Its configuration is one line of JSON on standard input."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from clustermd.errors import Refused
from clustermd.node.config import ArrayConfig, refusal_to_wire
from clustermd.node.process import ArrayProcess, Starter
from clustermd.node.run_array import start_array
from clustermd.node.running import StartArray
from clustermd.rundir import RunDir


def main(start: StartArray = start_array) -> int:
    """Run one array until it is stopped. The exit status: 0 after a clean stop."""
    os.umask(0o077)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s",
    )
    starter = Starter(0, 1)
    try:
        config = ArrayConfig.from_json(_first_line())
        rundir = RunDir.from_environment()
    except Refused as refusal:
        starter.tell("refused", refusal_to_wire(refusal))
        return 1
    os.chdir("/")
    return asyncio.run(ArrayProcess(config, rundir, starter, start).run())


def _first_line() -> str:
    """Read no further than the line, so that the end of the file is still there to be seen."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            break
        line += piece
    return line.decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
