"""mdadm's grammar: what many command lines mean, and in which words the others are refused.

The refusals were compared with what mdadm 4.2 says to the same words; its name is replaced by ours.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from clustermd.cli.command import Action, Command, UsageError, parse_size
from clustermd.cli.grammar import parse
from clustermd.cli.options import Mode

C, A, MISC = Mode.CREATE, Mode.ASSEMBLE, Mode.MISC
UUID = bytes.fromhex("22222222333333334444444400000001")
AB: dict[str, Any] = {"devices": ["/dev/md0", "a", "b"]}
CREATE: dict[str, Any] = {"mode": C, "level": 1, "raid_devices": 2, **AB}

UNDERSTOOD: list[tuple[str, dict[str, Any]]] = [
    ("-C /dev/md0 -l1 -n2 a b", CREATE),
    ("-CR /dev/md0 -l1 -b clustered -n2 a b", {**CREATE, "run": True, "bitmap": "clustered"}),
    ("-C /dev/md0 a b -l1 -n2", CREATE),
    ("--create /dev/md0 --level=1 --raid-devices=2 a b", CREATE),
    ("--create /dev/md0 --level mirror --raid-devices 2 a b", CREATE),
    ("--create /dev/md0 --level raid1 --raid-disks 2 a b", CREATE),
    ("--cre /dev/md0 --le=1 --raid-dev=2 a b", CREATE),
    ("-C /dev/md0 -l=1 -n=2 a b", CREATE),
    ("-vvC /dev/md0 -l1 -n2 a b", {**CREATE, "verbose": 2}),
    ("-q -C --force /dev/md0 -l1 -n1 a b", {**CREATE, "quiet": True, "force": True, "raid_devices": 1}),
    ("-Y -D md0", {"mode": MISC, "action": Action.DETAIL, "export": True, "devices": ["md0"]}),
    ("-C -f /dev/md0 -l1 -n1 a b", {**CREATE, "force": True, "raid_devices": 1}),
    ("-C /dev/md0 -l1 -n2 -x1 a b c", {**CREATE, "spare_devices": 1, "devices": ["/dev/md0", "a", "b", "c"]}),
    ("-C /dev/md0 -l1 -n2 --spare-disks=0 a b", {**CREATE, "spare_devices": 0}),
    ("-C /dev/md0 -l1 -n2 a missing", {**CREATE, "devices": ["/dev/md0", "a", "missing"]}),
    ("-C /dev/md0 -l1 -n2 -z 1024 a b", {**CREATE, "size_sectors": 2048}),
    ("-C /dev/md0 -l1 -n2 -z 3M a b", {**CREATE, "size_sectors": 6144}),
    ("-C /dev/md0 -l1 -n2 --size=max a b", {**CREATE, "size_sectors": 0}),
    ("-C /dev/md0 -l1 -n2 -c 64 a b", {**CREATE, "chunk_sectors": 128}),
    ("-C /dev/md0 -l1 -n2 -d 1 a b", {**CREATE, "delay_s": 1}),
    ("-C /dev/md0 -l1 -n2 --delay=7 a b", {**CREATE, "delay_s": 7}),
    ("-C /dev/md0 -l1 -n2 -e 1.0 a b", {**CREATE, "metadata": "1.0"}),
    ("-C /dev/md0 -l1 -n2 -e default a b", {**CREATE, "metadata": "1.2"}),
    ("-C /dev/md0 -l1 -n2 --metadata=1 a b", {**CREATE, "metadata": "1.2"}),
    ("-C /dev/md0 -l1 -n2 --bitmap=internal a b", {**CREATE, "bitmap": "internal"}),
    ("-C /dev/md0 -l1 -n2 -bnone a b", {**CREATE, "bitmap": "none"}),
    ("-C /dev/md0 -l1 -n2 --bitmap-chunk=64K a b", {**CREATE, "bitmap_chunk_bytes": 65536}),
    ("-C /dev/md0 -l1 -n2 --bitmap-chunk=64M a b", {**CREATE, "bitmap_chunk_bytes": 64 << 20}),
    ("-C /dev/md0 -l1 -n2 --data-offset=2M a b", {**CREATE, "data_offset_sectors": 4096}),
    ("-C /dev/md0 -l1 -n2 -b clustered --nodes=8 a b", {**CREATE, "bitmap": "clustered", "nodes": 8}),
    (
        "-C /dev/md0 --nodes 2 --home-cluster=c1 -b clustered -l1 -n2 a b",
        {**CREATE, "bitmap": "clustered", "nodes": 2, "home_cluster": "c1"},
    ),
    ("-C /dev/md0 -l1 -n2 -N home --homehost=h a b", {**CREATE, "name": "home", "homehost": "h"}),
    ("-C /dev/md0 -l1 -n2 --assume-clean a b", {**CREATE, "assume_clean": True}),
    ("-C /dev/md0 -l1 -n2 -u 22222222:33333333:44444444:00000001 a b", {**CREATE, "uuid": UUID}),
    ("-C /dev/md0 -l1 -n2 -- a -b", {**CREATE, "devices": ["/dev/md0", "a", "-b"]}),
    (
        "-C /dev/md0 -l5 -n3 a b c",
        {"mode": C, "level": 5, "raid_devices": 3, "devices": ["/dev/md0", "a", "b", "c"]},
    ),
    ("-A /dev/md0 a b", {"mode": A, **AB}),
    ("--assemble /dev/md0 --run a b", {"mode": A, "run": True, **AB}),
    ("-ARf /dev/md0 a b", {"mode": A, "run": True, "force": True, **AB}),
    ("-Ao /dev/md0 a b", {"mode": A, "readonly": True, **AB}),
    ("-A /dev/md0 -u 22222222-33333333-44444444-00000001 a b", {"mode": A, "uuid": UUID, **AB}),
    ("-A --scan a b", {"mode": A, "scan": True, "devices": ["a", "b"]}),
    ("-As", {"mode": A, "scan": True}),
    ("-A /dev/md0 --name=x --home-cluster=y a b", {"mode": A, "name": "x", "home_cluster": "y", **AB}),
    ("-D /dev/md0", {"mode": MISC, "action": Action.DETAIL, "devices": ["/dev/md0"]}),
    ("-Db /dev/md0", {"mode": MISC, "action": Action.DETAIL, "brief": True, "devices": ["/dev/md0"]}),
    ("-b -D /dev/md0", {"mode": MISC, "action": Action.DETAIL, "brief": True, "devices": ["/dev/md0"]}),
    ("-Ds", {"mode": MISC, "action": Action.DETAIL, "scan": True}),
    ("--detail --scan --export", {"mode": MISC, "action": Action.DETAIL, "scan": True, "export": True}),
    ("-DYt md0", {"mode": MISC, "action": Action.DETAIL, "export": True, "test": True, "devices": ["md0"]}),
    ("--misc --detail md0", {"mode": MISC, "action": Action.DETAIL, "devices": ["md0"]}),
    ("-D --json md0", {"mode": MISC, "action": Action.DETAIL, "json": True, "devices": ["md0"]}),
    ("-E a b", {"mode": MISC, "action": Action.EXAMINE, "devices": ["a", "b"]}),
    ("-EY a", {"mode": MISC, "action": Action.EXAMINE, "export": True, "devices": ["a"]}),
    ("--examine --brief a", {"mode": MISC, "action": Action.EXAMINE, "brief": True, "devices": ["a"]}),
    ("-X a", {"mode": MISC, "action": Action.EXAMINE_BITMAP, "devices": ["a"]}),
    ("--examine-bitmap a", {"mode": MISC, "action": Action.EXAMINE_BITMAP, "devices": ["a"]}),
    ("-Q a", {"mode": MISC, "action": Action.QUERY, "devices": ["a"]}),
    ("-S md0 md1", {"mode": MISC, "action": Action.STOP, "devices": ["md0", "md1"]}),
    ("-S --scan", {"mode": MISC, "action": Action.STOP, "scan": True}),
    ("-S -f md0", {"mode": MISC, "action": Action.STOP, "force": True, "devices": ["md0"]}),
    ("--stop --force md0", {"mode": MISC, "action": Action.STOP, "force": True, "devices": ["md0"]}),
    ("/dev/md0 --stop", {"mode": Mode.MANAGE, "action": Action.STOP, "devices": ["/dev/md0"]}),
    ("-W md0", {"mode": MISC, "action": Action.WAIT, "devices": ["md0"]}),
    ("--wait --scan", {"mode": MISC, "action": Action.WAIT, "scan": True}),
    ("--zero-superblock a b", {"mode": MISC, "action": Action.ZERO_SUPERBLOCK, "devices": ["a", "b"]}),
    (
        "--zero-superblock -e 1.0 a",
        {"mode": MISC, "action": Action.ZERO_SUPERBLOCK, "metadata": "1.0", "devices": ["a"]},
    ),
    ("/dev/md0", {"mode": Mode.MANAGE, "devices": ["/dev/md0"]}),
    ("-h", {"help": True}),
    ("-C --help", {"mode": C, "help": True}),
    ("--help-options", {"help_options": True}),
    ("-V", {"version": True}),
    ("--version", {"version": True}),
    ("locks --json", {"verb": "locks", "devices": ["--json"]}),
    ("demo --fast -x", {"verb": "demo", "devices": ["--fast", "-x"]}),
]

REFUSED: list[tuple[str, str]] = [
    ("-n2 -C /dev/md0 x y", "-n does not set the mode, and so cannot be the first option."),
    ("--scan -D", "--scan does not set the mode, and so cannot be the first option."),
    ("--force -D x", "--force does not set the mode, and so cannot be the first option."),
    ("--level=1 --create /dev/md0", "--level does not set the mode, and so cannot be the first option."),
    ("-C", "an md device must be given in this mode"),
    ("-A", "an md device must be given in this mode"),
    ("-C /dev/md0 -l99 -n2 x y", "invalid raid level: 99"),
    ("-C -A /dev/md0", '-A would set clustermd mode to "assemble", but it is already set to "create".'),
    ("-A -C /dev/md0", '-C would set clustermd mode to "create", but it is already set to "assemble".'),
    ("-C -D /dev/md0", '-D would set clustermd mode to "misc", but it is already set to "create".'),
    ("/dev/md0 -D", '-D would set clustermd mode to "misc", but it is already set to "manage".'),
    ("-D -E x", "--examine/-E cannot be given with -D"),
    ("--foo", "unrecognized option '--foo'"),
    ("-C --foo", "unrecognized option '--foo'"),
    ("-C -j", "invalid option -- 'j'"),
    ("-C -l", "option requires an argument -- 'l'"),
    ("-C --level", "option '--level' requires an argument"),
    ("-C /dev/md0 --assume-clean=1 x", "option '--assume-clean' doesn't allow an argument"),
    ("-C /dev/md0 -l1 -n0 x y", "invalid number of raid devices: 0"),
    ("-C /dev/md0 -l1 -nq x y", "invalid number of raid devices: q"),
    ("-C /dev/md0 -l1 -n2 -n2 x y", "raid-devices set twice: 2 and 2"),
    ("-C /dev/md0 -l1 -n1 x", "'1' is an unusual number of drives for an array, so it is probably"),
    ("-C /dev/md0 -l1 -l1 -n2 x y", "raid level may only be set once.  Second value is 1."),
    ("-C /dev/md0 -x 1 -x 1 a b", "spare-devices set twice: 1 and 1"),
    ("-C /dev/md0 -x q a b", "invalid number of spare-devices: q"),
    ("-C /dev/md0 -l1 -n2 --nodes=1 -b clustered x y", "clustered array needs two nodes at least: 1"),
    ("-C /dev/md0 -l1 -n2 --nodes=q -b clustered x y", "clustered array needs two nodes at least: q"),
    ("-C /dev/md0 -l1 -n2 --nodes=4 x y", "--nodes argument only compatible with --bitmap=clustered"),
    ("-C /dev/md0 -l1 -n2 -z 3q x y", "invalid size: 3q"),
    ("-C /dev/md0 -l1 -n2 -z 0 x y", "invalid size: 0"),
    ("-C /dev/md0 -l1 -n2 -c 3q x y", "invalid chunk/rounding value: 3q"),
    ("-C /dev/md0 -l1 -n2 -e 0.5 x y", "unrecognised metadata identifier: 0.5"),
    ("-C /dev/md0 -l1 -n2 -b bogus x y", "bitmap must be 'internal', or 'clustered', or 'none'"),
    ("-C /dev/md0 -l1 -n2 -b /a/file x y", "bitmap files (/a/file) are not offered by clustermd"),
    ("-C /dev/md0 -b none -b none x", "bitmap cannot be set twice. Second value: none."),
    ("-A /dev/md0 -b internal x", "no need to specify --bitmap when assembling arrays with internal"),
    ("-C /dev/md0 -l1 -n2 -d 0 x y", "invalid delay: 0"),
    ("-C /dev/md0 -l1 -n2 -u 123 x y", "Bad uuid: 123"),
    ("-C /dev/md0 -N " + "a" * 40, "is too long, 32 chars max."),
    ("-C /dev/md0 --data-offset=q x", "invalid data-offset: q"),
    ("-C /dev/md0 --bitmap-chunk=q x", "invalid bitmap chunksize: q"),
    ("-C /dev/md0 --bitmap-chunk=3K x", "invalid bitmap chunksize: 3K"),
    ("-C /dev/md0 --home-cluster=" + "x" * 65, "Cluster name too big."),
    ("-C /dev/md0 --scan x y", ":option --scan not valid in create mode"),
    ("-A --level=1 /dev/md0 x", ":option --level not valid in assemble mode"),
    ("-A -l1 /dev/md0 x", "option -l not valid in assemble mode"),
    ("-E --level=1 x", ":option --level not valid in misc mode"),
    ("-D --bitmap=clustered", ":option --bitmap not valid in misc mode"),
    ("-D", "No devices given."),
    ("-E", "No devices to examine"),
    ("-X", "No devices given."),
    ("-S", "No devices given."),
    ("-W", "No devices given."),
    ("--zero-superblock", "No devices given."),
    ("-C --na=x --raid=2", "option '--raid' is ambiguous; possibilities: '--raid-devices' '--raid-disks'"),
    ("/dev/md0 --add x", "--add of mdadm is not offered by clustermd"),
    ("/dev/md0 -f x", "-f of mdadm is not offered by clustermd"),
    ("-C /dev/md0 --write-behind x", "--write-behind of mdadm is not offered by clustermd"),
    ("-w /dev/md0", "-w of mdadm is not offered by clustermd"),
    ("-R /dev/md0", "-R of mdadm is not offered by clustermd for running arrays"),
    ("--misc x", "--misc needs an action such as --detail, --examine or --stop"),
    ("-A -c /etc/mdadm.conf", "configuration files (/etc/mdadm.conf) are not offered by clustermd"),
]


@pytest.mark.parametrize(("words", "meaning"), UNDERSTOOD, ids=[words for words, _ in UNDERSTOOD])
def test_a_command_line_means_this(words: str, meaning: dict[str, Any]) -> None:
    command = parse(words.split())
    wanted = Command(**meaning)
    for field in fields(Command):
        assert getattr(command, field.name) == getattr(wanted, field.name), field.name


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words[:60] for words, _ in REFUSED])
def test_a_command_line_is_refused_in_mdadms_words(words: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(words.split())
    assert message in refused.value.message


@pytest.mark.parametrize("words", [[], ["-vv"], ["--quiet"]])
def test_without_a_mode_only_the_way_to_help_is_shown(words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parse(words)
    assert refused.value.message == ""
    assert refused.value.data["usage"]


def test_an_empty_word_is_a_device_and_a_lone_dash_too() -> None:
    assert parse(["-E", "", "-"]).devices == ["", "-"]


@pytest.mark.parametrize(
    ("text", "sectors"),
    [
        ("1", 2),
        ("1K", 2),
        ("1M", 2048),
        ("1G", 2 << 20),
        ("2T", 4 << 30),
        ("8s", 8),
        ("", None),
        ("-1", None),
    ],
)
def test_sizes_are_kibibytes_unless_a_suffix_says_otherwise(text: str, sectors: int | None) -> None:
    assert parse_size(text) == sectors
