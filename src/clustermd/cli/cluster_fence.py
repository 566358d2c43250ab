"""`clustermd cluster fence-ack`, `fence-test` and `fence-device`: where a person takes part in fencing.

fence-ack is an operator's word that a lost node is off. It is believed without a look, so it is asked for twice.
fence-test looks whether the configured policy would work, and with `NODE --yes` does it: the day a node is lost is
the wrong one to find out. fence-device makes the small shared disk of `fence = "device"`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from clustermd.cli.command import UsageError
from clustermd.cli.contents import contents
from clustermd.cli.output import say, show, show_json
from clustermd.clock import SystemClock
from clustermd.conf import Conf
from clustermd.errors import DeviceRefused, Refused
from clustermd.group.agreed.fencing import Victim
from clustermd.group.process_group import Member
from clustermd.lockd.client import vouch
from clustermd.lockd.fencing.fence_disk import FenceDisk
from clustermd.lockd.fencing.fencer import Fencer
from clustermd.lockd.fencing.make import make_fencer
from clustermd.node.disk import Disk
from clustermd.rundir import RunDir

_ANSWER_S = 10.0
_ACK_HELP = """\
Usage: clustermd cluster fence-ack NODE [--yes]

You vouch that NODE is switched off, or cut off from all disks of its arrays, and stays so until it has been
restarted. Nodes that wait for its fencing believe you and take over from it. If NODE still runs, both sides write:
the data is damaged, and nothing can tell where.

  --yes   do not ask
"""
_TEST_HELP = """\
Usage: clustermd cluster fence-test [NODE] [--json]   would fencing (this NODE) work? nobody is harmed
       clustermd cluster fence-test NODE --yes        fence NODE now: it is switched off
"""
_DEVICE_HELP = """\
Usage: clustermd cluster fence-device --create PATH

