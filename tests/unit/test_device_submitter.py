"""The submitter's contract, the same for io_uring, for a very small ring, and for threads."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.member_device import Gate, GateState, Op, Submitter
from clustermd.device.ring import Ring
from clustermd.device.submitter import make_submitter
from clustermd.device.threads import ThreadSubmitter
from clustermd.device.uring import UringSubmitter
from clustermd.errors import Refused

SIZE_BYTES = 4 << 20
LIMIT_S = 20.0

Make = Callable[[asyncio.AbstractEventLoop, Gate], Submitter]

KINDS: dict[str, Make] = {
    "uring": lambda loop, gate: UringSubmitter(loop, gate, 64 << 20),
    # everything waits for room: a backlog, and a wrap every four requests
    "small ring": lambda loop, gate: UringSubmitter(loop, gate, 64 << 20, entries=4, completion_entries=8),
    # more in flight than the completion ring holds: the kernel has to keep some back
    "overflow": lambda loop, gate: UringSubmitter(
        loop, gate, 64 << 20, entries=4, completion_entries=4, slots=256
    ),
    "threads": lambda loop, gate: ThreadSubmitter(loop, gate, 64 << 20, threads=4),
}


@pytest.fixture(params=list(KINDS))
def make(request: pytest.FixtureRequest) -> Make:
    return KINDS[request.param]


@pytest.fixture
def path(tmp_path: Path) -> str:
    image = tmp_path / "member.img"
    with open(image, "wb") as file:
        file.truncate(SIZE_BYTES)
    return str(image)


class Recorder:
    """A target that writes down what completes."""

    def __init__(self) -> None:
        self.results: dict[int, int] = {}
        self.order: list[str] = []
        self.then: Callable[[int, int], None] | None = None

    def io_done(self, tag: int, result: int) -> None:
        assert tag not in self.results, f"request {tag} completed twice"
        self.results[tag] = result
        self.order.append(f"done {tag}")
        if self.then is not None:
            self.then(tag, result)


class Bench:
    """One submitter with one device and a recorder."""

    def __init__(self, submitter: Submitter, gate: Gate, device: DirectDevice) -> None:
        self.submitter = submitter
        self.gate = gate
        self.device = device
        self.recorder = Recorder()
        self.changed = asyncio.Event()
        submitter.after_sweep(self.changed.set)

    def write(self, tag: int, offset_bytes: int, data: bytes, fua: bool = False) -> None:
        buffer = self.submitter.pool.take(len(data))
        buffer.view[: len(data)] = data
        self.submitter.queue(
            self.device, Op.WRITE, offset_bytes, len(data), buffer, 0, self.recorder, tag, fua
        )

    async def results(self, count: int) -> dict[int, int]:
        while len(self.recorder.results) < count:
            self.changed.clear()
            await self.changed.wait()
        return self.recorder.results


@asynccontextmanager
async def bench(make: Make, path: str) -> AsyncIterator[Bench]:
    gate = Gate()
    device = open_member(path)
    submitter = make(asyncio.get_running_loop(), gate)
    try:
        yield Bench(submitter, gate, device)
    finally:
        # a lost completion would let close wait for ever, where the test should fail
        await asyncio.wait_for(submitter.close(), LIMIT_S / 2)
        device.close()


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, LIMIT_S))


def test_nothing_happens_before_submit_and_nobody_is_called_within_it(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            b.write(1, 0, b"a" * 4096)
            for _ in range(5):
                await asyncio.sleep(0)
            assert b.submitter.in_flight == 0
            b.submitter.submit()
            assert b.recorder.results == {}
            assert b.submitter.in_flight == 1
            assert await b.results(1) == {1: 4096}
            assert b.submitter.in_flight == 0

    run(story())
    assert Path(path).read_bytes()[:4096] == b"a" * 4096


def test_a_batch_of_all_operations(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            for tag in range(300):
                b.write(tag, tag * 4096, bytes([tag % 251 + 1]) * 4096, fua=tag % 3 == 0)
            b.submitter.submit()
            assert set((await b.results(300)).values()) == {4096}
            assert await b.submitter.run(b.device, Op.FLUSH, 0, 0) == 0
            assert await b.submitter.run(b.device, Op.DISCARD, 4096, 8192) == 0
            buffer = b.submitter.pool.take(16384)
            # buffer offset: read into the second half
            assert await b.submitter.run(b.device, Op.READ, 0, 8192, buffer, 8192) == 8192
            assert bytes(buffer.view[8192:16384]) == bytes([1]) * 4096 + bytes(4096)
            # and write from there
            assert await b.submitter.run(b.device, Op.WRITE, 1 << 20, 4096, buffer, 8192) == 4096

    run(story())
    content = Path(path).read_bytes()
    assert len(content) == SIZE_BYTES
    assert content[4096:12288] == bytes(8192)
    assert content[12288 : 12288 + 4096] == bytes([4]) * 4096
    assert content[1 << 20 : (1 << 20) + 4096] == bytes([1]) * 4096


def test_errors_and_short_reads_come_back_per_request(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            reader = open_member(path, read_only=True)
            closed = open_member(path, read_only=True)
            closed.close()
            buffer = b.submitter.pool.take(8192)
            queue, done = b.submitter.queue, b.recorder
            queue(b.device, Op.READ, 0, 4096, buffer, 0, done, 0)
            queue(reader, Op.WRITE, 0, 4096, buffer, 0, done, 1)
            queue(closed, Op.READ, 0, 4096, buffer, 0, done, 2)
            queue(b.device, Op.READ, SIZE_BYTES - 4096, 8192, buffer, 0, done, 3)
            queue(b.device, Op.READ, SIZE_BYTES, 4096, buffer, 0, done, 4)
            queue(closed, Op.FLUSH, 0, 0, None, 0, done, 5)
            queue(reader, Op.DISCARD, 0, 4096, None, 0, done, 6)
            queue(b.device, Op.READ, 4096, 4096, buffer, 0, done, 7)
            queue(b.device, Op.READ, -4096, 4096, buffer, 0, done, 8)
            b.submitter.submit()
            assert await b.results(9) == {
                0: 4096,
                1: -errno.EBADF,
                2: -errno.EBADF,
                3: 4096,
                4: 0,
                5: -errno.EBADF,
                6: -errno.EBADF,
                7: 4096,
                8: -errno.EINVAL,
            }
            reader.close()

    run(story())


def test_held_gate_keeps_the_queue_and_opening_lets_it_go(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            b.gate.hold("contact lost")
            for tag in range(20):
                b.write(tag, tag * 4096, b"h" * 4096)
                b.submitter.submit()
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert b.recorder.results == {}
            assert b.submitter.in_flight == 0
            assert Path(path).read_bytes() == bytes(SIZE_BYTES)
            b.gate.open()
            assert b.recorder.results == {}
            assert set((await b.results(20)).values()) == {4096}

    run(story())


def test_shut_gate_answers_later_and_writes_nothing(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            b.gate.hold("contact lost")
            for tag in range(20):
                b.write(tag, tag * 4096, b"s" * 4096)
            b.submitter.submit()
            b.gate.shut("others may have taken over")
            assert b.recorder.results == {}
            assert set((await b.results(20)).values()) == {-errno.ESHUTDOWN}
            # and so does everything queued from now on
            b.write(20, 0, b"s" * 4096)
            b.submitter.submit()
            assert 20 not in b.recorder.results
            assert (await b.results(21))[20] == -errno.ESHUTDOWN
            assert await b.submitter.run(b.device, Op.FLUSH, 0, 0) == -errno.ESHUTDOWN

    run(story())
    assert Path(path).read_bytes() == bytes(SIZE_BYTES)


def test_what_was_queued_before_a_shut_never_passes_a_renewed_gate(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            b.gate.hold("contact lost")
            for tag in range(20):
                b.write(tag, tag * 4096, b"s" * 4096)
            b.gate.shut("others may have taken over")
            b.gate.renew()
            assert b.gate.state is GateState.OPEN
            b.submitter.submit()
            assert set((await b.results(20)).values()) == {-errno.ESHUTDOWN}
            b.write(20, 20 * 4096, b"n" * 4096)
            b.submitter.submit()
            assert (await b.results(21))[20] == 4096

    run(story())
    assert Path(path).read_bytes()[: 20 * 4096] == bytes(20 * 4096)


class SetLease:
    """A lease that a test ends and renews."""

    def __init__(self) -> None:
        self.good = True

    def valid(self) -> bool:
        return self.good


def test_a_lease_is_looked_at_before_each_submission_and_again_while_it_is_over(
    make: Make, path: str
) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            lease = b.gate.lease = SetLease()
            seen: list[GateState] = []
            b.gate.listen(seen.append)
            lease.good = False
            b.write(0, 0, b"c" * 4096)
            b.submitter.submit()
            await asyncio.sleep(0.05)
            assert b.recorder.results == {}
            assert seen == [GateState.HELD] and "lease" in b.gate.reason
            # a lease that is renewed tells nobody
            lease.good = True
            assert await b.results(1) == {0: 4096}
            assert seen == [GateState.HELD, GateState.OPEN]
            lease.good = False
            b.write(1, 0, b"c" * 4096)
            b.submitter.submit()
            b.gate.shut("others may have taken over")
            assert (await b.results(2))[1] == -errno.ESHUTDOWN

    run(story())


def test_contact_and_lease_both_have_to_let_go_of_the_gate(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            lease = b.gate.lease = SetLease()
            lease.good = False
            b.write(0, 0, b"c" * 4096)
            b.submitter.submit()
            b.gate.hold("contact lost")
            assert b.gate.reason == "contact lost"
            lease.good = True
            await asyncio.sleep(0.05)
            assert b.gate.state is GateState.HELD and b.recorder.results == {}
            lease.good = False
            b.submitter.submit()
            b.gate.open()
            await asyncio.sleep(0.05)
            assert b.gate.state is GateState.HELD and "lease" in b.gate.reason and b.recorder.results == {}
            lease.good = True
            assert await b.results(1) == {0: 4096}

    run(story())


def test_a_gate_opens_again_after_a_lease_even_if_nothing_waits_behind_it(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            lease = b.gate.lease = SetLease()
            lease.good = False
            waiter = asyncio.create_task(b.submitter.run(b.device, Op.FLUSH, 0, 0))
            await asyncio.sleep(0.01)
            waiter.cancel()
            opened = asyncio.Event()
            b.gate.listen(lambda state: opened.set())
            lease.good = True
            await asyncio.wait_for(opened.wait(), LIMIT_S)
            assert b.gate.state is GateState.OPEN

    run(story())


def test_a_request_that_waits_for_a_thread_looks_at_the_lease_again(path: str) -> None:
    class EndsAfterFirstLook(SetLease):
        looks = 0

        def valid(self) -> bool:
            self.looks += 1
            return self.good and (self.looks == 1 or self.looks > 3)

    async def story() -> None:
        async with bench(KINDS["threads"], path) as b:
            lease = b.gate.lease = EndsAfterFirstLook()
            b.write(0, 0, b"t" * 4096)
            b.submitter.submit()  # the first look: the gate lets it pass; then the thread's own
            while lease.looks < 2:
                await asyncio.sleep(0)
            assert b.recorder.results == {} and Path(path).read_bytes()[:4096] == bytes(4096)
            assert await b.results(1) == {0: 4096}

    run(story())
    assert Path(path).read_bytes()[:4096] == b"t" * 4096


def test_a_sweep_calls_targets_then_listeners_then_submits_what_they_queued(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            order = b.recorder.order

            def follow(tag: int, result: int) -> None:
                if tag < 10:
                    b.write(tag + 10, tag * 4096, b"f" * 4096)
                    assert tag + 10 not in b.recorder.results

            b.recorder.then = follow
            b.submitter.after_sweep(lambda: order.append("swept"))
            for tag in range(10):
                b.write(tag, tag * 4096, b"e" * 4096)
            b.submitter.submit()
            # no submit by us: the sweep does it
            assert len(await b.results(20)) == 20
            await asyncio.sleep(0)
            assert order[-1] == "swept"
            assert order.index("swept") < order.index("done 10")

    run(story())
    assert Path(path).read_bytes()[: 10 * 4096] == b"f" * 40960


def test_an_error_in_a_target_or_listener_loses_no_completion(make: Make, path: str) -> None:
    async def story() -> None:
        reported: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        async with bench(make, path) as b:

            def fail(tag: int, result: int) -> None:
                if tag % 2:
                    raise ZeroDivisionError(f"target {tag}")

            def fail_once() -> None:
                if "listener" not in reported:
                    raise ZeroDivisionError("listener")

            b.submitter.after_sweep(fail_once)
            b.recorder.then = fail
            for tag in range(50):
                b.write(tag, tag * 4096, b"x" * 4096)
            b.submitter.submit()
            assert len(await b.results(50)) == 50
            await b.submitter.drained()
            assert sorted(set(reported)) == sorted(
                [f"target {tag}" for tag in range(1, 50, 2)] + ["listener"]
            )

    run(story())


def test_data_is_right_over_many_ring_lengths(make: Make, path: str) -> None:
    """Each block is written and read back 40 times; a slot mixed up shows as wrong data or a wrong tag."""

    async def story() -> None:
        async with bench(make, path) as b:
            blocks, rounds = 64, 40
            turns = [0] * blocks
            buffers = [b.submitter.pool.take(4096) for _ in range(blocks)]
            finished = asyncio.Event()

            class Block:
                def content(self, block: int) -> bytes:
                    return (block * 1000 + turns[block]).to_bytes(8, "little") * 512

                def write(self, block: int) -> None:
                    buffers[block].view[:4096] = self.content(block)
                    b.submitter.queue(
                        b.device, Op.WRITE, block * 4096, 4096, buffers[block], 0, self, block * 2
                    )

                def io_done(self, tag: int, result: int) -> None:
                    block, was_read = divmod(tag, 2)
                    assert result == 4096
                    if not was_read:
                        buffers[block].view[:4096] = bytes(4096)
                        b.submitter.queue(
                            b.device, Op.READ, block * 4096, 4096, buffers[block], 0, self, tag + 1
                        )
                        return
                    assert buffers[block].view[:4096] == self.content(block)
                    turns[block] += 1
                    if turns[block] < rounds:
                        self.write(block)
                    elif min(turns) == rounds:
                        finished.set()

            target = Block()
            for block in range(blocks):
                target.write(block)
            b.submitter.submit()
            await finished.wait()

    run(story())


def test_a_cancelled_run_returns_only_when_the_device_is_done_with_the_buffer(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            buffer = b.submitter.pool.take(1 << 20)
            buffer.view[:4096] = b"c" * 4096
            task = asyncio.ensure_future(b.submitter.run(b.device, Op.WRITE, 0, 1 << 20, buffer))
            await asyncio.sleep(0)
            assert b.submitter.in_flight == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert b.submitter.in_flight == 0

            # behind a held gate it is withdrawn: the caller does not wait, and nothing is written later
            b.gate.hold("contact lost")
            for tag in range(20):
                b.write(tag, (tag + 1) * 4096, b"k" * 4096)
            task = asyncio.ensure_future(b.submitter.run(b.device, Op.WRITE, 1 << 21, 4096, buffer))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            b.gate.open()
            assert set((await b.results(20)).values()) == {4096}

    run(story())
    content = Path(path).read_bytes()
    assert content[:4096] == b"c" * 4096
    assert content[1 << 21 : (1 << 21) + 4096] == bytes(4096)


def test_closing_waits_for_what_is_in_flight_and_cancels_what_is_held(make: Make, path: str) -> None:
    async def story() -> None:
        async with bench(make, path) as b:
            for tag in range(10):
                b.write(tag, tag * 4096, b"z" * 4096)
            b.submitter.submit()
            b.gate.hold("contact lost")
            for tag in range(10, 20):
                b.write(tag, tag * 4096, b"z" * 4096)
            await b.submitter.close()
            results = b.recorder.results
            assert len(results) == 20
            assert all(results[tag] == -errno.ECANCELED for tag in range(10, 20))
            assert b.submitter.in_flight == 0
            await b.submitter.close()

    run(story())


def test_a_kernel_short_of_memory_is_asked_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Ring.enter
    answers = [-errno.EAGAIN, -errno.EBUSY, 3]

    def scarce(ring: Ring, count: int) -> int:
        answer = answers.pop(0) if answers else count
        return answer if answer < 0 else enter(ring, min(answer, count))

    async def story() -> None:
        async with bench(KINDS["uring"], path) as b:
            monkeypatch.setattr(Ring, "enter", scarce)
            for tag in range(10):
                b.write(tag, tag * 4096, b"m" * 4096)
            b.submitter.submit()
            assert set((await b.results(10)).values()) == {4096}

    run(story())
    assert not answers


def test_an_unknown_operation_is_no_discard(path: str) -> None:
    async def story() -> None:
        async with bench(KINDS["uring"], path) as b:
            with pytest.raises(ValueError, match="no Op"):
                b.submitter.queue(b.device, 9, 0, 4096, None, 0, b.recorder, 0)  # type: ignore[arg-type]

    run(story())


def test_the_environment_chooses_the_submitter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def kind() -> type:
        submitter = make_submitter(pool_bytes=1 << 20)
        await submitter.close()
        return type(submitter)

    monkeypatch.setenv("CLUSTERMD_IO", "threads")
    assert asyncio.run(kind()) is ThreadSubmitter
    monkeypatch.setenv("CLUSTERMD_IO", "uring")
    assert asyncio.run(kind()) is UringSubmitter
    monkeypatch.delenv("CLUSTERMD_IO")
    assert asyncio.run(kind()) is UringSubmitter
    monkeypatch.setenv("CLUSTERMD_IO", "magic")
    with pytest.raises(Refused) as refused:
        asyncio.run(kind())
    assert refused.value.code == "bad-io-choice"


def test_where_io_uring_is_refused_threads_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    async def kind() -> type:
        submitter = make_submitter(pool_bytes=1 << 20)
        await submitter.close()
        return type(submitter)

    monkeypatch.setattr("clustermd.device.uring.Ring", refuse)
    monkeypatch.delenv("CLUSTERMD_IO", raising=False)
    assert asyncio.run(kind()) is ThreadSubmitter
    monkeypatch.setenv("CLUSTERMD_IO", "uring")
    with pytest.raises(Refused) as refused:
        asyncio.run(kind())
    assert refused.value.code == "no-io-uring"
