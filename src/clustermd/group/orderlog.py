"""The order's log: what makes a message stable at once on one machine.

Every event is written here before any member sees it. The file needs no fsync: what write(2) took survives
the death of every process, and when the machine goes, all members go with it. So when a sequencer dies,
each member reads the events it missed from the log, a new sequencer replays it, and nothing that
anybody was told is ever unknown to another (dlm.md 6.2: a grant shown must not be lost with its asker).

`order.log` starts with ["clustermd-order", 1, boot id] and a base record, then events, framed as on the
wire. When it is large it becomes `order.prev`, kept until every member has confirmed all of it, and a
new `order.log` starts with the state at that point as its base. A record cut short by a kill
was shown to nobody; the next sequencer cuts it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from clustermd.errors import BadBytes
from clustermd.group.frames import Decoder, Frame, encode
from clustermd.group.order import Event, Order

_MAGIC = "clustermd-order"
_VERSION = 1
ROTATE_BYTES = 8 << 20


class OrderLog:
    """The log as its one writer, the sequencer, has it."""

    def __init__(self, root: Path, boot_id: str) -> None:
        self._path = root / "order.log"
        self._previous = root / "order.prev"
        self._new = root / "order.new"
        self._boot_id = boot_id
        self._descriptor = -1
        self._size_bytes = 0
        self._base_place = 0

    def open(self) -> Order:
        """Replay what is there; a log of another boot keeps its places and rings, and no members.

        Raises BadBytes ("bad-order-log") with what to do when it cannot be read.
        """
        if self._previous.exists() and not self._path.exists():
            os.rename(self._previous, self._path)  # killed in the middle of a rotation, before any new event
        if not self._path.exists():
            return self._begin(Order())
        records, valid_bytes = _read(self._path)
        if len(records) < 2 or records[0][:2] != [_MAGIC, _VERSION] or len(records[0]) != 3:
            raise BadBytes(
                "bad-order-log",
                f"{self._path} is no order log of this version: "
                "end all processes of this cluster, then remove it",
                path=str(self._path),
            )
        order = Order.from_base(records[1])
        self._base_place = order.place
        for event in records[2:]:
            order.apply(event)
        if records[0][2] != self._boot_id:
            order.members, order.lost, order.seqs = {}, {}, {}
            self._previous.unlink(missing_ok=True)
            return self._begin(order)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(self._descriptor, valid_bytes)
        self._size_bytes = valid_bytes
        return order

    def append(self, data: bytes) -> None:
        """Write encoded events. Raises OSError; the sequencer must then end without telling anybody."""
        self._size_bytes += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def rotate(self, order: Order, confirmed_place: int) -> None:
        """Start a new file when this one is large, once all members have confirmed the one before."""
        if confirmed_place >= self._base_place and self._previous.exists():
            self._previous.unlink()
        if self._size_bytes >= ROTATE_BYTES and not self._previous.exists():
            self._begin(order)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self, order: Order) -> Order:
        data = encode([_MAGIC, _VERSION, self._boot_id]) + encode(order.base())
        self.close()
        self._descriptor = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._size_bytes = 0
        self._base_place = order.place
        self.append(data)
        if self._path.exists():
            os.rename(self._path, self._previous)
        os.rename(self._new, self._path)
        return order


def _read(path: Path) -> tuple[list[Frame], int]:
    """All whole records, and how many bytes they take."""
    decoder = Decoder()
    data = path.read_bytes()
    return decoder.feed(data), len(data) - decoder.pending_bytes


def missed(root: Path, place: int) -> Iterator[Event]:
    """The events after `place`, for a member whose sequencer has died. Raises BadBytes, OSError."""
    for name in ("order.prev", "order.log"):
        try:
            records, _ = _read(root / name)
        except FileNotFoundError:
            continue
        for event in records[2:]:
            if event[1] == place + 1:
                place += 1
                yield event
