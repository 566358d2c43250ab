"""The status of a running array, from its state: nothing is computed twice, nothing is asked of a disk."""

from __future__ import annotations

from dataclasses import asdict

from clustermd.array.coordinator import Coordinator
from clustermd.array.resync import Resync
from clustermd.array.state import ArrayState
from clustermd.array.status import ArrayStatus, BitmapStatus, MemberStatus

_SECONDS = (1 << 40) - 1


def uuid_text(uuid: bytes) -> str:
    """Four groups of eight hex digits, as mdadm prints UUIDs."""
    return ":".join(uuid[at : at + 4].hex() for at in range(0, 16, 4))


def report(state: ArrayState, coordinator: Coordinator, resync: Resync) -> ArrayStatus:
    """The values behind mdstat and `--detail` (see `status`)."""
    reference = state.reference
    members = []
    for member in state.members:
        major, minor = member.numbers()
        recovering = member.writable and not member.in_sync
        members.append(
            MemberStatus(
                path=member.path,
                number=member.number,
                role=None if member.faulty else member.role,
                faulty=member.faulty,
                in_sync=member.in_sync,
                recovery_offset_sectors=member.recovery_offset if recovering else None,
                write_mostly=member.write_mostly,
                failfast=member.fail_fast,
                major=major,
                minor=minor,
            )
        )
    return ArrayStatus(
        name=state.name,
        uuid=uuid_text(reference.set_uuid),
        set_name=reference.set_name,
        metadata=f"1.{reference.minor}",
        level=reference.level,
        layout=reference.layout,
        chunk_sectors=reference.chunksize,
        raid_disks=state.raid_disks,
        array_sectors=state.array_sectors,
        component_sectors=reference.size,
        created_s=reference.ctime & _SECONDS,
        updated_s=reference.utime & _SECONDS,
        events=state.events,
        read_only=state.read_only,
        clean=_clean(state),
        degraded=state.degraded,
        failed=not state.in_sync,
        members=tuple(members),
        sync=resync.status(),
        bitmap=_bitmap(state),
        held=state.held or state.gate.reason,
        counters={**asdict(state.counters), "messages_sent": coordinator.messages_sent},
    )


def _clean(state: ArrayState) -> bool:
    """A clustered array is called active while bits are dirty (conventions 3.2), another one until it is marked."""
    if state.reference.clustered and state.bitmap is not None:
        return next(state.bitmap.dirty_chunks(), None) is None
    return state.clean


def _bitmap(state: ArrayState) -> BitmapStatus | None:
    header, bitmap = state.bitmap_header, state.bitmap
    if header is None or bitmap is None:
        return None
    used, pages = bitmap.pages_used()
    return BitmapStatus(
        chunk_bytes=header.chunksize,
        chunks=bitmap.geometry.bits,
        dirty_chunks=sum(1 for _ in bitmap.dirty_chunks()),
        pages=pages,
        pages_used=used,
        nodes=header.nodes,
        cluster_name=header.cluster_name,
        slot=state.slot,
        daemon_sleep_s=header.daemon_sleep,
    )
