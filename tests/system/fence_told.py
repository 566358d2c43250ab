#!/usr/bin/env python3
"""A fence agent that does as it is told: `fence_namespace`, but on some nodes it fails, hangs, or is not asked.

The file `orders` has lines "NODE WORD": on the node of that host name it answers `fail` (status 1, with a reason),
`hang` (no end), or `stay` (status 0, and nobody is ended: the test has seen to that). `journal` gets a line for each
run: action, victim, the node it ran on.
"""

from __future__ import annotations

import os
import sys
import time

from fence_namespace import off, processes


def main() -> int:
    options = dict(line.rstrip("\n").split("=", 1) for line in sys.stdin if "=" in line)
    here, action = os.uname().nodename, options["action"]
    with open(options["journal"], "a") as journal:
        journal.write(f"{action} {options.get('nodename', '')} at {here}\n")
    with open(options["orders"]) as orders:
        word = dict(line.split() for line in orders).get(here, "")
    if word == "fail":
        print("the power switch does not answer")
        return 1
    if word == "hang":
        time.sleep(1000)
    if action == "monitor" or word == "stay":
        return 0
    if action == "status":
        return 0 if processes(options["plug"]) else 2
    return 0 if off(options["plug"]) else 1


if __name__ == "__main__":
    sys.exit(main())
