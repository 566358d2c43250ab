"""Replicas in memory are `clustermd.testing.locks.replicas`."""

from clustermd.testing.locks.client import Client
from clustermd.testing.locks.replicas import Cluster, Node

__all__ = ["Client", "Cluster", "Node"]
