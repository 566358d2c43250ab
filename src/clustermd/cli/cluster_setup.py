"""`clustermd cluster setup`: corosync.conf and the authkey for a new cluster, and what to do next.

It writes two files on this node and touches nothing else: no service is started, no other machine is spoken
to. What was there before is kept beside them, and is replaced only with --force, except the example that the
Debian package brings.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clustermd.cli.command import UsageError
from clustermd.cli.output import show, show_json
from clustermd.errors import Refused
from clustermd.group.corosync.conf import (
    DIRECTORY,
    FIRST_PORT,
    KEY_BYTES,
    TOKEN_MS,
    Plan,
    conf_text,
    parse_node,
)

_HELP = f"""\
Usage: clustermd cluster setup NODE=ADDRESS[,ADDRESS2] ... [options]

Writes corosync.conf and authkey for a new cluster of these nodes. NODE is the host name of a machine, ADDRESS how
the others reach it; a second address is a second, independent link. Run it once, on one node: it says how the
others get the files.

  --cluster=NAME    the cluster's name, also on the disks of its arrays (default: clustermd- and six random digits)
  --output=DIR      where to write (default: {DIRECTORY})
  --token=MS        milliseconds until a silent node is taken for lost (default: {TOKEN_MS})
  --force           replace files that are there already; they are kept as *.old
  --json            one JSON object
"""
_VALUES = ("--cluster", "--output", "--token")
_FLAGS = ("--force", "--json")


@dataclass
class _Words:
    """The command line, taken apart."""

    nodes: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)


def run(words: Sequence[str]) -> int:
    """The subcommand. The exit status. Raises Refused for what cannot work or is there already."""
    if "-h" in words or "--help" in words:
        show(_HELP)
        return 0
    given = _read(words)
    if not given.nodes:
        raise UsageError("cluster setup needs its nodes, for example: node1=192.168.1.1 node2=192.168.1.2")
    directory = Path(given.values.get("--output", DIRECTORY)).absolute()
    cluster = given.values.get("--cluster", f"clustermd-{secrets.token_hex(3)}")
    plan = Plan(
        cluster, tuple(parse_node(word) for word in given.nodes), _milliseconds(given.values.get("--token"))
    )
    conf, key = directory / "corosync.conf", directory / "authkey"
    kept = _write(conf, conf_text(plan), key, force="--force" in given.flags)
    steps = next_steps(plan, directory)
    if "--json" in given.flags:
        show_json(
            cluster=plan.cluster,
            nodes=[
                {"number": n, "name": node.name, "addresses": list(node.addresses)}
                for n, node in enumerate(plan.nodes, 1)
            ],
            detection_s=round(plan.detection_s, 1),
            written=[str(conf), str(key)],
            kept=[str(path) for path in kept],
            next=steps,
        )
        return 0
    show(f"wrote {conf} and {key}: cluster {plan.cluster}, {len(plan.nodes)} nodes\n")
    for path in kept:
        show(f"kept what was there as {path}\n")
    show("\nNext:\n" + "".join(f"  {number}. {step}\n" for number, step in enumerate(steps, 1)))
    return 0


def next_steps(plan: Plan, directory: Path) -> list[str]:
    """What a person does now, in order."""
    hosts = " ".join(node.addresses[0] for node in plan.nodes)
    ports = str(FIRST_PORT) if plan.links == 1 else f"{FIRST_PORT} to {FIRST_PORT + plan.links - 1}"
    steps = [
        "on every node: apt install corosync",
        f"copy both files to {DIRECTORY} of every node: for host in {hosts}; do "
        f"scp -p {directory}/corosync.conf {directory}/authkey root@$host:{DIRECTORY}/; done",
        f"let UDP port {ports} through between the nodes",
        "on every node: systemctl enable corosync && systemctl restart corosync",
        "on any node: corosync-quorumtool -s (all nodes, Quorate: Yes), then: clustermd cluster status",
        'on every node, in /etc/clustermd.conf: engine = "corosync", and how a lost node is fenced; '
        "then: clustermd cluster fence-test",
    ]
    if plan.two_nodes:
        steps[-1] += (
            " (two nodes: after a partition both have quorum, only fencing keeps them from writing both)"
        )
    return steps


def _read(words: Sequence[str]) -> _Words:
    given = _Words()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in _VALUES:
            if not equals:
                if not rest:
                    raise UsageError(f"cluster setup: {name} needs a value")
                value = rest.pop(0)
            given.values[name] = value
        elif word in _FLAGS:
            given.flags.add(word)
        elif word.startswith("-"):
            raise UsageError(f"cluster setup takes no {word!r}")
        else:
            given.nodes.append(word)
    return given


def _milliseconds(text: str | None) -> int:
    if text is None:
        return TOKEN_MS
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"cluster setup: --token takes milliseconds, not {text!r}")
    return int(text)


def _write(conf: Path, text: str, key: Path, *, force: bool) -> list[Path]:
    """Both files, or neither. What was there before and is kept. The key is never readable by others, not
    even at first.
    """
    there = [path for path in (conf, key) if path.exists()]
    if there and not force and not (there == [conf] and _is_example(conf)):
        raise Refused(
            "exists",
            f"{' and '.join(map(str, there))} {'are' if len(there) > 1 else 'is'} there already, "
            "perhaps of a cluster that runs: nothing was written. Another directory: --output DIR; "
            "to replace (what is there is kept as *.old): --force",
            paths=[str(path) for path in there],
        )
    fresh = {conf: (text.encode(), 0o644), key: (os.urandom(KEY_BYTES), 0o400)}
    try:
        conf.parent.mkdir(parents=True, exist_ok=True)
        for path, (content, mode) in fresh.items():
            _write_aside(_new(path), content, mode)
        kept = [path.with_name(f"{path.name}.old") for path in there]
        for path, old in zip(there, kept, strict=True):
            path.replace(old)
        for path in fresh:
            _new(path).replace(path)
    except OSError as error:
        raise Refused(
            "cannot-write",
            f"cannot write {error.filename}: {error.strerror}; run as root or use --output DIR",
        ) from None
    finally:
        for path in fresh:
            _new(path).unlink(missing_ok=True)
    return kept


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _write_aside(path: Path, content: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _is_example(conf: Path) -> bool:
    """The file that the Debian package brings names a cluster of this machine alone."""
    try:
        text = conf.read_text(errors="replace")
    except OSError:
        return False
    return (
        "cluster_name: debian" in text and "ring0_addr: 127.0.0.1" in text and text.count("ring0_addr:") == 1
    )
