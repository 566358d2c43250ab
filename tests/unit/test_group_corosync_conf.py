"""What `clustermd cluster setup` plans, refuses and writes. That corosync takes it, the system tests show."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from clustermd.cli.main import main
from clustermd.errors import Refused
from clustermd.group.corosync.conf import KEY_BYTES, Plan, conf_text, parse_node

THREE = ("alpha=192.168.7.1", "beta=192.168.7.2", "gamma=192.168.7.3")


def plan(*words: str, cluster: str = "home", token_ms: int = 1000) -> Plan:
    return Plan(cluster, tuple(parse_node(word) for word in words), token_ms)


def directives(text: str) -> list[str]:
    """The lines that corosync sees."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def test_nodes_are_numbered_in_their_order_and_have_names_and_links() -> None:
    lines = directives(conf_text(plan("beta=192.168.7.2,10.0.0.2", "alpha=192.168.7.1,10.0.0.1")))
    at = lines.index("nodelist {")
    assert lines[at + 1 : at + 7] == [
        "node {",
        "nodeid: 1",
        "name: beta",
        "ring0_addr: 192.168.7.2",
        "ring1_addr: 10.0.0.2",
        "}",
    ]
    assert lines[at + 8 : at + 10] == ["nodeid: 2", "name: alpha"]


def test_links_are_encrypted_and_timeouts_are_written() -> None:
    lines = directives(conf_text(plan(*THREE, token_ms=1500)))
    for line in (
        "transport: knet", "crypto_cipher: aes256", "crypto_hash: sha256", "keyfile: /etc/corosync/authkey",
        "token: 1500", "token_coefficient: 650", "cluster_name: home", "provider: corosync_votequorum",
    ):  # fmt: skip
        assert line in lines
    assert f"here {2.2 * (1.5 + 0.65):.1f} s" in conf_text(plan(*THREE, token_ms=1500))


def test_two_node_only_for_two_nodes() -> None:
    assert "two_node: 1" in directives(conf_text(plan(*THREE[:2])))
    assert not any("two_node" in line for line in directives(conf_text(plan(*THREE))))
    assert "5 nodes with one vote each: 3 of them" in conf_text(plan(*THREE, "d=10.0.0.1", "e=10.0.0.2"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("bad-node", ["alpha"]),
        ("bad-node", ["alpha=", "beta=10.0.0.1"]),
        ("bad-node", ["alpha=10.0.0.1"]),
        ("bad-node", ["alpha=10.0.0.1", "alpha=10.0.0.2"]),
        ("bad-node", ["alpha=10.0.0.1,10.0.1.1", "beta=10.0.0.2"]),
        ("bad-node", [f"n{n}=" + ",".join(f"10.{link}.0.{n}" for link in range(9)) for n in (1, 2)]),
        ("bad-node-name", ["al pha=10.0.0.1", "beta=10.0.0.2"]),
        ("bad-node-name", ["a\n}=10.0.0.1", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=10.0.0.1", "beta=10.0.0.1"]),
        ("bad-address", ["alpha=10.0.0.1,10.0.0.1", "beta=10.0.0.2,10.0.0.3"]),
        ("bad-address", ["alpha=fd00::1", "beta=fd00:0::1"]),
        ("bad-address", ["alpha=10.0.0.256", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=10.0.0", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=10.0.0.1/24", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=a host", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=127.0.0.1", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=0.0.0.0", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=224.0.0.1", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=fd00::1", "beta=10.0.0.2"]),
        ("bad-address", ["alpha=beta", "beta=10.0.0.2"]),
    ],
)  # fmt: skip
def test_what_could_never_work_is_refused_where_it_is_written(code: str, words: list[str]) -> None:
    with pytest.raises(Refused) as refused:
        plan(*words)
    assert refused.value.code == code


def test_host_names_and_ipv6_are_addresses() -> None:
    plan("alpha=alpha", "beta=beta.example.org")
    plan("alpha=fd00::1", "beta=fd00::2")


@pytest.mark.parametrize("name", ["", "a b", "x" * 64, "-x", "ü"])
def test_a_cluster_name_fits_on_disk_and_in_one_line(name: str) -> None:
    with pytest.raises(Refused) as refused:
        plan(*THREE, cluster=name)
    assert refused.value.code == "bad-cluster-name"


@pytest.mark.parametrize("token_ms", [0, 199, 60_001])
def test_a_token_has_bounds(token_ms: int) -> None:
    with pytest.raises(Refused) as refused:
        plan(*THREE, token_ms=token_ms)
    assert refused.value.code == "bad-token"


def setup(directory: Path, *words: str) -> int:
    return main(["cluster", "setup", *THREE, "--cluster", "home", f"--output={directory}", *words])


def test_both_files_are_written_and_the_key_is_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup(tmp_path / "new" / "deep") == 0
    directory = tmp_path / "new" / "deep"
    assert sorted(path.name for path in directory.iterdir()) == ["authkey", "corosync.conf"]
    assert (directory / "corosync.conf").read_text() == conf_text(plan(*THREE, token_ms=3000))
    key = directory / "authkey"
    assert stat.S_IMODE(key.stat().st_mode) == 0o400
    assert len(key.read_bytes()) == KEY_BYTES and len(set(key.read_bytes())) > 50
    told = capsys.readouterr().out
    for word in (
        "192.168.7.1 192.168.7.2 192.168.7.3",
        "scp -p",
        "UDP port 5405",
        "corosync-quorumtool -s",
        "fence-test",
    ):
        assert word in told


def test_what_is_there_is_replaced_by_force_only_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup(tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert setup(tmp_path, "--token=500") == 1
    assert "--force" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert setup(tmp_path, "--token=500", "--force") == 0
    assert "token: 500" in directives((tmp_path / "corosync.conf").read_text())
    assert (tmp_path / "authkey").read_bytes() != before["authkey"]
    for name, content in before.items():
        assert (tmp_path / f"{name}.old").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 4


def test_the_example_of_the_package_is_no_cluster(tmp_path: Path) -> None:
    example = "totem {\n  cluster_name: debian\n}\nnodelist {\n  node {\n    ring0_addr: 127.0.0.1\n  }\n}\n"
    (tmp_path / "corosync.conf").write_text(example)
    assert setup(tmp_path) == 0
    assert (tmp_path / "corosync.conf.old").read_text() == example
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "corosync.conf").write_text(example.replace("127.0.0.1", "10.0.0.1"))
    assert setup(tmp_path / "used") == 1


def test_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup(tmp_path, "--json", "--token", "1000") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cluster"] == "home"
    assert told["nodes"][2] == {"number": 3, "name": "gamma", "addresses": ["192.168.7.3"]}
    assert told["detection_s"] == 3.6
    assert told["written"] == [str(tmp_path / "corosync.conf"), str(tmp_path / "authkey")]


def test_a_cluster_without_a_name_gets_one_that_no_other_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = set()
    for number in range(3):
        assert main(["cluster", "setup", *THREE, "--json", "--output", str(tmp_path / str(number))]) == 0
        names.add(json.loads(capsys.readouterr().out)["cluster"])
    assert len(names) == 3


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["setup"],
        ["setup", "--nonsense"],
        ["setup", *THREE, "--token"],
        ["setup", *THREE, "--token=soon"],
    ],
)
def test_what_cannot_be_understood_ends_with_2(words: list[str]) -> None:
    assert main(["cluster", *words]) == 2


def test_help_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["setup", "--help"], ["setup", *THREE, "-h"]):
        assert main(["cluster", *words]) == 0
        assert "clustermd cluster setup" in capsys.readouterr().out
