"""What must hold of the disks after every request that lands (md-cluster spec 9: I1, I2, I4, I5, I12, I22).

Bits and differences are kept up to date as requests land: which bits stand on which box, which sectors of the in-sync
members differ. So after every single request it can be said whether some chunk differs under clear bits, whether data
went out before its bit was stable, whether a slot was written by somebody who does not own it, and whether events went
back.
The bytes are read anew by this file from md's format as `ondisk` gives it; the code under test is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clustermd.array.write import WriteOp
from clustermd.device.member_device import Op
from clustermd.errors import BadBytes
from clustermd.ondisk.bitmap_bits import BitmapGeometry
from clustermd.ondisk.superblock import ROLE_LIMIT, SUPERBLOCK_SECTORS, FeatureMap, Superblock, location
from clustermd.testing.simulator.boxes import SECTOR, Box, Io, Watcher
from clustermd.testing.trace.events import Layer

Report = Callable[[str, str, Layer, str, str], None]
"""rule, spec, layer, message, node"""


class DiskWatch(Watcher):
    """Watches all boxes of one array. `report` is told of what does not hold; `too_late(data, sector)` says why a
    client's write may not land any more."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.too_late: Callable[[bytes | memoryview, int], str] = lambda data, sector: ""
        self._boxes: list[Box] = []
        self._places: dict[Box, int] = {}
        self._places_by_name: dict[str, int] = {}

    def begin(self, boxes: list[Box], chunk_bytes: int, slots: int) -> None:
        """The boxes are formatted: read what stands there."""
        self._boxes = boxes
        self._places = {box: place for place, box in enumerate(boxes)}
        self._places_by_name = {box.name: place for place, box in enumerate(boxes)}
        superblocks = [self._superblock(box) for box in boxes]
        first = superblocks[0]
        assert first is not None
        self._super_at = first.super_offset
        self._data_at = first.data_offset
        self._sectors = first.size
        self._geometry = BitmapGeometry(chunk_bytes, first.size, slots)
        self._chunk_sectors = chunk_bytes // SECTOR
        self._slot_at = [
            self._geometry.start_sector(first.super_offset, first.bitmap_offset, slot)
            for slot in range(slots)
        ]
        self._slot_sectors = self._geometry.bytes_per_node // SECTOR
        self._bits = [[self._read_bits(box, slot) for slot in range(slots)] for box in boxes]
        self._events = [0 if sb is None else sb.events for sb in superblocks]
        self._superblocks = superblocks
        self.in_sync: list[int] = []
        self.differing: dict[int, set[int]] = {}
        self._look_at_roles()

    def _superblock(self, box: Box) -> Superblock | None:
        at = location(2, box.size_sectors)
        content = bytes(box.data[at * SECTOR : (at + SUPERBLOCK_SECTORS) * SECTOR])
        try:
            return Superblock.from_bytes(content, minor=2, at_sector=at, device_sectors=box.size_sectors)
        except BadBytes:
            return None

    def _read_bits(self, box: Box, slot: int) -> int:
        start = self._slot_at[slot] * SECTOR
        return int.from_bytes(box.data[start + 256 : start + self._geometry.bytes_per_node], "little")

    def read_again(self) -> None:
        """The boxes changed without a request: a power loss."""
        self._superblocks = [self._superblock(box) for box in self._boxes]
        self._events = [0 if sb is None else sb.events for sb in self._superblocks]
        self._bits = [
            [self._read_bits(box, slot) for slot in range(len(self._slot_at))] for box in self._boxes
        ]
        self.in_sync = []
        self._look_at_roles()
        self.check_covered("a power loss")

    # --- roles ------------------------------------------------------------------------------------------

    def _look_at_roles(self) -> None:
        """Who is in sync according to the newest superblock."""
        known = [sb for sb in self._superblocks if sb is not None]
        if not known:
            return
        active = [sb for sb in known if sb.role < ROLE_LIMIT] or known
        newest = max(active, key=lambda sb: sb.events)
        in_sync = [
            place
            for place, sb in enumerate(self._superblocks)
            if sb is not None
            and self._boxes[place].powered
            and newest.role_of(sb.dev_number) < ROLE_LIMIT
            and not sb.feature_map & FeatureMap.RECOVERY_OFFSET
            and sb.events + 1 >= newest.events
        ]
        if in_sync != self.in_sync:
            self.in_sync = in_sync
            self._compare_all()

    def _data(self, place: int, sector: int) -> bytes:
        at = (self._data_at + sector) * SECTOR
        return bytes(self._boxes[place].data[at : at + SECTOR])

    def data_of(self, place: int) -> bytes:
        """The data area of a box."""
        at = self._data_at * SECTOR
        return bytes(self._boxes[place].data[at : at + self._sectors * SECTOR])

    def _compare_all(self) -> None:
        self.differing = {}
        if len(self.in_sync) < 2:
            return
        first = self.data_of(self.in_sync[0])
        for other in self.in_sync[1:]:
            data = self.data_of(other)
            if data == first:
                continue
            for sector in range(self._sectors):
                at = sector * SECTOR
                if data[at : at + SECTOR] != first[at : at + SECTOR]:
                    self.differing.setdefault(sector // self._chunk_sectors, set()).add(sector)

    # --- requests -----------------------------------------------------------------------------------------

    def submitted(self, io: Io) -> None:
        """Data goes out only when its bits stand on every member that the sender writes to (I1)."""
        if io.op is Op.READ or io.op is Op.FLUSH or io.lo < self._data_at or io.path.fenced:
            return
        array = io.submitter.array
        if array is None:
            return
        state = array.state
        place = self._places[io.box]
        member = next((member for member in state.writable if member.path == io.box.name), None)
        if member is None or not member.in_sync:
            return  # filling a member needs no bits
        lo, hi = io.lo - self._data_at, io.hi - self._data_at
        chunks = range(lo // self._chunk_sectors, (hi - 1) // self._chunk_sectors + 1)
        mask = 0
        for chunk in chunks:
            mask |= 1 << chunk
        for other in state.writable:
            there = self._places_by_name[other.path]
            if other.in_sync and self._bits[there][state.slot] & mask != mask:
                if self._changes_nothing(io, place):
                    return  # rewriting what cannot be read
                self.report(
                    "bits-before-data",
                    "I1",
                    Layer.ARRAY,
                    f"sectors {lo} to {hi} go to {io.box.name}, and {other.path} has no bit for some of chunks"
                    f" {chunks.start} to {chunks.stop - 1} in slot {state.slot}",
                    io.submitter.node,
                )
                return

    def _changes_nothing(self, io: Io, place: int) -> bool:
        if io.op is Op.DISCARD:
            return False
        good = next((other for other in self.in_sync if other != place), place)
        at = io.offset_bytes
        return bytes(self._boxes[good].data[at : at + io.length_bytes]) == bytes(io.data())

    def landed(self, io: Io, sectors: Sequence[int]) -> None:
        if io.submitter.life_over:
            self.report(
                "late-write-after-fence",
                "I22",
                Layer.DEVICE,
                f"a {io.op.name} of sectors {io.lo} to {io.hi} lands on {io.box.name} after its sender was fenced",
                io.submitter.node,
            )
        if io.lo >= self._data_at:
            if io.op is Op.WRITE and isinstance(io.target, WriteOp):
                sector = sectors[0] if sectors else io.lo
                place = (sector - io.lo) * SECTOR
                if words := self.too_late(io.data()[place : place + SECTOR], sector - self._data_at):
                    self.report(
                        "landed-after-exclusion", "architecture", Layer.ARRAY, words, io.submitter.node
                    )
            self._data_landed(io, sectors)
        elif io.lo == self._super_at:
            self._superblock_landed(io)
        else:
            self._bitmap_landed(io)

    def _data_landed(self, io: Io, sectors: Sequence[int]) -> None:
        place = self._places[io.box]
        if place not in self.in_sync or len(self.in_sync) < 2:
            return
        touched = set()
        for number in sectors:
            sector = number - self._data_at
            mine = self._data(place, sector)
            chunk = sector // self._chunk_sectors
            if all(self._data(other, sector) == mine for other in self.in_sync if other != place):
                differing = self.differing.get(chunk)
                if differing is not None:
                    differing.discard(sector)
                    if not differing:
                        del self.differing[chunk]
            else:
                self.differing.setdefault(chunk, set()).add(sector)
                touched.add(chunk)
        if touched:
            self._covered(touched, io, "a write")

    def _superblock_landed(self, io: Io) -> None:
        place = self._places[io.box]
        superblock = self._superblock(io.box)
        self._superblocks[place] = superblock
        if superblock is None:
            self.report(
                "superblock-torn",
                "1.2",
                Layer.ARRAY,
                f"{io.box.name} has no valid superblock",
                io.submitter.node,
            )
            return
        if superblock.events < self._events[place]:
            self.report(
                "events-only-grow",
                "I12",
                Layer.ARRAY,
                f"events of {io.box.name} go from {self._events[place]} back to {superblock.events}",
                io.submitter.node,
            )
        self._events[place] = superblock.events
        self._look_at_roles()
        self._covered(set(self.differing), io, "a superblock")

    def _bitmap_landed(self, io: Io) -> None:
        place = self._places[io.box]
        slot = next(
            (
                number
                for number, start in enumerate(self._slot_at)
                if start <= io.lo < start + self._slot_sectors
            ),
            None,
        )
        if slot is None:
            return
        before = self._bits[place][slot]
        after = self._bits[place][slot] = self._read_bits(io.box, slot)
        cleared = before & ~after
        if cleared and self.differing:
            chunks = {chunk for chunk in self.differing if cleared >> chunk & 1}
            if chunks:
                self._covered(chunks, io, f"slot {slot}'s bitmap")

    def _covered(self, chunks: set[int], io: Io, what: str) -> None:
        """Chunks that differ have a bit in some slot on an in-sync member (I5)."""
        if place_bits := self._uncovered(chunks):
            self.report(
                "difference-without-bit",
                "I5",
                Layer.ARRAY,
                f"after {what} landed on {io.box.name}, chunks {sorted(place_bits)} differ between in-sync members,"
                " and no slot has a bit for them",
                io.submitter.node,
            )

    def _uncovered(self, chunks: set[int]) -> set[int]:
        if not chunks or len(self.in_sync) < 2:
            return set()
        union = 0
        for place in self.in_sync:
            for bits in self._bits[place]:
                union |= bits
        return {chunk for chunk in chunks if not union >> chunk & 1}

    def check_covered(self, what: str) -> None:
        if uncovered := self._uncovered(set(self.differing)):
            self.report(
                "difference-without-bit",
                "I5",
                Layer.ARRAY,
                f"after {what} chunks {sorted(uncovered)} differ between in-sync members,"
                " and no slot has a bit for them",
                "",
            )

    # --- at rest ------------------------------------------------------------------------------------------

    def bits_left(self) -> dict[int, int]:
        """Slot -> its bits on the in-sync members together, where there are any."""
        left: dict[int, int] = {}
        for slot in range(len(self._slot_at)):
            union = 0
            for place in self.in_sync:
                union |= self._bits[place][slot]
            if union:
                left[slot] = union
        return left
