"""Transcripts: text files with commands, and below each what happened, written by the program and read by people.

    # Prose. It says what to look at and which rule that is.
    request A.token EX
    request B.token EX
    ----
    A.token: granted EX
    A.token: somebody wants EX
    (B.token waits for EX)

A line that begins with `#` and an empty line are prose and stay as they are. Any other line begins a block: commands
up to the line `----`, then the outcome up to the next empty line. The outcome of several commands is that of one
after the other; a command that has nothing to tell says nothing, a block that has nothing to tell says `ok`.

Every file of a directory is told to the same kind of `Story`, a new one a file. A test compares; with
CLUSTERMD_REWRITE_TRANSCRIPTS=1 in the environment it writes the outcomes instead, and leaves commands and prose alone.
The idea is that of the data-driven tests of etcd's raft.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

BAR = "----"
NOTHING = "ok"


class Story(Protocol):
    """What commands are told to. Its methods `do_<word>(*arguments)` return lines, or None for nothing."""

    def begin(self) -> None:
        """A block begins."""

    def close(self) -> None:
        """The file ends."""


@dataclass(frozen=True, slots=True)
class Block:
    """Commands and the outcome that the file has for them. `line` is where it begins, from 1."""

    line: int
    commands: tuple[str, ...]
    outcome: tuple[str, ...]


class BadTranscript(Exception):
    """A file that is none, or a command that its story does not know."""


def parse(text: str) -> list[str | Block]:
    """Prose lines and blocks, in order. Raises BadTranscript."""
    parts: list[str | Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        if not lines[at].strip() or lines[at].startswith("#"):
            parts.append(lines[at])
            at += 1
            continue
        begin = at
        while at < len(lines) and lines[at].strip() and lines[at] != BAR:
            at += 1
        if at == len(lines) or lines[at] != BAR:
            raise BadTranscript(f"line {begin + 1}: commands without a {BAR} below them")
        commands = tuple(lines[begin:at])
        at += 1
        below = at
        while at < len(lines) and lines[at].strip():
            at += 1
        parts.append(Block(begin + 1, commands, tuple(lines[below:at])))
    return parts


def tell(text: str, make: Callable[[], Story]) -> str:
    """The text with the outcomes that its commands have now."""
    lines: list[str] = []
    story = make()
    try:
        for part in parse(text):
            if isinstance(part, str):
                lines.append(part.rstrip())
                continue
            outcome: list[str] = []
            story.begin()
            for number, command in enumerate(part.commands):
                try:
                    outcome += _do(story, command)
                except BaseException as error:
                    error.add_note(f"in line {part.line + number}: {command}")
                    raise
            lines += [*part.commands, BAR, *(outcome or [NOTHING])]
    finally:
        story.close()
    return "\n".join(lines) + "\n"


def _do(story: Story, command: str) -> list[str]:
    word, *arguments = command.split()
    method: Callable[..., list[str] | None] | None = getattr(story, f"do_{word.replace('-', '_')}", None)
    if method is None:
        known = sorted(name[3:].replace("_", "-") for name in dir(story) if name.startswith("do_"))
        raise BadTranscript(f"{word} is no command; there are {', '.join(known)}")
    outcome = [line.rstrip() for line in method(*arguments) or ()]
    if not all(outcome):
        raise BadTranscript(f"{command}: an empty line in an outcome would end it")
    return outcome


def difference(wanted: str, got: str, name: str) -> str:
    """A unified diff, empty if there is none."""
    lines = difflib.unified_diff(
        wanted.splitlines(), got.splitlines(), f"{name} (the file)", f"{name} (the program)", lineterm="", n=8
    )
    return "\n".join(lines)
