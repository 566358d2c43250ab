"""The text of /proc/mdstat, to the byte, from what the arrays say of themselves.

Linux prints per array a line with its members, a line with its size and `[raid disks/working] [UU_]`, then
a line for a running sync (a bar) or a waiting one (a tab and `resync=PENDING`), then the bitmap, each behind
six blanks; an array without bitmap ends in the six blanks (seen in files recorded from Linux 6.1;
md-cluster spec 5.12). The order of arrays and of members is the caller's.

Not ours is `(auto-read-only)`: there is no such state here (design, rule 13).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from clustermd.array.status import ArrayStatus, BitmapStatus, MemberStatus, SyncStatus

PERSONALITIES = ("raid1",)
"""Levels this program runs."""


def mdstat(arrays: Sequence[ArrayStatus]) -> str:
    """The whole file for `arrays`, which come in the order they are shown in."""
    head = "Personalities : " + "".join(f"[{name}] " for name in PERSONALITIES) + "\n"
    return head + "".join(array_text(array) for array in arrays) + "unused devices: <none>\n"


def array_text(array: ArrayStatus) -> str:
    """The lines of one array. An empty one follows a bitmap; without bitmap there is a line of blanks."""
    shown = member_names(array.members)
    names = "".join(
        f" {name}[{member.number}]{flags(member)}" for name, member in zip(shown, array.members, strict=True)
    )
    activity = "active (read-only)" if array.read_only else "active"
    working = array.raid_disks - array.degraded
    lines = [
        f"{array.name} : {activity} {level_name(array.level)}{names}",
        f"      {array.array_sectors // 2} blocks super {array.metadata}"
        f" [{array.raid_disks}/{working}] [{role_letters(array)}]",
    ]
    if array.sync is not None:
        lines.append("      " + sync_text(array.sync))
    lines.append("      " + (bitmap_text(array.bitmap) + "\n" if array.bitmap else ""))
    return "\n".join(lines) + "\n"


def level_name(level: int) -> str:
    """`raid1` for 1, `linear` for -1."""
    return "linear" if level == -1 else f"raid{level}"


def member_names(members: Sequence[MemberStatus]) -> list[str]:
    """Each member's basename; the whole path for those whose basenames collide."""
    times = Counter(os.path.basename(member.path) for member in members)
    return [
        member.path if times[os.path.basename(member.path)] > 1 else os.path.basename(member.path)
        for member in members
    ]


def flags(member: MemberStatus) -> str:
    """What stands behind a member, in Linux's order: (W) write-mostly, (F) faulty, (S) spare."""
    text = "(W)" if member.write_mostly else ""
    if member.faulty:
        return text + "(F)"
    return text + ("(S)" if member.spare else "")


def role_letters(array: ArrayStatus) -> str:
    """One letter per role: U when its member is in sync."""
    in_sync = {member.role for member in array.members if member.in_sync and not member.faulty}
    return "".join("U" if role in in_sync else "_" for role in range(array.raid_disks))


def sync_text(sync: SyncStatus) -> str:
    """The bar of a running sync, or why it waits. md calls a repair `resync`, a remote recovery `recover`."""
    action = "resync" if sync.action == "repair" else sync.action
    if sync.state != "running":
        word = "recover" if action == "recovery" and sync.state == "remote" else action
        return f"\t{word}={sync.state.upper()}"
    total, done = sync.total_sectors // 2, min(sync.done_sectors, sync.total_sectors) // 2
    per_mille = done_per_mille(sync)
    filled = per_mille // 50
    bar = "=" * filled + ">" + "." * (20 - filled)
    return (
        f"[{bar}]  {action} ={per_mille // 10:3d}.{per_mille % 10}% ({done}/{total})"
        f" finish={_finish_minutes(total - done, sync.speed_kib_s)}min speed={sync.speed_kib_s}K/sec"
    )


def done_per_mille(sync: SyncStatus) -> int:
    """How much is done, as Linux shows it: by whole 512 KiB, one more in the total, so never quite 1000."""
    return (sync.done_sectors >> 10) * 1000 // ((sync.total_sectors >> 10) + 1)


def _finish_minutes(left_kib: int, speed_kib_s: int) -> str:
    """Minutes with one digit, rounded down like Linux does; a standing sync counts as 1 KiB/s."""
    seconds = left_kib // max(speed_kib_s, 1)
    return f"{seconds // 60}.{seconds % 60 // 6}"


def bitmap_text(bitmap: BitmapStatus) -> str:
    """Counter pages in use of all, the memory they take, and what one bit covers."""
    chunk = f"{bitmap.chunk_bytes // 1024}KB" if bitmap.chunk_bytes >= 1024 else f"{bitmap.chunk_bytes}B"
    return f"bitmap: {bitmap.pages_used}/{bitmap.pages} pages [{bitmap.pages_used * 4}KB], {chunk} chunk"
