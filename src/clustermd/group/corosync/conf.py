"""A corosync.conf for people who have none: explicit nodes, encrypted links, votes, timeouts that are explained.

Pure: words in, text out. What is written is what corosync.conf(5) and votequorum(5) recommend, with the
reason beside each line, since the file is read again on the day when something is slow or split. Addresses
and names are checked here, where the mistake is made: corosync itself would start and then wait for a node
that can never be reached.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from clustermd.errors import Refused
from clustermd.group.corosync.cmap import LINKS_MAX

DIRECTORY = "/etc/corosync"
"""Where corosync and its unit look for both files, on every node."""
KEYFILE = f"{DIRECTORY}/authkey"
KEY_BYTES = 256
"""Size of the authkey: 2048 bits, as corosync-keygen makes it."""
FIRST_PORT = 5405
"""UDP port of link 0; each further link takes the next one."""
TOKEN_MS = 3000
TOKEN_COEFFICIENT_MS = 650
TOKEN_LEAST_MS, TOKEN_MOST_MS = 200, 60_000
NODES_MAX = 128
"""CPG_MEMBERS_MAX."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(
    r"(?!.*\.$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """A node to be: its name (the machine's host name) and one address a link."""

    name: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster to be; nodes get the numbers 1, 2, ... in their order. Raises Refused for what could never
    work.
    """

    cluster: str
    nodes: tuple[PlannedNode, ...]
    token_ms: int = TOKEN_MS

    def __post_init__(self) -> None:
        _check_cluster_name(self.cluster)
        _check_nodes(self.nodes)
        if not TOKEN_LEAST_MS <= self.token_ms <= TOKEN_MOST_MS:
            raise Refused(
                "bad-token",
                f"a token timeout of {self.token_ms} ms is not between {TOKEN_LEAST_MS} and {TOKEN_MOST_MS}: "
                "below, a busy machine is taken for a dead one; above, a dead one holds everybody up for minutes",
                token_ms=self.token_ms,
            )

    @property
    def two_nodes(self) -> bool:
        return len(self.nodes) == 2

    @property
    def links(self) -> int:
        return len(self.nodes[0].addresses)

    @property
    def detection_s(self) -> float:
        """Seconds from a death until the others know: the token in force and the consensus (1.2 of it)."""
        return 2.2 * (self.token_ms + max(0, len(self.nodes) - 2) * TOKEN_COEFFICIENT_MS) / 1000


def parse_node(word: str) -> PlannedNode:
    """`NODE=ADDRESS[,ADDRESS2]`. Raises Refused `bad-node`."""
    name, equals, addresses = word.partition("=")
    if not equals or not name or not addresses:
        raise Refused("bad-node", f"{word!r} is not NODE=ADDRESS, for example node1=192.168.1.1", word=word)
    return PlannedNode(name, tuple(addresses.split(",")))


def conf_text(plan: Plan) -> str:
    """The file, the same for all nodes."""
    quorum = (
        _TWO_NODE
        if plan.two_nodes
        else _MAJORITY.format(nodes=len(plan.nodes), quorum=len(plan.nodes) // 2 + 1)
    )
    return _TEXT.format(
        cluster=plan.cluster,
        keyfile=KEYFILE,
        token=plan.token_ms,
        coefficient=TOKEN_COEFFICIENT_MS,
        detection=f"{plan.detection_s:.1f}",
        nodes="\n".join(_node_text(number, node) for number, node in enumerate(plan.nodes, 1)),
        quorum=quorum,
    )


def _node_text(number: int, node: PlannedNode) -> str:
    addresses = "".join(f"    ring{link}_addr: {address}\n" for link, address in enumerate(node.addresses))
    return f"  node {{\n    nodeid: {number}\n    name: {node.name}\n{addresses}  }}"


def _check_cluster_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Refused(
            "bad-cluster-name",
            f"{name!r} cannot be a cluster's name: 1 to 63 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit",
            name=name,
        )


def _check_nodes(nodes: Sequence[PlannedNode]) -> None:
    if not 2 <= len(nodes) <= NODES_MAX:
        raise Refused(
            "bad-node", f"a cluster has 2 to {NODES_MAX} nodes, not {len(nodes)}: name each as NODE=ADDRESS"
        )
    for node in nodes:
        if not _NAME.fullmatch(node.name):
            raise Refused(
                "bad-node-name",
                f"{node.name!r} cannot be a node's name: 1 to 63 letters, digits, '.', '_' or '-'; "
                "use the machine's host name",
                name=node.name,
            )
    _check_given_once(nodes)
    links = len(nodes[0].addresses)
    for node in nodes:
        if len(node.addresses) != links:
            raise Refused(
                "bad-node",
                f"{nodes[0].name} has {links} addresses and {node.name} has {len(node.addresses)}: "
                "each node needs one address for each link",
            )
    if links > LINKS_MAX:
        raise Refused(
            "bad-node", f"corosync has at most {LINKS_MAX} links, so at most as many addresses a node"
        )
    for link in range(links):
        _check_link(link, [(node.name, node.addresses[link]) for node in nodes])


def _check_given_once(nodes: Sequence[PlannedNode]) -> None:
    """No name and no address for two nodes, nor an address for two links; a node's name may be its address."""
    names: set[str] = set()
    owners: dict[str, str] = {}
    for node in nodes:
        if node.name in names:
            raise Refused("bad-node", f"the node {node.name} is given twice", word=node.name)
        names.add(node.name)
        for address in map(_canonical, node.addresses):
            if address in owners:
                raise Refused(
                    "bad-address",
                    f"{address} is given twice, for {owners[address]} and {node.name}",
                    address=address,
                )
            owners[address] = node.name
    for address, owner in owners.items():
        if address in names and address != owner:
            raise Refused("bad-address", f"{owner} has the name of another node, {address}, as its address")


def _canonical(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address


def _check_link(link: int, addresses: Sequence[tuple[str, str]]) -> None:
    """Addresses of one link: each reachable from elsewhere, all of one family (corosync.conf(5), ip_version)."""
    families: dict[int, str] = {}
    for name, address in addresses:
        family = _checked_family(name, address)
        if family is not None:
            families.setdefault(family, f"{name}={address}")
    if len(families) > 1:
        raise Refused(
            "bad-address",
            f"link {link} mixes IPv4 and IPv6 ({' and '.join(families.values())}): "
            "all addresses of a link are of one kind",
        )


def _checked_family(name: str, address: str) -> int | None:
    """4 or 6, or None for a host name. Raises Refused `bad-address`."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        if re.fullmatch(r"[0-9.]+", address) or not _HOST.fullmatch(address):
            raise Refused(
                "bad-address",
                f"{address!r} of {name} is neither an IP address nor a host name",
                address=address,
            ) from None
        return None
    if parsed.is_loopback or parsed.is_unspecified or parsed.is_multicast or parsed.is_link_local:
        raise Refused(
            "bad-address",
            f"{address} of {name} is no address that the other nodes reach it by: "
            "give that of its network card for the cluster",
            address=address,
        )
    return parsed.version


_TWO_NODE = """\
  # Two nodes: one vote is a quorum, so after a partition BOTH sides have it. What keeps them from writing both is
  # fencing alone: configure it in /etc/clustermd.conf before there is data. Implies wait_for_all: after a
  # start, a node waits until it has seen the other one once.
  two_node: 1"""
_MAJORITY = """\
  # {nodes} nodes with one vote each: {quorum} of them are a quorum. A side of a partition without it stops."""
_TEXT = """\
# Written by clustermd cluster setup. The same on all nodes, as is the authkey. See corosync.conf(5).

totem {{
  version: 2

  # Arrays carry this name on disk. Another cluster that sees the same disks must have another name.
  cluster_name: {cluster}

  # knet: one or more links a node, over UDP, encrypted and authenticated with the authkey.
  transport: knet
  crypto_model: openssl
  crypto_cipher: aes256
  crypto_hash: sha256
  keyfile: {keyfile}

  # Milliseconds without the token until a node is taken for lost, plus token_coefficient for each node above two.
  # A loss is known after 2.2 times that sum (token + consensus, which is 1.2 times the token): here {detection} s.
  # Smaller is faster, but a machine that stands still for longer (swap, a paused virtual machine) is then
  # taken for dead.
  token: {token}
  token_coefficient: {coefficient}
}}

# Every node, always: who is missing counts for the quorum. name is the host name. A number stays with its node.
nodelist {{
{nodes}
}}

quorum {{
  provider: corosync_votequorum
{quorum}
}}

system {{
  # Realtime priority: a busy machine must not hold the token back, or it is taken for dead.
  sched_rr: yes
  # If larger socket buffers cannot be had (no CAP_NET_ADMIN), go on with those there are.
  allow_knet_handle_fallback: yes
}}

logging {{
  # journalctl -u corosync
  to_syslog: yes
  to_stderr: no
  to_logfile: no
  timestamp: on
}}
"""
