"""How the demonstration looks: numbered steps, facts below them, colour only on a terminal."""

from __future__ import annotations

import os
import sys
import time

_BOLD, _GREEN, _RED, _YELLOW, _DIM = "1", "32", "31", "33", "2"
_WIDTH = 100


class Failed(Exception):
    """Something that had to hold did not; the demonstration ends here."""


class Page:
    """Prints the story. `must` is the only way a fact counts: what does not hold ends the demonstration."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0
        self._start = time.monotonic()
        self.measured: list[tuple[str, str]] = []

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def step(self, title: str) -> None:
        """The next step of the story."""
        self._step += 1
        print(f"\n{self._paint(_BOLD, f'{self._step:2}. {title}')}", flush=True)

    def say(self, text: str) -> None:
        """Something a reader should know."""
        for line in text.splitlines():
            print(f"    {line}", flush=True)

    def quote(self, text: str, command: str = "") -> None:
        """What a file or a program says, as it says it."""
        if command:
            print("    " + self._paint(_YELLOW, f"$ {command}"))
        for line in text.rstrip().splitlines():
            print("    " + self._paint(_DIM, line[:_WIDTH]), flush=True)

    def must(self, holds: object, what: str, otherwise: str = "") -> None:
        """A fact. Raises Failed when it does not hold."""
        if holds:
            print(f"    {self._paint(_GREEN, 'ok')}  {what}", flush=True)
            return
        print(f"    {self._paint(_RED, 'NOT SO')}  {what}", flush=True)
        raise Failed(otherwise or what)

    def measure(self, name: str, value: str) -> None:
        """A number for the summary."""
        self.measured.append((name, value))

    def summary(self) -> None:
        print(f"\n{self._paint(_BOLD, 'In short')}")
        width = max(len(name) for name, _ in self.measured)
        for name, value in self.measured:
            print(f"    {name:{width}}  {value}")
        print(f"\n{self._paint(_GREEN, 'All of it held.')} It took {self.elapsed_s:.0f} s.", flush=True)

    def failed(self, why: str) -> None:
        print(f"\n{self._paint(_RED, 'The demonstration failed:')} {why}", flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def chunks_text(chunks: frozenset[int], most: int = 24) -> str:
    """Chunk numbers for people."""
    numbers = sorted(chunks)
    shown = " ".join(str(number) for number in numbers[:most])
    return f"{len(numbers)} chunks of 64 KiB: {shown}{' ...' if len(numbers) > most else ''}"
