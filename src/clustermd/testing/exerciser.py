"""The exerciser: writes blocks it can account for, and logs every acknowledgement.

    python -m clustermd.testing.exerciser --socket md0/nbd.sock --node 1 --blocks 0..4096 --log node1.log

It owns a range of 4 KiB blocks of an NBD export: nobody else writes there. With `--stripe S/I/N` it owns only
each N-th stripe of S blocks of the range, from the I-th on, so that N exercisers write side by side in the same
chunks. Up to `--depth` requests are in flight, never two on one block. A write is logged as issued
before it is sent and as acknowledged before its blocks are written again (`write_log`). Some
requests are reads of idle blocks, judged on the spot; some are flushes; some writes carry FUA.

With `--cross-read-percent` some requests read blocks of `--cross-blocks`, whoever writes them and whether or not a
write is under way; nobody can judge those on the spot. Every read is recorded beside the log (`history_log`),
and `register_history` judges them all afterwards.

Started again with the same log it goes on where that ended: it first reads each block in doubt.

The report (`--report`, JSON) is written when it ends: after `--seconds`, on SIGTERM, or when the
server dies. Times are CLOCK_MONOTONIC in ns, so that a test can take off intervals in which it held
a server on purpose. Exit status: 0 all well, 1 an error or a wrong read, 3 the server went away.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clustermd.testing.blocks import BLOCK_BYTES, content, parse
from clustermd.testing.history_log import ReadLogWriter
from clustermd.testing.judge import judge_block
from clustermd.testing.nbd_client import FUA, Command, Disconnected, NbdClient, Reply
from clustermd.testing.write_log import Kind, Knowledge, LogWriter, knowledge_of_logs

FINISHED = "finished"
STOPPED = "stopped"
DISCONNECTED = "disconnected"
STUCK = "stuck"

_SLOW_NS = 100_000_000
_DRAIN_S = 20.0
_POLL_S = 0.05
_TRIES_FOR_IDLE_BLOCKS = 16
_HOT_SHARE = 0.8
_MAX_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. Blocks are `first_block` to `end_block - 1`; `hot_blocks` get most requests.

    `stripe` (size, index, count): of each `count` stripes of `size` blocks the one numbered `index` is ours.
    `cross_blocks` (first, end): the blocks that cross reads choose from, None for all of the export.
    """

    node: int
    first_block: int
    end_block: int
    depth: int = 16
    seed: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    max_blocks: int = 4
    hot_blocks: int = 0
    read_percent: int = 20
    fua_percent: int = 5
    flush_percent: int = 1
    stripe: tuple[int, int, int] = (1, 0, 1)
    cross_read_percent: int = 0
    cross_blocks: tuple[int, int] | None = None


@dataclass(slots=True)
class Report:
    """What happened. `slow` holds (start, end) of each request that took 0.1 s or more, in ns."""

    node: int
    ended: str = FINISHED
    started_ns: int = 0
    ended_ns: int = 0
    reads: int = 0
    cross_reads: int = 0
    writes: int = 0
    flushes: int = 0
    in_flight_at_end: int = 0
    writes_in_flight_at_end: int = 0
    longest_request_ns: int = 0
    errors: list[str] = field(default_factory=list)
    slow: list[tuple[int, int]] = field(default_factory=list)

    def longest_stall_s(self, held: list[tuple[int, int]] | None = None) -> float:
        """The longest any request waited, in seconds, without the intervals in which the server was held."""
        longest = 0 if self.slow else self.longest_request_ns
        for start, end in self.slow:
            excused = sum(max(0, min(end, until) - max(start, since)) for since, until in held or [])
            longest = max(longest, end - start - excused)
        return longest / 1e9

    @classmethod
    def load(cls, path: str | Path) -> Report:
        values = json.loads(Path(path).read_text())
        values["slow"] = [(start, end) for start, end in values["slow"]]
        return cls(**values)


@dataclass(slots=True)
class _Request:
    command: Command
    block: int
    count: int
    sent_ns: int
    generations: list[tuple[int, int]] = field(default_factory=list)
    cross: bool = False


