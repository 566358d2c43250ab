"""The life of an array process, with an array of plain values: start, answers, stop, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clustermd.array.status import ArrayStatus, MemberStatus, SyncStatus
from clustermd.errors import Refused
from clustermd.node import control
from clustermd.node.config import ArrayConfig
from clustermd.node.control import ControlClient
from clustermd.node.files import ArrayFiles
from clustermd.node.process import ArrayProcess, Starter
from clustermd.node.running import Notice, RunningArray
from clustermd.rundir import RunDir
from clustermd.trace import Trace

STATUS = ArrayStatus(
    name="md0",
    uuid="0" * 32,
    set_name="x",
    metadata="1.2",
    level=1,
    layout=0,
    chunk_sectors=0,
    raid_disks=2,
    array_sectors=2048,
    component_sectors=2048,
    created_s=0,
    updated_s=0,
    events=0,
    read_only=False,
    clean=True,
    degraded=0,
    failed=False,
    members=(MemberStatus("/a", 0, 0, False, True, None), MemberStatus("/b", 1, 1, False, True, None)),
    sync=None,
    bitmap=None,
    held="",
    counters={},
)


class Plain:
    """A RunningArray of plain values."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.now = STATUS
        self.connected: list[str] = []
        self.quiet = asyncio.Event()
        self.over = asyncio.Event()
        self.stops: list[bool] = []
        self.stop_error: Exception | None = None

    def show(self, **changes: Any) -> None:
        self.now = replace(self.now, **changes)
        self.changed.set()

    def status(self) -> ArrayStatus:
        return self.now

    def clients(self) -> list[str]:
        return self.connected

    async def idle(self) -> None:
        await self.quiet.wait()

    async def stop(self, force: bool) -> None:
        self.stops.append(force)
        if self.stop_error:
            raise self.stop_error

    async def ended(self) -> str:
        await self.over.wait()
        return "its last disk is gone"


class Running:
    """A process under test, within this one: `said` is what its starter heard."""

    def __init__(self, rundir: RunDir) -> None:
        self.rundir = rundir
        self.files = ArrayFiles.of(rundir, "md0")
        self.array = Plain()
        self.said: list[dict[str, Any]] = []
        self.task: asyncio.Task[int]
        self._to_child, self._from_child = os.pipe(), os.pipe()

    def begin(self, start: Callable[..., Any] | None = None) -> None:
        async def plain(*_: Any) -> RunningArray:
            return self.array

        starter = Starter(self._to_child[0], self._from_child[1])
        process = ArrayProcess(ArrayConfig("md0", ("/a", "/b")), self.rundir, starter, start or plain)
        self.task = asyncio.create_task(process.run())

    async def heard(self) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            line += await asyncio.to_thread(os.read, self._from_child[0], 1 << 16)
        return dict(json.loads(line))

    def starter_dies(self) -> None:
        os.close(self._to_child[1])
        self._to_child = (self._to_child[0], -1)

    async def ask(self, command: str, **arguments: bool) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            with ControlClient(self.rundir, "md0") as client:
                return client.ask(command, None, **arguments)

        return await asyncio.to_thread(ask)

    def close(self) -> None:
        for fd in (*self._to_child, *self._from_child):
            if fd >= 0:
                os.close(fd)


@asynccontextmanager
async def process(rundir: RunDir, start: Callable[..., Any] | None = None) -> AsyncIterator[Running]:
    running = Running(rundir)
    running.begin(start)
    try:
        yield running
        if not running.task.done():
            running.array.connected = []
            await running.ask("stop", force=True)
        await asyncio.wait_for(running.task, 5)
    finally:
        running.task.cancel()
        running.close()


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "r", "node1")


