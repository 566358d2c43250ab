"""Lock modes, flags and statuses of the DLM, with their numbers (dlm.md 1.1, 1.3, 1.7).

Three flags act outside the engine or not at all: TIMEOUT is accepted and means nothing, since the engine knows no time
(`dlm.session` cancels with ETIMEDOUT); CANCEL belongs to unlock; CONVERT says by which call a lock operation came.
"""

from __future__ import annotations

import enum


class Mode(enum.IntEnum):
    IV = -1
    NL = 0
    CR = 1
    CW = 2
    PR = 3
    PW = 4
    EX = 5


class Flag(enum.IntFlag):
    NONE = 0
    NOQUEUE = 0x1
    CANCEL = 0x2
    CONVERT = 0x4
    VALBLK = 0x8
    QUECVT = 0x10
    IVVALBLK = 0x20
    CONVDEADLK = 0x40
    PERSISTENT = 0x80
    NODLCKWT = 0x100
    NODLCKBLK = 0x200
    EXPEDITE = 0x400
    NOQUEUEBAST = 0x800
    HEADQUE = 0x1000
    NOORDER = 0x2000
    ORPHAN = 0x4000
    ALTPR = 0x8000
    ALTCW = 0x10000
    FORCEUNLOCK = 0x20000
    TIMEOUT = 0x40000


class SpaceFlag(enum.IntFlag):
    """How a lockspace is joined. NEWEXCL is Linux's (dlm.md 1.7); DEADLOCKS is ours: `dlm.deadlock`."""

    NONE = 0
    NEWEXCL = 0x8
    DEADLOCKS = 0x100


class StatusFlag(enum.IntFlag):
    """What a completion says beside its status."""

    NONE = 0
    DEMOTED = 1
    VALNOTVALID = 2
    ALTMODE = 4


EAGAIN = -11
EBUSY = -16
EINVAL = -22
ENOENT = -2
EDEADLK = -35
ETIMEDOUT = -110
ECANCEL = -0x10001
EUNLOCK = -0x10002

_ROWS = {
    Mode.NL: (Mode.NL, Mode.CR, Mode.CW, Mode.PR, Mode.PW, Mode.EX),
    Mode.CR: (Mode.NL, Mode.CR, Mode.CW, Mode.PR, Mode.PW),
    Mode.CW: (Mode.NL, Mode.CR, Mode.CW),
    Mode.PR: (Mode.NL, Mode.CR, Mode.PR),
    Mode.PW: (Mode.NL, Mode.CR),
    Mode.EX: (Mode.NL,),
}
COMPATIBLE: frozenset[tuple[int, int]] = frozenset(
    (int(a), int(b)) for a, row in _ROWS.items() for b in row
) | {pair for mode in range(-1, 6) for pair in ((-1, mode), (mode, -1))}


def compatible(a: int, b: int) -> bool:
    """Whether two modes may be granted together; IV goes with everything."""
    return (a, b) in COMPATIBLE
