"""An array in this process over image files: make the images, start it, send it requests, look at the disks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from faulty_submitter import Fault, FaultySubmitter

from clustermd.array.array import Array
from clustermd.array.assemble import load_members
from clustermd.array.coordinator import Alone, Coordinator
from clustermd.array.request import Kind, Request
from clustermd.clock import SystemClock
from clustermd.device.direct import open_member
from clustermd.device.member_device import MemberDevice
from clustermd.device.submitter import make_submitter
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.create import BitmapKind, NewMember, plan_create
from clustermd.ondisk.superblock import Superblock, find
from clustermd.trace import Trace

MIB = 1 << 20
BLOCK = 4096
CHUNK = 64 << 10
"""Bytes of a chunk of `make_images`, unless it is told otherwise."""


def make_images(
    directory: Path,
    count: int = 2,
    *,
    mib: int = 16,
    bitmap: BitmapKind = BitmapKind.INTERNAL,
    chunk: int = CHUNK,
    nodes: int = 4,
    delay: int = 1,
    assume_clean: bool = True,
    raid_disks: int | None = None,
    minor: int = 2,
) -> list[Path]:
    """Image files with a new array on them."""
    paths = [directory / f"disk{number}.img" for number in range(count)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(mib * MIB)
    plan = plan_create(
        devices=[NewMember(str(path), mib * MIB // 512) for path in paths],
        raid_disks=raid_disks or count,
        name="md0",
        set_uuid=b"U" * 16,
        device_uuids=[bytes([number + 1]) * 16 for number in range(count)],
        now=1_700_000_000,
        bitmap=bitmap,
        nodes=nodes,
        cluster_name="testcluster" if bitmap is BitmapKind.CLUSTERED else "",
        bitmap_chunk_bytes=chunk if bitmap is not BitmapKind.NONE else None,
        daemon_sleep=delay,
        assume_clean=assume_clean,
        minor=minor,
    )
    for member in plan.members:
        with open(member.path, "r+b") as file:
            for sector, content in member.writes:
                file.seek(sector * 512)
                file.write(content)
    return paths


def clustered(directory: Path, count: int = 2, **options: Any) -> list[Path]:
    """Image files with a new clustered array, whose bits are cleared late (`delay` 60) unless told otherwise."""
    return make_images(directory, count, bitmap=BitmapKind.CLUSTERED, **{"delay": 60, **options})


def superblock_of(path: Path) -> Superblock:
    with open(path, "rb") as file:

        def read(sector: int, count: int) -> bytes:
            file.seek(sector * 512)
            return file.read(count * 512)

        return find(read, os.path.getsize(path) // 512)


def data_at(path: Path) -> int:
    """The byte of a member at which its data begins."""
    return superblock_of(path).data_offset * 512


def data_of(path: Path) -> bytes:
    """The data area of a member, as long as the component size."""
    superblock = superblock_of(path)
    with open(path, "rb") as file:
        file.seek(superblock.data_offset * 512)
        return file.read(superblock.size * 512)


def poke(path: Path, array_byte: int, content: bytes) -> None:
    """Change one member's data behind the array's back."""
    superblock = superblock_of(path)
    with open(path, "r+b") as file:
        file.seek(superblock.data_offset * 512 + array_byte)
        file.write(content)


def slot_area(path: Path, slot: int) -> tuple[int, int, BitmapGeometry]:
    """(byte offset, length, geometry) of a slot's bitmap area."""
    superblock = superblock_of(path)
    with open(path, "rb") as file:
        file.seek((superblock.super_offset + superblock.bitmap_offset) * 512)
        header = BitmapSuperblock.from_bytes(file.read(256))
    geometry = BitmapGeometry.of(header)
    start = geometry.start_sector(superblock.super_offset, superblock.bitmap_offset, slot) * 512
    return start, geometry.bytes_per_node, geometry


def dirty_chunks(path: Path, slot: int = 0) -> list[int]:
    start, length, geometry = slot_area(path, slot)
    with open(path, "rb") as file:
        file.seek(start)
        return geometry.dirty_chunks(file.read(length))


