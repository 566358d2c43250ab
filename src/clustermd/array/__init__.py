"""One array on one node: members, bitmap, windows, write, read, resync, metadata."""
