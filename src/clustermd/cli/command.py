"""What a parsed command line is, and the values in it that more than one option has: sizes and UUIDs."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from clustermd.cli.options import Mode
from clustermd.errors import Refused

_UNIT_SECTORS = {"K": 2, "M": 2 << 10, "G": 2 << 20, "T": 2 << 30, "s": 1}


class UsageError(Refused):
    """The command line cannot be understood. Exit status 2. With `data["usage"]` getopt's hint follows."""

    def __init__(self, message: str, code: str = "usage", usage: bool = False) -> None:
        super().__init__(code, message, usage=usage)


class Action(enum.Enum):
    """What misc mode does with its devices."""

    DETAIL = "detail"
    EXAMINE = "examine"
    EXAMINE_BITMAP = "examine-bitmap"
    QUERY = "query"
    STOP = "stop"
    WAIT = "wait"
    ZERO_SUPERBLOCK = "zero-superblock"


@dataclass(slots=True)
class Command:
    """A parsed command line. Options not given are None, False or empty.

    `devices` are all words that are no options, in their order. Sizes are sectors of 512 bytes;
    `size_sectors` is 0 for `max`. `verb` is set for our own verbs; `devices` are then its words, unread.
    """

    mode: Mode | None = None
    action: Action | None = None
    verb: str | None = None
    devices: list[str] = field(default_factory=list)

    level: int | None = None
    layout: str | None = None
    raid_devices: int | None = None
    spare_devices: int | None = None
    size_sectors: int | None = None
    chunk_sectors: int | None = None
    data_offset_sectors: int | None = None
    metadata: str | None = None
    bitmap: str | None = None
    bitmap_chunk_bytes: int | None = None
    delay_s: int | None = None
    nodes: int | None = None
    home_cluster: str | None = None
    homehost: str | None = None
    name: str | None = None
    uuid: bytes | None = None
    config: str | None = None
    prefer: str | None = None
    cluster_engine: str | None = None

    assume_clean: bool = False
    brief: bool = False
    export: bool = False
    force: bool = False
    help: bool = False
    help_options: bool = False
    json: bool = False
    quiet: bool = False
    readonly: bool = False
    run: bool = False
    scan: bool = False
    test: bool = False
    verbose: int = 0
    version: bool = False


def parse_uuid(text: str) -> bytes:
    """16 bytes from 32 hexadecimal digits with ':', '.', '-' or blanks between. Raises UsageError."""
    digits = re.sub(r"[:.\- ]", "", text)
    if not re.fullmatch(r"[0-9a-fA-F]{32}", digits):
        raise UsageError(f"Bad uuid: {text}")
    return bytes.fromhex(digits)


def parse_size(text: str) -> int | None:
    """Sectors from a number of KiB, or with a suffix K, M, G, T (or s for sectors). None for other text."""
    match = re.fullmatch(r"(\d{1,18})([KMGTs]?)", text)
    if not match:
        return None
    return int(match[1]) * _UNIT_SECTORS[match[2] or "K"]
