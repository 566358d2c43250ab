"""Errors that production code catches, logs and outlives: in a run nobody may have to read a log to find a bug."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from clustermd.testing.simulator.loop import PROCESS

LAST_FRAMES = 4


class LogWatch(logging.Handler):
    """Between `begin` and `end` each error that a living process logs with an exception is told to `found`.

    `found(words, logger)` gets message and last frames, and the name of the logger.
    """

    def __init__(self, found: Callable[[str, str], None]) -> None:
        super().__init__(logging.ERROR)
        self._found = found
        self._logger = logging.getLogger("clustermd")

    def begin(self) -> None:
        self._was = self._logger.propagate, self._logger.level
        self._logger.propagate = False
        self._logger.setLevel(logging.ERROR)
        self._logger.addHandler(self)

    def end(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate, level = self._was
        self._logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get()
        if process is not None and not process.alive:
            return  # it unwinds
        if record.exc_info and record.exc_info[0] is not None:
            where = traceback.format_exception(*record.exc_info)[-LAST_FRAMES:]
            self._found(f"{record.getMessage()}: {''.join(where)}", record.name)
