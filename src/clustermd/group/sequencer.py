"""The sequencer: gives the lockds of one machine their one order (`python -m clustermd.group.sequencer`).

One process per $CLUSTERMD_RUN, alone by a file lock. It orders bytes and knows no locks (design sections
3 and 5). What a lockd says is an event when it is in the order's log, then all members see it.

Members come with "join" and go with "leave", or are lost with their socket. Lost is announced at once; fenced
when every witness of that life is proved: the lockd is killed at once if it still runs, its array
processes drain by themselves and are killed only after `unresponsive_s` (`group.proof`).

A new sequencer reads its predecessor's log and list of living incarnations and is *recovering*: it
orders nothing until each former incarnation has rejoined or is proved dead. One that neither rejoins nor ends
within `unresponsive_s` is killed. Then comes the first view of the new life, with the dead as lost, each
followed by its fencing. What the links say is in `group.sequencer_protocol`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clustermd.clock import Clock, SystemClock
from clustermd.conf import Conf
from clustermd.errors import BadBytes, Refused
from clustermd.group.daemon import run_daemon
from clustermd.group.endings import Ending, Endings
from clustermd.group.frames import Frame, FrameLink, bad_frame, encode, serve_links, stop_serving
from clustermd.group.incarnations import Incarnation, Incarnations, Nodes
from clustermd.group.liveness import Bounds, PeerWatch
from clustermd.group.order import Event, Order
from clustermd.group.orderlog import OrderLog
from clustermd.group.process import alive, boot_id, ended, kill, start_time
from clustermd.group.process_group import Left, Member, Witness
from clustermd.group.registrar import Registrar
from clustermd.group.sequencer_protocol import PROTOCOL
from clustermd.group.tasks import Tasks
from clustermd.rundir import RunDir

MAX_UNSENT_BYTES = 64 << 20
log = logging.getLogger("clustermd.sequencer")


@dataclass(eq=False, slots=True)
class Client:
    """One connected lockd; `member` is known after its hello."""

    link: FrameLink
    watch: PeerWatch
    pid_started: int
    member: Member | None = None
    receiving: bool = False
    confirmed_place: int = 0
    out: bytearray = field(default_factory=bytearray)


class Sequencer:
    """The process's state. `run` serves until nobody needs it, or `stop` is set."""

    def __init__(self, root: Path, bounds: Bounds, clock: Clock) -> None:
        self._root = root
        self._bounds = bounds
        self._clock = clock
        self._nodes = Nodes(root)
        self._incarnations = Incarnations(root, boot_id())
        self._log = OrderLog(root, boot_id())
        self._order = Order()
        self._clients: dict[FrameLink, Client] = {}
        self._awaited: dict[int, float] = {}  # former incarnations that may still rejoin: seconds awaited
        self._joiners: list[Client] = []
        self._recovering = True
        self._unlogged = bytearray()
        self._tasks = Tasks()
        self._registrar = Registrar(self._incarnations, clock)
        self._endings = Endings(clock, bounds, self._tasks, self._proved)

    async def run(self, socket_path: Path, stop: asyncio.Event, ready: Any) -> None:
        self._nodes.load()
        self._incarnations.load()
        self._order = self._log.open()
        server = await serve_links(socket_path, self._made, self._frame, self._lost)
        try:
            self._recover()
            ready()
            await self._tick_until(stop)
        finally:
            stop_serving(server, socket_path)
            for client in list(self._clients.values()):
                client.link.close()
            self._tasks.cancel()
            self._flush()
            self._log.close()
            self._registrar.close()

    # --- links

    def _made(self, link: FrameLink) -> None:
        self._clients[link] = Client(link, PeerWatch(self._bounds), start_time(link.peer_pid) or 0)

    def _lost(self, link: FrameLink, reason: str) -> None:
        client = self._clients.pop(link)
        if client in self._joiners:
            self._joiners.remove(client)
        if client.member is None:
            return
        record = self._incarnations.living.get(client.member.incarnation)
        if record is not None:
            log.info("lost %s: %s", _name(client.member), reason)
            self._lose(record)

    def _frame(self, link: FrameLink, frame: Frame) -> None:
        client = self._clients[link]
        client.watch.heard()
        member = client.member
        match frame:
            case ["send", int(seq), bytes(payload)] if member is not None and client.receiving:
                event = self._order.message(member.incarnation, seq, payload)
                if event is not None:
                    self._emit(event)
            case ["pong", int(), int(place)]:
                client.confirmed_place = place
            case ["ping", int(number)]:
                link.send("pong", number)
            case ["hello", int(protocol), str(name), int(incarnation), place] if member is None:
                self._hello(client, protocol, name, incarnation, place)
            case ["join"] if member is not None:
                self._join(client)
            case ["witness", int(request), list(wire)] if member is not None:
                self._tasks.spawn(self._register(client, request, member, _witness(wire)))
            case ["withdraw", int(request), str(key)] if member is not None:
                self._registrar.withdraw(member, key)
                link.send("ok", request)
            case ["leave", int(request)] if member is not None:
                self._leave(client, request)
            case ["status", int(request)]:
                link.send("status", request, self.status())
            case _:
                raise bad_frame(f"a lockd says {frame[0]!r} in a way the sequencer does not know")

    def _hello(self, client: Client, protocol: int, name: str, incarnation: int, place: Any) -> None:
        """A lockd presents itself; `place` is the last one it has seen if it was a member before."""
        if protocol != PROTOCOL:
            raise bad_frame(
                f"a lockd speaks version {protocol}, the sequencer {PROTOCOL}: end the older processes"
            )
        if not client.pid_started:
            raise bad_frame(
                f"process {client.link.peer_pid} of {name} cannot be seen from here, so not be proved dead"
            )
        number = self._nodes.number(name)
        if place is not None and (incarnation not in self._awaited or place != self._order.place):
            reason = (
                "its place is taken by another process or was given up"
                if place == self._order.place
                else (f"it saw place {place} where the order's log ends at {self._order.place}")
            )
            client.link.send("expelled", f"{name} cannot rejoin: {reason}")
            client.link.close()
            del self._clients[client.link]
            return
        for other in list(self._clients.values()):
            if other.member is not None and other.member.name == name:
                other.link.fail("the same node has connected anew")
        client.member = Member(number, incarnation, name)
        client.link.send("welcome", number, self._order.place, self._recovering)
        if place is not None:
            del self._awaited[incarnation]
            client.confirmed_place = place
            log.info("%s rejoins", _name(client.member))
            self._tasks.spawn(self._registrar.reclaim(self._incarnations.living[incarnation]))
            self._recovered()

    def _join(self, client: Client) -> None:
        assert client.member is not None
        incarnation = client.member.incarnation
        if client.receiving or client in self._joiners or incarnation in self._order.members:
            raise bad_frame(f"{_name(client.member)} joins twice")
        self._awaited.pop(incarnation, None)
        record = Incarnation(client.member, client.link.peer_pid, client.pid_started)
        self._incarnations.living[incarnation] = record
        self._incarnations.save()
        if self._recovering:
            self._joiners.append(client)
            self._recovered()
        else:
            self._admit(client)

    def _admit(self, client: Client) -> None:
        assert client.member is not None
        client.receiving = True
        client.confirmed_place = self._order.place
        self._emit(self._order.join(client.member))

    def _leave(self, client: Client, request: int) -> None:
        assert client.member is not None
        incarnation = client.member.incarnation
        record = self._incarnations.living.get(incarnation)
        if record is not None and record.witnesses:
            kept = ", ".join(record.witnesses)
            client.link.send(
                "refused", request, "not-clean", f"processes of this node still do I/O: {kept}", {}
            )
            return
        client.receiving = False
        if incarnation in self._order.members:
            self._emit(self._order.view(left=[(client.member, Left.LEFT)]))
            self._flush()  # before the list forgets it: every member in the log is on the list
        if client in self._joiners:
            self._joiners.remove(client)
        self._registrar.forget(incarnation)
        client.member = None
        client.link.send("ok", request)
        self._recovered()

    # --- the order

    def _emit(self, event: Event) -> None:
        """Queue an event for the log and the members of this moment; it leaves in this loop turn."""
        data = encode(event)
        if not self._unlogged:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unlogged += data
        for client in self._clients.values():
            if client.receiving:
                client.out += data

    def _flush(self) -> None:
        """To the log first, then to everybody: what a member sees cannot be lost any more."""
        if not self._unlogged:
            return
        data = bytes(self._unlogged)
        self._unlogged.clear()
        self._log.append(data)
        for client in self._clients.values():
            if client.out:
                client.link.send_bytes(bytes(client.out))
                client.out.clear()

    async def _register(self, client: Client, request: int, member: Member, witness: Witness) -> None:
        try:
            await self._registrar.register(member, witness)
        except Refused as error:
            client.link.send("refused", request, error.code, error.message, error.data)
        else:
            client.link.send("ok", request)

    # --- ends

    def _lose(self, record: Incarnation) -> None:
        """A life is over: tell the others now, and prove it."""
        incarnation = record.member.incarnation
        if incarnation in self._endings.open:
            return
        self._awaited.pop(incarnation, None)
        if not self._recovering and incarnation in self._order.members:
            self._emit(self._order.view(left=[(record.member, Left.LOST)]))
        self._endings.begin(record)

    def _proved(self, ending: Ending) -> None:
        if self._recovering:
            self._recovered()
        else:
            self._fence(ending)

    def _fence(self, ending: Ending) -> None:
        assert ending.proof is not None
        incarnation = ending.record.member.incarnation
        if incarnation in self._order.lost:
            self._emit(self._order.fenced(incarnation, ending.proof))
        self._flush()
        del self._endings.open[incarnation]
        self._registrar.forget(incarnation)

    # --- a new life

    def _recover(self) -> None:
        unknown = {**self._order.members, **self._order.lost}.keys() - self._incarnations.living.keys()
        if unknown:
            raise BadBytes(
                "bad-incarnations",
                f"{self._root}/order.log has members that incarnations.json does not know, so nobody knows whose "
                "writes may still be on their way: end all processes of this cluster, then remove both",
            )
        for incarnation, record in list(self._incarnations.living.items()):
            if incarnation in self._order.lost or not alive(record.pid, record.pid_started):
                self._lose(record)
            else:
                self._awaited[incarnation] = 0.0
                self._tasks.spawn(self._watch_former(record))
        names = [record.title for record in self._incarnations.living.values()]
        log.info("started; former incarnations: %s", ", ".join(names) or "none")
        self._recovered()

    async def _watch_former(self, record: Incarnation) -> None:
        """A former lockd that ends before it rejoins is lost at once, without waiting for the bound."""
        await ended(record.pid, record.pid_started)
        if record.member.incarnation in self._awaited:
            self._lose(record)

    def _recovered(self) -> None:
        """Order the first view of the new life once nobody's fate is open."""
        if not self._recovering or self._awaited or self._endings.unproved:
            return
        self._recovering = False
        back = {
            client.member.incarnation: client
            for client in self._clients.values()
            if client.member is not None
        }
        dead = [member for member in self._order.members.values() if member.incarnation not in back]
        for incarnation in self._order.members:
            if incarnation in back:
                back[incarnation].receiving = True
        if self._order.members:
            self._emit(self._order.view(left=[(member, Left.LOST) for member in dead]))
        for ending in list(self._endings.open.values()):
            self._fence(ending)
        joiners, self._joiners = self._joiners, []
        for client in joiners:
            self._admit(client)
        log.info("open with %d members", len(self._order.members))

    # --- time

    async def _tick_until(self, stop: asyncio.Event) -> None:
        last_s = self._clock.monotonic_s()
        idle_s = 0.0
        number = 0
        while not stop.is_set() and idle_s < max(self._bounds.linger_s, 0.01):
            try:
                await asyncio.wait_for(stop.wait(), self._bounds.tick_s)
            except TimeoutError:
                pass
            now_s = self._clock.monotonic_s()
            elapsed_s, last_s = now_s - last_s, now_s
            number += 1
            for client in list(self._clients.values()):
                if client.watch.tick(elapsed_s):
                    self._give_up(client, f"no answer for {client.watch.silent_s:.1f} s")
                elif client.link.unsent_bytes > MAX_UNSENT_BYTES:
                    self._give_up(client, f"it has not read {client.link.unsent_bytes} bytes")
                elif client.member is not None:
                    client.link.send("ping", number)
            for incarnation in list(self._awaited):
                self._awaited[incarnation] += min(elapsed_s, 2 * self._bounds.tick_s)
                if self._awaited[incarnation] >= self._bounds.unresponsive_s:
                    record = self._incarnations.living[incarnation]
                    log.info("%s did not rejoin within %g s", record.title, self._bounds.unresponsive_s)
                    self._lose(record)
            confirmed = [client.confirmed_place for client in self._clients.values() if client.receiving]
            if not self._recovering:  # former members may still have to read what they missed
                self._flush()
                self._log.rotate(self._order, min(confirmed, default=self._order.place))
            idle_s = 0.0 if self._clients or self._incarnations.living else idle_s + elapsed_s

    def _give_up(self, client: Client, reason: str) -> None:
        if client.member is not None:
            kill(client.link.peer_pid, client.pid_started)
        client.link.fail(reason)

    def status(self) -> dict[str, Any]:
        """What people want to know: who is silent, and whose end is awaited on what account."""
        return {
            "pid": os.getpid(),
            "recovering": self._recovering,
            "unresponsive": [
                {
                    "node": client.member.name,
                    "pid": client.link.peer_pid,
                    "silent_s": round(client.watch.silent_s, 1),
                }
                for client in self._clients.values()
                if client.member is not None and client.watch.shown
            ],
            "registering": self._registrar.status(),
            "awaited": [
                {"node": self._incarnations.living[incarnation].member.name, "for_s": round(for_s, 1)}
                for incarnation, for_s in self._awaited.items()
            ],
            "unproved": self._endings.status(),
        }


def _name(member: Member) -> str:
    return f"{member.name} ({member.incarnation:016x})"


def _witness(wire: list[Any]) -> Witness:
    try:
        return Witness.from_wire(wire)
    except (ValueError, TypeError) as error:
        raise bad_frame(f"a witness cannot be read ({error})") from None


def main() -> None:
    """Entry point of the process."""
    rundir = RunDir.from_environment()
    rundir.make(rundir.root)
    sequencer = Sequencer(rundir.root, Bounds.from_environment(Conf.load()), SystemClock())
    run_daemon(
        rundir.root / "sequencer.lock",
        lambda stop, ready: sequencer.run(rundir.sequencer_socket, stop, ready),
    )


if __name__ == "__main__":
    main()
