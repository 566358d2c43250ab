"""What NBD in Python costs when somebody else drives it: a file, served by nbdkit's Python plugin.

    nbdkit python benchmarks/nbdkit_plugin.py file=disk.img

As plain as such a plugin is usually written (nbdkit-python-plugin(3)): one call per request.
"""

import builtins
import os

API_VERSION = 2
_path = ""


def config(key, value):
    global _path
    if key != "file":
        raise RuntimeError(f"unknown parameter {key}")
    _path = os.path.abspath(value)


def open(_readonly):
    return os.open(_path, os.O_RDWR)


def close(handle):
    os.close(handle)


def get_size(handle):
    return os.fstat(handle).st_size


def pread(handle, buffer, offset, _flags):
    buffer[:] = os.pread(handle, builtins.len(buffer), offset)


def pwrite(handle, buffer, offset, _flags):
    os.pwrite(handle, buffer, offset)


def flush(handle, _flags):
    os.fdatasync(handle)
