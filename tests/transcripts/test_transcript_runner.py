"""What transcripts rest on: a wrong outcome is found, rewriting changes outcomes only, twice told is the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bitmap_story import BitmapStory
from channel_story import ChannelStory
from locks_story import LocksStory
from takeover_story import TakeoverStory
from test_transcripts import FILES, HERE, STORIES
from transcript import BAR, BadTranscript, Block, difference, parse, tell

from clustermd.array.bitmap import Bitmap
from clustermd.array.bitmap_writer import BitmapWriter
from clustermd.cluster.channel import Channel
from clustermd.cluster.messages import Message
from clustermd.dlm.resource import Lock, Resource

TEXT = """# Prose stays,
#   as it is.

members A B
----
whatever the file says

request A.r EX
request B.r PR
queues
----
"""


def text_of(name: str) -> str:
    return (HERE / name).read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_without_its_outcomes_is_rewritten_to_the_very_same_file(path: Path) -> None:
    text = path.read_text()
    bare: list[str] = []
    for part in parse(text):
        bare += [part] if isinstance(part, str) else [*part.commands, BAR]
    assert tell("\n".join(bare) + "\n", STORIES[path.parent.name]) == text


def test_outcomes_are_written_and_prose_is_kept() -> None:
    told = tell(TEXT, LocksStory)
    assert told.startswith(TEXT[: TEXT.index("whatever")] + "slot 1: A, member\nslot 2: B, member\n")
    assert told.endswith("(B.r waits for PR)\nr: value never written\n  granted    A EX\n  waiting    B PR\n")


def test_a_wrong_outcome_shows_as_a_difference_of_lines() -> None:
    right = tell(TEXT, LocksStory)
    wrong = right.replace("A.r: granted EX", "A.r: granted PR")
    shown = difference(wrong, tell(wrong, LocksStory), "story").splitlines()
    assert "-A.r: granted PR" in shown and "+A.r: granted EX" in shown
    assert shown[:2] == ["--- story (the file)", "+++ story (the program)"]
    assert difference(right, tell(right, LocksStory), "story") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("queues\n", "line 1: commands without a ----"),
        ("# x\n\nqueues\n\n# more\n----\n", "line 3: commands without a ----"),
        (f"nonsense\n{BAR}\n", "nonsense is no command"),
    ],
)
def test_what_is_no_transcript_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadTranscript, match=re.escape(words)):
        tell(text, LocksStory)


def test_an_error_says_which_line_it_was() -> None:
    with pytest.raises(KeyError) as error:
        tell("# one\nmembers A\nunlock A.nothing\n----\n", LocksStory)
    assert error.value.__notes__ == ["in line 3: unlock A.nothing"]


def test_a_lock_engine_that_lets_readers_overtake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that requests are granted from the head of the queue, taken out; the file says otherwise."""
    right = Resource._can_grant

    def anybody(self: Resource, lock: Lock, *, now: bool) -> bool:
        waiting, self.waiting = self.waiting, []
        try:
            return right(self, lock, now=True)
        finally:
            self.waiting = waiting

    text = text_of("locks/noqueue.txt")
    unchecked = "clustermd.testing.locks.invariants.Checker._judge"
    monkeypatch.setattr(unchecked, lambda self, engine, call: None)
    monkeypatch.setattr("clustermd.testing.locks.invariants.Checker.after", lambda self, effects: None)
    assert tell(text, LocksStory) == text
    monkeypatch.setattr(Resource, "_can_grant", anybody)
    assert "+B.bitmap0002/2: granted NL" in difference(text, tell(text, LocksStory), "noqueue").splitlines()


def test_a_sweep_that_forgets_to_look_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clearing the bit of a chunk that was written meanwhile: the crash says that nothing would be copied."""

    def clear(self: Bitmap, chunks: object) -> int:
        cleared = list(chunks)  # type: ignore[call-overload]
        for chunk in cleared:
            self.counters[chunk] = 0
            self._clear_bit(chunk)
            self.lazy.add(self.page_of(chunk))
        return len(cleared)

    text = text_of("bitmap/sweep_meets_write.txt")
    first = text[: text.index("# It is the same")]
    monkeypatch.setattr(Bitmap, "clear", clear)
    shown = difference(first, tell(first, BitmapStory), "sweep").splitlines()
    assert "-a survivor would copy: 3" in shown and "+a survivor would copy: none" in shown


def test_a_sender_that_asks_nobody_for_answers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def whatever(self: Channel, message: Message) -> None:
        return None

    text = text_of("channel/receiver_fails.txt")
    monkeypatch.setattr(Channel, "_answers", whatever)
    shown = difference(text, tell(text, ChannelStory), "channel")
    assert "-    * A fails to send, peer-failed" in shown
    assert "+    * A has sent METADATA_UPDATED" in shown


def test_a_takeover_that_does_not_wait_for_its_own_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is a moment at which the disks differ and no bit says so: the story stops there."""
    flush = BitmapWriter.flush

    async def later(self: BitmapWriter) -> None:
        bitmap = self.state.bitmap
        if bitmap is None or not bitmap.unreconciled:
            await flush(self)

    text = text_of("takeover/second_death_at_source_cleared.txt")
    monkeypatch.setattr(BitmapWriter, "flush", later)
    with pytest.raises(AssertionError, match="bits only cover"):
        tell(text, TakeoverStory)


def test_parse_gives_prose_lines_and_blocks_in_order() -> None:
    parts = parse("# a\n\nx 1\ny\n----\nout\n\n# b\nz\n----\n")
    assert parts == ["# a", "", Block(3, ("x 1", "y"), ("out",)), "", "# b", Block(9, ("z",), ())]
