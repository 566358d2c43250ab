"""Loaded by every Python process of a cluster whose PYTHONPATH has this directory: plants one flaw, if it is meant.

`PLANTED` names it. The flaws are those that a trace must show: a lock manager that grants what excludes each other, an
array that writes in another node's window, and one that does not wait for its bits.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_PLANTED = os.environ.get("PLANTED", "")
_IN = sys.orig_argv


def _incompatible_grants() -> None:
    from clustermd.dlm import modes

    modes.COMPATIBLE |= {(int(modes.Mode.PW), int(modes.Mode.PW))}


def _blind_to_windows() -> None:
    from clustermd.array.windows import Windows

    Windows.blocked = lambda self, lo, hi: False  # type: ignore[method-assign]


def _impatient_for_bits() -> None:
    from clustermd.array.bitmap import Bitmap

    start_write = Bitmap.start_write

    def at_once(self: Bitmap, chunks: Any) -> bool:
        start_write(self, chunks)
        return True

    Bitmap.start_write = at_once  # type: ignore[method-assign]


if _PLANTED == "locks" and "clustermd.lockd" in _IN:
    _incompatible_grants()
elif _PLANTED == "windows" and "clustermd.node" in _IN:
    _blind_to_windows()
elif _PLANTED == "bits" and "clustermd.node" in _IN:
    _impatient_for_bits()
