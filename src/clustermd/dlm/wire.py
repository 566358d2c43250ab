"""The frames between a client and its lock daemon, and those that the daemons multicast. All are lists for msgpack.

A client sends one frame for each operation; `op` is the client's own number, echoed in the answer:

    ["join", op, space, lvb_bytes, max_slots, flags]  -> ["done", ...] or ["refused", ...]; ["waits", ...] between
    ["leave", op, space]                              -> ["answer", op, rc, 0]
    ["recovered", op, space, slot, generation]        -> ["answer", op, rc, 0]
    ["purge", op, space, node, pid]                   -> ["answer", op, rc, 0]
    ["request", op, space, name, mode, flags, bast]   -> ["answer", op, rc, lock], then ["cast", ...]
                              with ORPHAN             -> ["adopted", ...], or ["answer", op, rc < 0, 0]
    ["convert", op, lock, mode, flags, lvb]           -> ["cast", ...], or ["answer", op, rc < 0, lock]
    ["unlock", op, lock, flags, lvb]                  -> ["cast", ...], or ["answer", op, rc < 0, lock]
                              with CANCEL             -> as "cancel"
    ["cancel", op, lock, status]                      -> ["answer", op, rc, lock]; the pending op gets its cast

The last field of a join (a `SpaceFlag`, 0) and of a cancel (ECANCEL) may be left out. It hears, in the order in which
the lock manager generated it:

    ["answer", op, rc, lock]
    ["refused", op, code, message, data]
    ["cast", op, lock, status, sb_flags, lvb, mode]
    ["adopted", op, lock, sb_flags, lvb, mode]
    ["bast", lock, mode]
    ["waits", op, space, [[slot, node, name, state], ...]]
    ["prep", space]
    ["slot", space, slot, node, name]
    ["done", space, [[slot, node, name], ...], our_slot, generation]

What comes in is checked here: a frame with a wrong word, type or length raises BadBytes and changes nothing.
Names of resources are 1 to 64 bytes (dlm.md 1.2), of lockspaces 1 to 64 characters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from clustermd.dlm.effects import (
    Answer,
    Bast,
    Cast,
    Effect,
    JoinWaits,
    RecoverDone,
    RecoverPrep,
    RecoverSlot,
)
from clustermd.dlm.modes import ECANCEL, EDEADLK, ETIMEDOUT
from clustermd.errors import BadBytes

Frame = list[Any]

OP_MAX = (1 << 63) - 1
LOCK_MAX = (1 << 64) - 1
SLOTS_MAX = 4096
LVB_BYTES_MAX = 4096

_PACKER = msgpack.Packer(use_bin_type=True)


def pack(value: Any) -> bytes:
    packed: bytes = _PACKER.pack(value)
    return packed


def array_head(count: int) -> bytes:
    """What stands before the `count` packed values of a list."""
    head: bytes = msgpack.Packer().pack_array_header(count)
    return head


def unpack(data: bytes) -> Any:
    """Raises BadBytes for what is not one msgpack value."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData) as error:
        raise BadBytes("bad-frame", f"{len(data)} bytes from a lock daemon are no message: {error}") from None


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _text(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and low <= len(value) <= high


def _name(value: Any) -> bool:
    return type(value) is bytes and 1 <= len(value) <= 64


def _lvb(value: Any) -> bool:
    return value is None or (type(value) is bytes and len(value) <= LVB_BYTES_MAX)


_OP = _integer(0, OP_MAX)
_MODE = _integer(0, 5)
_FLAGS = _integer(0, 0xFFFFFFFF)
_LOCK = _integer(0, LOCK_MAX)
_SPACE = _text(1, 64)
_STATUS: Callable[[Any], bool] = lambda value: value in (ECANCEL, EDEADLK, ETIMEDOUT)  # noqa: E731  as the next
_BOOL: Callable[[Any], bool] = lambda value: type(value) is bool  # noqa: E731  a row of the table below

CLIENT_FRAMES: dict[str, tuple[tuple[str, Callable[[Any], bool]], ...]] = {
    "join": (
        ("lockspace", _SPACE),
        ("value block bytes", _integer(0, LVB_BYTES_MAX)),
        ("slots", _integer(1, SLOTS_MAX)),
        ("flags", _FLAGS),
    ),
    "leave": (("lockspace", _SPACE),),
    "recovered": (
        ("lockspace", _SPACE),
        ("slot", _integer(1, SLOTS_MAX)),
        ("generation", _integer(0, OP_MAX)),
    ),
    "purge": (("lockspace", _SPACE), ("node", _OP), ("process", _OP)),
    "request": (
        ("lockspace", _SPACE),
        ("resource name", _name),
        ("mode", _MODE),
        ("flags", _FLAGS),
        ("blocking callback", _BOOL),
    ),
    "convert": (("lock", _LOCK), ("mode", _MODE), ("flags", _FLAGS), ("value block", _lvb)),
    "unlock": (("lock", _LOCK), ("flags", _FLAGS), ("value block", _lvb)),
    "cancel": (("lock", _LOCK), ("status", _STATUS)),
}
_MAY_END_EARLY = frozenset(("join", "cancel"))
"""Frames whose last field may be left out."""


def check_client_frame(frame: Any) -> None:
    """Raises BadBytes if `frame` is none of `CLIENT_FRAMES`, or one of its fields is not what it must be."""
    if type(frame) is not list or len(frame) < 2 or type(frame[0]) is not str:
        raise BadBytes("bad-frame", "a lock client sent something that is no operation")
    fields = CLIENT_FRAMES.get(frame[0])
    if fields is None:
        raise BadBytes("bad-frame", f"a lock client asked for {frame[0][:32]!r}, which is no operation")
    if len(frame) == 1 + len(fields) and frame[0] in _MAY_END_EARLY:
        fields = fields[:-1]
    if len(frame) != 2 + len(fields) or not _OP(frame[1]):
        raise BadBytes(
            "bad-frame", f"a {frame[0]} of a lock client has not the {2 + len(fields)} fields it must have"
        )
    for value, (what, allowed) in zip(frame[2:], fields, strict=True):
        if not allowed(value):
            raise BadBytes(
                "bad-frame", f"a {frame[0]} of a lock client has a {what} that cannot be: {str(value)[:64]!r}"
            )


def frame_op(frame: Any) -> int:
    """The operation number of a frame that may be malformed; 0 if it has none."""
    if type(frame) is list and len(frame) > 1 and _OP(frame[1]):
        return int(frame[1])
    return 0


def effect_frame(effect: Effect) -> Frame:
    """The frame that tells a client about an effect."""
    match effect:
        case Answer(_, op, rc, lock):
            return ["answer", op, rc, lock]
        case Cast(adopted=True):
            return ["adopted", effect.op, effect.lock, effect.sb_flags, effect.lvb, effect.mode]
        case Cast():
            return ["cast", effect.op, effect.lock, effect.status, effect.sb_flags, effect.lvb, effect.mode]
        case Bast(_, lock, mode):
            return ["bast", lock, mode]
        case RecoverPrep(_, space):
            return ["prep", space]
        case RecoverSlot(_, space, slot, node, name):
            return ["slot", space, slot, node, name]
        case RecoverDone(_, space, slots, our_slot, generation):
            return ["done", space, [list(slot) for slot in slots], our_slot, generation]
        case JoinWaits(_, op, space, holders):
            return ["waits", op, space, [list(holder) for holder in holders]]
        case _:
            return ["refused", effect.op, effect.code, effect.message, effect.data]
