"""What is asked of disks, running or not: -E, -X, -Q, and --zero-superblock.

The first three only read, and need no right but to read. --zero-superblock writes one place, after it made sure that
no array of this machine and nothing in the kernel has the disk.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from clustermd.cli import examine as member_page
from clustermd.cli.arrays import query_text
from clustermd.cli.command import Command
from clustermd.cli.create import wipe
from clustermd.cli.examine_bitmap import examine_bitmap_text, read_areas, unwritten_slots
from clustermd.cli.output import PROGRAM, say, show, show_json
from clustermd.cli.units import uuid_text
from clustermd.device.in_use import in_use_by_kernel
from clustermd.errors import BadBytes, DeviceRefused, Refused
from clustermd.node.config import array_name, device_name
from clustermd.node.control import ControlClient
from clustermd.node.disk import SECTOR, Disk
from clustermd.node.files import running_arrays, running_pid
from clustermd.node.mdstat import level_name
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.bitmap_superblock import BitmapSuperblock
from clustermd.ondisk.superblock import ROLE_LIMIT, SUPERBLOCK_SECTORS, Parsed, Superblock, location
from clustermd.rundir import RunDir


def examine(command: Command) -> int:
    """Run `-E`. The exit status: 1 when a device has no superblock or cannot be read."""
    rundir = RunDir.from_environment()
    brief = command.brief or (command.scan and not command.export)
    worst, found, facts = 0, [], []
    for path in command.devices:
        try:
            with Disk(path) as disk:
                parsed, bitmap = member_page.read_member(disk.read, disk.size_sectors)
                sectors = disk.size_sectors
        except BadBytes as error:
            if not brief:
                worst = 1
                what = f"No md superblock detected on {path}."
                say(what if error.code == "no-superblock" else f"{what[:-1]}: {error.message}")
            continue
        except DeviceRefused as error:
            say(error.message)
            worst = 1
            continue
        if command.json:
            facts.append(_member_json(path, parsed, bitmap))
        elif brief:
            found.append((path, parsed.superblock))
        elif command.export:
            show(member_page.export_text(parsed.superblock))
        else:
            homehost = command.homehost or rundir.node
            show(member_page.examine_text(path, parsed, sectors, homehost=homehost, bitmap=bitmap))
    if command.json:
        show_json(members=facts)
    elif found:
        show(member_page.brief_text(found, verbose=command.verbose > 0))
    return worst


def _member_json(path: str, parsed: Parsed, bitmap: BitmapSuperblock | None) -> dict[str, Any]:
    sb = parsed.superblock
    values = asdict(sb)
    values.update(
        path=path,
        set_uuid=uuid_text(sb.set_uuid),
        device_uuid=uuid_text(sb.device_uuid),
        feature_map=int(sb.feature_map),
        role=sb.role if sb.role < ROLE_LIMIT else None,
        clustered=sb.clustered,
        clean=sb.clean,
        checksum_ok=parsed.checksum_ok,
        bitmap=_bitmap_json(bitmap) if bitmap is not None else None,
    )
    return values


def _bitmap_json(header: BitmapSuperblock) -> dict[str, Any]:
    values = asdict(header)
    values.update(uuid=uuid_text(header.uuid), state=int(header.state))
    return values


def examine_bitmap(command: Command) -> int:
    """Run `-X`. The exit status."""
    worst, facts = 0, []
    for path in command.devices:
        try:
            with Disk(path) as disk:
                parsed, _ = member_page.read_member(disk.read, disk.size_sectors)
                areas = read_areas(disk.read, parsed.superblock, disk.size_sectors)
            if command.json:
                facts.append(_areas_json(path, areas))
            else:
                show(examine_bitmap_text(path, areas))
        except DeviceRefused as error:
            say(error.message.replace("cannot open", "failed to open bitmap file", 1))
            worst = 1
            continue
        except BadBytes as error:
            said = {
                "no-superblock": f"No md superblock detected on {path}.",
                "no-bitmap": f"{path} has no write-intent bitmap",
            }
            say(said.get(error.code, f"{path}: {error.message}"))
            worst = 1
            continue
        for slot in unwritten_slots(areas):
            say(
                f"{path}: the bitmap of slot {slot} was never written: no node had it since the disk was added"
            )
    if command.json:
        show_json(bitmaps=facts)
    return worst


def _areas_json(path: str, areas: list[bytes | None]) -> dict[str, Any]:
    slots: list[dict[str, Any]] = []
    for slot, area in enumerate(areas):
        try:
            header = BitmapSuperblock.from_bytes((area or b"")[:256])
        except BadBytes:
            slots.append({"slot": slot, "valid": False})
            continue
        dirty = BitmapGeometry.of(header).dirty_chunks(area or b"")
        slots.append({"slot": slot, "valid": True, **_bitmap_json(header), "dirty_chunks": list(dirty)})
    return {"path": path, "slots": slots}


def query(command: Command) -> int:
    """Run `-Q`: is it a running array, is it a member. The exit status."""
    rundir = RunDir.from_environment()
    worst, facts = 0, []
    for shown in command.devices:
        try:
            name = array_name(shown)
            if running_pid(rundir, name) is not None:
                with ControlClient(rundir, name) as client:
                    said = client.ask("status")
                facts.append({"path": shown, "array": name, "member_of": None})
                if not command.json:
                    show(query_text(said, shown))
                continue
        except Refused as refusal:
            if refusal.code not in ("bad-array-name", "not-running"):
                say(refusal.message)
                worst = 1
                continue
        try:
            with Disk(shown) as disk:
                superblock = _superblock_of(disk)
        except DeviceRefused as refusal:
            say(refusal.message)
            worst = 1
            continue
        running = _running_with(rundir, superblock) if superblock else None
        uuid = uuid_text(superblock.set_uuid) if superblock else None
        facts.append({"path": shown, "array": None, "member_of": uuid, "running_as": running})
        if not command.json:
            show(f"{shown}: is not an md array\n")
            if superblock:
                show(_member_line(shown, superblock, running))
    if command.json:
        show_json(devices=facts)
    return worst


def _superblock_of(disk: Disk) -> Superblock | None:
    try:
        return disk.superblock()
    except BadBytes:
        return None


def _member_line(shown: str, superblock: Superblock, running: str | None) -> str:
    what = f"device {superblock.role}" if superblock.role < ROLE_LIMIT else "spare"
    state = f"active {level_name(superblock.level)} {device_name(running)}" if running else None
    return (
        f"{shown}: {what} in {superblock.raid_disks} device"
        f" {state or 'inactive ' + level_name(superblock.level) + ' array'}."
        f"  Use {PROGRAM} --examine for more detail.\n"
    )


def _running_with(rundir: RunDir, superblock: Superblock) -> str | None:
    """The name under which this node runs the array of `superblock`."""
    for name in running_arrays(rundir):
        try:
            with ControlClient(rundir, name) as client:
                uuid = str(client.ask("status")["status"]["uuid"])
        except Refused:
            continue
        if uuid.replace(":", "").replace("-", "").lower() == superblock.set_uuid.hex():
            return name
    return None


def zero_superblock(command: Command) -> int:
    """Run `--zero-superblock`. The exit status: 2 when a device may not be written."""
    worst, zeroed = 0, []
    minor = int((command.metadata or "1.2")[-1])
    for path in command.devices:
        try:
            with Disk(path, writable=True) as disk:
                _refuse_in_use(disk)
                writes = wipe(disk)
                if not writes and command.force:
                    at = location(minor, disk.size_sectors)
                    writes = [(at, bytes(min(SUPERBLOCK_SECTORS, disk.size_sectors - at) * SECTOR))]
                if not writes:
                    say(f"Unrecognised md component device - {path}")
                    continue
                disk.write(writes)
                zeroed.append(os.path.abspath(path))
        except Refused as refusal:
            say(f"Couldn't open {path} for write - not zeroing: {refusal.message}")
            worst = 2
    if command.json:
        show_json(zeroed=zeroed)
    return worst


def _refuse_in_use(disk: Disk) -> None:
    if disk.in_use_by_array():
        raise DeviceRefused("device-in-array", f"{disk.path} is a member of a running array", path=disk.path)
    user = in_use_by_kernel(disk.path)
    if user is not None:
        raise DeviceRefused("device-busy", f"{disk.path} is {user}", path=disk.path)
