"""Clustered MD in userspace: software RAID on disks that several machines share."""

__version__ = "0.1.0"
