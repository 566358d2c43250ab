"""A disk with a will of its own for tests: nbdkit with any filter, nbdfuse makes a file of it, losetup a disk.

Whatever a failed test left on its way, the mount and the loop device are taken down, the servers ended.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clustermd.testing.nbdkit import nbdkit

SIZE_BYTES = 16 << 20


@contextmanager
def nbd_file(directory: Path, *arguments: str) -> Iterator[tuple[str, Path]]:
    """(path of the FUSE file, path of the backing file) behind nbdkit with arguments such as `--filter=log`."""
    backing, mounted = directory / "backing.img", directory / "disk.img"
    with open(backing, "wb") as file:
        file.truncate(SIZE_BYTES)
    mounted.touch()
    filters = [word for word in arguments if word.startswith("--")]
    settings = [word for word in arguments if not word.startswith("--")]
    with nbdkit(*filters, "file", str(backing), *settings) as (socket, server):
        fuse = subprocess.Popen(["nbdfuse", mounted, f"nbd+unix:///?socket={socket}"])
        try:
            until(lambda: mounted.stat().st_size == SIZE_BYTES, "nbdfuse serves")
            yield str(mounted), backing
        finally:
            try:
                # a request on its way keeps the mount busy
                until(lambda: not _is_mounted(mounted) or _unmount(mounted), "the file is unmounted")
            finally:
                for program in (fuse, server):
                    program.terminate()
                    program.wait(20)


@contextmanager
def loop_over(path: str) -> Iterator[str]:
    """A loop device with direct I/O over `path`."""
    command = ["losetup", "--find", "--show", "--direct-io=on", path]
    loop = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield loop
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
        # a busy device is detached when its last request ends
        until(lambda: path not in _backing_of(loop), "the loop device is detached")


def until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Poll what gives no event: files that other programs make, and kernel locks."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.01)


def _backing_of(loop: str) -> str:
    try:
        return Path("/sys/block", Path(loop).name, "loop/backing_file").read_text()
    except OSError:
        return ""


def _is_mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/self/mountinfo").read_text()


def _unmount(path: Path) -> bool:
    return subprocess.run(["fusermount3", "-u", path], stderr=subprocess.DEVNULL, check=False).returncode == 0
