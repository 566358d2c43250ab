"""From the configuration to its fencing policy."""

from __future__ import annotations

from clustermd.clock import Clock
from clustermd.conf import Conf
from clustermd.errors import Refused
from clustermd.group.process_group import Member
from clustermd.group.proof import beside_loop
from clustermd.lockd.fencing.agent import AgentFencer
from clustermd.lockd.fencing.device import DeviceFencer
from clustermd.lockd.fencing.fence_disk import FenceDisk
from clustermd.lockd.fencing.fencer import Fencer
from clustermd.lockd.fencing.lease import LeaseFencer
from clustermd.lockd.fencing.none import NoFencer
from clustermd.lockd.fencing.stonith import StonithFencer


async def make_fencer(conf: Conf, me: Member, clock: Clock) -> Fencer:
    """The policy of `conf`, as used by `me`. Raises Refused ("no-fence", "no-fence-device" ...).

    A `DeviceFencer` wants its `watch` to be run as well.
    """
    match conf.fence:
        case "agent" if conf.fence_agent is not None:
            return AgentFencer(conf.fence_agent, conf.path)
        case "stonith":
            return StonithFencer(conf.stonith_action)
        case "device":
            disk = await beside_loop(lambda: FenceDisk.open(conf.fence_device))
            return DeviceFencer(disk, me, clock, conf.watchdog_s, conf.device_bound_s)
        case "lease":
            return LeaseFencer(clock, conf.lease_s, conf.drift, conf.device_bound_s)
        case "none":
            return NoFencer()
    raise Refused("no-fence", f"{conf.path} chooses no way to fence a lost node", path=conf.path)
