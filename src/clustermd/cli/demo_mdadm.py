"""The demonstration's neutral witness: Linux's own mdadm, asked about the disks."""

from __future__ import annotations

import subprocess

from clustermd.cli.demo_page import Failed


def mdadm(*arguments: str) -> str:
    done = subprocess.run(["mdadm", *arguments], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise Failed(f"mdadm {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def examine_bitmap(image: str) -> str:
    """`mdadm -X` by way of a loop device, which it wants."""
    losetup = ["losetup", "--find", "--show", "--read-only", image]
    device = subprocess.run(losetup, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    try:
        return mdadm("-X", device)
    finally:
        subprocess.run(["losetup", "--detach", device], timeout=20, check=False)


def pick(text: str, *wanted: str) -> str:
    """The lines that start with one of the wanted words."""
    return "\n".join(line for line in text.splitlines() if line.strip().startswith(wanted))
