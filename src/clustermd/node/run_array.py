"""Starting an array from its configuration: the floors are put together here and nowhere else.

Disks are opened, superblocks read, the right to run the array is made sure of (not held by the kernel, of our
cluster, complete), then the array joins, and only then NBD clients are let in. What fails is undone in the
opposite order, and its reason is for the person who asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from functools import partial
from uuid import UUID

from clustermd.array.array import Array
from clustermd.array.assemble import Assembly, load_members
from clustermd.array.coordinator import Alone, Coordinator
from clustermd.array.status import ArrayStatus
from clustermd.clock import SystemClock
from clustermd.cluster.cluster import Cluster
from clustermd.conf import Conf
from clustermd.device.direct import DirectDevice, open_member
from clustermd.device.in_use import in_use_by_kernel
from clustermd.device.lease import LeaseFile
from clustermd.device.member_device import Gate, GateState
from clustermd.device.submitter import make_submitter
from clustermd.errors import DeviceRefused, Refused
from clustermd.export.nbd import ClientInfo, NbdServer
from clustermd.node.cluster_name import own_cluster_name
from clustermd.node.config import ArrayConfig
from clustermd.node.disk import Disk
from clustermd.node.files import ArrayFiles, SpeedLimits
from clustermd.node.link import LockdLink, connect_link
from clustermd.node.running import Notice, RunningArray
from clustermd.rundir import RunDir
from clustermd.trace import Trace

log = logging.getLogger("clustermd.node")
_BOOTTIME_NS = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)


class Served:
    """An array and its NBD server."""

    def __init__(self, array: Array, server: NbdServer, changed: asyncio.Event) -> None:
        self._array = array
        self._server = server
        self.changed = changed

    def status(self) -> ArrayStatus:
        return self._array.status()

    def clients(self) -> list[str]:
        return [client_text(client) for client in self._server.clients()]

    async def idle(self) -> None:
        await self._array.idle()

    async def stop(self, force: bool) -> None:
        await self._server.stop(force)
        await self._array.stop()

    async def ended(self) -> str:
        await self._array.stopped.wait()
        return "it was stopped"


def client_text(client: ClientInfo) -> str:
    """A connected client, for people."""
    return f"{client.command or 'a process'} (pid {client.pid})"


async def start_array(config: ArrayConfig, rundir: RunDir, trace: Trace, notice: Notice) -> RunningArray:
    """Run the array of `config` on this node. Raises Refused or OSError, with everything undone."""
    conf = Conf.load()
    clustered = _look(config)
    changed = asyncio.Event()
    async with AsyncExitStack() as undo:
        submitter = make_submitter()
        undo.push_async_callback(submitter.close)
        devices: list[DirectDevice] = []

        def opener(path: str) -> DirectDevice:
            devices.append(open_member(path, read_only=config.read_only, clustered=clustered))
            return devices[-1]

        assembly = await load_members(config.paths, opener, submitter)
        undo.callback(assembly.close)
        for out in assembly.left_out:
            log.warning("%s: %s is left out: %s", config.name, out.path, out.why)
            notice(f"{out.path} is left out: {out.why}")
        _check_cluster(config, assembly, conf)
        coordinator: Coordinator = Alone()
        if assembly.clustered and not config.read_only:
            opened = [device for device in devices if device.fd >= 0]

            def shared() -> list[DirectDevice]:
                good = {member.path for member in assembly.members if member.in_sync}
                return [device for device in opened if device.path in good]

            async def connect() -> LockdLink:
                link = await connect_link(
                    rundir,
                    config.name,
                    opened,
                    shared,
                    submitter,
                    notice,
                    trace,
                    one_machine=not conf.clustered,
                )
                if conf.clustered:
                    try:
                        submitter.gate.lease = LeaseFile.open(rundir.lease, _BOOTTIME_NS)
                    except BaseException:
                        await link.close()
                        raise
                return link

            lockspace = str(UUID(bytes=assembly.reference.set_uuid))
            # Nodes on one machine share its clients' fate; a machine may be replaced while its clients live.
            coordinator = Cluster(lockspace, connect, trace, excludes=conf.clustered)
            submitter.gate.listen(partial(_say_lapsed, submitter.gate, config.name))
        array = Array(
            config.name,
            assembly,
            coordinator,
            submitter,
            SystemClock(),
            trace,
            read_only=config.read_only,
            allow_degraded=config.run or config.force,
            limits=SpeedLimits(rundir, log.warning),
            changed=changed.set,
        )
        # From here on the array owns submitter and disks, and its stop closes them.
        undo.pop_all()
        undo.push_async_callback(array.stop)
        await array.start()
        server = NbdServer(array, ArrayFiles.of(rundir, config.name).nbd_socket, trace)
        await server.start()
        array.watch_exclusion(server.exclude, server.admit)
        undo.pop_all()
    return Served(array, server, changed)


def _say_lapsed(gate: Gate, name: str, state: GateState) -> None:
    if gate.lapsed and state is GateState.HELD:
        log.warning("%s: I/O is held: %s", name, gate.reason)


def _look(config: ArrayConfig) -> bool:
    """Whether the array is clustered, from its superblocks; and whether the kernel leaves us its disks."""
    clustered = False
    for path in config.paths:
        with Disk(path) as disk:
            superblock = disk.superblock()
        if config.uuid and superblock.set_uuid.hex() != config.uuid:
            raise Refused(
                "not-one-array", f"{path} is not a member of the array with UUID {config.uuid}", path=path
            )
        clustered = clustered or superblock.clustered
        user = None if config.read_only else in_use_by_kernel(path)
        if user is not None:
            raise DeviceRefused(
                "device-busy",
                f"{path} is {user}, so no array may write to it: free it first (a file and a loop device over it"
                " are one disk with two caches: use the loop device)",
                path=path,
            )
    return clustered


def _check_cluster(config: ArrayConfig, assembly: Assembly, conf: Conf) -> None:
    """Refuse an array of another cluster unless its name was given by hand (design 5)."""
    template = assembly.template
    if not assembly.clustered or template is None or config.read_only:
        return
    own = config.cluster_name or own_cluster_name(conf)
    if template.cluster_name != own:
        raise Refused(
            "other-cluster",
            f"{config.name} belongs to the cluster {template.cluster_name!r}, but this node to {own!r}:"
            " if no machine of that cluster uses these disks any more, give its name with"
            f" --home-cluster={template.cluster_name}",
            array_cluster=template.cluster_name,
            own_cluster=own,
        )
