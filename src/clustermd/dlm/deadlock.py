"""Who waits for whom, and requests that would close a circle of waits (dlm.md 1.6, 6.7).

Linux finds only conversions that block each other on one resource; that is `resource` and always on. In a lockspace
whose members joined it with DEADLOCKS, a request or conversion that is about to be queued is also looked at across
resources and across all such lockspaces. If its session would wait for itself by way of others, it is not queued: it
completes with EDEADLK, a conversion stays in its old mode. So the victim is always the newest, and all replicas choose
the same one, since nothing but the order of operations decides.

A lock in a queue waits for those that hold what excludes it, for the holders that exclude those before it in the queue,
and for those before it. What is no wait:

    one's own locks      two tasks of one session that exclude each other are their owner's business, and a task
                         that waits for its own lock is not found
    who lets go          a holder with a blocking callback is asked to let go and does, and NODLCKBLK promises the same.
                         If it does not, because it waits itself, that circle is not found
    a patient request    NODLCKWT: its owner goes on meanwhile and does not count as waiting. It is never the victim
    an alternative       ALTPR, ALTCW: only what excludes both modes counts

Owners are sessions, not tasks. A session that waits with one task while another is free to let go looks as if it were
stuck, so programs like that ask for blocking callbacks, say NODLCKWT, or join without DEADLOCKS, as arrays do.

Looked at is when something is queued, not when something is granted: a grant out of turn (NOORDER, or a conversion
that passes a queue) to a session that waits elsewhere can close a circle. The next thing that this session, or one
of those that wait for it, queues is then refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from clustermd.dlm.effects import SessionKey
from clustermd.dlm.lock import ALTCW, ALTPR, CW, IV, NODLCKBLK, NODLCKWT, NOORDER, PR, Lock
from clustermd.dlm.modes import COMPATIBLE

if TYPE_CHECKING:
    from clustermd.dlm.resource import Resource


def excludes(holder: Lock, waiter: Lock) -> bool:
    """Whether what `holder` has keeps `waiter` from every mode it would take."""
    if (holder.gr, waiter.rq) in COMPATIBLE:
        return False
    if waiter.fl & ALTPR:
        return (holder.gr, PR) not in COMPATIBLE
    return not waiter.fl & ALTCW or (holder.gr, CW) not in COMPATIBLE


def blockers(resource: Resource, lock: Lock) -> Iterator[Lock]:
    """The locks that must go or go down before queued `lock` can be granted; some may come more than once."""
    queue = [lock]
    if not lock.fl & NOORDER:
        queue = list(resource.converting)
        if lock.gr == IV:
            queue += resource.waiting
        del queue[queue.index(lock) + 1 :]
    for waiter in queue:
        if waiter is not lock:
            yield waiter
        for holder in (*resource.granted, *resource.converting):
            if holder is not waiter and holder is not lock and excludes(holder, waiter):
                yield holder


class Waits:
    """The queued locks of the lockspaces that look for deadlocks, by session."""

    __slots__ = ("_queued",)

    def __init__(self) -> None:
        self._queued: dict[SessionKey, dict[int, tuple[Resource, Lock]]] = {}

    def begin(self, resource: Resource, lock: Lock) -> None:
        """`lock` stands in a queue of `resource` now."""
        self._queued.setdefault(lock.session, {})[lock.id] = resource, lock

    def end(self, lock: Lock) -> None:
        """`lock` stands in no queue any more, if it did."""
        mine = self._queued.get(lock.session)
        if mine is not None and mine.pop(lock.id, None) is not None and not mine:
            del self._queued[lock.session]

    def close_a_circle(self, lock: Lock) -> bool:
        """Whether the session of `lock`, which was just queued, waits for itself now."""
        if lock.fl & NODLCKWT:
            return False
        us = lock.session
        seen, to_visit = {us}, [us]
        while to_visit:
            waiter = to_visit.pop()
            for blocker in self._sessions_before(waiter):
                if blocker == us:
                    return True
                if blocker not in seen:
                    seen.add(blocker)
                    to_visit.append(blocker)
        return False

    def _sessions_before(self, session: SessionKey) -> Iterator[SessionKey]:
        for resource, lock in self._queued.get(session, {}).values():
            if lock.fl & NODLCKWT:
                continue
            for blocker in blockers(resource, lock):
                if blocker.session != session and not (blocker.wants_bast or blocker.fl & NODLCKBLK):
                    yield blocker.session
