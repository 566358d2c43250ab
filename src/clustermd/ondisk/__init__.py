"""Bytes <-> values: superblock, bitmap superblock, bitmap bits, bad block log. No I/O."""
