"""`clustermd demo`: two nodes, one mirror, kill -9 under load, and proof of what follows.

Everything is real: two nodes of this machine run as they always do, in a directory of their own, with
fio and the exerciser as their clients. Nothing is simulated but one thing, which is said when it is done:
a SIGKILL alone seldom leaves the halves of a mirror different, because the kernel finishes what it was
handed. So while node2 is held, some writes that were sent and never answered are put back to their
old content on one half, which is what a crash may leave (`testing.crash_states`).

The exit status is 0 only when everything that had to hold did.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustermd.cli.demo_mdadm import examine_bitmap, mdadm, pick
from clustermd.cli.demo_page import Failed, Page, chunks_text, ms
from clustermd.cli.output import say
from clustermd.testing.crash import Crash, crash
from clustermd.testing.disks import all_clear, differing_blocks, dirty_chunks, look
from clustermd.testing.judge import judge as judge_blocks
from clustermd.testing.judge import nbd_reader
from clustermd.testing.load import Load, start_fio
from clustermd.testing.local_cluster import LocalCluster, Node
from clustermd.testing.nbd_client import NbdClient
from clustermd.testing.trace.events import Event
from clustermd.testing.trace.file import read_traces
from clustermd.testing.trace.judge import judge_all
from clustermd.testing.trace.verdict import verdict
from clustermd.testing.waiting import wait_until

DISK_BYTES = 64 << 20
CREATE = ["-CR", "md0", "-l1", "-n2", "-b", "clustered", "--nodes=4", "--delay=1", "--assume-clean"]
CREATE += ["--bitmap-chunk=64K"]
LOAD = ("--rate", "1500", "--depth", "32", "--hot-blocks", "512")
FIO_BYTES = 8 << 20
FIO_IOPS = 300
FIO_S = 30
LOAD_RECORDS = 6000
TRIES = 5
SETTLE_S = 20.0
STALL_BOUND_S = 2.0
TRACE_WIDTH = 96


def run(words: Sequence[str]) -> int:
    """The verb. 0: all held; 1: something did not; 2: it takes no arguments."""
    if words:
        say(f"demo takes no arguments, and {words[0]!r} is one")
        return 2
    page = Page()
    with LocalCluster({"CLUSTERMD_TRACE": "1"}) as cluster:
        try:
            Story(page, cluster).tell()
        except Failed as failure:
            page.failed(str(failure))
            page.quote(cluster.logs())
            return 1
        except AssertionError as failure:  # a wait that ended, a command that was refused
            page.failed(str(failure))
            return 1
    page.summary()
    return 0


@dataclass(frozen=True, slots=True)
class Takeover:
    """When what happened, in seconds after node2 could run again."""

    found_out_s: float
    taken_over_s: float
    copied_s: float


class Story:
    """The steps, in order. Each says what it does and checks what must hold."""

    def __init__(self, page: Page, cluster: LocalCluster) -> None:
        self.page = page
        self.cluster = cluster
        self.one = cluster.node("node1")
        self.two = cluster.node("node2")
        self.disks: list[str] = []
        self.loads: list[Load] = []
        self.fios: list[subprocess.Popen[bytes]] = []

    def tell(self) -> None:
        self.start()
        for attempt in range(TRIES):
            self.write(attempt)
            happened, before = self.kill()
            if happened.counts:
                break
            self.page.say("this kill met no write in flight under a dirty bit: once more")
            self.wait_for_takeover(happened.slot)
            self.quiet_fio()
            self.loads[1].stop()
            self.command(self.one, "-A", "md0", *self.disks)
        else:
            raise Failed(f"none of {TRIES} kills met a write in flight")
        self.takeover(happened, before)
        self.rejoin()
        self.prove()
        self.stop()
        self.judge_traces()

    # the steps

    def start(self) -> None:
        page = self.page
        page.step("Two disks in two storage boxes (here: image files), and two nodes that share them")
        self.disks = self.cluster.images(2, DISK_BYTES)
        page.say(f"everything is in {self.cluster.directory} and goes away at the end")
        began = time.monotonic()
        self.command(self.one, *CREATE, *self.disks)
        self.command(self.two, "-A", "md0", *self.disks)
        page.must(
            True, f"node1 and node2 run one array, {time.monotonic() - began:.1f} s after the first command"
        )
        wait_until(lambda: all_clear(self.disks), "the bits of creation to be cleared", SETTLE_S)
        page.quote(self.two.mdstat(), f"cat {self.two.rundir.node_dir}/mdstat")
        third = look(self.disks[0]).size_bytes // 4096 // 3
        self.loads = [Load(self.one, 1, 0, third), Load(self.two, 2, third, 2 * third)]

    def write(self, attempt: int) -> None:
        page = self.page
        page.step("Both nodes write at once, over NBD" + (" (again)" if attempt else ""))
        page.say(
            "an exerciser on each node: 4 KiB blocks that say who wrote them, every acknowledgement logged"
        )
        if shutil.which("fio"):
            page.say("and fio on each node, 4 KiB random writes with 16 in flight")
            end = self.loads[1].blocks[1] * 4096
            for number, node in enumerate((self.one, self.two)):
                offset = end + number * FIO_BYTES
                self.fios.append(start_fio(self.cluster, node.socket(), FIO_S, FIO_BYTES, offset, FIO_IOPS))
        else:
            page.say("(fio is not installed; the exercisers are all the load there is)")
        for load in self.loads:
            load.start(*LOAD)
        for load in self.loads:
            load.wait_for_records(load.records + LOAD_RECORDS)
        page.must(all(load.running for load in self.loads), "both nodes serve their clients")

    def kill(self) -> tuple[Crash, int]:
        page = self.page
        page.step("kill -9 for node1, in the middle of its writes")
        names = ", ".join(f"{process.role} {process.pid}" for process in self.one.processes())
        page.say(f"node2 is held (SIGSTOP), so that the disks can be looked at; killed are: {names}")
        copied_before = self.two.status().counters["resynced_chunks"]
        happened = crash(self.loads[0], [self.two], self.disks)
        held_s = (happened.released_ns - happened.held_ns) / 1e9
        page.say(f"{happened.report.writes_in_flight_at_end} writes were sent and not answered")
        page.must(happened.dirty, f"node1's bitmap (slot {happened.slot}) says on both disks where it wrote:")
        page.quote(chunks_text(happened.dirty))
        stale = {change.block for change in happened.changes}
        page.say(
            f"{len(stale)} blocks of unanswered writes were given their old content on one half and the new one\n"
            "on the other: a state that this crash may have left, and the one a mirror must be repaired from"
        )
        if happened.counts:
            page.must(
                happened.differing,
                f"the halves of the mirror differ now, in {len(happened.differing)} blocks",
            )
            chunk_blocks = happened.disk.chunk_bytes // 4096
            places = {block // chunk_blocks for block in happened.differing}
            page.must(places <= happened.dirty, "and only where a dirty bit says that they may")
        page.say(f"after {held_s:.1f} s node2 may go on (SIGCONT)")
        return happened, copied_before

    def takeover(self, happened: Crash, copied_before: int) -> None:
        page = self.page
        page.step("node2 finds out, takes the bitmap over, and copies exactly those chunks")
        self.wait_for_takeover(happened.slot)
        self.two.run("-W", "md0", expect=None)
        found = self.read_trace(happened)
        page.must(True, f"it found out after {ms(found.found_out_s)}")
        page.must(
            True, f"node1's bits were its own, and slot {happened.slot} clear, after {ms(found.taken_over_s)}"
        )
        page.must(True, f"the copying had ended after {ms(found.copied_s)}")
        copied = self.two.status().counters["resynced_chunks"] - copied_before
        page.must(
            copied == len(happened.dirty),
            f"{copied} chunks were copied, as many as bits were dirty in node1's slot",
        )
        self.quiet_fio()
        report = self.loads[1].stop()
        stall_s = report.longest_stall_s([(happened.held_ns, happened.released_ns)])
        page.must(not report.errors, "node2's clients saw no error", "; ".join(report.errors[:3]))
        page.must(stall_s < STALL_BOUND_S, f"and none of their requests waited longer than {ms(stall_s)}")
        wait_until(lambda: all_clear(self.disks), "every bit to be clear", SETTLE_S, self.cluster.logs)
        page.must(True, "the bitmap is idle again: no bit is set in any slot, on either disk")
        page.measure("node2 knew that node1 was dead", f"{ms(found.found_out_s)} after it could run")
        page.measure("node1's bitmap taken over", ms(found.taken_over_s))
        page.measure("halves made equal", f"{ms(found.copied_s)}, {copied} chunks of 64 KiB")
        page.measure("longest wait of a client of node2", ms(stall_s))

    def rejoin(self) -> None:
        page = self.page
        page.step("node1 comes back")
        began = time.monotonic()
        self.command(self.one, "-A", "md0", *self.disks)
        took_s = time.monotonic() - began
        slot = self.one.slot()
        page.must(slot != self.two.slot(), f"it claimed slot {slot} and serves again after {ms(took_s)}")
        page.measure("node1 back in service", ms(took_s))
        self.loads[0].start(*LOAD)
        self.loads[0].wait_for_records(self.loads[0].records + 500)
        report = self.loads[0].stop()
        page.must(
            not report.errors,
            f"its client goes on: {report.writes} writes more",
            "; ".join(report.errors[:3]),
        )
        wait_until(lambda: all_clear(self.disks), "every bit to be clear", SETTLE_S, self.cluster.logs)

    def prove(self) -> None:
        page = self.page
        page.step("The proof")
        differing = differing_blocks(self.disks)
        size = look(self.disks[0]).size_bytes
        page.must(not differing, f"both halves are equal, byte by byte, over {size >> 20} MiB")
        logs = [load.log for load in self.loads]
        for node in (self.one, self.two):
            with NbdClient(node.socket()) as client:
                report = judge_blocks(logs, nbd_reader(client))
            page.must(
                report.good,
                f"every acknowledged write is there, read through {node.name}: {report.acknowledged} blocks",
                str(report),
            )
        page.measure("acknowledged blocks judged", f"{report.acknowledged}, none lost")

    def stop(self) -> None:
        page = self.page
        page.step(
            "Both nodes stop"
            + (", and Linux's own mdadm looks at the disks" if shutil.which("mdadm") else "")
        )
        for node in (self.one, self.two):
            self.command(node, "-S", "md0")
        if shutil.which("mdadm") is None:
            page.say("(mdadm is not installed)")
            return
        for disk in self.disks:
            text = mdadm("-E", disk)
            page.quote(
                pick(
                    text,
                    "Magic",
                    "Cluster Name",
                    "State ",
                    "Checksum",
                    "Events",
                    "Device Role",
                    "Array State",
                )
            )
            page.must(
                re.search(r"Checksum : \S+ - correct", text), f"mdadm -E takes {Path(disk).name} for its own"
            )
        if os.geteuid() != 0:
            page.say("(mdadm -X wants a block device, and only root can make a loop device)")
            return
        for disk in self.disks:
            text = examine_bitmap(disk)
            page.quote(pick(text, "Cluster nodes", "Node Slot", "Bitmap :"))
            counts = re.findall(r", (\d+) dirty", text)
            page.must(counts == ["0"] * 4, f"mdadm -X finds all four bitmaps of {Path(disk).name} clean")

    def judge_traces(self) -> None:
        """Every step of the protocol that both nodes noted, held to the rules that judge simulated runs too."""
        page = self.page
        page.step("What both nodes noted on the way is judged, as clustermd trace does")
        recorded = read_traces([node.files().trace for node in (self.one, self.two)])
        judge = judge_all(recorded.events)
        if judge.violations:
            page.quote(verdict(judge.violations[0], recorded.events, TRACE_WIDTH))
        events = f"{len(recorded.events)} events in the traces of {len(recorded.nodes)} nodes"
        page.must(
            not judge.violations,
            f"{events} keep all {len(judge.rules)} rules of locks, messages, windows, bits and superblocks",
            f"{len(judge.violations)} violations, the first: {next(iter(judge.violations), '')}",
        )
        page.measure("events of the protocol judged", f"{len(recorded.events)}, every rule held")

    # what the steps use

    def wait_for_takeover(self, slot: int) -> None:
        wait_until(lambda: not dirty_chunks(self.disks, slot), "the takeover", SETTLE_S, self.cluster.logs)

    def quiet_fio(self) -> None:
        """End fio; the one whose server died has ended, or hangs until it is told."""
        for fio in self.fios:
            fio.terminate()
        for fio in self.fios:
            fio.wait(SETTLE_S)
        self.fios.clear()

    def command(self, node: Node, *arguments: str) -> None:
        """Run clustermd on a node, and show it."""
        shown = " ".join(Path(word).name if word.startswith("/") else word for word in arguments)
        self.page.quote(node.run(*arguments), f"CLUSTERMD_NODE={node.name} clustermd {shown}")

    def read_trace(self, happened: Crash) -> Takeover:
        """What node2's trace says about the takeover. Its clock is the boot-time one."""
        behind_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        released_s = happened.released_ns / 1e9 + behind_s
        recorded = read_traces([self.two.files().trace])
        events = [event for event in recorded.events if event.time_s >= released_s]
        read_s = first(events, "takeover.read", slot=happened.slot)
        cleared_s = first(events, "takeover.source_cleared", slot=happened.slot)
        copied_s = [event.time_s for event in events if event.name == "resync.copied"]
        if not copied_s:
            raise Failed("node2's trace tells of no copying")
        return Takeover(read_s - released_s, cleared_s - released_s, copied_s[-1] - released_s)


def first(events: Sequence[Event], name: str, **fields: Any) -> float:
    """When a point was first passed."""
    for event in events:
        if event.name == name and all(event.fields.get(key) == value for key, value in fields.items()):
            return event.time_s
    raise Failed(f"node2's trace has no {name}")
