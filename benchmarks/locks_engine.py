"""How fast the lock manager is without any network: `.venv/bin/python benchmarks/locks_engine.py`.

An uncontended EX lock is requested and freed again and again, on a thousand names in turn: two operations a pair.

- engine: `dlm.engine` alone, called directly; what it tells is taken after each pair.
- session frames: what a session's frames cost beside it, which every operation passes: checked, turned into a call, its
  effects turned into frames.
- machine, N operations an entry: `dlm.machine`, as every replica does it: an entry is unpacked, hashed into the
  history, logged, applied. Busy clients share an entry, a single one has it alone.
- contended: two sessions hand one EX lock to each other, with blocking callbacks; each turn is two operations.

One process, one processor; processor time, the best of several rounds, so other load disturbs little.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

from clustermd.dlm.engine import Engine
from clustermd.dlm.machine import Machine
from clustermd.dlm.modes import Mode
from clustermd.dlm.wire import Frame, check_client_frame, effect_frame, pack

SPACE = "benchmark"
LVB_BYTES = 64
NAMES = [b"resource-%d" % number for number in range(1024)]
US, OTHER = (1, 1, 1), (2, 1, 1)


def engine_with(*sessions: tuple[int, int, int]) -> Engine:
    """An engine whose sessions have joined."""
    engine = Engine()
    for key in sessions:
        engine.open_session(key, f"node{key[0]}", "benchmark", 1)
        engine.join(key, 1, SPACE, LVB_BYTES, 4)
    engine.take_effects()
    return engine


def engine_alone(pairs: int) -> float:
    """Seconds of processor time for `pairs` requests and unlocks."""
    engine = engine_with(US)
    started_s = time.process_time()
    for number in range(pairs):
        _, lock = engine.request(US, number, SPACE, NAMES[number & 1023], Mode.EX, 0, False)
        engine.unlock(US, number, lock, 0, None)
        engine.take_effects()
    return time.process_time() - started_s


def contended(pairs: int) -> float:
    """The same for turns of two sessions: one asks, the other hears of it and frees."""
    engine = engine_with(US, OTHER)
    _, held = engine.request(US, 1, SPACE, b"hot", Mode.EX, 0, True)
    holder, waiter = US, OTHER
    started_s = time.process_time()
    for number in range(pairs):
        _, wanted = engine.request(waiter, number, SPACE, b"hot", Mode.EX, 0, True)
        engine.unlock(holder, number, held, 0, None)
        engine.take_effects()
        held, holder, waiter = wanted, waiter, holder
    return time.process_time() - started_s


def frames_of(pairs: int) -> list[Frame]:
    """What a session sends for so many pairs, when its first lock has id 1."""
    frames: list[Frame] = []
    for number in range(pairs):
        op = 2 * number + 2
        frames.append(["request", op, SPACE, NAMES[number & 1023], int(Mode.EX), 0, False])
        frames.append(["unlock", op + 1, number + 1, 0, None])
    return frames


def session_frames(pairs: int) -> float:
    """The checks of a client's frames and the making of those that answer it, without applying anything."""
    engine = engine_with(US)
    frames = frames_of(pairs)
    _, lock = engine.request(US, 1, SPACE, b"one", Mode.EX, 0, False)
    engine.unlock(US, 2, lock, 0, None)
    effects = engine.take_effects()
    started_s = time.process_time()
    for number in range(0, len(frames), 2):
        check_client_frame(frames[number])
        check_client_frame(frames[number + 1])
        for effect in effects:
            effect_frame(effect)
    return time.process_time() - started_s


def machine_with(batch: int) -> Callable[[int], float]:
    """A measurement of the replicated state machine with `batch` operations an entry."""

    def measure(pairs: int) -> float:
        machine = Machine()
        machine.apply(pack(["install", 1, [[1, 1, "node1"]], [], []]))
        machine.apply(
            pack(["ops", 1, 1, 1, [[1, "open", "benchmark", 1], [1, "join", 1, SPACE, LVB_BYTES, 4]]])
        )
        ops = [[1, *frame] for frame in frames_of(pairs)]
        entries = [
            pack(["ops", 1, 1, first + 3, ops[first : first + batch]]) for first in range(0, len(ops), batch)
        ]
        started_s = time.process_time()
        for entry in entries:
            machine.apply(entry)
            machine.trim(machine.applied)
        spent_s = time.process_time() - started_s
        assert machine.engine.next_lock == pairs + 1, "every operation was applied"
        return spent_s

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=20_000, help="requests and unlocks a round (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="the best one counts (%(default)s)")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args()
    measured = {
        "engine": engine_alone,
        "contended": contended,
        "session frames": session_frames,
        "machine, 1 operation an entry": machine_with(1),
        "machine, 16 operations an entry": machine_with(16),
        "machine, 128 operations an entry": machine_with(128),
    }
    results = {
        name: 2 * options.pairs / min(measure(options.pairs) for _ in range(options.rounds))
        for name, measure in measured.items()
    }
    if options.json:
        print(json.dumps({name: round(rate) for name, rate in results.items()}))
        return
    print(f"Python {platform.python_version()}, {options.pairs} pairs a round, best of {options.rounds}")
    for name, rate in results.items():
        print(f"{name:<34}{rate:>12,.0f} operations/s{1e6 / rate:>8.2f} us each")


if __name__ == "__main__":
    main()
