"""Sizes and times as mdadm words them: both binary and decimal units, two digits, local time."""

from __future__ import annotations

import time

_STEPS = ((1 << 31, 1 << 20, 10**6, "M"), (1 << 41, 1 << 30, 10**9, "G"), (None, 1 << 40, 10**12, "T"))
_SECONDS = (1 << 40) - 1


def human_size(size_bytes: int) -> str:
    """` (63.00 MiB 66.06 MB)` with its leading space, or nothing for less than 5000 KiB."""
    if size_bytes < 5000 * 1024:
        return ""
    binary, decimal, letter = _step(size_bytes)
    return f" ({_hundredths(size_bytes, binary)} {letter}iB {_hundredths(size_bytes, decimal)} {letter}B)"


def human_size_brief(size_bytes: int) -> str:
    """`66.06MB`: decimal units, as in `--export`; nothing for less than 5000 KiB."""
    if size_bytes < 5000 * 1024:
        return ""
    _, decimal, letter = _step(size_bytes)
    return f"{_hundredths(size_bytes, decimal)}{letter}B"


def human_chunk(size_bytes: int) -> str:
    """`64 KB`, `1 MB`: the largest binary unit that is not larger than the size."""
    for suffix in ("B", "KB", "MB", "GB"):
        if size_bytes < 1024:
            return f"{size_bytes} {suffix}"
        size_bytes >>= 10
    return f"{size_bytes} TB"


def local_time(stamp: int) -> str:
    """`Sun Nov 22 09:18:17 2026` for a superblock's time (seconds in its low 40 bits)."""
    return time.ctime(stamp & _SECONDS)


def uuid_text(uuid: bytes) -> str:
    """Four groups of eight hex digits with colons, in the raw byte order."""
    digits = uuid.hex()
    return ":".join(digits[at : at + 8] for at in range(0, 32, 8))


def _step(size_bytes: int) -> tuple[int, int, str]:
    for limit, binary, decimal, letter in _STEPS:
        if limit is None or size_bytes < limit:
            return binary, decimal, letter
    raise AssertionError("the last step has no limit")


def _hundredths(size_bytes: int, unit: int) -> str:
    """`size / unit` rounded half up to two digits."""
    if unit & (unit - 1):
        hundredths = (size_bytes // (unit // 200) + 1) // 2
    else:
        hundredths = (size_bytes * 200 // unit + 1) // 2
    return f"{hundredths // 100}.{hundredths % 100:02d}"
