"""What must hold of a lock engine is `clustermd.testing.locks.invariants`."""

from clustermd.testing.locks.invariants import Checker
from clustermd.testing.locks.modes import is_down, may_coexist

__all__ = ["Checker", "is_down", "may_coexist"]
