"""What is asked of running arrays: -D, -S, -W. Each array answers by its control socket.

The exit status follows mdadm: the worst over all arrays; with --test, -D says 4 when it could learn nothing.
"""

from __future__ import annotations

from typing import Any

from clustermd.array.status import ArrayStatus
from clustermd.cli import detail as page
from clustermd.cli.command import Command
from clustermd.cli.output import PROGRAM, say, show, show_json
from clustermd.errors import Refused
from clustermd.node.config import array_name, device_name
from clustermd.node.control import ControlClient, process_state
from clustermd.node.files import rewrite_mdstat, running_arrays
from clustermd.node.mdstat import level_name
from clustermd.rundir import RunDir

NO_INFORMATION = 4
END_S = 10.0


def detail(command: Command) -> int:
    """Run `-D`. The exit status."""
    rundir = RunDir.from_environment()
    names = command.devices or [device_name(name) for name in running_arrays(rundir)]
    brief = command.brief or (command.scan and not command.export)
    worst, facts = 0, []
    for shown in names:
        try:
            with ControlClient(rundir, array_name(shown)) as client:
                said = client.ask("status")
        except Refused as refusal:
            say(f"cannot open {shown}: {refusal.message}")
            worst = max(worst, NO_INFORMATION if command.test else 1)
            continue
        status = ArrayStatus.from_wire(said["status"])
        if command.json:
            facts.append(page.array_json(said))
        elif command.export:
            show(page.export_text(status, said["uri"]))
        elif brief:
            show(page.brief_text(status, command.verbose > 0))
        else:
            show(page.detail_text(status, shown, command.homehost or rundir.node))
            _say_idle_spares(status)
        if command.test:
            worst = max(worst, page.test_status(status))
    if worst:
        _drop_dead(rundir)
    if command.json:
        show_json(arrays=facts)
    return worst


def _drop_dead(rundir: RunDir) -> None:
    """Take arrays whose process died out of mdstat: nobody else may be there to do it."""
    if rundir.node_dir.exists():
        rewrite_mdstat(rundir)


def _say_idle_spares(status: ArrayStatus) -> None:
    """A spare of a degraded array would be rebuilt by Linux; here it waits, and that must be said."""
    spares = [member.path for member in status.members if member.spare]
    if status.degraded and spares:
        say(f"the spare {', '.join(spares)} stays idle: rebuilding onto a spare is not offered yet")


def stop(command: Command) -> int:
    """Run `-S`. The exit status: 1 when an array could not be stopped."""
    rundir = RunDir.from_environment()
    if command.scan and command.devices:
        raise Refused("usage", "--stop not meaningful with both a --scan assembly and a device name.")
    names = command.devices or [device_name(name) for name in running_arrays(rundir)]
    worst, stopped = 0, []
    for shown in names:
        try:
            stopped.append(_stop_one(rundir, shown, command.force))
        except Refused as refusal:
            say(f"cannot stop {shown}: {refusal.message}")
            worst = 1
            continue
        if not command.quiet:
            say(f"stopped {shown}")
    _drop_dead(rundir)
    if command.json:
        show_json(stopped=stopped)
    return worst


def _stop_one(rundir: RunDir, shown: str, force: bool) -> str:
    name = array_name(shown)

    def patience() -> None:
        state = process_state(client.pid)
        say(f"still waiting for {shown} to stop (process {client.pid} is {state}); its log may say more")

    with ControlClient(rundir, name) as client:
        client.ask("stop", patience, force=force)
        if not client.wait_for_end(END_S):
            raise Refused("not-ended", f"{name} is stopped, but its process {client.pid} has not ended yet")
    return name


def wait(command: Command) -> int:
    """Run `-W`. Success only if it did wait for every array, as with mdadm."""
    rundir = RunDir.from_environment()
    names = command.devices or [device_name(name) for name in running_arrays(rundir)]
    worst, facts = 0, []
    for shown in names:
        try:
            with ControlClient(rundir, array_name(shown)) as client:
                waited = bool(client.ask("wait", lambda: None)["waited"])
        except Refused as refusal:
            say(f"cannot wait for {shown}: {refusal.message}")
            worst = 2
            continue
        facts.append({"name": array_name(shown), "waited": waited})
        worst = max(worst, 0 if waited else 1)
    if command.json:
        show_json(arrays=facts)
    return worst


def query_text(said: dict[str, Any], shown: str) -> str:
    """The line of `-Q` for a running array."""
    status = ArrayStatus.from_wire(said["status"])
    spares = sum(1 for member in status.members if member.spare)
    mebibytes = status.array_sectors / 2048
    size = f"{mebibytes:.2f}MiB" if mebibytes < 2048 else f"{mebibytes / 1024:.2f}GiB"
    return (
        f"{shown}: {size} {level_name(status.level)} {status.raid_disks} devices,"
        f" {spares} spare{'' if spares == 1 else 's'}. Use {PROGRAM} --detail for more detail.\n"
    )
