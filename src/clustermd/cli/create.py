"""`-C`: make a new array of empty disks, and start it.

Nothing is written before everything was checked on all devices: that they are there, large enough, given
once, used by nobody, and empty, or that the person (or --run) agrees to lose what is on them; and, with corosync, that
this node takes part in its cluster. Then old
superblocks are wiped, bitmaps are written, and superblocks last, each step durable on all devices before the
next: what a crash leaves is not assembled, because a member lacks its superblock, or is complete. Every
device stays claimed from the check until the end, so two -C cannot take the same disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Sequence

from clustermd.cli.command import Command
from clustermd.cli.contents import contents, old_superblock_at
from clustermd.cli.detail import array_json
from clustermd.cli.output import say, show_json
from clustermd.cli.start import start
from clustermd.conf import Conf
from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.in_use import in_use_by_kernel
from clustermd.errors import DeviceRefused, Refused
from clustermd.lockd.client import connect
from clustermd.node.cluster_name import own_cluster_name
from clustermd.node.config import ArrayConfig, array_name
from clustermd.node.disk import SECTOR, Disk
from clustermd.node.files import running_pid
from clustermd.node.link import SAY_S
from clustermd.ondisk.create import BitmapKind, CreatePlan, NewMember, plan_create
from clustermd.ondisk.superblock import SUPERBLOCK_SECTORS, find_all
from clustermd.rundir import RunDir

MISSING = "missing"
INTERNAL_FROM_SECTORS = 100 << 21
"""Arrays of this size (100 GiB) get an internal bitmap unless --bitmap says otherwise, as with mdadm."""
_LEVEL_NAMES = {-1: "linear"}
_ASK_TIMES = 5


def create(command: Command) -> int:
    """Run `-C`. The exit status. Raises Refused, with nothing written unless a write itself failed."""
    rundir = RunDir.from_environment()
    name = array_name(command.devices[0])
    paths = command.devices[1:]
    _check_wishes(command, paths)
    if running_pid(rundir, name) is not None:
        raise Refused(
            "already-running", f"{name} is already running on this node: stop it, or take another name"
        )
    with contextlib.ExitStack() as opened:
        disks = [
            None if path == MISSING else opened.enter_context(Disk(path, writable=True)) for path in paths
        ]
        present = [disk for disk in disks if disk is not None]
        _check_twice(present)
        for disk in present:
            opened.callback(_claim(disk).close)
        plan = _plan(command, rundir, name, disks)
        warnings = [message for disk in present for message in contents(disk)]
        largest = max(present, key=lambda disk: disk.size_sectors)
        if command.size_sectors in (None, 0) and largest.size_sectors * 100 > _smallest(present) * 101:
            warnings.append(
                f"largest drive ({largest.path}) exceeds size ({plan.size_sectors // 2}K) by more than 1%"
            )
        for message in warnings:
            say(message)
        if warnings and not command.run and not confirm("Continue creating array? "):
            say("create aborted.")
            return 1
        if command.bitmap == "clustered" and Conf.load().clustered:
            asyncio.run(_take_part(rundir, name))
        _write(plan, present)
    config = ArrayConfig(
        name=name,
        paths=tuple(os.path.abspath(path) for path in paths if path != MISSING),
        uuid=plan.members[0].superblock.set_uuid.hex(),
        read_only=command.readonly,
        cluster_name=command.home_cluster or "",
        run=True,
        created=True,
    )
    said = start(config, rundir)
    if not command.quiet:
        say(f"array {command.devices[0]} started.")
        say(f"reach it at {said['uri']}")
    if command.json:
        show_json(arrays=[array_json(said)])
    return 0


def confirm(question: str) -> bool:
    """Ask on standard output until the answer begins with y or n; no answer is no."""
    for _ in range(_ASK_TIMES):
        print(question, end="", flush=True)
        answer = sys.stdin.readline()
        if answer[:1] in ("y", "Y"):
            return True
        if answer[:1] in ("n", "N"):
            return False
        if not answer:
            break
        question = "Please answer y or n: "
    say("assuming 'no'")
    return False


def _check_wishes(command: Command, paths: Sequence[str]) -> None:
    """What mdadm --create asks first, in its order and words."""
    if command.raid_devices is None:
        raise Refused("no-raid-devices", "no raid-devices specified.")
    if command.level is None:
        raise Refused("no-level", "a RAID level is needed to create an array.")
    if command.level != 1:
        wanted = _LEVEL_NAMES.get(command.level, f"raid{command.level}")
        raise Refused("level-not-offered", f"level {wanted} is not offered by clustermd: only raid1 is.")
    if command.layout is not None:
        raise Refused("no-layout", "layout is not meaningful for this level: raid1 has none.")
    wanted_devices = command.raid_devices + (command.spare_devices or 0)
    if len(paths) > wanted_devices:
        raise Refused(
            "too-many-devices",
            f"You have listed more devices ({len(paths)}) than are in the array({wanted_devices})!",
        )
    if len(paths) < wanted_devices:
        raise Refused(
            "too-few-devices", "You haven't given enough devices (real or missing) to create this array"
        )
    if all(path == MISSING for path in paths[: command.raid_devices]):
        raise Refused("all-missing", "Subdevs can't be all missing")
    if command.readonly:
        raise Refused(
            "readonly-create", "a new array must be written to become one: create it, then -A --readonly it"
        )
    if command.chunk_sectors is not None and not command.quiet:
        say("chunk size ignored for this level")


def _claim(disk: Disk) -> DirectDevice:
    """Keep everybody else from a device until it is closed. Raises DeviceRefused with who uses it."""
    user = in_use_by_kernel(disk.path)
    if user is not None:
        raise DeviceRefused(
            "device-busy", f"{disk.path} is {user}: free it first, or use another device", path=disk.path
        )
    if disk.in_use_by_array():
        raise DeviceRefused(
            "device-in-array",
            f"{disk.path} is a member of a running array: stop that array first",
            path=disk.path,
        )
    return open_member(disk.path)


def _check_twice(disks: Sequence[Disk]) -> None:
    seen: dict[tuple[int, int], str] = {}
    for disk in disks:
        if disk.inode in seen:
            other = seen[disk.inode]
            same = f"{disk.path} is given twice" if other == disk.path else f"{disk.path} is {other}"
            raise DeviceRefused(
                "device-twice", f"{same}: every member needs a disk of its own", path=disk.path
            )
        seen[disk.inode] = disk.path


def _smallest(disks: Sequence[Disk]) -> int:
    return min(disk.size_sectors for disk in disks)


def _plan(command: Command, rundir: RunDir, name: str, disks: Sequence[Disk | None]) -> CreatePlan:
    assert command.raid_devices is not None
    present = [disk for disk in disks if disk is not None]
    kind = command.bitmap
    if kind is None:
        kind = "internal" if _smallest(present) >= INTERNAL_FROM_SECTORS else "none"
    minor = int((command.metadata or "1.2")[-1])
    members = [None if disk is None else NewMember(disk.path, disk.size_sectors) for disk in disks]
    homehost = command.homehost if command.homehost is not None else rundir.node
    clustered = kind == "clustered"
    return plan_create(
        devices=members,
        raid_disks=command.raid_devices,
        name=command.name if command.name is not None else set_name(name),
        set_uuid=command.uuid or os.urandom(16),
        device_uuids=[os.urandom(16) for _ in disks],
        now=int(time.time()),
        homehost="" if homehost in ("none", "<ignore>") else homehost,
        minor=minor,
        level=1,
        bitmap=BitmapKind(kind),
        nodes=command.nodes if command.nodes is not None else 4,
        cluster_name=(command.home_cluster or own_cluster_name()) if clustered else "",
        bitmap_chunk_bytes=command.bitmap_chunk_bytes,
        data_offset_sectors=command.data_offset_sectors,
        size_sectors=command.size_sectors or None,
        daemon_sleep=command.delay_s or 5,
        assume_clean=command.assume_clean,
        force=command.force,
    )


def set_name(name: str) -> str:
    """The name on disk: 3 for md3, else the array's name itself (mdadm(8), CREATE MODE)."""
    return name[2:] if name.startswith("md") and name[2:].isdigit() else name