def test_ready_is_said_when_it_serves_and_the_files_are_there(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            ready = (await running.heard())["ready"]
            assert ready["pid"] == os.getpid()
            assert ready["uri"] == f"nbd+unix:///md0?socket={running.files.nbd_socket}"
            assert (await running.ask("status"))["status"]["name"] == "md0"
            names = {path.name for path in running.files.directory.iterdir()}
            assert names == {"pid", "control.sock", "status.json"}
            assert "md0 : active raid1 a[0] b[1]\n" in (rundir.node_dir / "mdstat").read_text()
        assert list(running.files.directory.iterdir()) == []
        assert running.task.result() == 0
        assert "md0" not in (rundir.node_dir / "mdstat").read_text()

    asyncio.run(story())


def test_mdstat_follows_changes(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.array.show(sync=SyncStatus("resync", "remote"))
            mdstat = rundir.node_dir / "mdstat"
            async with asyncio.timeout(2):
                while "resync=REMOTE" not in mdstat.read_text():
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_a_stop_is_refused_while_clients_are_connected_and_names_them(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.array.connected = ["fio (pid 7)"]
            with pytest.raises(Refused) as refused:
                await running.ask("stop")
            assert refused.value.code == "in-use"
            assert refused.value.data["clients"] == ["fio (pid 7)"]
            assert running.array.stops == []
            await running.ask("stop", force=True)
            assert await running.task == 0
            assert running.array.stops == [True]

    asyncio.run(story())


def test_wait_answers_when_the_sync_is_done_and_says_whether_there_was_one(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.array.show(sync=SyncStatus("resync", "running", 0, 2048, 1))
            waiting = asyncio.create_task(running.ask("wait"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            running.array.quiet.set()
            assert (await waiting)["waited"] is True
            running.array.show(sync=None)
            assert (await running.ask("wait"))["waited"] is False

    asyncio.run(story())


def test_who_waits_when_the_array_is_stopped_is_told(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            waiting = asyncio.create_task(running.ask("wait"))
            await asyncio.sleep(0.05)
            await running.ask("stop")
            with pytest.raises(Refused) as refused:
                await waiting
            assert refused.value.code == "stopped"
            assert await running.task == 0

    asyncio.run(story())


def test_sigterm_stops_in_order(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.array.connected = ["fio (pid 7)"]
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running.task == 0
            assert running.array.stops == [True]

    asyncio.run(story())


def test_an_array_that_cannot_go_on_ends_its_process(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.array.over.set()
            assert await running.task == 1
            assert running.array.stops == [True]

    asyncio.run(story())


def test_a_stop_that_fails_is_told_and_ends_the_process(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.array.stop_error = OSError(5, "Input/output error")
            with pytest.raises(Refused) as refused:
                await running.ask("stop")
            assert refused.value.code == "unclean-stop"
            assert await running.task == 1

    asyncio.run(story())


def test_a_refused_start_is_told_with_code_and_data_and_leaves_nothing(rundir: RunDir) -> None:
    async def start(_config: ArrayConfig, _rundir: RunDir, _trace: Trace, notice: Notice) -> RunningArray:
        raise Refused("other-cluster", "it belongs to another one", own="x")

    async def story() -> None:
        async with process(rundir, start) as running:
            said = (await running.heard())["refused"]
            assert said == {
                "code": "other-cluster",
                "message": "it belongs to another one",
                "data": {"own": "x"},
            }
            assert await running.task == 1
            assert list(running.files.directory.iterdir()) == []

    asyncio.run(story())


def test_a_disk_error_at_the_start_is_told(rundir: RunDir) -> None:
    async def start(*_: Any) -> RunningArray:
        raise OSError(5, "Input/output error")

    async def story() -> None:
        async with process(rundir, start) as running:
            said = (await running.heard())["refused"]
            assert (said["code"], said["data"]) == ("start-failed", {"errno": 5})
            assert await running.task == 1

    asyncio.run(story())


def test_a_run_directory_that_cannot_be_written_does_not_stop_the_array(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            running.files.status.unlink()
            running.files.status.mkdir()
            running.array.show(held="something")
            running.array.show(raid_disks=3)
            await asyncio.sleep(0.3)
            assert (await running.ask("status"))["status"]["raid_disks"] == 3
            running.files.status.rmdir()

    asyncio.run(story())


def test_why_a_start_takes_long_is_told_while_it_does(rundir: RunDir) -> None:
    async def start(_config: ArrayConfig, _rundir: RunDir, _trace: Trace, notice: Notice) -> RunningArray:
        notice("waiting for node2 to be fenced")
        await asyncio.sleep(0.1)
        return Plain()

    async def story() -> None:
        async with process(rundir, start) as running:
            assert await running.heard() == {"notice": "waiting for node2 to be fenced"}
            assert "ready" in await running.heard()

    asyncio.run(story())


@pytest.mark.parametrize("how", ["starter", "signal"])
def test_a_start_is_undone_when_its_starter_dies_or_a_signal_comes(rundir: RunDir, how: str) -> None:
    undone = asyncio.Event()

    async def start(*_: Any) -> RunningArray:
        try:
            await asyncio.Event().wait()
        finally:
            undone.set()
        raise AssertionError

    async def story() -> None:
        async with process(rundir, start) as running:
            await asyncio.sleep(0.05)
            if how == "starter":
                running.starter_dies()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(running.task, 2) == 1
            assert undone.is_set()
            assert list(running.files.directory.iterdir()) == []

    asyncio.run(story())


def test_a_second_process_for_the_same_name_is_refused(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as first:
            await first.heard()
            second = Running(rundir)
            second.begin()
            assert (await second.heard())["refused"]["code"] == "already-running"
            assert await second.task == 1
            second.close()
            assert (await first.ask("status"))["pid"] == os.getpid()

    asyncio.run(story())


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"command": "dance"}', '{"command": 7}'])
def test_a_bad_request_is_refused_and_the_connection_goes_on(rundir: RunDir, line: str) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            reader, writer = await asyncio.open_unix_connection(running.files.control_socket)
            writer.write(line.encode() + b'\n{"command": "clients"}\n')
            assert "refused" in json.loads(await reader.readline())
            assert json.loads(await reader.readline()) == {"ok": True, "clients": []}
            writer.close()

    asyncio.run(story())


def test_a_line_without_end_closes_its_connection_only(rundir: RunDir) -> None:
    async def story() -> None:
        async with process(rundir) as running:
            await running.heard()
            reader, writer = await asyncio.open_unix_connection(running.files.control_socket)
            writer.write(b"x" * (2 * control.LINE_MAX_BYTES))
            try:
                await writer.drain()
                assert await reader.read() == b""
            except ConnectionError:
                pass  # closed while we still wrote
            writer.close()
            assert (await running.ask("clients")) == {"ok": True, "clients": []}

    asyncio.run(story())


def test_nobody_to_ask_is_a_refusal(rundir: RunDir) -> None:
    with pytest.raises(Refused) as refused:
        ControlClient(rundir, "md0")
    assert refused.value.code == "not-running"
    assert "node1" in refused.value.message
