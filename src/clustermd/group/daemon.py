"""What every daemon of ours does around its work: its file lock, its log, its signals, its end.

Crash-only: an error nobody expected ends the process at once with its traceback in the log, as a kill
would; what it guarded is durable and a successor goes on. SIGTERM and SIGINT ask for a clean end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from clustermd.errors import Refused
from clustermd.group.start import HELD, await_predecessor, say_ready, take_lock

CRASHED = 70  # EX_SOFTWARE

log = logging.getLogger("clustermd")


def run_daemon(lock: Path, serve: Callable[[asyncio.Event, Callable[[], None]], Awaitable[None]]) -> None:
    """Run `serve(stop, ready)` under the file lock `lock`; never returns.

    `serve` calls `ready()` when it listens and ends soon after `stop` is set.
    """
    logging.basicConfig(format=f"%(asctime)s [{os.getpid()}] %(message)s", level=logging.INFO)
    await_predecessor()
    if take_lock(lock) is None:
        sys.exit(HELD)
    os.chdir("/")  # keep no directory of our starter's busy

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_crash)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(stop, say_ready)

    try:
        asyncio.run(work())
    except Refused as refusal:
        log.error("ended: %s", refusal)
        os._exit(CRASHED)
    except Exception:
        log.exception("ended by an error")
        os._exit(CRASHED)
    log.info("ended")
    # a thread that looks at a hung disk must not keep the process
    logging.shutdown()
    os._exit(0)


def _crash(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    message = context.get("message", "")
    if "socket" in context or "never retrieved" in message:
        # no descriptor for a new connection (tried again by asyncio), or an answer nobody waits for
        log.error("%s", message, exc_info=error)
        return
    log.error("ended by an error: %s", message, exc_info=error)
    logging.shutdown()
    os._exit(CRASHED)