class Exerciser:
    """One connection's worth of load; `run` returns the report. `stop` may be called by a signal."""

    def __init__(self, client: NbdClient, plan: Plan, log_path: str | Path) -> None:
        if not 0 <= plan.first_block < plan.end_block <= client.size_bytes // BLOCK_BYTES:
            raise ValueError(f"blocks {plan.first_block}..{plan.end_block} are not all inside the export")
        size, _, stripes = plan.stripe
        if min(plan.hot_blocks or plan.end_block, plan.end_block - plan.first_block) < size * stripes:
            raise ValueError(f"there are too few blocks for {stripes} stripes of {size}")
        self._cross_blocks = plan.cross_blocks or (0, client.size_bytes // BLOCK_BYTES)
        if not 0 <= self._cross_blocks[0] < self._cross_blocks[1] <= client.size_bytes // BLOCK_BYTES:
            raise ValueError("the blocks of cross reads are not all inside the export")
        self._client = client
        self._plan = plan
        self._random = random.Random(f"{plan.seed}/{plan.node}")
        self._known = knowledge_of_logs([log_path])
        self._log = LogWriter(log_path, plan.node)
        self._reads = ReadLogWriter(log_path, plan.node)
        self._requests: dict[int, _Request] = {}
        self._busy: set[int] = set()
        self._stopping = False
        self._report = Report(plan.node)

    def stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> Report:
        report = self._report
        report.started_ns = time.monotonic_ns()
        try:
            self._settle_doubts()
            self._exercise()
            self._drain()
        except Disconnected:
            report.ended = DISCONNECTED
        now = time.monotonic_ns()
        report.ended_ns = now
        report.in_flight_at_end = len(self._requests)
        for request in self._requests.values():
            report.writes_in_flight_at_end += request.command is Command.WRITE
            if report.ended != DISCONNECTED:
                self._took(request, now)
        self._log.close()
        self._reads.close()
        return report

    def _settle_doubts(self) -> None:
        """Read each block whose last write was never answered: what it holds now is what it holds."""
        for block in [block for block, entry in self._known.items() if entry.in_doubt]:
            self._read(block, 1)
            self._answer(self._client.receive())

    def _exercise(self) -> None:
        plan = self._plan
        start = time.monotonic()
        sent = 0
        while not self._stopping:
            elapsed = time.monotonic() - start
            if plan.seconds and elapsed >= plan.seconds:
                return
            due = int(elapsed * plan.rate) + 1 - sent if plan.rate else plan.depth
            room = min(plan.depth - len(self._requests), due)
            for _ in range(room):
                sent += self._issue()
            paced = plan.rate and len(self._requests) < plan.depth
            self._collect(min(_POLL_S, 1 / plan.rate) if paced else _POLL_S)
        self._report.ended = STOPPED

    def _drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_S
        while self._requests:
            if time.monotonic() > deadline:
                self._report.ended = STUCK
                return
            self._collect(_POLL_S)

    def _collect(self, timeout_s: float) -> None:
        while self._client.readable(timeout_s):
            self._answer(self._client.receive())
            timeout_s = 0

    def _issue(self) -> int:
        """Send one request of the mix. Returns how many were sent: 0 when no idle blocks were found."""
        plan, roll = self._plan, self._random.random() * 100
        if roll < plan.flush_percent:
            handle = self._client.send(Command.FLUSH)
            self._requests[handle] = _Request(Command.FLUSH, 0, 0, time.monotonic_ns())
            return 1
        if 0 <= roll - plan.flush_percent - plan.read_percent < plan.cross_read_percent:
            self._read_across()
            return 1
        for _ in range(_TRIES_FOR_IDLE_BLOCKS):
            block, count = self._choose()
            if self._busy.isdisjoint(range(block, block + count)):
                break
        else:
            return 0
        if roll < plan.flush_percent + plan.read_percent:
            self._read(block, count)
        else:
            self._write(block, count, FUA if self._random.random() * 100 < plan.fua_percent else 0)
        return 1

    def _choose(self) -> tuple[int, int]:
        plan = self._plan
        hot = plan.hot_blocks and self._random.random() < _HOT_SHARE
        end = min(plan.end_block, plan.first_block + plan.hot_blocks) if hot else plan.end_block
        count = self._random.randint(1, plan.max_blocks)
        block = self._random.randrange(plan.first_block, end)
        size, index, stripes = plan.stripe
        if stripes > 1:
            within = (block - plan.first_block) % (size * stripes)
            block += index * size + within % size - within
            if block >= end:
                return self._choose()
            end = min(end, block + size - within % size)
        return block, min(count, end - block)

    def _read(self, block: int, count: int) -> None:
        # The time before the send: the server may have read before the send returns.
        now = time.monotonic_ns()
        handle = self._client.send(Command.READ, block * BLOCK_BYTES, count * BLOCK_BYTES)
        self._requests[handle] = _Request(Command.READ, block, count, now)
        self._busy.update(range(block, block + count))

    def _read_across(self) -> None:
        """Read blocks of whomever; what else is in flight there does not matter."""
        first, end = self._cross_blocks
        block = self._random.randrange(first, end)
        count = min(self._random.randint(1, self._plan.max_blocks), end - block)
        now = time.monotonic_ns()
        handle = self._client.send(Command.READ, block * BLOCK_BYTES, count * BLOCK_BYTES)
        self._requests[handle] = _Request(Command.READ, block, count, now, cross=True)

    def _write(self, block: int, count: int, flags: int) -> None:
        generations = []
        for each in range(block, block + count):
            entry = self._known.setdefault(each, Knowledge(self._plan.node))
            entry.issued += 1
            generations.append((each, entry.issued))
        self._log.append(Kind.ISSUED, generations)
        data = b"".join(content(self._plan.node, each, generation) for each, generation in generations)
        self._busy.update(range(block, block + count))
        now = time.monotonic_ns()
        # Known as in flight before a byte is sent: the server may die in the middle of the send.
        self._requests[-block - 1] = request = _Request(Command.WRITE, block, count, now, generations)
        handle = self._client.send(Command.WRITE, block * BLOCK_BYTES, data=data, flags=flags)
        del self._requests[-block - 1]
        self._requests[handle] = request

    def _answer(self, reply: Reply) -> None:
        request, now = self._requests.pop(reply.handle), time.monotonic_ns()
        self._took(request, now)
        if not request.cross:
            self._busy.difference_update(range(request.block, request.block + request.count))
        if reply.error:
            self._wrong(
                f"{request.command.name} of {request.count} blocks at {request.block}: error {reply.error}"
            )
        elif request.command is Command.WRITE:
            self._report.writes += 1
            self._log.append(Kind.ACKNOWLEDGED, request.generations)
            for block, generation in request.generations:
                self._known[block].floor = generation
        elif request.command is Command.READ:
            self._reads.append(request.block, reply.data, request.sent_ns, now)
            if request.cross:
                self._report.cross_reads += 1
                return
            self._report.reads += 1
            for number in range(request.count):
                self._verify(
                    request.block + number, reply.data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                )
        else:
            self._report.flushes += 1

    def _verify(self, block: int, data: bytes) -> None:
        entry = self._known.get(block, Knowledge(self._plan.node))
        fault = judge_block(block, entry, data)
        if fault is not None:
            self._wrong(f"read: {fault}")
            return
        identity = parse(data)
        if identity is not None and identity.generation > entry.floor:
            self._log.append(Kind.SEEN, [(block, identity.generation)])
            entry.floor = identity.generation

    def _took(self, request: _Request, now_ns: int) -> None:
        report, took = self._report, now_ns - request.sent_ns
        report.longest_request_ns = max(report.longest_request_ns, took)
        if took >= _SLOW_NS:
            report.slow.append((request.sent_ns, now_ns))
            if len(report.slow) > _MAX_KEPT:
                report.slow.remove(min(report.slow, key=lambda slow: slow[1] - slow[0]))

    def _wrong(self, what: str) -> None:
        if len(self._report.errors) < _MAX_KEPT:
            self._report.errors.append(what)


def _range(text: str) -> tuple[int, int]:
    first, _, end = text.partition("..")
    return int(first), int(end)


def _stripe(text: str) -> tuple[int, int, int]:
    size, index, count = map(int, text.split("/"))
    if not (size > 0 and 0 <= index < count):
        raise ValueError(text)
    return size, index, count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clustermd.testing.exerciser", description="writes blocks it can account for"
    )
    parser.add_argument("--socket", required=True, help="unix socket of the NBD server")
    parser.add_argument("--export", default="", help="name of the export")
    parser.add_argument("--log", required=True, help="append-only log of what was issued and acknowledged")
    parser.add_argument("--report", help="where the JSON report goes (default: standard output)")
    parser.add_argument("--node", type=int, required=True, help="number written into each block")
    parser.add_argument("--blocks", type=_range, required=True, metavar="A..B", help="4 KiB blocks A to B-1")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="0: until SIGTERM")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second, 0: as many as go")
    parser.add_argument("--max-blocks", type=int, default=4, help="largest request in blocks")
    parser.add_argument("--hot-blocks", type=int, default=0, help="this many first blocks get most requests")
    parser.add_argument("--read-percent", type=int, default=20)
    parser.add_argument("--fua-percent", type=int, default=5)
    parser.add_argument("--flush-percent", type=int, default=1)
    parser.add_argument(
        "--cross-read-percent", type=int, default=0, help="reads of blocks that others write, too"
    )
    parser.add_argument("--cross-blocks", type=_range, metavar="A..B", help="what those read (default: all)")
    parser.add_argument("--stripe", type=_stripe, default=(1, 0, 1), metavar="SIZE/INDEX/COUNT")
    return parser


