"""One lock, and the numbers that the rules are written with: modes and flags as plain integers, since the engine looks
at them for every operation.

`Callbacks` is where the rules put what they tell: one ordered list for all resources.
"""

from __future__ import annotations

from dataclasses import dataclass

from clustermd.dlm.effects import Effect, SessionKey
from clustermd.dlm.modes import Flag, Mode, StatusFlag

IV, NL, CW, PR, PW, EX = (int(mode) for mode in (Mode.IV, Mode.NL, Mode.CW, Mode.PR, Mode.PW, Mode.EX))

NOQUEUE = int(Flag.NOQUEUE)
VALBLK = int(Flag.VALBLK)
QUECVT = int(Flag.QUECVT)
IVVALBLK = int(Flag.IVVALBLK)
CONVDEADLK = int(Flag.CONVDEADLK)
NODLCKWT = int(Flag.NODLCKWT)
NODLCKBLK = int(Flag.NODLCKBLK)
EXPEDITE = int(Flag.EXPEDITE)
NOQUEUEBAST = int(Flag.NOQUEUEBAST)
HEADQUE = int(Flag.HEADQUE)
NOORDER = int(Flag.NOORDER)
ALTPR = int(Flag.ALTPR)
ALTCW = int(Flag.ALTCW)

DEMOTED = int(StatusFlag.DEMOTED)
VALNOTVALID = int(StatusFlag.VALNOTVALID)
ALTMODE = int(StatusFlag.ALTMODE)

LVB_DIRECTION = {
    #   to: NL CR CW PR PW EX       r: resource to caller, w: caller to resource, .: nothing (dlm.md 2.2)
    -1: "rrrrrr",
    0: "rrrrrr",
    1: ".rrrrr",
    2: "..rrrr",
    3: "...rrr",
    4: "wwwwwr",
    5: "wwwwww",
}


def is_down_conversion(granted: int, requested: int) -> bool:
    """Whether `requested` needs nothing that `granted` does not give already (dlm.md 1.1)."""
    return requested < granted and {granted, requested} != {CW, PR}


@dataclass(slots=True, eq=False)
class Lock:
    """One lock. `gr` and `rq` are the granted and the requested mode, `fl` the last lock operation's flags.

    `op` is the owner's number for the operation whose completion comes next. `highbast` is the strongest
    mode blasted since the last grant, `cast_mode` what the last completion said is granted: a bast that is
    compatible with it would say nothing new. `persistent` ones survive their session as orphans (`dlm.orphans`).
    """

    id: int
    session: SessionKey
    op: int
    rq: int
    fl: int
    wants_bast: bool
    lvb: bytes | None
    gr: int = IV
    sb: int = 0
    lvb_seq: int = 0
    highbast: int = 0
    cast_mode: int = IV
    persistent: bool = False


class Callbacks:
    """Where resources put their effects: one ordered list for all, and the basts of the input being applied.

    Two basts on one lock caused by the same input say no more than the stronger one; basts of different inputs
    are not compared, as the recorded kernel does for callbacks that were read (dlm.md 1.8).
    """

    __slots__ = ("basts", "out")

    def __init__(self) -> None:
        self.out: list[Effect] = []
        self.basts: dict[int, int] = {}

    def begin(self) -> None:
        """The next input starts."""
        self.basts.clear()
