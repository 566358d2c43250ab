"""A cable with faults: frames between two devices, each way with loss, delay and jitter. Run by `netns_kit`.

    python link_relay.py NODE-SIDE SWITCH-SIDE

A line of standard input sets one way: `to` or `from` (the node), loss (0 to 1), delay and jitter in ms. The
end of standard input ends it. The kernel's own means for this (netem) is a module that many kernels lack;
this needs packet sockets only. Frames keep their order, as on a cable; they travel with the kernel's header
for unfinished checksums (PACKET_VNET_HDR), so that those stay right.
"""

from __future__ import annotations

import collections
import os
import random
import select
import socket
import sys
import time

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_OUTGOING = 4
_FRAME_BYTES = 1 << 17


class Way:
    """One direction: what is read from `source` goes to `sink`, later or never."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.loss, self.delay_s, self.jitter_s = 0.0, 0.0, 0.0
        self.waiting: collections.deque[tuple[float, bytes]] = collections.deque()

    def read(self, dice: random.Random) -> None:
        while True:
            try:
                frame, address = self.source.recvfrom(_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:
                return  # the device is down: its frames are gone
            if address[2] == PACKET_OUTGOING or dice.random() < self.loss:
                continue
            due = time.monotonic() + self.delay_s + self.jitter_s * dice.random()
            if self.waiting:
                due = max(due, self.waiting[-1][0])
            self.waiting.append((due, frame))

    def send(self) -> float | None:
        """Send what is due. Seconds until the next one is."""
        while self.waiting:
            left = self.waiting[0][0] - time.monotonic()
            if left > 0:
                return left
            try:
                self.sink.send(self.waiting.popleft()[1])
            except OSError:
                pass  # a full queue or a device that is down loses frames, as a cable does
        return None


def packet_socket(device: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    opened.bind((device, ETH_P_ALL))
    return opened


def main(node_side: str, switch_side: str) -> None:
    node, switch = packet_socket(node_side), packet_socket(switch_side)
    ways = {"to": Way(switch, node), "from": Way(node, switch)}
    dice = random.Random()
    print("ready", flush=True)
    while True:
        waits = [left for way in ways.values() if (left := way.send()) is not None]
        ready, _, _ = select.select([node, switch, 0], [], [], min(waits, default=None))
        if 0 in ready:
            text = os.read(0, 4096).decode()
            if not text:
                return
            for line in text.splitlines():
                name, loss, delay_ms, jitter_ms = line.split()
                way = ways[name]
                way.loss, way.delay_s, way.jitter_s = (
                    float(loss),
                    float(delay_ms) / 1e3,
                    float(jitter_ms) / 1e3,
                )
            print("ready", flush=True)
        for way in ways.values():
            if way.source in ready:
                way.read(dice)


if __name__ == "__main__":
    main(*sys.argv[1:])
