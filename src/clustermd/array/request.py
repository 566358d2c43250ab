"""One client request on its way through an array.

The export makes it, `Volume.submit` takes a batch of them, and the array answers each exactly once by
`owner.completed(request)` with `error` set (0 or a positive errno). The buffer is the request's own until then.
"""

from __future__ import annotations

import enum
from typing import Protocol

from clustermd.device.member_device import Buffer, BufferPool


class Kind(enum.IntEnum):
    READ = 0
    WRITE = 1
    FLUSH = 2
    TRIM = 3
    WRITE_ZEROES = 4


class Owner(Protocol):
    def completed(self, request: Request) -> None:
        """`request` is answered. Called from a completion sweep, from within `submit`, or when a life ends; must not
        submit."""


class Request:
    """`offset_bytes` and `length_bytes` are multiples of 512, inside the array; FLUSH has neither.

    READ: the array fills `buffer.view[:length_bytes]`. WRITE: it writes what is there; nobody may change
    it before completion. `fua`: the write is durable when completed. `no_hole`: WRITE_ZEROES must not
    deallocate. `cookie` is the owner's.
    """

    __slots__ = (
        "buffer",
        "cookie",
        "error",
        "fua",
        "kind",
        "length_bytes",
        "no_hole",
        "offset_bytes",
        "owner",
    )

    def __init__(
        self,
        kind: Kind,
        offset_bytes: int,
        length_bytes: int,
        buffer: Buffer | None,
        owner: Owner,
        cookie: int,
        fua: bool = False,
        no_hole: bool = False,
    ) -> None:
        self.kind = kind
        self.offset_bytes = offset_bytes
        self.length_bytes = length_bytes
        self.buffer = buffer
        self.owner = owner
        self.cookie = cookie
        self.fua = fua
        self.no_hole = no_hole
        self.error = 0


class Volume(Protocol):
    """What an export serves: a running array (or a memory volume in tests)."""

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def block_bytes(self) -> int:
        """What offsets and lengths must be multiples of."""

    @property
    def pool(self) -> BufferPool: ...

    def submit(self, batch: list[Request]) -> None:
        """Take a batch. Each request is completed once, now or later; this never blocks or raises."""
