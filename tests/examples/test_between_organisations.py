"""The page for separate organisations: its private network connects everybody, and its keys make a configuration."""

from __future__ import annotations

import re
from ipaddress import ip_interface, ip_network
from itertools import permutations
from pathlib import Path

from deca_ds.config import load_config
from deca_ds.config.checks import check_world

PAGE = (Path(__file__).parents[2] / "docs/between_organisations.md").read_text(encoding="utf-8")
PUBLIC = {"NORTH": "198.51.100.10", "EAST": "203.0.113.20"}

Section = dict[str, str]


def sites() -> dict[str, tuple[Section, list[Section]]]:
    """Name -> [Interface] and [Peer]s of its file."""
    found = {}
    for block in re.findall(r"^```ini\n(.*?)^```", PAGE, re.M | re.S):
        parts = re.split(r"^\[(?:Interface|Peer)\].*\n", block, flags=re.M)[1:]
        own, *peers = (dict(re.findall(r"^(\w+) = (.*)$", part, re.M)) for part in parts)
        found[own["PrivateKey"].removesuffix("_PRIVATE")] = own, peers
    return found


def test_every_site_reaches_every_other_one():
    files = sites()
    assert files.keys() == {*PUBLIC, "SOUTH"}
    for name, other in permutations(files, 2):
        own, peers = files[name]
        (peer,) = (peer for peer in peers if peer["PublicKey"] == f"{other}_PUBLIC")
        theirs, their_peers = files[other]
        assert ip_network(peer["AllowedIPs"]).network_address == ip_interface(theirs["Address"]).ip
        assert ip_interface(theirs["Address"]).network == ip_interface(own["Address"]).network
        if "Endpoint" in peer:
            assert peer["Endpoint"] == f"{PUBLIC[other]}:{theirs['ListenPort']}"
        else:  # then the other one has to come, and to come again
            (back,) = (peer for peer in their_peers if peer["PublicKey"] == f"{name}_PUBLIC")
            assert "Endpoint" in back and "PersistentKeepalive" in back


def test_the_pages_configuration_loads_and_fits_its_network(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "my_run.yaml").write_text(f"{block}model: {{path: model}}\n")
    config = load_config(tmp_path / "my_run.yaml")
    assert set(check_world(config, 3)) == {1}
    assert config.cluster.min_clients > config.cluster.clients / 2, "two parts never both continue"
    (_, address), *_ = re.findall(r"(MASTER_ADDR)=(\S+)", PAGE)
    assert address == str(ip_interface(sites()["NORTH"][0]["Address"]).ip)
