"""The fence device: its blocks, what it is made of, the message that ends a life, and a node that watches."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from clustermd.clock import SystemClock
from clustermd.conf import Conf
from clustermd.errors import BadBytes, Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.group.process import start_time
from clustermd.group.process_group import Member
from clustermd.lockd.fencing.device import DeviceFencer
from clustermd.lockd.fencing.fence_disk import BLOCK_BYTES, SIZE_BYTES, SLOTS, Beat, FenceDisk, Pill
from clustermd.lockd.fencing.make import make_fencer
from clustermd.lockd.fencing.self_fence import self_fence
from clustermd.lockd.fencing.watch import DeviceWatch

LIMIT_S = 30.0
UUID = bytes(range(16))
ONE, TWO = Member(1, 0x1111, "node1"), Member(2, 0x2222, "node2")
T = TypeVar("T")


def run(story: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(story, LIMIT_S)

    return asyncio.run(bounded())


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A file that takes O_DIRECT, and one in memory, which may not."""
    if request.param == "disk":
        yield str(tmp_path / "fence")
        return
    file = Path(f"/dev/shm/cmd-fence-{os.getpid()}")
    yield str(file)
    file.unlink(missing_ok=True)


@pytest.fixture
def disk(path: str) -> Any:
    FenceDisk.create(path, UUID)
    disk = FenceDisk.open(path)
    yield disk
    disk.close()


# --- blocks


def test_blocks_come_back_as_they_were_written(disk: FenceDisk) -> None:
    beat, pill = Beat(7, "node7", 2**64 - 1, 9), Pill(7, 5, "nöde1")
    assert disk.beat(7) is None and disk.pill(7) is None
    disk.write_beat(beat)
    disk.write_pill(pill)
    assert (disk.beat(7), disk.pill(7)) == (beat, pill)
    disk.write_beat(Beat(7, "node7", 1, 10))
    assert disk.pill(7) == pill, "a heartbeat took the message away"
    last = Beat(SLOTS - 1, "last", 1, 1)
    disk.write_beat(last)
    assert disk.beats() == [Beat(7, "node7", 1, 10), last]
    assert os.path.getsize(disk.path) == SIZE_BYTES


def test_a_number_without_a_slot_is_refused_with_the_remedy(disk: FenceDisk) -> None:
    with pytest.raises(Refused, match=r"0 to 1023, not for 1024.*nodeid in corosync.conf"):
        disk.write_pill(Pill(1024, 1, "x"))
    with pytest.raises(Refused):
        disk.pill(-1)


def test_a_torn_or_foreign_block_is_no_message(disk: FenceDisk) -> None:
    disk.write_pill(Pill(2, 5, "node1"))
    with open(disk.path, "r+b") as file:
        file.seek(BLOCK_BYTES * 6 + 40)
        file.write(b"\xff")
    with pytest.raises(BadBytes, match="message to node 2 has a wrong checksum"):
        disk.pill(2)
    FenceDisk(disk.path, os.open(disk.path, os.O_RDWR), bytes(16)).write_beat(Beat(3, "other", 1, 1))
    with pytest.raises(BadBytes, match="another device"):
        disk.beat(3)
    assert disk.beats() == []


# --- making one


@pytest.mark.parametrize("at", [0, 1080, 4096, SIZE_BYTES - 1, (20 << 20) - 4096, (20 << 20) - 1])
def test_nothing_that_has_content_becomes_a_fence_device(tmp_path: Path, at: int) -> None:
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(20 << 20)
        file.seek(at)
        file.write(b"x")
    before = path.read_bytes()
    with pytest.raises(Refused, match="not empty") as caught:
        FenceDisk.create(str(path), UUID)
    assert caught.value.code == "fence-device-not-empty" and path.read_bytes() == before


def test_too_small_made_twice_or_no_disk_at_all(path: str, tmp_path: Path) -> None:
    FenceDisk.create(path, UUID)
    with pytest.raises(Refused, match="already"):
        FenceDisk.create(path, UUID)
    (tmp_path / "small").write_bytes(bytes(4096))
    with pytest.raises(Refused, match="needs 8392704"):
        FenceDisk.create(str(tmp_path / "small"), UUID)
    with pytest.raises(Refused, match="neither a disk nor a file"):
        FenceDisk.create("/dev/null", UUID)
    with pytest.raises(Refused, match="No such file"):
        FenceDisk.create(str(tmp_path / "no" / "where"), UUID)
    assert not (tmp_path / "no").exists()


def test_an_empty_disk_of_any_size_is_taken(tmp_path: Path) -> None:
    for size in (0, SIZE_BYTES, SIZE_BYTES + 12345):
        path = tmp_path / f"disk{size}"
        with open(path, "wb") as file:
            file.truncate(size)
        FenceDisk.create(str(path), UUID)
        FenceDisk.open(str(path)).close()


