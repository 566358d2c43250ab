"""A deterministic simulator of whole clusters: the production code over simulated time, group, disks and machines.

Begin reading at `run` (one run), then `loop`, `boxes`, `order`, `machine`.
"""
