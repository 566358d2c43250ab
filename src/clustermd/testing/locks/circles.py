"""Circles of waits between sessions, read from the ledger alone: brute force over the whole graph (dlm.md 1.6, 6.7).

A session waits for another one if one of its queued locks cannot be granted before the other lets a lock go. The other
does not count if it has a blocking callback for that lock or said NODLCKBLK, nor does a wait with NODLCKWT.
"""

from __future__ import annotations

from clustermd.dlm.effects import SessionKey
from clustermd.dlm.modes import Flag, Mode
from clustermd.testing.locks.ledger import Ledger, Queues, Record, ResourceKey
from clustermd.testing.locks.modes import may_coexist
from clustermd.testing.locks.rules import LockRuleBroken

Graph = dict[SessionKey, set[SessionKey]]


def _wanted(record: Record) -> list[int]:
    """The modes that would do."""
    if record.fl & Flag.ALTPR:
        return [record.rq, Mode.PR]
    return [record.rq, Mode.CW] if record.fl & Flag.ALTCW else [record.rq]


def _obstacles(records: dict[int, Record], queues: Queues, lock: int) -> set[int]:
    """All locks of the resource that must change before `lock` can be granted."""
    converting, waiting = ([entry[0] for entry in queue] for queue in (queues.converting, queues.waiting))
    line = converting if lock in converting else [*converting, *waiting]
    line = [lock] if records[lock].fl & Flag.NOORDER else line[: line.index(lock) + 1]
    found = set(line)
    for holder, granted, _ in (*queues.granted, *queues.converting):
        for one in line:
            if one != holder and not any(may_coexist(granted, mode) for mode in _wanted(records[one])):
                found.add(holder)
    return found - {lock}


def graph(ledger: Ledger, all_queues: dict[ResourceKey, Queues]) -> Graph:
    """Which session waits for which, directly."""
    waits: Graph = {}
    records = ledger.records
    for key, queues in all_queues.items():
        if key[0] not in ledger.seeking:
            continue
        for lock, _, _ in (*queues.converting, *queues.waiting):
            waiter = records[lock]
            if waiter.fl & Flag.NODLCKWT:
                continue
            for other in _obstacles(records, queues, lock):
                blocker = records[other]
                lets_go = blocker.wants_bast or blocker.fl & Flag.NODLCKBLK
                if blocker.session != waiter.session and not lets_go:
                    waits.setdefault(waiter.session, set()).add(blocker.session)
    return waits


def _waits_for_itself(waits: Graph, session: SessionKey) -> bool:
    reached: set[SessionKey] = set()
    while True:
        more = set(waits.get(session, set())).union(*(waits.get(one, set()) for one in reached))
        if more <= reached:
            return session in reached
        reached |= more


def none_closed(ledger: Ledger, now: dict[ResourceKey, Queues], record: Record) -> None:
    """What was just queued must not have closed a circle. Raises LockRuleBroken."""
    if record.key[0] not in ledger.seeking or record.fl & Flag.NODLCKWT:
        return
    if _waits_for_itself(graph(ledger, now), record.session):
        raise LockRuleBroken("deadlock", f"{record} was queued, and its session waits for itself")


def would_close(ledger: Ledger, record: Record) -> bool:
    """Whether queueing `record`, which was submitted just now, would have closed a circle."""
    was = ledger.queues.get(record.key, Queues())
    mine = next((entry for entry in was.granted if entry[0] == record.id), (record.id, int(Mode.IV), 0))
    queued = (record.id, mine[1], record.rq)
    queues = Queues(
        [entry for entry in was.granted if entry[0] != record.id], list(was.converting), list(was.waiting)
    )
    queue = queues.waiting if mine[1] == Mode.IV else queues.converting
    queue.insert(0 if record.fl & Flag.HEADQUE else len(queue), queued)
    return _waits_for_itself(graph(ledger, ledger.queues | {record.key: queues}), record.session)