def set_bits(path: Path, slot: int, chunks: list[int]) -> None:
    """Set bits of a slot on one member, as a node that died there would have left them."""
    start, length, _ = slot_area(path, slot)
    with open(path, "r+b") as file:
        file.seek(start)
        area = bytearray(file.read(length))
        for chunk in chunks:
            area[256 + chunk // 8] |= 1 << chunk % 8
        file.seek(start)
        file.write(area)


class Client:
    """Sends requests to a volume and awaits their answers."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self._answers: dict[int, asyncio.Future[Request]] = {}
        self._cookie = 0

    def completed(self, request: Request) -> None:
        self._answers.pop(request.cookie).set_result(request)

    def send(
        self, kind: Kind, offset: int = 0, data: bytes | int = 0, *, fua: bool = False, no_hole: bool = False
    ) -> asyncio.Future[Request]:
        length = data if isinstance(data, int) else len(data)
        buffer = None
        if kind in (Kind.READ, Kind.WRITE):
            buffer = self.array.pool.take(length)
            if isinstance(data, bytes):
                buffer.view[:length] = data
        self._cookie += 1
        answer: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        self._answers[self._cookie] = answer
        self.array.submit([Request(kind, offset, length, buffer, self, self._cookie, fua, no_hole)])
        return answer

    async def do(self, kind: Kind, offset: int = 0, data: bytes | int = 0, **flags: bool) -> bytes:
        request = await asyncio.wait_for(self.send(kind, offset, data, **flags), 20)
        content = b""
        if request.buffer is not None:
            content = bytes(request.buffer.view[: request.length_bytes])
            request.buffer.release()
        if request.error:
            raise OSError(request.error, os.strerror(request.error))
        return content

    async def write(self, offset: int, data: bytes, **flags: bool) -> None:
        await self.do(Kind.WRITE, offset, data, **flags)

    async def read(self, offset: int, length: int) -> bytes:
        return await self.do(Kind.READ, offset, length)


@asynccontextmanager
async def running(
    paths: list[Path],
    *,
    coordinator: Coordinator | None = None,
    opener: Callable[[str], MemberDevice] | None = None,
    read_only: bool = False,
    allow_degraded: bool = False,
    trace: Trace | None = None,
    device_timeout_s: int = 30,
    stop: bool = True,
    faulty: bool | list[Fault] = False,
    tick_s: float = 1.0,
    **options: Any,
) -> AsyncIterator[tuple[Array, Client]]:
    """A started array and a client; stopped in the end.

    `faulty`: over a `FaultySubmitter` (`disks_of`), with these faults from the start. `tick_s`: how long one of the
    seconds takes by which the array counts how long a member does not answer.
    """
    submitter: Any = make_submitter()
    if faulty is not False:
        submitter = FaultySubmitter(submitter, faulty if isinstance(faulty, list) else None)
    assembly = await load_members(
        [str(path) for path in paths],
        opener or (lambda path: open_member(path, read_only=read_only, clustered=False, exclusive=False)),
        submitter,
    )
    array = Array(
        "md0",
        assembly,
        coordinator or Alone(),
        submitter,
        SystemClock(),
        trace or Trace(),
        read_only=read_only,
        allow_degraded=allow_degraded,
        device_timeout_s=device_timeout_s,
        **options,
    )
    array.state.tick_s = tick_s
    try:
        await array.start()
        yield array, Client(array)
        if stop:
            await asyncio.wait_for(array.stop(), 20)
    except BaseException:
        if stop:
            await abandon(array)
        raise


def disks_of(array: Array) -> FaultySubmitter:
    """The faulty submitter of an array."""
    submitter = array.state.submitter
    assert isinstance(submitter, FaultySubmitter)
    return submitter


def tasks_of(array: Array) -> set[asyncio.Task[Any]]:
    """The tasks of an array, as far as it knows them."""
    tasks: set[Any] = set(array._tasks) | array.state.tasks
    tasks |= {array.resync._task, array.repair._task, array.faults._task, array.activity.task}
    life = getattr(array.coordinator, "_life", None)
    if life is not None:
        tasks |= set(life._tasks.values()) | {life.channel._task}
    return {task for task in tasks if task is not None}


async def abandon(array: Array) -> None:
    """End an array as a crash would: nothing more is submitted, what is in flight lands or fails."""
    array.state.gate.shut("abandoned by the test")
    if isinstance(array.state.submitter, FaultySubmitter):
        array.state.submitter.well()
        array.state.submitter.release(error=5)
    await array.state.submitter.drained()
    for task in tasks_of(array):
        task.cancel()


def run(story: Coroutine[Any, Any, None], limit_s: float = 30) -> None:
    """Run a test's story; longer than `limit_s` is a failure, and so is an error in a completion of I/O.

    Such an error (a request answered twice, a counter below zero) reaches no caller; only the loop hears of it.
    """
    errors: list[BaseException] = []

    def hear(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and "completion" in context["message"]:
            errors.append(error)
        loop.default_exception_handler(context)

    async def listened_to() -> None:
        asyncio.get_running_loop().set_exception_handler(hear)
        await asyncio.wait_for(story, limit_s)

    asyncio.run(listened_to())
    assert not errors, f"errors in completions: {errors}"


async def until(what: Callable[[], object], limit_s: float = 10) -> None:
    """Wait until `what()` is true. For states that give no event; a test says in an assertion what it means."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limit_s
    while not what():
        assert loop.time() < end_s, "it never came to that"
        await asyncio.sleep(0.002)
