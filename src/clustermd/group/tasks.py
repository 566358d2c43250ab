"""Background work of a daemon: tasks that are kept until they end, and whose failure is not overlooked.

A task that fails of itself goes to the loop's exception handler; in a daemon that ends the process
(`group.daemon`): a successor goes on from what is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """A set of running tasks."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)

    def cancel(self) -> None:
        """Cancel all of them; nobody waits for what they were at."""
        for task in self._running:
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            context = {"message": "a task failed", "exception": task.exception()}
            asyncio.get_running_loop().call_exception_handler(context)
