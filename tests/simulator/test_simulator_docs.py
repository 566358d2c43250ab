"""`docs/simulator.md` shows the fault atlas as it is. CLUSTERMD_REWRITE_DOCS=1 writes the table anew."""

from __future__ import annotations

import os
from pathlib import Path

from clustermd.testing.simulator import atlas
from clustermd.testing.simulator.story import atlas_rows, meaning_and_limit

PAGE = Path(__file__).parents[2] / "docs" / "simulator.md"
REWRITE = "CLUSTERMD_REWRITE_DOCS"
END = "<!-- the end of the atlas -->\n"


def test_the_page_shows_every_fault_with_its_limit() -> None:
    text = PAGE.read_text()
    before, begin, rest = text.partition("<!-- the atlas:")
    switch, _, rest = rest.partition("\n")
    shown, end, after = rest.partition(END)
    assert begin and end
    table = "\n" + "\n".join(atlas_rows()) + "\n\n"
    if os.environ.get(REWRITE):
        PAGE.write_text(before + begin + switch + "\n" + table + end + after)
        return
    assert shown == table, f"the atlas has changed: set {REWRITE}=1 and run this again"


def test_every_fault_says_what_happens() -> None:
    for name, kind in atlas.KINDS.items():
        assert len(meaning_and_limit(kind.do)[0]) > 15, f"{name} has no docstring"