def test_what_is_no_fence_device_is_not_opened(tmp_path: Path) -> None:
    for content in (b"", bytes(8192), b"CMDFENCE" + bytes(8192), os.urandom(8192)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(Refused, match="fence-device --create") as caught:
            FenceDisk.open(str(tmp_path / "other"))
        assert caught.value.code == "not-a-fence-device"
    with pytest.raises(Refused, match="cannot be opened"):
        FenceDisk.open(str(tmp_path / "missing"))


# --- the policy


def _fencer(disk: FenceDisk, me: Member = ONE, watchdog_s: float = 1.0, bound_s: float = 0.2) -> DeviceFencer:
    return DeviceFencer(disk, me, SystemClock(), watchdog_s, bound_s)


class Node:
    """A node that watches, and writes down what becomes of it."""

    def __init__(self, disk: Any, me: Member, watchdog_s: float = 1.0) -> None:
        self.ended = ""
        self.until_s = 0.0
        self.watch: DeviceWatch = _fencer(disk, me, watchdog_s).watch(self._end, self._renew, interval_s=0.05)

    def _end(self, reason: str) -> None:
        assert not self.ended
        self.ended = reason

    def _renew(self, until_s: float) -> None:
        self.until_s = until_s


async def _until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_a_lost_node_reads_its_message_and_ends_and_the_proof_comes_after_its_time(disk: FenceDisk) -> None:
    async def story() -> None:
        node = Node(disk, TWO)
        await node.watch.claim()
        watching = asyncio.create_task(node.watch.run())
        await _until(lambda: (beat := disk.beat(2)) is not None and beat.count > 2)
        assert node.until_s > SystemClock().boottime_s() and not node.ended
        fencer = _fencer(disk)
        began = time.monotonic()
        proof = await fencer.fence(Victim(2, "node2", TWO.incarnation, 0.0))
        assert time.monotonic() - began >= fencer.wait_s == 2.2
        assert "node1 says so" in node.ended and "told to end" in proof
        assert node.until_s < SystemClock().boottime_s() - 0.2, "it could have submitted after the proof"
        await watching

    run(story())


def test_the_message_names_the_life_that_gives_heartbeats_there(disk: FenceDisk) -> None:
    """Of two lost lives, the one that may still act; and the one whose number nobody knows."""

    async def story(known: int) -> None:
        node = Node(disk, Member(2, 0x3333, "node2"))
        await node.watch.claim()
        watching = asyncio.create_task(node.watch.run())
        fencing = asyncio.create_task(_fencer(disk).fence(Victim(2, "node2", known, 0.0)))
        await watching
        assert "says so" in node.ended
        fencing.cancel()

    run(story(0x2222))
    disk.write_pill(Pill(2, 1, "nobody"))
    run(story(0))


def test_the_next_life_of_a_node_does_not_obey_a_message_to_the_last(disk: FenceDisk) -> None:
    async def story() -> None:
        disk.write_pill(Pill(2, 0x9999, "node1"))
        node = Node(disk, TWO)
        await node.watch.claim()
        watching = asyncio.create_task(node.watch.run())
        await _until(lambda: (beat := disk.beat(2)) is not None and beat.count > 4)
        assert not node.ended
        watching.cancel()

    run(story())


def test_a_node_that_cannot_read_the_device_ends_itself_in_time(disk: FenceDisk) -> None:
    class Broken:
        path, good = disk.path, True

        def beat(self, node: int) -> Beat | None:
            return None

        def write_beat(self, beat: Beat) -> None:
            pass

        def pill(self, node: int) -> Pill | None:
            if not self.good:
                raise OSError(5, "Input/output error")
            return None

    async def story() -> None:
        broken = Broken()
        node = Node(broken, TWO, watchdog_s=0.5)
        await node.watch.claim()
        watching = asyncio.create_task(node.watch.run())
        await _until(lambda: node.until_s)
        broken.good = False
        await _until(lambda: node.watch.trouble)
        broken.good = True
        await _until(lambda: not node.watch.trouble)  # an error that passes is none
        broken.good = False
        began, until_s = time.monotonic(), node.until_s
        await watching
        assert 0.4 < time.monotonic() - began < 5
        assert "could not be read" in node.ended and "Input/output error" in node.ended
        assert node.until_s <= until_s + 0.2, "a failed look renewed the lease"

    run(story())


def test_a_device_that_hangs_ends_the_node_and_blocks_nothing(disk: FenceDisk) -> None:
    class Hanging:
        path, looks = disk.path, 0

        def pill(self, node: int) -> Pill | None:
            self.looks += 1
            time.sleep(1.5)
            return None

        def write_beat(self, beat: Beat) -> None:
            raise AssertionError("it gives no heartbeat while it cannot read")

    async def story() -> None:
        hanging = Hanging()
        node = Node(hanging, TWO, watchdog_s=0.5)
        began = time.monotonic()
        await node.watch.run()
        assert time.monotonic() - began < 1.4
        assert "does not answer" in node.ended and hanging.looks == 1 and not node.until_s
        await asyncio.sleep(1.5)  # the thread that hangs

    run(story())


def test_a_slow_look_gives_leave_from_its_start_not_its_end(disk: FenceDisk) -> None:
    class Slow:
        path = disk.path

        def pill(self, node: int) -> Pill | None:
            time.sleep(0.3)
            return None

        def write_beat(self, beat: Beat) -> None:
            pass

    async def story() -> None:
        node = Node(Slow(), TWO, watchdog_s=5.0)
        began_s = SystemClock().boottime_s()
        watching = asyncio.create_task(node.watch.run())
        await _until(lambda: node.until_s)
        assert node.until_s < began_s + 5.2
        watching.cancel()
        await asyncio.sleep(0.4)

    run(story())


def test_one_number_belongs_to_one_living_node(disk: FenceDisk) -> None:
    async def story() -> None:
        other = Node(disk, Member(2, 0x3333, "other"))
        await other.watch.claim()
        watching = asyncio.create_task(other.watch.run())
        await _until(lambda: (beat := disk.beat(2)) is not None and beat.count > 2)
        with pytest.raises(Refused, match="in use by other"):
            await Node(disk, TWO).watch.claim()
        with pytest.raises(Refused, match="two nodes have one nodeid"):
            await _fencer(disk).fence(Victim(2, "node2", 5, 0.0))
        assert disk.pill(2) is None
        watching.cancel()
        await asyncio.sleep(0.2)
        await Node(disk, TWO).watch.claim()  # nobody gives heartbeats there any more
        beat = disk.beat(2)
        assert beat is not None and beat.name == "node2"

    run(story())


def test_a_message_that_cannot_be_written_proves_nothing(disk: FenceDisk) -> None:
    class ReadOnly:
        path = disk.path
        beat = disk.beat

        def write_pill(self, pill: Pill) -> None:
            raise OSError(30, "Read-only file system")

    class Hanging(ReadOnly):
        def write_pill(self, pill: Pill) -> None:
            time.sleep(1.0)

    class Forgetful(ReadOnly):
        def write_pill(self, pill: Pill) -> None:
            pass

        def pill(self, node: int) -> Pill | None:
            return None

    for device, why in (
        (ReadOnly(), "Read-only"),
        (Hanging(), "did not answer"),
        (Forgetful(), "was not found"),
    ):
        fencer = DeviceFencer(device, ONE, SystemClock(), 0.3, 0.0)  # type: ignore[arg-type]
        with pytest.raises(Refused, match=why) as caught:
            run(fencer.fence(Victim(2, "node2", 5, 0.0)))
        assert caught.value.code == "fence-failed"


def test_a_check_names_who_is_silent(disk: FenceDisk) -> None:
    async def story() -> None:
        node = Node(disk, TWO)
        await node.watch.claim()
        watching = asyncio.create_task(node.watch.run())
        disk.write_beat(Beat(1, "node1", 1, 1))
        assert "heartbeats of node2" in await _fencer(disk).check("node2")
        with pytest.raises(Refused, match="node1 gave no heartbeat"):
            await _fencer(disk).check("")
        watching.cancel()
        await asyncio.sleep(0.1)

    run(story())


# --- ending oneself


def test_ending_oneself_kills_exactly_those_processes(tmp_path: Path) -> None:
    async def story() -> None:
        first = await asyncio.create_subprocess_exec("sleep", "1000")
        second = await asyncio.create_subprocess_exec("sleep", "1000")
        started = [(one.pid, start_time(one.pid) or 0) for one in (first, second)]
        switch, dog = tmp_path / "sysrq", tmp_path / "watchdog"
        switch.touch()
        # a number that another process has by now is left alone
        wrong = (started[1][0], started[1][1] - 1)
        assert self_fence([started[0], wrong], "kill", sysrq=switch, watchdog=dog) == 1
        assert await first.wait() == -9 and second.returncode is None and switch.read_text() == ""
        assert self_fence([started[1]], "reboot", sysrq=switch, watchdog=dog) == 1
        assert await second.wait() == -9 and switch.read_text() == "b"

    run(story())


def test_a_reboot_that_is_refused_leaves_the_watchdog_alone_and_open(tmp_path: Path) -> None:
    dog = tmp_path / "watchdog"
    dog.touch()
    self_fence([], "reboot", sysrq=tmp_path / "no" / "sysrq", watchdog=dog)
    numbers = [number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
    held = [number for number in numbers if os.readlink(f"/proc/self/fd/{number}") == str(dog)]
    assert len(held) == 1
    os.close(int(held[0]))
    self_fence([], "reboot", sysrq=tmp_path / "no" / "sysrq", watchdog=tmp_path / "no" / "dog")


# --- choosing


def test_the_configuration_chooses_the_policy(path: str) -> None:
    FenceDisk.create(path, UUID)
    texts = {
        "agent": 'fence = "agent"\n[fence_agent]\nagent = "fence_xvm"\n',
        "stonith": 'fence = "stonith"\n',
        "device": f'fence = "device"\nfence_device = "{path}"\n',
        "lease": 'fence = "lease"\n',
        "none": 'fence = "none"\n',
    }
    for policy, text in texts.items():
        fencer = run(make_fencer(Conf.parse(text.encode()), ONE, SystemClock()))
        assert fencer.policy == policy
        assert bool(fencer.unsafe) == (policy in ("lease", "none"))
    with pytest.raises(Refused, match="no way to fence"):
        run(make_fencer(Conf(), ONE, SystemClock()))
