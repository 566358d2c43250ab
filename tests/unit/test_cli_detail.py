"""`-D` and mdstat against what mdadm 4.2 and Linux 6.1 printed: recorded states are read back and worded again.

From each recorded state the facts are taken (numbers, roles, sizes, times), an ArrayStatus is made of them, and
our text must be theirs. Two things of Linux have no counterpart: `(auto-read-only)`, and a finish time that the
kernel computes from numbers it doesn't show.
"""

from __future__ import annotations

import calendar
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clustermd.array.status import ArrayStatus, BitmapStatus, MemberStatus, SyncStatus
from clustermd.cli.detail import (
    array_json,
    brief_text,
    detail_text,
    export_text,
    state_text,
)
from clustermd.cli.detail import (
    test_status as exit_status_of_test,
)
from clustermd.node.mdstat import array_text, mdstat
from clustermd.node.running import MemberOrder

GOLDENS = Path(os.environ.get("CLUSTERMD_GOLDENS") or Path(__file__).parents[3] / "shared" / "goldens")


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machines on which the states were recorded kept UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class Recorded:
    """One recorded state of a RAID1: its mdstat lines and its `mdadm -D` page."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        self.name = f"{path.parent.name}/{path.name}"
        self.node = re.search(r"^### node (\d)", text, re.M)
        stat = re.search(r"^(md0 : active.*?)^unused devices", text, re.M | re.S)
        page = re.search(r"^### mdadm -D /dev/md0\n(.*?)^### ", text, re.M | re.S)
        self.mdstat = stat.group(1).replace(" (auto-read-only)", "") if stat else ""
        self.page = page.group(1) if page else ""

    @property
    def usable(self) -> bool:
        return "Raid Level : raid1\n" in self.page and bool(self.mdstat)

    def field(self, label: str, default: str = "") -> str:
        found = re.search(rf"^ *{re.escape(label)} : (.*)$", self.page, re.M)
        return found.group(1) if found else default

    def status(self) -> ArrayStatus:
        roles = int(self.field("Raid Devices"))
        in_sync_roles = re.search(r"\[([U_]+)\]", self.mdstat)
        assert in_sync_roles
        state = self.field("State").strip()
        set_name = self.field("Name").split("  (local")[0]
        return ArrayStatus(
            name="md0",
            uuid=self.field("UUID"),
            set_name=set_name,
            metadata=self.field("Version"),
            level=1,
            layout=0,
            chunk_sectors=0,
            raid_disks=roles,
            array_sectors=2 * int(self.field("Array Size").split()[0]),
            component_sectors=2 * int(self.field("Used Dev Size").split()[0]),
            created_s=_seconds(self.field("Creation Time")),
            updated_s=_seconds(self.field("Update Time")),
            events=int(self.field("Events")),
            read_only=False,
            clean=state.startswith("clean"),
            degraded=in_sync_roles.group(1).count("_"),
            failed="FAILED" in state,
            members=tuple(self._members()),
            sync=self._sync(state),
            bitmap=self._bitmap(state),
            held="",
            counters={},
        )

    def _members(self) -> Iterator[MemberStatus]:
        rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+|-) +(\S.*?)   (/dev/\S+)$", self.page, re.M)
        by_name = {row[5].removeprefix("/dev/"): row for row in rows}
        for name in re.findall(r"(vd\w)\[\d+\]", self.mdstat):
            number, major, minor, role, words, path = by_name[name]
            yield MemberStatus(
                path=path,
                number=int(number),
                role=None if role == "-" else int(role),
                faulty="faulty" in words,
                in_sync="active sync" in words,
                recovery_offset_sectors=0 if "rebuilding" in words else None,
                write_mostly="writemostly" in words,
                failfast="failfast" in words,
                major=int(major),
                minor=int(minor),
            )

    def _sync(self, state: str) -> SyncStatus | None:
        bar = re.search(r"(resync|recovery) = *[\d.]+% \((\d+)/(\d+)\) finish=\S+ speed=(\d+)K", self.mdstat)
        if bar:
            done, total, speed = (int(bar.group(group)) for group in (2, 3, 4))
            return SyncStatus(bar.group(1), "running", done * 2, total * 2, speed)
        waits = re.search(r"\t(\w+)=(\w+)", self.mdstat)
        if waits:
            return SyncStatus(
                {"recover": "recovery"}.get(waits.group(1), waits.group(1)), waits.group(2).lower()
            )
        return None

    def _bitmap(self, state: str) -> BitmapStatus | None:
        found = re.search(r"bitmap: (\d+)/(\d+) pages \[\d+KB\], (\d+)KB chunk", self.mdstat)
        if not found:
            return None
        used, pages, chunk = (int(number) for number in found.groups())
        cluster = self.field("Cluster Name").strip()
        dirty = 1 if state.startswith("active") else 0
        return BitmapStatus(chunk << 10, 1, dirty, pages, used, 4 if cluster else 0, cluster, 0, 5)


def _seconds(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%a %b %d %H:%M:%S %Y"))


STATES = [state for path in sorted(GOLDENS.glob("*/*.state.txt")) if (state := Recorded(path)).usable]
WENT_ON = (
    ("s30-raid1-crash-dirty/recovering", "75% complete", "49% complete"),
    ("c09-both-killed/2-node2-rw", "State : clean ", "State : clean, resyncing "),
    ("c09-both-killed/2-node2-rw", "bitmap\n", "bitmap\n\n     Resync Status : 95% complete\n"),
)
"""mdstat was recorded before the page, and there the sync went on in between: what the page said earlier."""
needs_goldens = pytest.mark.skipif(not STATES, reason=f"no recorded states in {GOLDENS} (CLUSTERMD_GOLDENS)")


@needs_goldens
@pytest.mark.parametrize("recorded", STATES, ids=[state.name for state in STATES])
def test_detail_prints_what_mdadm_printed(recorded: Recorded) -> None:
    wanted = recorded.page
    for name, words, earlier in WENT_ON:
        if recorded.name.startswith(name):
            wanted = wanted.replace(words, earlier)
    homehost = "node1" if "(local to host node1)" in recorded.page else "elsewhere"
    assert detail_text(recorded.status(), "/dev/md0", homehost) == wanted


@needs_goldens
@pytest.mark.parametrize("recorded", STATES, ids=[state.name for state in STATES])
def test_mdstat_prints_what_linux_printed(recorded: Recorded) -> None:
    ours, theirs = array_text(recorded.status()), recorded.mdstat
    finish = re.search(r"finish=([\d.]+)min", theirs)
    if finish:
        own = re.search(r"finish=([\d.]+)min", ours)
        assert own
        assert float(own.group(1)) == pytest.approx(float(finish.group(1)), rel=0.08, abs=0.11)
        ours = re.sub(r"finish=[\d.]+", "finish=N", ours)
        theirs = re.sub(r"finish=[\d.]+", "finish=N", theirs)
    assert ours == theirs


@needs_goldens
def test_the_recorded_states_cover_the_ways_a_raid1_can_be() -> None:
    pages = "".join(state.page + state.mdstat for state in STATES)
    for words in (
        "faulty",
        "removed",
        "spare rebuilding",
        "(S)",
        "(W)",
        "(PENDING)",
        "recover=REMOTE",
        "resync =",
    ):
        assert words in pages
    assert len(STATES) > 90


MEMBERS = (
    MemberStatus("/dev/sda", 0, 0, False, True, None),
    MemberStatus("/dev/sdb", 1, 1, False, True, None),
)
STATUS = ArrayStatus(
    name="md0",
    uuid="22222222:33333333:44444444:00000001",
    set_name="node1:home",
    metadata="1.2",
    level=1,
    layout=0,
    chunk_sectors=0,
    raid_disks=2,
    array_sectors=79872,
    component_sectors=79872,
    created_s=0,
    updated_s=0,
    events=7,
    read_only=False,
    clean=True,
    degraded=0,
    failed=False,
    members=MEMBERS,
    sync=None,
    bitmap=BitmapStatus(65536, 624, 0, 1, 0, 4, "c1", 0, 5),
    held="",
    counters={"data_writes": 3},
)
LOST = replace(MEMBERS[1], role=None, faulty=True, in_sync=False)


@pytest.mark.parametrize(
    ("changes", "text", "exit_status"),
    [
        ({}, "clean", 0),
        ({"clean": False, "bitmap": None}, "active", 0),
        ({"clean": False}, "clean", 0),
        ({"clean": False, "bitmap": replace(STATUS.bitmap or None, dirty_chunks=2)}, "active", 0),  # type: ignore[type-var]
        ({"degraded": 1, "members": (MEMBERS[0], LOST)}, "clean, degraded", 1),
        ({"degraded": 2, "failed": True, "members": ()}, "clean, FAILED", 2),
        ({"sync": SyncStatus("resync", "delayed")}, "clean, resyncing (DELAYED)", 0),
        ({"sync": SyncStatus("check", "running", 1, 2, 3)}, "clean, checking", 0),
        (
            {"degraded": 1, "sync": SyncStatus("recovery", "remote")},
            "clean, degraded, recovering (REMOTE)",
            1,
        ),
    ],
)
def test_state_and_exit_status_of_test(changes: dict[str, Any], text: str, exit_status: int) -> None:
    status = replace(STATUS, **changes)
    assert state_text(status) == text
    assert exit_status_of_test(status) == exit_status


def test_why_io_is_held_is_a_line_of_its_own() -> None:
    page = detail_text(replace(STATUS, held="lost contact to the sequencer"), "md0", "")
    assert "\n              Held : lost contact to the sequencer\n" in page
    assert "Held" not in detail_text(STATUS, "md0", "")


def test_brief_and_export_are_lines_for_files_and_scripts() -> None:
    spare = MemberStatus("/images/c.img", 2, None, False, False, None)
    status = replace(STATUS, members=(*MEMBERS, spare))
    uuid = "UUID=22222222:33333333:44444444:00000001"
    assert brief_text(status, False) == f"ARRAY /dev/md0 metadata=1.2 spares=1 name=node1:home {uuid}\n"
    assert brief_text(STATUS, True) == (
        f"ARRAY /dev/md0 level=raid1 num-devices=2 metadata=1.2 name=node1:home {uuid}\n"
        "   devices=/dev/sda,/dev/sdb\n"
    )
    assert export_text(status, "nbd+unix:///md0?socket=/x").splitlines() == [
        "MD_LEVEL=raid1",
        "MD_DEVICES=2",
        "MD_METADATA=1.2",
        "MD_UUID=22222222:33333333:44444444:00000001",
        "MD_DEVNAME=md0",
        "MD_NAME=node1:home",
        "MD_DEVICE_dev_sda_ROLE=0",
        "MD_DEVICE_dev_sda_DEV=/dev/sda",
        "MD_DEVICE_dev_sdb_ROLE=1",
        "MD_DEVICE_dev_sdb_DEV=/dev/sdb",
        "MD_DEVICE_images_c_img_ROLE=spare",
        "MD_DEVICE_images_c_img_DEV=/images/c.img",
        "MD_NBD_URI=nbd+unix:///md0?socket=/x",
    ]


def test_json_has_bytes_as_integers_and_null_for_what_is_not() -> None:
    said = {"status": STATUS.to_wire(), "node": "n", "pid": 7, "uri": "u", "nbd_socket": "s", "clients": []}
    facts = json.loads(json.dumps(array_json(said)))
    assert facts["array_bytes"] == 79872 * 512
    assert facts["sync"] is None
    assert facts["held"] is None
    assert facts["level"] == "raid1"
    assert facts["members"][1]["state"] == "active sync"
    assert facts["nbd"] == {"uri": "u", "socket": "s", "clients": []}
    assert "array_sectors" not in facts


def test_members_with_one_basename_are_shown_by_their_paths() -> None:
    members = (replace(MEMBERS[0], path="/a/disk"), replace(MEMBERS[1], path="/b/disk"))
    text = array_text(replace(STATUS, members=members))
    assert text.splitlines()[0] == "md0 : active raid1 /a/disk[0] /b/disk[1]"


def test_a_read_only_array_and_one_without_bitmap() -> None:
    text = array_text(replace(STATUS, read_only=True, bitmap=None))
    assert (
        text
        == "md0 : active (read-only) raid1 sda[0] sdb[1]\n      39936 blocks super 1.2 [2/2] [UU]\n      \n"
    )


def test_the_file_of_a_node_without_arrays() -> None:
    assert mdstat([]) == "Personalities : [raid1] \nunused devices: <none>\n"


@pytest.mark.parametrize(
    ("sync", "text"),
    [
        (SyncStatus("resync", "running", 0, 79872, 0), "[>....................]  resync =  0.0% (0/39936)"),
        (
            SyncStatus("resync", "running", 79872, 79872, 5),
            "[===================>.]  resync = 98.7% (39936/39936)",
        ),
        (
            SyncStatus("check", "running", 39936, 79872, 5),
            "[=========>...........]  check = 49.3% (19968/39936)",
        ),
        (
            SyncStatus("repair", "running", 39936, 79872, 5),
            "[=========>...........]  resync = 49.3% (19968/39936)",
        ),
        (SyncStatus("resync", "remote"), "      \tresync=REMOTE\n"),
        (SyncStatus("recovery", "remote"), "      \trecover=REMOTE\n"),
        (SyncStatus("recovery", "delayed"), "      \trecovery=DELAYED\n"),
    ],
)
def test_a_sync_is_a_bar_or_the_reason_why_it_waits(sync: SyncStatus, text: str) -> None:
    assert text in array_text(replace(STATUS, sync=sync))


def test_members_come_in_the_order_of_linuxs_list() -> None:
    spare = MemberStatus("/dev/sdc", 2, None, False, False, None)
    late = MemberStatus("/dev/sdd", 3, None, False, False, None)
    status = replace(STATUS, members=(*MEMBERS, spare))

    def numbers(order: MemberOrder, status: ArrayStatus) -> list[int]:
        return [member.number for member in order.apply(status).members]

    created, assembled = MemberOrder(created=True), MemberOrder(created=False)
    assert numbers(created, status) == [2, 1, 0]
    assert numbers(assembled, status) == [0, 2, 1]
    assert numbers(created, replace(status, members=(*status.members, late))) == [3, 2, 1, 0]
    assert numbers(created, replace(status, members=(MEMBERS[0], late))) == [3, 0]