async def _take_part(rundir: RunDir, name: str) -> None:
    """Have this node in its cluster before disks are written for it. Says what it waits for. Raises Refused."""
    said = ""
    while True:
        try:
            connection = await connect(rundir, f"create {name}", timeout_s=SAY_S)
        except Refused as refusal:
            if refusal.code != "group-not-ready":
                raise
            if refusal.message != said:
                said = refusal.message
                say(f"{name}: {said}")
        else:
            await connection.close()
            return


def _write(plan: CreatePlan, disks: Sequence[Disk]) -> None:
    """Wipe, write bitmaps, write superblocks; each durable on all members before the next begins."""
    for disk in disks:
        disk.write(wipe(disk))
    for member, disk in zip(plan.members, disks, strict=True):
        disk.write(member.writes[:-1])
    for member, disk in zip(plan.members, disks, strict=True):
        disk.write(member.writes[-1:])


def wipe(disk: Disk) -> list[tuple[int, bytes]]:
    """Writes that remove the superblock of every version from a disk."""
    sectors = [parsed.superblock.super_offset for parsed in find_all(disk.read, disk.size_sectors)]
    old = old_superblock_at(disk)
    if old is not None:
        sectors.append(old)
    return [
        (sector, bytes(min(SUPERBLOCK_SECTORS, disk.size_sectors - sector) * SECTOR)) for sector in sectors
    ]