def _exercise(path: str, export: str, plan: Plan, log: str) -> Report:
    """Connect and run. A server that dies before it has answered leaves a report as well: of nothing."""
    asked_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    started_ns = time.monotonic_ns()
    try:
        client = NbdClient(path, export)
    except (Disconnected, OSError):
        return Report(plan.node, DISCONNECTED, started_ns, time.monotonic_ns())
    with client:
        exerciser = Exerciser(client, plan, log)
        signal.signal(signal.SIGTERM, exerciser.stop)
        if asked_to_stop:
            exerciser.stop()
        return exerciser.run()


def main(arguments: list[str] | None = None) -> int:
    given = vars(_parser().parse_args(arguments))
    path, export, log, report_path = (given.pop(name) for name in ("socket", "export", "log", "report"))
    first, end = given.pop("blocks")
    plan = Plan(first_block=first, end_block=end, **given)
    report = _exercise(path, export, plan, log)
    text = json.dumps(asdict(report)) + "\n"
    if report_path:
        # Renamed into place: whoever waits for the report finds all of it.
        Path(report_path + ".new").write_text(text)
        os.replace(report_path + ".new", report_path)
    else:
        print(text, end="")
    if report.ended == DISCONNECTED:
        return 3
    return 1 if report.errors or report.ended == STUCK else 0


if __name__ == "__main__":
    sys.exit(main())
