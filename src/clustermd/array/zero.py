"""Discards and zeroes: writes like any other, in pieces (rule 9).

A TRIM goes down only where every member then reads zeroes; elsewhere it succeeds and does nothing, since copies that
differ are worse than space not freed. WRITE_ZEROES discards under the same condition unless the client wants the
space kept, and writes zeroes otherwise. A member that turns out not to discard after all makes the piece
be written with zeroes on all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from clustermd.array.request import Kind, Request
from clustermd.device.member_device import Buffer

DISCARD_PIECE_BYTES = 64 << 20
ZERO_PIECE_BYTES = 1 << 20
PARALLEL = 4


class Lent:
    """The array's zeroes, lent to one piece: giving them back gives back nothing."""

    __slots__ = ("address", "view")

    def __init__(self, zeroes: Buffer) -> None:
        self.view = zeroes.view
        self.address = zeroes.address

    def release(self) -> None:
        return None


class ZeroJob:
    """One TRIM or WRITE_ZEROES request: hands pieces to `start` and answers when all are done."""

    __slots__ = (
        "_answered",
        "_discard",
        "_end",
        "_error",
        "_on_way",
        "_position",
        "_request",
        "_start",
        "_zeroes",
    )

    def __init__(
        self, request: Request, discard: bool, zeroes: Buffer, start: Callable[[Request], None]
    ) -> None:
        self._request = request
        self._discard = discard
        self._zeroes = Lent(zeroes)
        self._start = start
        self._position = request.offset_bytes
        self._end = request.offset_bytes + request.length_bytes
        self._on_way = 0
        self._error = 0
        self._answered = False

    def run(self) -> None:
        """Hand out pieces up to the limit. Queues only."""
        while self._position < self._end and self._on_way < PARALLEL and not self._error:
            length = min(
                DISCARD_PIECE_BYTES if self._discard else ZERO_PIECE_BYTES, self._end - self._position
            )
            at, self._position = self._position, self._position + length
            self._on_way += 1
            self._piece(Kind.TRIM if self._discard else Kind.WRITE, at, length)
        if not self._on_way and not self._answered:
            self._answered = True
            self._request.error = self._error
            self._request.owner.completed(self._request)

    def _piece(self, kind: Kind, at: int, length: int) -> None:
        buffer = self._zeroes if kind is Kind.WRITE else None
        self._start(Request(kind, at, length, buffer, self, 0, self._request.fua))

    def completed(self, piece: Request) -> None:
        if piece.error == errno.EOPNOTSUPP and piece.kind is Kind.TRIM:
            self._discard = False
            self._position = min(self._position, piece.offset_bytes)  # from there on with zeroes
        elif piece.error:
            self._error = self._error or piece.error
        self._on_way -= 1
        self.run()
