"""Replicas in memory are `clustermd.testing.locks.replicas`."""

from clustermd.testing.locks.replicas import Client, Cluster, Frame, Node

__all__ = ["Client", "Cluster", "Frame", "Node"]
