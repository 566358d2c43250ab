"""Who answers: silence of a peer, counted only while we ourselves were awake to hear.

A peer is pinged once a tick and any word of it counts. Silence grows by the time between two ticks,
but by no more than two ticks: a watcher that was stopped, or a machine that was suspended, finds the
answers in its sockets later and must not kill the peers that gave them (design section 5).
Silence is shown from `SHOWN_S` on; at `unresponsive_s` the peer is killed and then proved dead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from clustermd.conf import Conf
from clustermd.errors import Refused

SHOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long is too long. `unresponsive_s` of the configuration, and `$CLUSTERMD_UNRESPONSIVE_S` and
    `$CLUSTERMD_LINGER_S` change them.

    `unresponsive_s`: silence after which a process is killed. `linger_s`: how long a daemon stays after
    its last client.
    """

    unresponsive_s: float = 10.0
    linger_s: float = 5.0

    @classmethod
    def from_environment(cls, conf: Conf) -> Bounds:
        """The bounds that the environment names, else the configuration. Raises Refused ("bad-bound")."""
        return cls(
            _seconds("CLUSTERMD_UNRESPONSIVE_S", conf.unresponsive_s, least=0.5),
            _seconds("CLUSTERMD_LINGER_S", cls().linger_s, least=0.0),
        )

    @property
    def tick_s(self) -> float:
        """How often peers are pinged."""
        return min(0.5, self.unresponsive_s / 10)


def _seconds(variable: str, default: float, least: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= 86400:
        raise Refused(
            "bad-bound", f"{variable} is {text!r}: give seconds from {least:g} to 86400, or unset it"
        )
    return value


class PeerWatch:
    """The silence of one peer."""

    __slots__ = ("_bounds", "silent_s")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.silent_s = 0.0

    def heard(self) -> None:
        self.silent_s = 0.0

    def tick(self, elapsed_s: float) -> bool:
        """`elapsed_s` passed since the last tick; whether the peer's time is up."""
        self.silent_s += min(elapsed_s, 2 * self._bounds.tick_s)
        return self.silent_s >= self._bounds.unresponsive_s

    @property
    def shown(self) -> bool:
        return self.silent_s >= SHOWN_S
