"""The modes again, read from the specification and not from the engine (dlm.md 1.1, 1.6)."""

from __future__ import annotations

from clustermd.dlm.modes import Mode

_TOGETHER = {
    Mode.NL: "NL CR CW PR PW EX",
    Mode.CR: "NL CR CW PR PW",
    Mode.CW: "NL CR CW",
    Mode.PR: "NL CR PR",
    Mode.PW: "NL CR",
    Mode.EX: "NL",
}
_COEXIST = frozenset(
    (int(a), int(b)) for a, names in _TOGETHER.items() for b in Mode if b.name in names.split()
)


def may_coexist(a: int, b: int) -> bool:
    """Whether two modes may be granted together; what is not granted (IV) excludes nothing."""
    return a < 0 or b < 0 or (a, b) in _COEXIST


def is_down(granted: int, requested: int) -> bool:
    """Whether a conversion asks for nothing new. PR and CW cannot be compared: that way is never down."""
    return requested < granted and (granted, requested) != (Mode.PR, Mode.CW)
