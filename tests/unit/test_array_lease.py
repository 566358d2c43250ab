"""An array whose node's lease is over: it waits, says so, and blames no member for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from array_kit import data_of, make_images, run, running, until

TICK_S = 0.02


class SetLease:
    good = True

    def valid(self) -> bool:
        return self.good


def test_the_time_without_a_lease_counts_for_no_member(tmp_path: Path) -> None:
    paths = make_images(tmp_path)

    async def story() -> None:
        async with running(paths, device_timeout_s=2, tick_s=TICK_S) as (array, client):
            lease = array.state.gate.lease = SetLease()
            await client.write(0, b"a" * 4096)
            lease.good = False
            waiting = [
                asyncio.ensure_future(client.write(0, b"b" * 4096)),  # its bit is on disk
                asyncio.ensure_future(client.write(40 << 10, b"c" * 4096)),
                asyncio.ensure_future(client.read(8192, 4096)),
            ]
            await asyncio.sleep(25 * TICK_S)  # much longer than a member may take
            assert not any(one.done() for one in waiting)
            assert "lease is over" in array.status().held
            assert data_of(paths[0])[:4096] == b"a" * 4096
            lease.good = True
            await asyncio.gather(*waiting)
            await until(lambda: not array.status().held)
            assert not any(member.faulty for member in array.status().members)
        assert all(data_of(path)[:4096] == b"b" * 4096 for path in paths)

    run(story())
