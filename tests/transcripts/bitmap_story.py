"""Transcripts of the write-intent bitmap: counters and pages in memory, and what a disk would have of them.

The array has 64 MiB in chunks of 64 KiB, so 1024 bits in one page unless `geometry` says otherwise. The disk is a
dictionary of pages: `flush` sends pages on their way, `flushed` lets them arrive, so a crash can come between the two.

    geometry chunks=40000                   another size
    load 3 5                                the own slot has these bits on disk already
    write 3 [4 ...]      start a write      end 3 [4 ...] [degraded]      one ended
    flush                begin_flush        flushed      the pages are on all members
    sweep                begin_sweep        clear 3 ..   after the members' caches were flushed
    mark 7               merged from a dead node         reconciled 7 [degraded]      copied         whole
    state                every chunk with a counter      crash        what a survivor would find on the disk
"""

from __future__ import annotations

from clustermd.array.bitmap import COUNT_MASK, NEEDED, Bitmap
from clustermd.ondisk.bitmap_bits import BitmapGeometry

CHUNK_BYTES = 64 << 10


def _numbers(chunks: list[int]) -> str:
    return " ".join(map(str, chunks)) or "none"


class BitmapStory:
    """One slot's bitmap and its area on a disk."""

    def __init__(self) -> None:
        self.do_geometry("chunks=1024")

    def begin(self) -> None: ...

    def close(self) -> None: ...

    def do_geometry(self, chunks: str) -> None:
        count = int(chunks.removeprefix("chunks="))
        self.geometry = BitmapGeometry(CHUNK_BYTES, count * CHUNK_BYTES // 512, 4)
        self.bitmap = Bitmap(self.geometry)
        self.disk = [bytes(page) for page in self.bitmap.pages]
        self.on_way: dict[int, bytes] = {}

    def do_load(self, *chunks: str) -> list[str]:
        self.bitmap.mark(map(int, chunks), on_disk=True)
        self.disk = [bytes(page) for page in self.bitmap.pages]
        return self.do_state()

    # --- writes

    def do_write(self, *chunks: str) -> list[str]:
        stable = self.bitmap.start_write(map(int, chunks))
        return ["data may go now" if stable else "data must wait for the bits", *self._lines(chunks)]

    def do_end(self, *chunks: str) -> list[str]:
        numbers, degraded = self._degraded(chunks)
        self.bitmap.end_write(map(int, numbers), degraded)
        return self._lines(numbers)

    # --- pages

    def do_flush(self) -> list[str]:
        self.on_way = self.bitmap.begin_flush()
        return [
            f"page {page} goes to all members with bits {_numbers(self._bits(page, content))}"
            for page, content in self.on_way.items()
        ] or ["nothing to write"]

    def do_flushed(self) -> list[str]:
        for page, content in self.on_way.items():
            self.disk[page] = content
        self.on_way = {}
        self.bitmap.end_flush()
        return [f"on disk: {_numbers(self._on_disk())}"]

    # --- the sweep

    def do_sweep(self) -> list[str]:
        before = list(self.bitmap.counters)
        ready = self.bitmap.begin_sweep()
        aged = [
            chunk
            for chunk, (was, now) in enumerate(zip(before, self.bitmap.counters, strict=True))
            if was != now
        ]
        return [f"aged: {_numbers(aged)}; may be cleared after a flush of the members: {_numbers(ready)}"]

    def do_clear(self, *chunks: str) -> list[str]:
        cleared = self.bitmap.clear(map(int, chunks))
        return [f"cleared {cleared} of {len(chunks)}", *self._lines(chunks)]

    # --- what must be copied

    def do_mark(self, *chunks: str) -> list[str]:
        self.bitmap.mark(map(int, chunks))
        return self._lines(chunks)

    def do_reconciled(self, *chunks: str) -> list[str]:
        numbers, degraded = self._degraded(chunks)
        for chunk in numbers:
            self.bitmap.reconciled(int(chunk), degraded)
        return self._lines(numbers)

    def do_whole(self) -> list[str]:
        self.bitmap.whole()
        return self.do_state()

    # --- looking

    def do_state(self) -> list[str]:
        bitmap = self.bitmap
        lines = self._lines(tuple(str(chunk) for chunk, value in enumerate(bitmap.counters) if value))
        waiting = [
            f"page {page} waits to be written ({'new bits' if page in bitmap.dirty else 'only cleared bits'})"
            for page in sorted(bitmap.dirty | bitmap.lazy)
        ]
        return [*lines, *waiting, f"on disk: {_numbers(self._on_disk())}"]

    def do_pages(self) -> list[str]:
        used, total = self.bitmap.pages_used()
        return [
            f"{len(self.bitmap.pages)} pages of bits on disk, {used} of {total} pages of counters in memory"
        ]

    def do_crash(self) -> list[str]:
        """The node is gone. Pages on their way may have arrived or not."""
        landed = list(self.disk)
        for page, content in self.on_way.items():
            landed[page] = content
        lines = [f"a survivor would copy: {_numbers(self._on_disk())}"]
        if landed != self.disk:
            also = [chunk for page in range(len(landed)) for chunk in self._bits(page, landed[page])]
            lines.append(f"or, if the pages on their way arrived: {_numbers(sorted(also))}")
        return lines

    def _lines(self, chunks: tuple[str, ...]) -> list[str]:
        return [self._line(int(chunk)) for chunk in chunks]

    def _line(self, chunk: int) -> str:
        bitmap = self.bitmap
        value = bitmap.counters[chunk]
        count = value & COUNT_MASK
        counter = f"NEEDED|{count}" if value & NEEDED else str(count)
        words = [
            "clean" if count == 0 else "aged" if count == 1 else "at rest" if value == 2
            else "no write" if count == 2 else f"{count - 2} writing"
        ]  # fmt: skip
        if bitmap.bit(chunk):
            words.append("bit set" + (", not stable" if chunk in bitmap.unstable else ""))
        if chunk in bitmap.unreconciled:
            words.append("must be copied")
        return f"chunk {chunk}: {counter} ({', '.join(words)})"

    @staticmethod
    def _degraded(words: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
        return tuple(word for word in words if word != "degraded"), "degraded" in words

    def _bits(self, page: int, content: bytes) -> list[int]:
        area = bytearray(b"".join(bytes(len(part)) for part in self.disk))
        size = len(content)
        area[page * size : (page + 1) * size] = content
        return self.geometry.dirty_chunks(bytes(area))

    def _on_disk(self) -> list[int]:
        return self.geometry.dirty_chunks(b"".join(self.disk))
