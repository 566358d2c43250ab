"""Frames: whole ones come out however the bytes are cut; garbage is refused and costs one link."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermd.errors import BadBytes, Refused
from clustermd.group.frames import (
    MAX_FRAME_BYTES,
    Decoder,
    Frame,
    FrameLink,
    bad_frame,
    encode,
    open_link,
    serve_links,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.binary(max_size=50)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
frames = st.builds(lambda word, rest: [word, *rest], st.text(max_size=10), st.lists(values, max_size=4))


@settings(max_examples=60, deadline=None)
@given(st.lists(frames, max_size=6), st.data())
def test_frames_survive_any_cut(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    decoder = Decoder()
    heard: list[Frame] = []
    while stream:
        length = data.draw(st.integers(1, len(stream)))
        heard += decoder.feed(stream[:length])
        stream = stream[length:]
    assert heard == sent
    assert decoder.pending_bytes == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_frames_or_bad_bytes(noise: bytes) -> None:
    heard: list[Frame] = []
    with suppress(BadBytes):  # and nothing else
        heard = Decoder().feed(noise)
    assert all(isinstance(frame[0], str) for frame in heard)


@pytest.mark.parametrize(
    "body", [b"\xc1", b"\x80", b"\x90", b"\x91\x01", b"\x91\xa1a\x00", b"\x91\xa1\xff", b"\x91" * 5000]
)
def test_bodies_that_are_no_frame(body: bytes) -> None:
    with pytest.raises(BadBytes):
        Decoder().feed(struct.pack(">I", len(body)) + body)


def test_a_huge_length_is_refused_before_anything_is_kept_for_it() -> None:
    with pytest.raises(BadBytes, match="4194305 bytes"):
        Decoder().feed(struct.pack(">I", MAX_FRAME_BYTES + 1))
    with pytest.raises(Refused, match="at most"):
        encode(["big", bytes(MAX_FRAME_BYTES)])


class Server:
    """Listens, keeps what it hears."""

    def __init__(self) -> None:
        self.links: list[FrameLink] = []
        self.frames: list[Frame] = []
        self.lost: list[str] = []
        self.something = asyncio.Event()

    def frame(self, link: FrameLink, frame: Frame) -> None:
        if frame[0] == "nonsense":
            raise bad_frame("nonsense was said")
        if frame[0] == "fault":
            raise OSError("our own disk is full")
        self.frames.append(frame)
        self.something.set()

    def ended(self, link: FrameLink, reason: str) -> None:
        self.lost.append(reason)
        self.something.set()

    async def heard(self, count: int) -> None:
        while len(self.frames) + len(self.lost) < count:
            self.something.clear()
            await asyncio.wait_for(self.something.wait(), 5)


def run(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 10))


def test_a_bad_peer_loses_its_link_and_nobody_else(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server()
        path = tmp_path / "s"
        listening = await serve_links(path, server.links.append, server.frame, server.ended)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        ends: list[str] = []
        good = await open_link(path, lambda *_: None, lambda _, reason: ends.append("good"))
        bad = await open_link(path, lambda *_: None, lambda _, reason: ends.append("bad"))
        bad.send("nonsense")
        bad.send("after it")
        await server.heard(1)
        assert "nonsense" in server.lost[0] and not server.frames
        bad = await open_link(path, lambda *_: None, lambda _, reason: ends.append("bad"))
        bad.send_bytes(b"\xff\xff\xff\xff")
        await server.heard(2)
        good.send("hello", 1)
        await server.heard(3)
        assert server.frames == [["hello", 1]]
        assert server.links[0].peer_pid == os.getpid()
        good.close()
        await server.heard(4)
        assert ends == ["bad", "bad"], "who closes a link is not told that it is lost"
        listening.close()

    run(story())


def test_what_is_sent_in_one_turn_leaves_together_and_in_order(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server()
        path = tmp_path / "s"
        listening = await serve_links(path, server.links.append, server.frame, server.ended)
        link = await open_link(path, lambda *_: None, lambda *_: None)
        writes: list[bytes] = []
        assert link._transport is not None
        write = link._transport.write
        link._transport.write = lambda data: (writes.append(data), write(data))  # type: ignore[method-assign, assignment]
        link.send("one")
        link.send("two")
        assert not writes and link.unsent_bytes == len(encode(["one"]) + encode(["two"]))
        link.send_bytes(encode(["three"]))
        assert len(writes) == 1
        link.send("four")
        link.close()
        await server.heard(5)
        assert server.frames == [["one"], ["two"], ["three"], ["four"]] and len(writes) == 2
        listening.close()

    run(story())


def test_an_error_of_ours_is_not_taken_for_one_of_the_socket(tmp_path: Path) -> None:
    async def story() -> None:
        crashed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: crashed.set_result(context["exception"])
        )
        server = Server()
        listening = await serve_links(tmp_path / "s", server.links.append, server.frame, server.ended)
        link = await open_link(tmp_path / "s", lambda *_: None, lambda *_: None)
        link.send("fault")
        assert "disk is full" in str(await crashed)
        listening.close()

    run(story())


def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="CLUSTERMD_RUN") as refused:
        run(open_link(tmp_path / ("x" * 108), lambda *_: None, lambda *_: None))
    assert refused.value.code == "socket-path-too-long"
