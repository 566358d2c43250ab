"""The ctypes declarations against corosync's own headers: layouts, numbers, and the types of callbacks.

A C program is made from what Python declares; where something differs it does not compile or prints another number.
"""

from __future__ import annotations

import ctypes
import enum
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from clustermd.group.corosync import cmap, cpg, library, quorum, votequorum
from clustermd.group.corosync.errors import Status

HEADERS = ("cpg", "quorum", "votequorum", "cmap")
LAYOUTS: dict[str, tuple[type[ctypes.Structure], tuple[str, ...]]] = {
    "struct cpg_name": (cpg.Name, ("length", "value")),
    "struct cpg_address": (cpg.Address, ("nodeid", "pid", "reason")),
    "struct cpg_ring_id": (cpg.RingId, ("nodeid", "seq")),
    "struct iovec": (cpg.IoVector, ("iov_base", "iov_len")),
    "cpg_model_v1_data_t": (
        cpg.Model,
        ("model", "cpg_deliver_fn", "cpg_confchg_fn", "cpg_totem_confchg_fn", "flags"),
    ),
    "struct quorum_ring_id": (quorum.RingId, ("nodeid", "seq")),
    "quorum_model_v1_data_t": (quorum.Model, ("model", "quorum_notify_fn", "nodelist_notify_fn")),
    "votequorum_callbacks_t": (
        votequorum.Callbacks,
        (
            "votequorum_quorum_notify_fn",
            "votequorum_expectedvotes_notify_fn",
            "votequorum_nodelist_notify_fn",
        ),
    ),
    "struct votequorum_info": (votequorum.Info, tuple(name for name, *_ in votequorum.Info._fields_)),
}
ENUMS: tuple[tuple[type[enum.IntEnum] | type[enum.IntFlag], str], ...] = (
    (cpg.Reason, "CPG_REASON_"),
    (votequorum.NodeState, "VOTEQUORUM_NODESTATE_"),
)
NUMBERS: dict[str, int] = {
    "CS_DISPATCH_ONE_NONBLOCKING": library.DISPATCH_ONE_NONBLOCKING,
    "CPG_MAX_NAME_LENGTH": cpg.NAME_MAX,
    "CPG_MODEL_V1": cpg._MODEL_V1,
    "CPG_TYPE_AGREED": cpg._AGREED,
    "CPG_MODEL_V1_DELIVER_INITIAL_TOTEM_CONF": cpg._TELL_FIRST_RING,
    "QUORUM_MODEL_V1": quorum._MODEL_V1,
    "QUORUM_FREE": quorum._NO_PROVIDER,
    "(CS_TRACK_CURRENT | CS_TRACK_CHANGES)": quorum._CURRENT_AND_CHANGES,
    "CS_TRACK_CHANGES": votequorum._CHANGES,
    "VOTEQUORUM_QDEVICE_MAX_NAME_LEN": votequorum._NAME_MAX,
    "CMAP_KEYNAME_MAXLEN": cmap.KEY_MAX,
    **{
        f"CS_{'' if status is Status.OK else 'ERR_'}{status.name}": status
        for status in Status
        if status < 100
    },
    "CS_ERR_SECURITY": Status.SECURITY,
    **{prefix + member.name: member for kind, prefix in ENUMS for member in kind},
    **{
        "VOTEQUORUM_INFO_" + ("TWONODE" if rule is votequorum.Rules.TWO_NODE else str(rule.name)): rule
        for rule in votequorum.Rules.__members__.values()
    },
}
CALLBACKS = {
    "cpg_deliver_fn_t": cpg.DELIVER,
    "cpg_confchg_fn_t": cpg.CONFCHG,
    "cpg_totem_confchg_fn_t": cpg.TOTEM,
    "quorum_v1_quorum_notification_fn_t": quorum.QUORUM,
    "votequorum_expectedvotes_notification_fn_t": votequorum.EXPECTED,
}
_NEEDED = "needs a C compiler and libcpg-dev, libquorum-dev, libvotequorum-dev, libcmap-dev"


@pytest.fixture
def compiler() -> str:
    found = shutil.which("cc")
    if found is None or not all(Path(f"/usr/include/corosync/{name}.h").exists() for name in HEADERS):
        if os.environ.get("CLUSTERMD_TESTS_MUST_RUN"):
            pytest.fail(f"cannot run here, and CI is set: {_NEEDED}", pytrace=False)
        pytest.skip(_NEEDED)
    return found


def compiled(compiler: str, directory: Path, body: str) -> list[str]:
    """The lines that a program with `body` in its main prints."""
    includes = "".join(f"#include <corosync/{name}.h>\n" for name in HEADERS)
    text = "#include <stddef.h>\n#include <stdio.h>\n#include <sys/uio.h>\n" + includes
    text += f"int main(void) {{\n{body}return 0;\n}}\n"
    source, program = directory / "look.c", directory / "look"
    source.write_text(text)
    done = subprocess.run(
        [compiler, "-Wall", "-Werror", "-o", str(program), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()


def test_structures_lie_in_memory_as_in_c(compiler: str, tmp_path: Path) -> None:
    wanted: list[tuple[str, int]] = []
    for name, (structure, fields) in LAYOUTS.items():
        assert len(fields) == len(structure._fields_)
        wanted.append((f"sizeof({name})", ctypes.sizeof(structure)))
        for field, (ours, *_) in zip(fields, structure._fields_, strict=True):
            wanted.append((f"offsetof({name}, {field})", getattr(structure, ours).offset))
            wanted.append((f"sizeof((({name} *)0)->{field})", getattr(structure, ours).size))
    body = "".join(f'printf("%zu\\n", {expression});\n' for expression, _ in wanted)
    found = [int(line) for line in compiled(compiler, tmp_path, body)]
    assert dict(zip((name for name, _ in wanted), found, strict=True)) == dict(wanted)


def test_numbers_are_those_of_the_headers(compiler: str, tmp_path: Path) -> None:
    body = "".join(f'printf("%d\\n", (int){name});\n' for name in NUMBERS)
    found = [int(line) for line in compiled(compiler, tmp_path, body)]
    assert dict(zip(NUMBERS, found, strict=True)) == {name: int(number) for name, number in NUMBERS.items()}


def test_callbacks_take_what_corosync_gives(compiler: str, tmp_path: Path) -> None:
    checks = ""
    for name, declared in CALLBACKS.items():
        types = [c_type(argument) for argument in declared._argtypes_]
        if name.startswith("cpg") and name != "cpg_totem_confchg_fn_t":
            assert types[1] == "void *", "the group's name, which Python does not look at"
            types[1] = "const struct cpg_name *"
        same = f"__builtin_types_compatible_p({name}, void (*)({', '.join(types)}))"
        checks += f'_Static_assert({same}, "{name}");\n'
    compiled(compiler, tmp_path, checks)


def c_type(declared: type) -> str:
    """The C type of an argument as ctypes declares it."""
    known = {
        ctypes.c_uint64: "uint64_t",
        ctypes.c_uint32: "uint32_t",
        ctypes.c_void_p: "void *",
        ctypes.c_size_t: "size_t",
        cpg.RingId: "struct cpg_ring_id",
        quorum.RingId: "struct quorum_ring_id",
        ctypes.POINTER(cpg.Address): "const struct cpg_address *",
        ctypes.POINTER(ctypes.c_uint32): "const uint32_t *",
    }
    return known[declared]
