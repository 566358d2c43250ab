"""`-D`: a running array in the words, the columns and the exit status of `mdadm --detail`.

Texts are those of mdadm 4.2 to the byte (checked against what it printed for arrays of Linux 6.1), so that
scripts that read it go on working. There is one addition, only when there is something to say: a line `Held`
with the reason for which I/O waits. `--json` carries the same facts under stable names.
"""

from __future__ import annotations

import re
from typing import Any

from clustermd.array.status import ArrayStatus, MemberStatus
from clustermd.cli.units import human_size, local_time, uuid_text
from clustermd.node.config import device_name
from clustermd.node.mdstat import done_per_mille, level_name

SCHEMA = 1
_BUSY = {"resync": "resyncing", "recovery": "recovering", "check": "checking", "repair": "resyncing"}
_PROGRESS = {"resync": "Resync", "recovery": "Rebuild", "check": "Check", "repair": "Resync"}


def detail_text(status: ArrayStatus, shown: str, homehost: str) -> str:
    """The whole page for an array that the command line calls `shown`."""
    lines = [f"{shown}:", *_shape(status), *_state(status)]
    if status.chunk_sectors:
        lines += ["", f"        Chunk Size : {status.chunk_sectors // 2}K"]
    lines += ["", f"Consistency Policy : {'bitmap' if status.bitmap else 'resync'}", ""]
    sync = status.sync
    if sync is not None and sync.state == "running":
        lines += [_line(f"{_PROGRESS[sync.action]} Status", f"{done_per_mille(sync) // 10}% complete"), ""]
    lines.append(_line("Name", status.set_name + local_to(status.set_name, homehost)))
    if status.bitmap is not None and status.bitmap.nodes:
        lines.append(_line("Cluster Name", f"{status.bitmap.cluster_name:<64}"))
    lines += [_line("UUID", _uuid(status)), _line("Events", str(status.events)), ""]
    lines += _table(status)
    return "\n".join(lines) + "\n"


def _line(label: str, value: str) -> str:
    return f"{label:>18} : {value}"


def _shape(status: ArrayStatus) -> list[str]:
    array_kib, component_kib = status.array_sectors // 2, status.component_sectors // 2
    lines = [
        _line("Version", status.metadata),
        _line("Creation Time", local_time(status.created_s)),
        _line("Raid Level", level_name(status.level)),
        _line("Array Size", f"{array_kib}{human_size(array_kib << 10)}"),
        _line("Used Dev Size", f"{component_kib}{human_size(component_kib << 10)}"),
        _line("Raid Devices", str(status.raid_disks)),
        _line("Total Devices", str(len(status.members))),
        _line("Persistence", "Superblock is persistent"),
        "",
    ]
    if status.bitmap is not None:
        lines += [_line("Intent Bitmap", "Internal(Clustered)" if status.bitmap.nodes else "Internal"), ""]
    return lines


def _state(status: ArrayStatus) -> list[str]:
    active = sum(1 for member in status.members if _active(member))
    failed = sum(1 for member in status.members if member.faulty)
    lines = [
        _line("Update Time", local_time(status.updated_s)),
        _line("State", state_text(status) + " "),
    ]
    if status.held:
        lines.append(_line("Held", status.held))
    return [
        *lines,
        _line("Active Devices", str(active)),
        _line("Working Devices", str(len(status.members) - failed)),
        _line("Failed Devices", str(failed)),
        _line("Spare Devices", str(len(status.members) - failed - active)),
    ]


def state_text(status: ArrayStatus) -> str:
    """`clean`, `active, degraded`, `clean, resyncing (PENDING)` ...

    A clustered array is called active only while its bitmap is dirty: it never counts as clean on disk.
    """
    idle_cluster = status.bitmap is not None and status.bitmap.nodes > 0 and status.bitmap.dirty_chunks == 0
    text = "clean" if status.clean or idle_cluster else "active"
    if status.failed:
        text += ", FAILED"
    elif status.degraded:
        text += ", degraded"
    if status.sync is not None:
        text += f", {_BUSY[status.sync.action]}"
        if status.sync.state != "running":
            text += f" ({status.sync.state.upper()})"
    return text


def _active(member: MemberStatus) -> bool:
    return member.in_sync and member.role is not None and not member.faulty


