"""The configuration file: what it gives, and that every mistake is one sentence with file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustermd.conf import FENCES, Conf
from clustermd.errors import Refused

AGENT = """
engine = "corosync"
fence = "agent"
[fence_agent]
agent = "fence_ipmilan"
username = "admin"
lanplus = true
power_wait = 4
[fence_agent.nodes.node1]
ip = "10.0.0.1"
[fence_agent.nodes.node2]
ip = "10.0.0.2"
"""


def _refusal(text: str, engine: str | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        Conf.parse(text.encode(), "/etc/c.conf", engine)
    assert caught.value.message.startswith("/etc/c.conf"), "it does not say which file"
    assert "\n" not in caught.value.message
    return caught.value


def test_no_file_means_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clustermd.conf.PATH", "/nowhere/clustermd.conf")
    conf = Conf.load({})
    assert (conf.engine, conf.fence, conf.clustered) == ("local", "", False)
    assert (conf.lease_s, conf.device_bound_s, conf.startup_s) == (10, 30, 30)


def test_an_agent_with_its_options() -> None:
    conf = Conf.parse(AGENT.encode())
    assert conf.clustered and conf.fence_agent is not None
    agent = conf.fence_agent
    assert (agent.agent, agent.action, agent.timeout_s, agent.retries) == ("fence_ipmilan", "off", 60, 1)
    assert agent.options == {"username": "admin", "lanplus": "1", "power_wait": "4"}
    assert agent.nodes["node2"] == {"ip": "10.0.0.2"}


def test_the_environment_names_file_and_engine(tmp_path: Path) -> None:
    path = tmp_path / "c.conf"
    path.write_text('fence = "lease"\nlease_s = 2\n')
    conf = Conf.load({"CLUSTERMD_CONF": str(path), "CLUSTERMD_ENGINE": "corosync"})
    assert (conf.engine, conf.fence, conf.lease_s, conf.path) == ("corosync", "lease", 2, str(path))
    assert Conf.load({"CLUSTERMD_CONF": str(path)}).engine == "local"
    with pytest.raises(Refused, match=r"CLUSTERMD_ENGINE.*'ring'.*\"local\", \"corosync\""):
        Conf.load({"CLUSTERMD_CONF": str(path), "CLUSTERMD_ENGINE": "ring"})
    with pytest.raises(Refused, match="does not exist"):
        Conf.load({"CLUSTERMD_CONF": str(tmp_path / "missing")})
    with pytest.raises(Refused, match="cannot be read"):
        Conf.load({"CLUSTERMD_CONF": str(tmp_path)})


def test_corosync_without_a_choice_explains_the_choices() -> None:
    refusal = _refusal("", "corosync")
    assert refusal.code == "no-fence"
    assert all(f'"{policy}"' in refusal.message for policy in FENCES)
    assert refusal.data["choices"] == list(FENCES)


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("leese_s = 3", "leese_s", "did you mean lease_s?"),
        ("colour = 3", "colour", '"lease_s"'),
        ('engine = "ring"', "engine", '"local", "corosync"'),
        ("engine = 3", "engine", '"local", "corosync"'),
        ('fence = "sbd"', "fence", '"device"'),
        ('lease_s = "10"', "lease_s", "seconds from 0.5 to 600"),
        ("lease_s = true", "lease_s", "seconds from 0.5 to 600"),
        ("lease_s = 0", "lease_s", "seconds from 0.5 to 600"),
        ("lease_s = nan", "lease_s", "seconds from 0.5 to 600"),
        ("drift = 0.6", "drift", "a number from 0 to 0.5"),
        ("device_bound_s = -1", "device_bound_s", "seconds from 0"),
        ('fence = "agent"', "fence", "[fence_agent]"),
        ('fence = "device"', "fence", "clustermd cluster fence-device --create"),
        ('fence = "device"\nfence_device = "sdx"', "fence_device", "absolute path"),
        ('fence = "lease"\nfence_device = "/dev/sdx"', "fence_device", 'fence = "device"'),
        ('fence = "lease"\nself_fence = "reboot"', "self_fence", 'fence = "device"'),
        ('fence = "lease"\nstonith_action = "off"', "stonith_action", 'fence = "stonith"'),
        ('fence = "stonith"\nstonith_action = "on"', "stonith_action", '"off", "reboot"'),
        ('fence = "none"\n[fence_agent]\nagent = "a"', "fence_agent", 'fence = "agent"'),
        ('fence_agent = "fence_ipmilan"', "fence_agent", "[fence_agent]"),
        ('fence = "agent"\n[fence_agent]\nip = "x"', "fence_agent.agent", 'agent = "fence_ipmilan"'),
        ('fence = "agent"\n[fence_agent]\nagent = "./x"', "fence_agent.agent", "absolute path"),
        (
            'fence = "agent"\n[fence_agent]\nagent = "x"\naction = "on"',
            "fence_agent.action",
            '"off", "reboot"',
        ),
        (
            'fence = "agent"\n[fence_agent]\nagent = "x"\ntimeout_s = 0',
            "fence_agent.timeout_s",
            "seconds from 1",
        ),
        ('fence = "agent"\n[fence_agent]\nagent = "x"\nretries = 1.5', "fence_agent.retries", "whole number"),
        (
            'fence = "agent"\n[fence_agent]\nagent = "x"\nip = [1]',
            "fence_agent.ip",
            "a string, a number or true",
        ),
        (
            'fence = "agent"\n[fence_agent]\nagent = "x"\nip = "a\\naction=on"',
            "fence_agent.ip",
            "one option a line",
        ),
        (
            'fence = "agent"\n[fence_agent]\nagent = "x"\nnodes = 3',
            "fence_agent.nodes",
            "[fence_agent.nodes.NAME]",
        ),
        (
            'fence = "agent"\n[fence_agent]\nagent = "x"\n[fence_agent.nodes.n1]\naction = "on"',
            "fence_agent.nodes.n1.action",
            "clustermd gives it",
        ),
        ("engine = ", None, "no TOML file"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, key: str | None, remedy: str) -> None:
    refusal = _refusal(text)
    assert refusal.code == "bad-conf"
    assert refusal.data.get("key") == key
    assert remedy in refusal.message, refusal.message
    assert key is None or f" {key} " in refusal.message


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(Refused, match="no TOML file"):
        Conf.parse(b"\xff\xfe")


def test_a_mistake_in_the_engine_is_told_even_when_the_environment_decides() -> None:
    assert _refusal('engine = "ring"\nfence = "none"', "local").data["key"] == "engine"
