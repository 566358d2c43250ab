"""How far a campaign of simulated runs is: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import sys
import time

from clustermd.cli.output import show

_BAR = 30
_LINE_EVERY_S = 10.0


class Progress:
    """`end_s` is when the campaign ends by the monotonic clock; without it so many runs are known to be made."""

    def __init__(self, end_s: float | None = None) -> None:
        self._begin_s = time.monotonic()
        self._end_s = end_s
        self._tty = sys.stderr.isatty()
        self._line_s = self._begin_s
        self._shown = False

    def show(self, runs: int, known: int, broken: int) -> None:
        """After each run. `known` counts only where no time ends the campaign."""
        now_s = time.monotonic()
        if not self._tty and now_s - self._line_s < _LINE_EVERY_S:
            return
        self._line_s = now_s
        if self._end_s is None:
            part = runs / known
            text = f"{runs}/{known} runs"
        else:
            part = min(1.0, (now_s - self._begin_s) / (self._end_s - self._begin_s))
            text = f"{runs} runs, {max(0.0, self._end_s - now_s):.0f} s left"
        text += f", {runs / (now_s - self._begin_s) * 60:.0f} a minute, {broken} broken"
        if self._tty:
            done = int(part * _BAR)
            sys.stderr.write(f"\r\x1b[K[{'#' * done}{' ' * (_BAR - done)}] {text}")
            self._shown = True
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def line(self, text: str) -> None:
        """A line of the result in between."""
        self.clear()
        show(text + "\n")

    def clear(self) -> None:
        """Takes the bar away."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
