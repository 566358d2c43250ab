"""Opening members: what they say of themselves, and every refusal with its code and its sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clustermd.device.direct import (
    LEAST_SECTORS,
    DirectDevice,
    claim_exclusive,
    identity,
    open_member,
    probe_exclusive,
)
from clustermd.device.in_use import in_use_by_kernel
from clustermd.errors import DeviceRefused


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "member.img"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
    return str(path)


def refusal(path: str, **how: bool) -> DeviceRefused:
    with pytest.raises(DeviceRefused) as refused:
        open_member(path, **how)
    assert path in refused.value.message
    assert refused.value.data["path"] == path
    return refused.value


def test_a_file_has_blocks_of_512_and_its_size_in_sectors(image: str) -> None:
    device = open_member(image)
    assert (device.path, device.size_sectors, device.logical_block_bytes) == (image, 2048, 512)
    assert not device.read_only and not device.block
    assert device.identity == identity(image)
    device.close()
    assert device.fd == -1
    device.close()


def test_a_file_that_ends_within_a_sector_is_counted_in_whole_ones(image: str) -> None:
    os.truncate(image, 100 * 512 + 511)
    device = open_member(image)
    assert device.size_sectors == 100
    device.close()


def test_opening_changes_nothing(image: str) -> None:
    before = os.stat(image)
    open_member(image).close()
    open_member(image, read_only=True).close()
    after = os.stat(image)
    assert (before.st_size, before.st_mtime_ns, before.st_blocks) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_blocks,
    )


def test_a_reader_cannot_write(image: str) -> None:
    device = open_member(image, read_only=True)
    assert device.read_only and not device.discard_zeroes
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(device.fd, bytes(4096), 0)
    device.close()


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "nothing")).code == "no-such-device"


@pytest.mark.parametrize("path", ["/dev/null", "/proc"])
def test_what_is_no_disk_is_refused(path: str) -> None:
    assert refusal(path).code == "not-a-disk"


def test_too_small_is_refused(image: str) -> None:
    os.truncate(image, (LEAST_SECTORS - 1) * 512)
    refused = refusal(image)
    assert refused.code == "device-too-small"
    assert refused.data["size_sectors"] == LEAST_SECTORS - 1
    os.truncate(image, LEAST_SECTORS * 512)
    open_member(image).close()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, "device-permission"),
        (errno.EPERM, "device-permission"),
        (errno.EROFS, "device-read-only"),
        (errno.EBUSY, "device-busy"),
        (errno.ENXIO, "no-such-device"),
        (errno.EIO, "device-open-failed"),
    ],
)
def test_the_kernels_refusals_become_sentences(
    image: str, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("clustermd.device.direct.os.open", refuse)
    assert refusal(image).code == code


def test_a_file_without_direct_io_goes_through_the_page_cache(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def no_direct(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags)

    monkeypatch.setattr("clustermd.device.direct.os.open", no_direct)
    device = open_member(image, clustered=True)
    assert not device.direct and device.logical_block_bytes == 512
    device.close()


def test_a_file_whose_direct_io_wants_more_than_a_sector_goes_through_the_page_cache(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clustermd.device.direct._direct_by_512", lambda fd: False)
    device = open_member(image)
    assert not device.direct and device.logical_block_bytes == 512
    device.close()


def test_one_array_claims_a_file_and_nodes_of_a_clustered_one_share_it(image: str) -> None:
    def all_of(*devices: DirectDevice) -> None:
        for device in devices:
            device.close()

    alone = open_member(image)
    assert refusal(image).code == "device-busy"
    assert refusal(image, clustered=True).code == "device-busy"
    reader = open_member(image, read_only=True)
    all_of(alone, reader)

    node1, node2 = open_member(image, clustered=True), open_member(image, clustered=True)
    assert refusal(image).code == "device-busy"
    unclaimed = open_member(image, exclusive=False)
    all_of(node1, node2, unclaimed)
    all_of(open_member(image))


def test_a_refused_open_leaves_no_descriptor(image: str, tmp_path: Path) -> None:
    holder = open_member(image)
    small = tmp_path / "small"
    small.write_bytes(bytes(512))
    before = len(os.listdir("/proc/self/fd"))
    refusal(image)
    refusal(str(small))
    refusal("/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before
    holder.close()


def test_the_claim_ends_with_its_process(image: str) -> None:
    program = (
        "import sys; from clustermd.device.direct import open_member; device = open_member(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert refusal(image).code == "device-busy"
        child.kill()
    open_member(image).close()


def test_identity_follows_links_and_tells_files_apart(image: str, tmp_path: Path) -> None:
    link, hard, copy = tmp_path / "link", tmp_path / "hard", tmp_path / "copy"
    link.symlink_to(image)
    os.link(image, hard)
    copy.write_bytes(Path(image).read_bytes())
    assert identity(str(link)) == identity(str(hard)) == identity(image)
    assert identity(str(copy)) != identity(image)
    with pytest.raises(DeviceRefused, match="there is no"):
        identity(str(tmp_path / "nothing"))


def test_files_pass_the_exclusive_probe_and_others_are_named(image: str, tmp_path: Path) -> None:
    probe_exclusive(image)
    with pytest.raises(DeviceRefused) as refused:
        probe_exclusive(str(tmp_path / "nothing"))
    assert refused.value.code == "no-such-device"
    with pytest.raises(DeviceRefused):
        claim_exclusive(str(tmp_path / "nothing"))


def test_a_plain_file_is_not_used_by_the_kernel(image: str) -> None:
    assert in_use_by_kernel(image) is None
    assert in_use_by_kernel(image + ".nothing") is None


def test_swap_space_is_in_use(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = Path(image).with_name("a swap")
    os.link(image, spaced)
    table = ["Filename Type Size Used Priority", str(spaced).replace(" ", "\\040") + " file 1020 0 -2"]
    monkeypatch.setattr("clustermd.device.in_use._lines", lambda path: table if path == "/proc/swaps" else [])
    assert in_use_by_kernel(image) == "swap space"


def test_only_file_systems_known_to_punch_holes_discard(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_member(image)
    if device.discard_zeroes:
        subprocess.run(["fallocate", "--punch-hole", "--length", "4096", image], check=True)
    device.close()
    monkeypatch.setattr("clustermd.device.direct._PUNCHING_FILE_SYSTEMS", frozenset())
    device = open_member(image)
    assert not device.discard_zeroes
    device.close()
