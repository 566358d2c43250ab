"""The NBD server of one array: a unix socket, private to the user, and its connections.

All connections serve the same volume and are one cache: a flush on any of them covers every write answered
before it arrived on any other (design rule 19), since all of them hand their requests to the one array.
Which clients are connected is asked of the kernel (SO_PEERCRED), so that a refused stop can name them.

When others went on without this node (`exclude`), what a client knows and caches of the array may be old, and no
answer can tell it so. Its connection ends with the answers it still gets; whoever connects after that is greeted when
the array serves again (`admit`), and begins anew.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from clustermd.array.request import Volume
from clustermd.errors import Refused
from clustermd.export.nbd_connection import Connection
from clustermd.export.nbd_replies import Budget
from clustermd.trace import Trace

CONNECTIONS_MAX = 256
BUFFERED_MAX_BYTES = 256 << 20  # of all connections together; each has its own bound as well
BACKLOG = 64
LAST_REPLIES_S = 2.0  # how long a stop waits for clients to take their last replies
NO_DESCRIPTORS_S = 0.2  # how long to leave new clients waiting when descriptors or memory ran out
SEND_BUFFER_BYTES = 1 << 20

_PEER = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """A connected client. `connected_s` is by the loop's clock; `command` is "" where it is not known."""

    pid: int
    uid: int
    gid: int
    command: str
    connected_s: float
    in_flight: int
    transmitting: bool


@dataclass(frozen=True, slots=True)
class _Peer:
    pid: int
    uid: int
    gid: int
    command: str
    since_s: float


class NbdServer:
    """Serves `volume` on the unix socket `path`, which must lie in a directory of the user's own."""

    def __init__(self, volume: Volume, path: str | os.PathLike[str], trace: Trace | None = None) -> None:
        self.path = Path(path)
        self._volume = volume
        self._trace = trace or Trace()
        self._listener: socket.socket | None = None
        self._connections: dict[Connection, _Peer] = {}
        self._changed = asyncio.Event()
        self._budget: Budget | None = None
        self._admits = True  # false while this node is excluded

    async def start(self) -> None:
        """Listen. Raises Refused when the path is too long, or another server answers there."""
        listener = _listen(self.path)
        listener.setblocking(False)
        self._listener = listener
        loop = asyncio.get_running_loop()
        self._budget = Budget(BUFFERED_MAX_BYTES, loop)
        loop.add_reader(listener, self._accept)

    def exclude(self, reason: str) -> None:
        """End all connections when what the array has of them is answered; new ones wait for `admit`."""
        self._admits = False
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
        for connection in list(self._connections):
            connection.finish(reason)

    def admit(self) -> None:
        """Let clients in again."""
        self._admits = True
        self._accept_again()

    def clients(self) -> list[ClientInfo]:
        """Who is connected, oldest first. A client that said goodbye is not."""
        now_s = asyncio.get_running_loop().time()
        return [
            ClientInfo(
                peer.pid,
                peer.uid,
                peer.gid,
                peer.command,
                now_s - peer.since_s,
                connection.in_flight,
                connection.transmitting,
            )
            for connection, peer in self._connections.items()
            if not connection.finishing
        ]

    async def stop(self, force: bool = False) -> None:
        """End what is in flight, disconnect, remove the socket.

        Without `force` raises Refused, and goes on serving, while clients are connected. Requests in flight
        are waited for as long as the array takes; clients get LAST_REPLIES_S to read their last replies.
        """
        clients = self.clients()
        if clients and not force:
            names = ", ".join(f"{client.command or 'process'} (pid {client.pid})" for client in clients)
            raise Refused(
                "nbd-clients-connected",
                f"{self._volume.name} is in use over {self.path} by {names}: "
                "disconnect them, or stop with --force",
                clients=[asdict(client) for client in clients],
            )
        self._end_listening()
        for connection in list(self._connections):
            connection.finish("the array was stopped")
        while any(connection.in_flight for connection in self._connections):
            self._changed.clear()
            await self._changed.wait()
        try:
            async with asyncio.timeout(LAST_REPLIES_S):
                await self._all_closed()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort("the client did not take its last replies")
            await self._all_closed()

    async def _all_closed(self) -> None:
        while self._connections:
            self._changed.clear()
            await self._changed.wait()

    def _end_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        if self._listener is None or self._budget is None:
            return
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            # The client stays in the backlog, and the socket readable: look away for a while.
            loop.remove_reader(self._listener)
            loop.call_later(NO_DESCRIPTORS_S, self._accept_again)
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            client.close()
            return
        peer = _peer(client, loop.time())
        connection = Connection(client, self._volume, loop, self._budget, self._ended)
        self._connections[connection] = peer
        self._trace.point("export.connected", pid=peer.pid, uid=peer.uid)

    def _accept_again(self) -> None:
        if self._listener is not None and self._admits:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _ended(self, connection: Connection) -> None:
        peer = self._connections.pop(connection)
        self._trace.point("export.disconnected", pid=peer.pid, uid=peer.uid, reason=connection.reason)
        self._changed.set()


def _peer(client: socket.socket, now_s: float) -> _Peer:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    pid, uid, gid = _PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    try:
        command = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        command = ""
    return _Peer(pid, uid, gid, command, now_s)


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, 0600 from its first moment. Replaces one that nobody listens on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if len(os.fsencode(path)) > 107:
            raise Refused(
                "socket-path-too-long",
                f"{path} is longer than the 107 bytes a unix socket may have: "
                "set CLUSTERMD_RUN to a shorter directory",
                path=str(path),
            )
        _remove_stale(path)
        os.fchmod(listener.fileno(), 0o600)  # Linux gives the file this mode when it is made
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Refused("not-a-socket", f"{path} exists and is no socket: move it away", path=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise Refused("socket-in-use", f"another server listens on {path}: stop it first", path=str(path))
