"""The life of an array process: start, say so, publish what the array looks like, stop.

It is started with its configuration on standard input and tells on standard output, one JSON object a line,
why it takes long (`notice`), that it serves I/O (`ready`) or that it does not (`refused`). If the starter
goes away before that, the start is undone. From then on the process is on its own: in its session, with its
files in the run directory, until the control socket's `stop` or SIGTERM, or until the array ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from typing import Any

from clustermd.array.status import ArrayStatus
from clustermd.errors import Refused
from clustermd.node.config import ArrayConfig, refusal_to_wire
from clustermd.node.control import ControlServer
from clustermd.node.files import (
    ArrayFiles,
    PidFile,
    SpeedLimits,
    make_private,
    nbd_uri,
    publish,
    rewrite_mdstat,
)
from clustermd.node.mdstat import array_text
from clustermd.node.recorder import record, wanted
from clustermd.node.running import MemberOrder, RunningArray, StartArray
from clustermd.rundir import RunDir
from clustermd.trace import Trace

LOOK_S = 1.0
"""How often the array is looked at for its mdstat, when nothing says that it changed."""
SHOW_S = 0.1
"""How often mdstat is written at most."""

log = logging.getLogger("clustermd.node")


class Starter:
    """The process that started this one, behind the pipes `read_fd` and `write_fd`."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd

    def tell(self, kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(self._write_fd, (json.dumps({kind: value}) + "\n").encode())

    async def gone(self) -> None:
        """Return when the starter closed its end of our standard input."""
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        try:
            loop.add_reader(self._read_fd, self._read, end)
        except PermissionError:
            await asyncio.Event().wait()  # a file has no end to wait for
        try:
            await end.wait()
        finally:
            loop.remove_reader(self._read_fd)

    def _read(self, end: asyncio.Event) -> None:
        if not os.read(self._read_fd, 4096):
            end.set()

    def detach(self) -> None:
        """Let go of the starter: nothing more is said."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (self._read_fd, self._write_fd):
            os.dup2(null, fd)
        os.close(null)


class ArrayProcess:
    """One array on one node. `run` is all there is to call; its result is the process's exit status."""

    def __init__(
        self, config: ArrayConfig, rundir: RunDir, starter: Starter, start_array: StartArray
    ) -> None:
        self.config = config
        self.rundir = rundir
        self.files = ArrayFiles.of(rundir, config.name)
        self._starter = starter
        self._start_array = start_array
        self._order = MemberOrder(config.created)
        self._control = ControlServer(self.files.control_socket, self._answer)
        self._running: RunningArray | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()
        self._failed = False
        self._shown = ""
        self._publish_error = ""
        self._mdstat_is_old = False

    async def run(self) -> int:
        pid_file = PidFile(self.files.pid)
        try:
            self.files.check_socket_paths()
            make_private(self.rundir, self.files)
            pid_file.acquire()
        except Refused as refusal:
            return self._refuse(refusal)
        except OSError as error:
            return self._refuse(
                Refused("run-directory", f"cannot use {self.files.directory}: {error.strerror}")
            )
        try:
            self.files.remove_leftovers()
            SpeedLimits(self.rundir, log.warning).make()
            return await self._run()
        finally:
            with contextlib.suppress(OSError):  # a run directory that was removed has no leftovers
                self.files.remove_leftovers()
                rewrite_mdstat(self.rundir)
            pid_file.release()

    async def _run(self) -> int:
        try:
            running = await self._start()
        except Refused as refusal:
            return self._refuse(refusal)
        except OSError as error:
            log.exception("%s could not be started", self.config.name)
            return self._refuse(
                Refused(
                    "start-failed", f"{self.config.name} could not be started: {error}", errno=error.errno
                )
            )
        if running is None:
            return 1
        self._running = running
        await self._control.start()
        self._publish()
        self._starter.tell("ready", self._description())
        self._starter.detach()
        log.info("%s is started with %s", self.config.name, " ".join(self.config.paths))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_by_signal, number)
        watch = asyncio.create_task(self._watch_end(running))
        try:
            await self._show_until_end(running)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await self._control.close()
        return 1 if self._failed else 0

    async def _show_until_end(self, running: RunningArray) -> None:
        ending = asyncio.create_task(self._ending.wait())
        try:
            while not self._ending.is_set():
                running.changed.clear()
                self._publish()
                change = asyncio.create_task(running.changed.wait())
                await asyncio.wait((ending, change), timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                await asyncio.wait((ending,), timeout=SHOW_S)
        finally:
            ending.cancel()

    async def _start(self) -> RunningArray | None:
        """The running array; None when the starter went away meanwhile, and then nothing is left of it."""
        trace = Trace()
        if wanted(os.environ, self.config.name):
            record(trace, self.files.trace, self.rundir.node, self.config.name)
        loop = asyncio.get_running_loop()
        start = asyncio.ensure_future(
            self._start_array(
                self.config, self.rundir, trace, lambda text: self._starter.tell("notice", text)
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, start.cancel)
        gone = asyncio.create_task(self._starter.gone())
        try:
            await asyncio.wait((start, gone), return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                log.info("the start of %s is given up: its starter is gone", self.config.name)
                start.cancel()
            return await start
        except asyncio.CancelledError:
            return None
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    def _refuse(self, refusal: Refused) -> int:
        log.error("%s: %s", refusal.code, refusal.message)
        self._starter.tell("refused", refusal_to_wire(refusal))
        return 1

    # what it says

    def _status(self) -> ArrayStatus:
        assert self._running is not None
        return self._order.apply(self._running.status())

    def _description(self) -> dict[str, Any]:
        assert self._running is not None
        return {
            "name": self.config.name,
            "node": self.rundir.node,
            "pid": os.getpid(),
            "nbd_socket": str(self.files.nbd_socket),
            "uri": nbd_uri(self.files.nbd_socket, self.config.name),
            "clients": self._running.clients(),
            "status": self._status().to_wire(),
        }

    def _publish(self) -> None:
        """Bring status.json and mdstat up to date. A full or broken run directory does not stop the array."""
        status = self._status()
        text = array_text(status)
        try:
            if text != self._shown:
                publish(self.rundir, status)
                self._shown = text
                self._mdstat_is_old = True
            if self._mdstat_is_old:
                self._mdstat_is_old = not rewrite_mdstat(self.rundir)
        except OSError as error:
            if self._publish_error != str(error):
                log.warning("mdstat is out of date, the run directory cannot be written: %s", error)
            self._publish_error = str(error)

    # what it is asked

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._running is not None
        command = request.get("command")
        if command == "status":
            return self._description()
        if command == "clients":
            return {"clients": self._running.clients()}
        if command == "wait":
            waited = self._running.status().sync is not None
            await self._until_idle(self._running)
            return {"waited": waited}
        if command == "stop":
            await self._stop(force=request.get("force") is True)
            return {"stopped": self.config.name}
        raise Refused("unknown-command", f"the array process knows no command {command!r}")

    async def _until_idle(self, running: RunningArray) -> None:
        idle, ending = asyncio.ensure_future(running.idle()), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((idle, ending), return_when=asyncio.FIRST_COMPLETED)
            if not idle.done():
                raise Refused("stopped", f"{self.config.name} was stopped before its sync was finished")
            await idle
        finally:
            for task in (idle, ending):
                task.cancel()

    async def _stop(self, force: bool) -> None:
        assert self._running is not None
        clients = self._running.clients()
        if self._stopping is None:
            if clients and not force:
                raise Refused(
                    "in-use",
                    f"{self.config.name} is in use by {', '.join(clients)}: disconnect them,"
                    " or stop with --force, which ends their requests in flight first",
                    clients=clients,
                )
            log.info("%s is being stopped", self.config.name)
            self._stopping = asyncio.create_task(self._running.stop(force))
            self._stopping.add_done_callback(self._stopped)
        try:
            await asyncio.shield(self._stopping)
        except (OSError, RuntimeError) as error:
            raise Refused(
                "unclean-stop",
                f"{self.config.name} could not be stopped cleanly, its process ends as if killed: {error}",
            ) from error

    def _stopped(self, task: asyncio.Task[None]) -> None:
        error = task.exception()
        if error is not None:
            log.error(
                "%s could not be stopped cleanly, its process ends now", self.config.name, exc_info=error
            )
            self._failed = True
        else:
            log.info("%s is stopped", self.config.name)
        self._ending.set()

    def _stop_by_signal(self, number: int) -> None:
        log.info("%s", signal.strsignal(number))
        task = asyncio.create_task(self._stop(force=True))
        task.add_done_callback(lambda done: done.exception())

    async def _watch_end(self, running: RunningArray) -> None:
        reason = await running.ended()
        if self._stopping is not None:
            return
        log.error("%s cannot go on: %s", self.config.name, reason)
        self._failed = True
        self._stop_by_signal(signal.SIGTERM)