def _table(status: ArrayStatus) -> list[str]:
    lines = ["    Number   Major   Minor   RaidDevice State"]
    by_role = {member.role: member for member in status.members if not member.faulty}
    for role in range(status.raid_disks):
        member = by_role.get(role)
        if member is None:
            lines.append(f"{'-':>8}{0:>8}{0:>9}{role:>9}      removed")
        else:
            lines.append(_row(member, str(role), member_state(member)))
    others = [member for member in status.members if member.faulty or member.role is None]
    if others:
        lines.append("")
    lines += [
        _row(member, "-", member_state(member)) for member in sorted(others, key=lambda one: one.number)
    ]
    return lines


def _row(member: MemberStatus, role: str, state: str) -> str:
    return f"{member.number:>8}{member.major:>8}{member.minor:>9}{role:>9}      {state}   {member.path}"


def member_state(member: MemberStatus) -> str:
    """The last column: `active sync`, `spare rebuilding`, `spare`, `faulty`, with the member's flags."""
    if member.faulty:
        text = "faulty"
    elif member.role is None:
        text = "spare"
    else:
        text = "active sync" if member.in_sync else "spare rebuilding"
    return text + (" writemostly" if member.write_mostly else "") + (" failfast" if member.failfast else "")


def local_to(set_name: str, homehost: str) -> str:
    """The note behind a name that starts with this host's."""
    return f"  (local to host {homehost})" if homehost and set_name.startswith(homehost + ":") else ""


def _uuid(status: ArrayStatus) -> str:
    """mdadm's form of a UUID: four groups of eight digits."""
    return uuid_text(bytes.fromhex(re.sub(r"[^0-9a-fA-F]", "", status.uuid)))


def brief_text(status: ArrayStatus, verbose: bool) -> str:
    """The ARRAY line of `-D --brief` and `-D --scan`, as it goes into mdadm.conf."""
    words = [f"ARRAY {device_name(status.name)}"]
    if verbose:
        words.append(f"level={level_name(status.level)} num-devices={status.raid_disks}")
    words.append(f"metadata={status.metadata}")
    spares = sum(1 for member in status.members if member.spare)
    if spares:
        words.append(f"spares={spares}")
    words += [f"name={status.set_name}", f"UUID={_uuid(status)}"]
    text = " ".join(words) + "\n"
    if verbose:
        text += f"   devices={','.join(sorted(member.path for member in status.members))}\n"
    return text


def export_text(status: ArrayStatus, uri: str) -> str:
    """KEY=value lines of `-D --export`. MD_NBD_URI is ours."""
    lines = [
        f"MD_LEVEL={level_name(status.level)}",
        f"MD_DEVICES={status.raid_disks}",
        f"MD_METADATA={status.metadata}",
        f"MD_UUID={_uuid(status)}",
        f"MD_DEVNAME={status.name}",
        f"MD_NAME={status.set_name}",
    ]
    for member in status.members:
        key = re.sub(r"[^A-Za-z0-9]", "_", member.path.lstrip("/"))
        role = "spare" if member.role is None or member.faulty else str(member.role)
        lines += [f"MD_DEVICE_{key}_ROLE={role}", f"MD_DEVICE_{key}_DEV={member.path}"]
    lines.append(f"MD_NBD_URI={uri}")
    return "\n".join(lines) + "\n"


def test_status(status: ArrayStatus) -> int:
    """Exit status of `-D --test`: 0 well, 1 a device is gone, 2 unusable (mdadm(8))."""
    if status.failed:
        return 2
    return 1 if status.degraded else 0


def array_json(said: dict[str, Any]) -> dict[str, Any]:
    """One array of `-D --json`, from what its process says of itself."""
    status = ArrayStatus.from_wire(said["status"])
    wire = status.to_wire()
    wire.update(
        device=device_name(status.name),
        node=said["node"],
        pid=said["pid"],
        uuid=_uuid(status),
        level=level_name(status.level),
        state=state_text(status),
        array_bytes=status.array_sectors * 512,
        component_bytes=status.component_sectors * 512,
        held=status.held or None,
        nbd={"uri": said["uri"], "socket": said["nbd_socket"], "clients": said["clients"]},
        members=[
            {**wire_member, "state": member_state(member)}
            for wire_member, member in zip(wire["members"], status.members, strict=True)
        ],
    )
    for sectors in ("array_sectors", "component_sectors"):
        del wire[sectors]
    return wire
