"""corosync takes what `clustermd cluster setup` writes: its parser does, and three daemons become one cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from corosync_kit import corosync_cluster, machine_text

from clustermd.cli.main import main
from clustermd.group.corosync import cmap
from clustermd.group.corosync.conf import KEYFILE

pytestmark = [pytest.mark.system, pytest.mark.needs("root", "ip", "corosync")]

CHECK = 'mount --bind "$1" /etc/corosync && corosync -t'


@pytest.mark.parametrize("count", [2, 3])
def test_a_written_configuration_makes_a_cluster(count: int, tmp_path: Path) -> None:
    with corosync_cluster(count, start=False) as cluster:
        words = [f"{node.name}={node.address}" for node in cluster.nodes]
        assert (
            main(["cluster", "setup", *words, "--cluster=written", "--token=500", f"--output={tmp_path}"])
            == 0
        )
        conf, key = tmp_path / "corosync.conf", tmp_path / "authkey"
        for node in cluster.nodes:
            # corosync finds the addresses of nodes on the machine, so it is asked on each.
            checked = node.run("sh", "-c", CHECK, "sh", str(tmp_path))
            assert checked.returncode == 0, checked.stderr
            node.conf.write_text(conf.read_text().replace(KEYFILE, str(key)) + machine_text(node))
        cluster.start()
        with cluster.node(2).inside():
            assert cmap.cluster_name() == "written"
            assert cmap.local_number() == 2
            assert [(node.number, node.name) for node in cmap.nodelist()] == [
                (node.number, node.name) for node in cluster.nodes
            ]
            token = 500 + 650 * (count - 2)
            assert cmap.timeouts() == cmap.Timeouts(token, token * 12 // 10)


def test_the_parser_is_asked_in_earnest(tmp_path: Path) -> None:
    with corosync_cluster(1, start=False) as cluster:
        (tmp_path / "corosync.conf").write_text("totem {\n  version: 2\n  transport: pigeons\n}\n")
        assert cluster.node(1).run("sh", "-c", CHECK, "sh", str(tmp_path)).returncode != 0
