"""Witness locks: one holder a byte, seen by all others, gone with the descriptor, no proof from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clustermd.device.direct import DirectDevice, identity, open_member
from clustermd.device.witness import CLAIM_OFFSET, WITNESS_BASE, held, hold, probe, release
from clustermd.errors import DeviceRefused


@pytest.fixture
def path(tmp_path: Path) -> str:
    image = tmp_path / "member.img"
    image.write_bytes(bytes(1 << 20))
    return str(image)


@pytest.fixture
def node1(path: str) -> Iterator[DirectDevice]:
    device = open_member(path, clustered=True)
    yield device
    device.close()


@pytest.fixture
def node2(path: str) -> Iterator[DirectDevice]:
    device = open_member(path, clustered=True)
    yield device
    device.close()


def free(path: str, offset: int) -> bool:
    return probe(path, *identity(path), offset)


def test_the_bytes_are_where_the_design_puts_them() -> None:
    assert WITNESS_BASE == 1 << 60
    assert CLAIM_OFFSET == WITNESS_BASE - 1


def test_a_byte_has_one_holder_and_bytes_are_independent(
    path: str, node1: DirectDevice, node2: DirectDevice
) -> None:
    assert free(path, WITNESS_BASE + 1)
    assert hold(node1.fd, WITNESS_BASE + 1)
    assert not hold(node2.fd, WITNESS_BASE + 1)
    assert hold(node2.fd, WITNESS_BASE + 2)
    assert not free(path, WITNESS_BASE + 1) and not free(path, WITNESS_BASE + 2)
    assert free(path, WITNESS_BASE) and free(path, WITNESS_BASE + 3)
    release(node1.fd, WITNESS_BASE + 1)
    assert free(path, WITNESS_BASE + 1) and not free(path, WITNESS_BASE + 2)
    assert hold(node2.fd, WITNESS_BASE + 1)


def test_the_holder_holds_again_and_does_not_see_itself(node1: DirectDevice, node2: DirectDevice) -> None:
    assert hold(node1.fd, WITNESS_BASE) and hold(node1.fd, WITNESS_BASE)
    assert not held(node1.fd, WITNESS_BASE)
    assert held(node2.fd, WITNESS_BASE)


def test_the_lock_lives_as_long_as_the_last_copy_of_its_descriptor(path: str) -> None:
    device = open_member(path, clustered=True)
    assert hold(device.fd, WITNESS_BASE)
    copy = os.dup(device.fd)
    device.close()
    assert not free(path, WITNESS_BASE)
    os.close(copy)
    assert free(path, WITNESS_BASE)


def test_a_probe_takes_nothing(path: str, node1: DirectDevice) -> None:
    """Also closing another descriptor of the file in the same process must not drop the lock."""
    assert free(path, WITNESS_BASE)
    assert hold(node1.fd, WITNESS_BASE)
    assert not free(path, WITNESS_BASE)
    assert not free(path, WITNESS_BASE)


def test_a_probe_needs_no_right_to_write(path: str, node1: DirectDevice) -> None:
    assert hold(node1.fd, WITNESS_BASE)
    os.chmod(path, 0o400)
    assert not free(path, WITNESS_BASE)


def test_another_inode_under_the_name_proves_nothing(path: str, node1: DirectDevice, tmp_path: Path) -> None:
    who = identity(path)
    assert hold(node1.fd, WITNESS_BASE)
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 20))
    os.rename(other, path)
    with pytest.raises(DeviceRefused) as refused:
        probe(path, *who, WITNESS_BASE)
    assert refused.value.code == "witness-other-inode"


def test_a_name_that_is_gone_proves_nothing(path: str) -> None:
    who = identity(path)
    os.unlink(path)
    with pytest.raises(DeviceRefused) as refused:
        probe(path, *who, WITNESS_BASE)
    assert refused.value.code == "witness-open-failed"


def test_who_cannot_write_cannot_hold(path: str) -> None:
    reader = open_member(path, read_only=True)
    with pytest.raises(DeviceRefused) as refused:
        hold(reader.fd, WITNESS_BASE)
    assert refused.value.code == "no-locks"
    assert path in refused.value.message
    reader.close()
