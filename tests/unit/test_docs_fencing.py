"""docs/fencing.md says what the code does: its example is understood, its keys and policies are all there are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from textwrap import dedent

from clustermd.conf import FENCES, Conf

TEXT = (Path(__file__).parents[2] / "docs" / "fencing.md").read_text()


def test_the_example_is_a_configuration() -> None:
    example = dedent("    #" + TEXT.partition("    # /etc/clustermd.conf")[2].partition("\n\nA mistake")[0])
    conf = Conf.parse(example.encode())
    assert conf.fence == "agent" and conf.fence_agent is not None
    assert conf.fence_agent.nodes == {"node1": {"ip": "10.1.0.1"}}


def test_all_keys_stand_in_the_table_with_their_defaults() -> None:
    table = TEXT.partition("## All keys")[2]
    rows = dict(re.findall(r"^\| `\[?(\w+)\]?` \|([^|]*)\|", table, re.MULTILINE))
    defaults = Conf()
    assert set(rows) == {field.name for field in fields(Conf)} - {"path"}
    for key, said in rows.items():
        default, said = getattr(defaults, key), said.strip()
        if isinstance(default, float):
            assert float(said) == default, key
        elif default and key != "fence_agent":
            assert said == f'`"{default}"`', key


def test_all_policies_stand_in_the_table() -> None:
    assert re.findall(r'^\| `"(\w+)"` \|', TEXT.partition("## The policies")[2], re.MULTILINE)[:5] == list(
        FENCES
    )
