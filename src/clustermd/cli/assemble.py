"""`-A`: start an array from its disks on this node. On a second node of a clustered array this is how it joins.

Here the devices of one array are picked, by --uuid, --name or the first device's superblock; whether they are up
to date and enough, whether the cluster is ours, and whether anybody else has them is decided by the array process
that they are given to. With --scan all words are devices, and each array found among them is started under its
own name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from clustermd.array.status import ArrayStatus
from clustermd.cli.command import Command
from clustermd.cli.detail import array_json
from clustermd.cli.output import say, show_json, show_refusal
from clustermd.cli.start import start
from clustermd.cli.units import uuid_text
from clustermd.errors import BadBytes, DeviceRefused, Refused
from clustermd.node.config import ArrayConfig, array_name
from clustermd.node.disk import Disk
from clustermd.ondisk.superblock import Superblock
from clustermd.rundir import RunDir

NOTHING_FOUND = 2
"""Exit status when --scan finds nothing, as mdadm's."""


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    superblock: Superblock


def assemble(command: Command) -> int:
    """Run `-A`. The exit status."""
    rundir = RunDir.from_environment()
    if command.scan:
        return _scan(command, rundir)
    shown, paths = command.devices[0], command.devices[1:]
    name = array_name(shown)
    if not paths:
        raise Refused(
            "no-devices", f"{shown} not identified in config file: there is none, so name its devices as well"
        )
    found = _pick(command, rundir, shown, paths)
    said = _start(command, rundir, name, shown, found)
    if command.json:
        show_json(arrays=[array_json(said)])
    return 0


def _scan(command: Command, rundir: RunDir) -> int:
    arrays: dict[bytes, list[_Found]] = {}
    for path in command.devices:
        with Disk(path) as disk:
            try:
                one = _Found(path, disk.superblock())
            except BadBytes as error:
                if command.verbose:
                    say(f"{path}: {error.message}")
                continue
        if _wanted(command, rundir, one.superblock):
            arrays.setdefault(one.superblock.set_uuid, []).append(one)
    if not arrays:
        say("No arrays found on the devices of the command line; there is no config file")
        return NOTHING_FOUND
    status, started = 0, []
    for found in arrays.values():
        try:
            name = scanned_name(found[0].superblock.set_name)
            started.append(array_json(_start(command, rundir, name, f"/dev/md/{name}", found)))
        except Refused as refusal:
            show_refusal(refusal, as_json=False)
            status = 1
    if command.json:
        show_json(arrays=started)
    return status


def scanned_name(set_name: str) -> str:
    """The array's name for a name on disk: without its home host; md3 for 3."""
    name = set_name.rpartition(":")[2]
    return array_name(f"md{name}" if name.isdigit() else name)


def _wanted(command: Command, rundir: RunDir, superblock: Superblock) -> bool:
    if command.uuid is not None and superblock.set_uuid != command.uuid:
        return False
    if command.name is None:
        return True
    homehost = command.homehost or rundir.node
    return superblock.set_name in (command.name, f"{homehost}:{command.name}")


def _pick(command: Command, rundir: RunDir, shown: str, paths: list[str]) -> list[_Found]:
    """The devices of one array. A device that does not belong is an error, unless --uuid or --name chose."""
    chosen = command.uuid is not None or command.name is not None
    found: list[_Found] = []
    inodes: dict[tuple[int, int], str] = {}
    for path in paths:
        with Disk(path) as disk:
            inode = disk.inode
            try:
                superblock = disk.superblock()
            except BadBytes as error:
                if chosen:
                    if command.verbose:
                        say(f"no usable superblock on {path}: {error.message}")
                    continue
                what = "no" if error.code == "no-superblock" else "no usable"
                raise DeviceRefused(
                    "no-superblock",
                    f"{path} has {what} superblock - assembly aborted: {error.message}",
                    path=path,
                ) from error
        if not _wanted(command, rundir, superblock):
            if command.verbose:
                say(f"{path} has wrong {'uuid' if command.uuid is not None else 'name'}.")
            continue
        if inode in inodes:
            raise DeviceRefused("device-twice", f"{path} is given twice (as {inodes[inode]})", path=path)
        if found and superblock.set_uuid != found[0].superblock.set_uuid:
            raise Refused(
                "not-one-array",
                f"superblock on {path} doesn't match others - assembly aborted:"
                f" it belongs to array {uuid_text(superblock.set_uuid)} ({superblock.set_name})",
                path=path,
            )
        for other in found:
            if superblock.device_uuid == other.superblock.device_uuid:
                raise DeviceRefused(
                    "similar-superblocks",
                    f"WARNING {path} and {other.path} appear to have very similar superblocks.\n"
                    "      If they are really different, please --zero-superblock one\n"
                    "      If they are the same or one is a copy, please name only one.",
                    paths=[other.path, path],
                )
        inodes[inode] = path
        found.append(_Found(path, superblock))
    if not found:
        raise Refused("no-devices-found", f"no devices found for {shown}")
    return found


def _start(command: Command, rundir: RunDir, name: str, shown: str, found: list[_Found]) -> dict[str, Any]:
    config = ArrayConfig(
        name=name,
        paths=tuple(os.path.abspath(one.path) for one in found),
        uuid=found[0].superblock.set_uuid.hex(),
        read_only=command.readonly,
        cluster_name=command.home_cluster or "",
        run=command.run,
        force=command.force,
    )
    said = start(config, rundir)
    if not command.quiet:
        say(f"{shown} has been started with {drives_text(ArrayStatus.from_wire(said['status']))}.")
        say(f"reach it at {said['uri']}")
    return said


def drives_text(status: ArrayStatus) -> str:
    """`2 drives`, `1 drive (out of 2)`, `2 drives and 1 spare`: mdadm's count of what an array started with."""
    working = [member for member in status.members if not member.faulty and member.role is not None]
    in_sync = sum(1 for member in working if member.in_sync)
    rebuilding = len(working) - in_sync
    spares = sum(1 for member in status.members if member.spare)
    text = f"{in_sync} drive{'' if in_sync == 1 else 's'}"
    if in_sync < status.raid_disks:
        text += f" (out of {status.raid_disks})"
    if rebuilding:
        text += f"{',' if spares else ' and'} {rebuilding} rebuilding"
    if spares:
        text += f" and {spares} spare{'' if spares == 1 else 's'}"
    return text
