"""The lock engine answers as the DLM of Linux 6.1 did, operation by operation (recorded: goldens/dlm/README.md)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import goldens
import pytest

from clustermd.dlm.effects import Bast, Cast
from clustermd.dlm.engine import Engine
from clustermd.dlm.modes import Flag
from clustermd.dlm.resource import Lock, Resource

SPACE = "kernel"
US = (1, 1, 1)
LVB_BYTES = 32


def recordings() -> list[Path]:
    """All files of recorded sequences; none where this machine has no recordings."""
    root = goldens.directory()
    return [] if root is None else sorted((root / "dlm").glob("*.jsonl*"))


def sequences(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            yield json.loads(line)


class Recorded:
    """An engine driven by the operations of one recorded sequence, answering in the recording's form."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.engine.open_session(US, "node1", "recording", 1)
        self.engine.join(US, 1, SPACE, LVB_BYTES, 1)
        self.engine.take_effects()
        self.ids: dict[int, int] = {}
        self.handles: dict[int, int] = {}

    def do(self, op: list[Any]) -> dict[str, Any]:
        word, handle, *rest = op
        rc = 0
        if word == "req":
            name, mode, flags = rest
            rc, lock = self.engine.request(US, 0, SPACE, name.encode(), mode, flags, True)
            if rc == 0:
                self.ids[handle], self.handles[lock] = lock, handle
        elif word == "conv":
            mode, flags, lvb = rest
            rc, _ = self.engine.convert(US, 0, self.ids[handle], mode, flags, value(lvb))
        elif word == "unlock":
            flags, lvb = rest
            rc, _ = self.engine.unlock(US, 0, self.ids[handle], flags, value(lvb))
        else:
            rc, _ = self.engine.cancel(US, self.ids[handle])
        events: dict[str, list[Any]] = {}
        for effect in self.engine.take_effects():
            if isinstance(effect, Cast):
                lvb = None if effect.lvb is None else effect.lvb.hex()
                event = ["c", effect.status, effect.sb_flags, lvb]
            elif isinstance(effect, Bast):
                event = ["b", effect.mode]
            else:
                continue
            events.setdefault(str(self.handles[effect.lock]), []).append(event)
        return {"rc": rc, "ev": events, "st": self.queues()}

    def queues(self) -> dict[str, Any]:
        return {
            name.decode(): {
                "g": [self.entry(lock)[:2] for lock in resource.granted],
                "c": [self.entry(lock) for lock in resource.converting],
                "w": [self.entry(lock) for lock in resource.waiting],
                "lvb": None if resource.lvb is None else resource.lvb.hex(),
                "invalid": resource.invalid,
            }
            for name, resource in self.resources().items()
        }

    def resources(self) -> dict[bytes, Resource]:
        return self.engine.spaces[SPACE].resources

    def entry(self, lock: Lock) -> list[int]:
        return [self.handles[lock.id], lock.gr, lock.rq]


def value(lvb: str | None) -> bytes:
    """The recorder's request always carried a buffer; without a value it held zeros."""
    return bytes(LVB_BYTES) if lvb is None else bytes.fromhex(lvb)


def recorded(answer: dict[str, Any]) -> dict[str, Any]:
    """The kernel's answer without what means nothing: the requested mode of granted locks, internal flags,
    and resources that have no locks (the kernel keeps them for a while)."""
    return {
        "rc": answer["rc"],
        "ev": answer["ev"],
        "st": {
            name: {
                "g": [entry[:2] for entry in state["g"]],
                "c": state["c"],
                "w": state["w"],
                "lvb": state["lvb"],
                "invalid": bool(state["flags"] & 2),
            }
            for name, state in answer["st"].items()
            if state["g"] or state["c"] or state["w"]
        },
    }


@pytest.mark.parametrize("path", recordings(), ids=lambda path: path.name)
def test_every_recorded_answer_of_the_kernel_is_ours(path: Path) -> None:
    operations = 0
    for number, sequence in enumerate(sequences(path)):
        ours = Recorded()
        for place, (op, answer) in enumerate(zip(sequence["ops"], sequence["kernel"], strict=True)):
            assert ours.do(op) == recorded(answer), f"sequence {number}, operation {place}: {op}"
            operations += 1
        for handle in sorted(ours.ids):
            ours.engine.unlock(US, 0, ours.ids[handle], int(Flag.FORCEUNLOCK), None)
        assert ours.resources() == {}
        assert ours.engine.locks == {}
    assert operations > 0
    if path.name == "kernel-6.1.jsonl.gz":
        assert operations > 12_000
