"""Proof of death: when a process's last request has landed.

A killed process closes its sockets at once, but requests it gave to the kernel land later (seconds on a
slow disk). The kernel drops its open-file-description lock only after the last of them, so whoever
can get that lock on every disk knows that nothing more comes (design section 5). A kernel file lock
gives no event, therefore this polls. A process that lost its daemon drains and lets go by itself; one
that has not done so after `unresponsive_s` is killed through a pidfd, and its locks are awaited all the same.

A disk whose path is gone or leads elsewhere by now cannot be asked for its lock. Then the kernel's list of all
locks (/proc/locks, proc(5)) is read: a request in flight keeps the open file, and so its lock there, even
when its name was removed.

Opening a disk that hangs can block, so looks at devices run beside the loop, in short-lived threads
that no exit waits for: a hung disk must not stop the cluster's order.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from clustermd.clock import Clock
from clustermd.device.witness import probe
from clustermd.errors import DeviceRefused
from clustermd.group.liveness import Bounds
from clustermd.group.process import alive, kill
from clustermd.group.process_group import Witness

T = TypeVar("T")

_FIRST_POLL_S = 0.005
_LAST_POLL_S = 0.1


async def beside_loop(function: Callable[[], T]) -> T:
    """Run `function`, which may block for as long as a disk hangs, without stopping the loop."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        if not outcome.done():
            set_it()

    def work() -> None:
        try:
            value = function()
        except Exception as caught:
            error = caught
            tell(lambda: outcome.set_exception(error))
        else:
            tell(lambda: outcome.set_result(value))

    def tell(set_it: Callable[[], None]) -> None:
        try:
            loop.call_soon_threadsafe(settle, set_it)
        except RuntimeError:
            pass  # the loop has ended, nobody waits any more

    threading.Thread(target=work, name="device-look", daemon=True).start()
    return await outcome


def lock_listed(inode: int, offset: int) -> bool:
    """Whether the kernel lists a lock that starts at byte `offset` of any file with this inode number.

    Devices are not compared: file systems differ in how they number them here, and a lock too many is
    only waited for.
    """
    with open("/proc/locks", encoding="ascii") as file:
        for line in file:
            # 1: OFDLCK ADVISORY WRITE -1 fd:01:131 0 EOF; who waits has "->" before the kind
            *_, place, start, _ = line.split()
            if place.rsplit(":", 1)[-1] == str(inode) and start == str(offset):
                return True
    return False


async def still_held(witness: Witness) -> list[str]:
    """The paths, with the reason, on which the end of its process is not proved."""

    def look() -> list[str]:
        held: list[str] = []
        for path, device, inode in witness.paths:
            try:
                if not probe(path, device, inode, witness.offset):
                    held.append(f"{path}: its lock is held")
            except DeviceRefused as error:
                vanished = error.code == "witness-open-failed" and not os.path.lexists(path)
                if not vanished and error.code != "witness-other-inode":
                    held.append(f"{path}: {error}")
                elif lock_listed(inode, witness.offset):
                    held.append(f"{path}: its lock is held, though the path is gone")
            except OSError as error:
                held.append(f"{path}: {error}")
        return held

    return await beside_loop(look)


async def prove_end(
    witness: Witness, clock: Clock, bounds: Bounds, waiting: Callable[[str], None] = lambda _: None
) -> str:
    """Wait until the last request of `witness`'s process has landed; says how that is known.

    `waiting(what)` is told what it waits for, for people. The process is killed after
    `unresponsive_s`. There is no time-out: without proof there is no end.
    """
    begun_s = clock.monotonic_s()
    poll_s = _FIRST_POLL_S
    killed = ""
    while held := await still_held(witness):
        waiting(f"process {witness.pid}: " + "; ".join(held))
        if (
            not killed
            and clock.monotonic_s() - begun_s >= bounds.unresponsive_s
            and kill(witness.pid, witness.pid_started)
        ):
            killed = "killed, "
        await asyncio.sleep(poll_s)
        poll_s = min(2 * poll_s, _LAST_POLL_S)
    state = "still runs" if alive(witness.pid, witness.pid_started) else "has ended"
    disks = ", ".join(path for path, _, _ in witness.paths) or "no disk"
    return f"process {witness.pid} {killed}{state}, its locks on {disks} are free"
