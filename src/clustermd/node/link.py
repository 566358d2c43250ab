"""The place of an array process among the nodes: its session of the lockd, and the witness of its I/O.

Before it writes anything, the process locks one byte of every disk through the descriptors that do its I/O and
has its lockd make that durable (design section 5). Should it die, whoever finds those bytes free knows that
nothing of it is in flight any more. At the end of each life of the array the bytes are given back first, when
nothing is in flight, then the session is closed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from clustermd.device import witness
from clustermd.device.direct import DirectDevice
from clustermd.device.member_device import Submitter
from clustermd.dlm.lockspace import Lockspace, LockspaceEvents
from clustermd.errors import DeviceRefused, Refused
from clustermd.group.process_group import Witness
from clustermd.lockd.client import LockdConnection, connect
from clustermd.node.files import array_using, process_started
from clustermd.rundir import RunDir
from clustermd.trace import Trace

SAY_S = 2.0
"""How long to wait without a word."""
SAME_DISKS_S = 5.0
"""How long a peer that seems to use other disks gets to turn out dead."""
_POLL_S = 0.02


class LockdLink:
    """A `cluster.Link` over this node's lockd. Made by `connect_link`.

    `devices` are all that may be written; `shared()` are those that every node of the array has open.
    `one_machine`: all nodes are here, so the kernel's locks tell whether they use the same disks.
    """

    def __init__(
        self,
        connection: LockdConnection,
        devices: Sequence[DirectDevice],
        shared: Callable[[], list[DirectDevice]],
        submitter: Submitter,
        rundir: RunDir,
        one_machine: bool,
    ) -> None:
        self._one_machine = one_machine
        self._connection = connection
        self._rundir = rundir
        self._devices = devices
        self._submitter = submitter
        self._shared = shared

    @property
    def offset(self) -> int:
        """The byte that proves our end: one per node, far behind any data."""
        return witness.WITNESS_BASE + self._connection.node

    async def join(self, name: str, events: LockspaceEvents, max_slots: int) -> Lockspace:
        lockspace = await self._connection.session.join(name, events, max_slots=max_slots)
        try:
            if self._one_machine:
                await self._check_same_disks(lockspace)
        except BaseException:
            await lockspace.leave()
            raise
        return lockspace

    async def _check_same_disks(self, lockspace: Lockspace) -> None:
        """Refuse disks that are not the ones the other nodes have open (rule 20).

        A node of this machine holds its witness byte on every disk it uses. Where a living peer's byte is free, it
        uses another file or device node: a copy, or a loop device over the file. One that has just died is
        still listed for a moment, so it gets the time to be found dead.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + SAME_DISKS_S
        while True:
            others = [
                (peer.name, device.path)
                for peer in lockspace.slots
                if peer.slot != lockspace.our_slot
                for device in self._shared()
                if not witness.held(device.fd, witness.WITNESS_BASE + peer.node)
            ]
            if not others:
                return
            if loop.time() >= end_s:
                name, path = others[0]
                raise DeviceRefused(
                    "not-the-same-disk",
                    f"{path} is not what {name} uses for this array: it is a copy, or another way to the same"
                    f" disk (a file and a loop device over it). Give this node the same files as {name}",
                    path=path,
                    peer=name,
                )
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Wait for the last request of this life, give up the witness locks, then the session."""
        await self._submitter.drained()
        for device in self._devices:
            if device.fd >= 0:
                witness.release(device.fd, self.offset)
        await self._connection.close()

    async def take_witness(self, array: str, notice: Callable[[str], None]) -> None:
        """Lock our byte of every disk and register it. Waits for a former process of this node to be gone."""
        for device in self._devices:
            loop = asyncio.get_running_loop()
            say_s = loop.time() + SAY_S
            while not witness.hold(device.fd, self.offset):
                other = array_using(self._rundir, device.path)
                if other is not None and other != array:
                    raise DeviceRefused(
                        "device-busy",
                        f"{device.path} is in use by {other} on this node: stop that array first",
                        path=device.path,
                        array=other,
                    )
                # The kernel tells nobody when the last request of a dead process has landed.
                if loop.time() >= say_s:
                    notice(f"waiting for the last requests of a former process of this node on {device.path}")
                    say_s = loop.time() + 10 * SAY_S
                await asyncio.sleep(_POLL_S)
        paths = tuple((os.path.abspath(device.path), *device.identity) for device in self._devices)
        pid = os.getpid()
        await self._connection.register(Witness(array, pid, process_started(pid), self.offset, paths))


async def connect_link(
    rundir: RunDir,
    array: str,
    devices: Sequence[DirectDevice],
    shared: Callable[[], list[DirectDevice]],
    submitter: Submitter,
    notice: Callable[[str], None],
    trace: Trace,
    *,
    one_machine: bool,
) -> LockdLink:
    """Join this node's lockd, started if need be, and register the witness. Says what it waits for.

    Raises Refused, DeviceRefused when a disk is held by the kernel, ClusterLost.
    """
    said = ""
    while True:
        try:
            connection = await connect(rundir, f"array {array}", timeout_s=SAY_S, trace=trace)
            break
        except Refused as refusal:
            if refusal.code != "group-not-ready":
                raise
            if refusal.message != said:
                said = refusal.message
                notice(said)
    link = LockdLink(connection, devices, shared, submitter, rundir, one_machine)
    try:
        await link.take_witness(array, notice)
    except BaseException:
        await link.close()
        raise
    return link
