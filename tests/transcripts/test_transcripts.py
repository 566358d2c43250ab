"""Every transcript still tells what the program does. See `transcript` for their form and for how to rewrite them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bitmap_story import BitmapStory
from channel_story import ChannelStory
from locks_story import LocksStory
from takeover_story import TakeoverStory
from transcript import Story, difference, tell

HERE = Path(__file__).parent
REWRITE = "CLUSTERMD_REWRITE_TRANSCRIPTS"
STORIES: dict[str, Callable[[], Story]] = {
    "locks": LocksStory,
    "bitmap": BitmapStory,
    "channel": ChannelStory,
    "takeover": TakeoverStory,
}
FILES = sorted(HERE.glob("*/*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_transcript_tells_what_happens(path: Path) -> None:
    text = path.read_text()
    told = tell(text, STORIES[path.parent.name])
    if os.environ.get(REWRITE):
        path.write_text(told)
        return
    if told != text:
        name = str(path.relative_to(HERE))
        pytest.fail(
            f"{name} tells something else now; if that is right, set {REWRITE}=1 and run this again\n"
            + difference(text, told, name),
            pytrace=False,
        )


def test_every_transcript_belongs_to_a_story() -> None:
    assert {path.parent.name for path in FILES} == set(STORIES)
