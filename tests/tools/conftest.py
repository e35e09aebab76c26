"""Hosts that are this machine, behind an `ssh`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SSH = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do [ "$1" = -o ] && shift; shift; done
host=$1; shift
[ "$host" = 127.0.0.3 ] && { echo 'root@127.0.0.3: Permission denied (publickey).' >&2; exit 255; }
echo "a banner of $host"
exec sh -c "$*"
"""


@pytest.fixture
def with_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in tmp_path with an `ssh` that runs here what is for other hosts, and does not get into 127.0.0.3."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the name of the machine may stand for its loopback address
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sh_alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH without `ssh`."""
    folder = tmp_path_factory.mktemp("sh")
    (folder / "sh").symlink_to(shutil.which("sh"))
    return str(folder)
