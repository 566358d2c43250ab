#!/usr/bin/env python3
"""A fence agent: ends every process of one network namespace, and says "off" only when all are gone.

It reads `key=value` lines as agents of the fence-agents project do. `plug` is the inode of the namespace; what
it did is appended to the file `journal`, for tests that count. Only the standard library is used: agents run with
the system's Python.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

PATIENCE_S = 10.0


def processes(plug: str) -> list[int]:
    """Whoever is in that namespace. A process that is only a name still (a zombie) is in none."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns/net") == f"net:[{plug}]":
                found.append(int(entry.name))
        except OSError:
            continue  # gone while we looked
    return found


def off(plug: str) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while left := processes(plug):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > until_s:
            return False
        time.sleep(0.01)
    return True


def main() -> int:
    options = dict(line.rstrip("\n").split("=", 1) for line in sys.stdin if "=" in line)
    action, plug = options["action"], options.get("plug", "")
    status = 1
    if action == "monitor":
        status = 0
    elif action == "status":
        status = 0 if processes(plug) else 2
    elif action in ("off", "reboot"):
        status = 0 if off(plug) else 1
    if "journal" in options:
        with open(options["journal"], "a") as journal:
            journal.write(f"{action} {options.get('nodename', '')} {status}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
