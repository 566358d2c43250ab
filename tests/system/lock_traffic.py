"""Counts in a file under a lock, as fast as it goes, until a file appears; then prints how often it counted.

    python lock_traffic.py COUNTER STOP

A session that is lost is followed by another one. Every count that was written was written under the lock, so of all
programs together it must be the number in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clustermd.dlm import Mode
from clustermd.errors import Refused
from clustermd.lockd.plain import PlainLockspace


def main() -> None:
    counter, stop = map(Path, sys.argv[1:])
    counted = lost = 0
    while not stop.exists():
        try:
            with PlainLockspace("traffic", label="traffic") as space:
                while not stop.exists():
                    with space.lock("counter", Mode.EX):
                        counter.write_text(f"{int(counter.read_text()) + 1}\n")
                        counted += 1
        except Refused as refusal:
            lost += 1
            print(refusal.message, file=sys.stderr)
    print(counted, lost)


if __name__ == "__main__":
    main()