Makes PATH the fence device of a cluster: an empty disk of 8.1 MiB or more that all nodes share, and that is no
member of any array. Then put fence = "device" and fence_device = "PATH" into the configuration of all nodes.
"""


def run(words: Sequence[str]) -> int:
    """The verbs; `words` begin with the subcommand. The exit status. Raises Refused, UsageError."""
    name, *rest = words
    verb, text, options = _VERBS[name]
    if "-h" in rest or "--help" in rest:
        show(text)
        return 0
    unknown = [word for word in rest if word.startswith("-") and word not in options]
    if unknown:
        raise UsageError(f"cluster {name} takes no {unknown[0]!r}")
    status: int = verb([word for word in rest if word not in options], set(rest) & options)
    return status


# --- fence-ack


def _ack(words: list[str], options: set[str]) -> int:
    if len(words) != 1:
        raise UsageError("cluster fence-ack needs one node: clustermd cluster fence-ack NODE")
    node = words[0]
    if "--yes" not in options:
        _make_sure(node)
    show(asyncio.run(vouch(RunDir.from_environment(), node, _ANSWER_S)) + "\n")
    return 0


def _make_sure(node: str) -> None:
    """Have the person type the node's name. Raises Refused without a terminal, or for anything else."""
    if not sys.stdin.isatty():
        raise Refused(
            "not-confirmed",
            f"you vouch that {node} is off and cannot write to any disk of its arrays: look, then say so with --yes",
            node=node,
        )
    say(
        f"you vouch that {node} is switched off, or cut off from all disks of its arrays, and stays so until it has"
        " been restarted. If it still runs, both sides write and the data is damaged."
    )
    print(f"Type the node's name to vouch for it: {node}? ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != node:
        raise Refused("not-confirmed", f"nothing was done: that was not {node!r}", node=node)


# --- fence-test


def _test(words: list[str], options: set[str]) -> int:
    if len(words) > 1:
        raise UsageError("cluster fence-test takes one node at most")
    node = words[0] if words else ""
    if "--yes" in options and not node:
        raise UsageError("cluster fence-test --yes needs the node that is to be fenced")
    conf = Conf.load()
    own = RunDir.from_environment().node
    if "--yes" in options:
        return asyncio.run(_really_fence(conf, own, node))
    return asyncio.run(_check(conf, own, node, "--json" in options))


async def _check(conf: Conf, own: str, node: str, as_json: bool) -> int:
    """Ask the policy about one node, or about itself and all nodes."""
    fencer = await make_fencer(conf, Member(0, 0, own), SystemClock())
    results: list[dict[str, Any]] = []
    for name in [node] if node else ["", *_nodes(conf)]:
        try:
            results.append({"node": name or None, "good": True, "text": await fencer.check(name)})
        except Refused as refusal:
            results.append({"node": name or None, "good": False, "text": refusal.message})
    if as_json:
        show_json(fence_test={"policy": fencer.policy, "unsafe": fencer.unsafe, "checks": results})
    else:
        show(_check_text(conf, fencer, results))
    return 0 if all(result["good"] for result in results) else 1


def _check_text(conf: Conf, fencer: Fencer, results: list[dict[str, Any]]) -> str:
    lines = [f'fence = "{fencer.policy}" ({conf.path})']
    if fencer.unsafe:
        lines.append(f"  unsafe: {fencer.unsafe}")
    for result in results:
        who = f"{result['node']}: " if result["node"] else ""
        lines.append(f"  {who}{'' if result['good'] else 'FAILED: '}{result['text']}")
    return "\n".join(lines) + "\n"


def _nodes(conf: Conf) -> list[str]:
    """The nodes that can be asked about one by one: of the configuration, else corosync's."""
    if conf.fence == "agent" and conf.fence_agent is not None and conf.fence_agent.nodes:
        return sorted(conf.fence_agent.nodes)
    if not conf.clustered or conf.fence not in ("agent", "stonith"):
        return []
    # not wanted where nobody has corosync
    from clustermd.group.corosync import cmap

    return [node.name for node in cmap.nodelist() if node.name]


async def _really_fence(conf: Conf, own: str, node: str) -> int:
    if node == own:
        raise Refused(
            "fence-self", f"{node} is this node: fence it from another one, as the cluster would", node=node
        )
    if conf.fence in ("lease", "none"):
        raise Refused(
            "nothing-to-test", f'{conf.path}: with fence = "{conf.fence}" nobody is ever switched off'
        )
    fencer = await make_fencer(conf, Member(0, 0, own), SystemClock())
    number, incarnation = _life_on_device(conf.fence_device, node) if conf.fence == "device" else (0, 0)
    say(f"fencing {node} by {fencer.policy}")
    victim = Victim(number, node, incarnation, SystemClock().boottime_s())
    show(await fencer.fence(victim) + "\n")
    return 0


def _life_on_device(path: str, node: str) -> tuple[int, int]:
    """Number and incarnation of the node of that name, from its heartbeats."""
    disk = FenceDisk.open(path)
    try:
        for beat in disk.beats():
            if beat.name == node:
                return beat.node, beat.incarnation
    except OSError as error:
        raise Refused("no-fence-device", f"{path} cannot be read: {error}", path=path) from error
    finally:
        disk.close()
    raise Refused(
        "unknown-node", f"{node} has never given a heartbeat on {path}: is that its name?", node=node
    )


# --- fence-device


def _device(words: list[str], options: set[str]) -> int:
    if "--create" not in options or len(words) != 1:
        raise UsageError("cluster fence-device needs a path: clustermd cluster fence-device --create PATH")
    path = os.path.abspath(words[0])
    try:
        FenceDisk.create(path, os.urandom(16))
    except Refused as refusal:
        if refusal.code == "fence-device-not-empty":
            _say_contents(path)
        raise
    show(
        f'{path} is a fence device now. In the configuration of all nodes: fence = "device", fence_device = "{path}"\n'
    )
    return 0


def _say_contents(path: str) -> None:
    try:
        with Disk(path) as disk:
            for message in contents(disk):
                say(message)
    except DeviceRefused:
        pass  # the refusal says enough


_VERBS: dict[str, tuple[Callable[[list[str], set[str]], int], str, set[str]]] = {
    "fence-ack": (_ack, _ACK_HELP, {"--yes"}),
    "fence-test": (_test, _TEST_HELP, {"--yes", "--json"}),
    "fence-device": (_device, _DEVICE_HELP, {"--create"}),
}
