"""The group in memory is `clustermd.testing.locks.order`."""

from clustermd.testing.locks.order import Event, MemoryGroup, Port, newcomer_reads_from_here

__all__ = ["Event", "MemoryGroup", "Port", "newcomer_reads_from_here"]
