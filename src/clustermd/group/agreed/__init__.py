"""A process group over any medium that gives agreed order and tells membership changes (corosync's CPG)."""
