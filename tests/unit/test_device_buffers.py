"""Buffers: aligned, of the size asked for, never two owners, never more than the bound."""

from __future__ import annotations

import ctypes

import pytest

from clustermd.device.buffers import LARGEST_BYTES, AlignedPool, PoolExhausted


@pytest.mark.parametrize(
    "length", [1, 511, 4096, 4097, 8192, 8193, 1 << 20, LARGEST_BYTES - 1, LARGEST_BYTES]
)
def test_a_buffer_is_large_enough_and_starts_at_a_page(length: int) -> None:
    pool = AlignedPool()
    buffer = pool.take(length)
    assert len(buffer.view) >= length
    assert len(buffer.view) < 2 * max(length, 4096)
    assert buffer.address % 4096 == 0


def test_address_and_view_are_the_same_memory() -> None:
    pool = AlignedPool()
    buffers = [pool.take(4096) for _ in range(200)]
    for number, buffer in enumerate(buffers):
        buffer.view[:4] = number.to_bytes(4, "little")
        buffer.view[-1] = number
    for number, buffer in enumerate(buffers):
        assert ctypes.string_at(buffer.address, 4) == number.to_bytes(4, "little")
        assert ctypes.string_at(buffer.address + 4095, 1)[0] == number


def test_a_released_buffer_is_used_again() -> None:
    pool = AlignedPool()
    first = pool.take(4096)
    address = first.address
    first.release()
    assert pool.take(100).address == address


def test_releasing_twice_raises_and_gives_no_second_owner() -> None:
    pool = AlignedPool()
    buffer = pool.take(4096)
    buffer.release()
    with pytest.raises(RuntimeError, match="released twice"):
        buffer.release()
    others = [pool.take(4096) for _ in range(300)]
    assert len({other.address for other in others}) == 300


def test_the_bound_holds_and_a_release_makes_room() -> None:
    pool = AlignedPool(limit_bytes=1 << 20)
    taken = [pool.take(64 << 10) for _ in range(16)]
    with pytest.raises(PoolExhausted) as refused:
        pool.take(64 << 10)
    assert refused.value.code == "buffers-exhausted"
    assert pool.mapped_bytes <= 1 << 20
    taken.pop().release()
    pool.take(64 << 10)


def test_idle_memory_of_other_sizes_makes_room() -> None:
    pool = AlignedPool(limit_bytes=1 << 20)
    small = [pool.take(4096) for _ in range(256)]
    with pytest.raises(PoolExhausted):
        pool.take(8192)
    for buffer in small[:128]:
        buffer.release()
    large = pool.take(256 << 10)
    large.view[:] = bytes(len(large.view))
    assert pool.mapped_bytes <= 1 << 20
    # what is still taken was left alone
    for buffer in small[128:]:
        buffer.view[0] = 1


@pytest.mark.parametrize("length", [0, -1, LARGEST_BYTES + 1, 1 << 40])
def test_impossible_lengths_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        AlignedPool().take(length)
