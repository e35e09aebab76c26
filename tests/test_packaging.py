"""What says which version this is, on what it runs, and how it is built: the places agree."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from jobs import BIN
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import deca_ds

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NEEDED = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of keepachangelog.com


def lowest(requirement: Requirement) -> str:
    """The version of its lower bound."""
    (bound,) = (clause.version for clause in requirement.specifier if clause.operator == ">=")
    return bound


def lowest_python() -> str:
    (clause,) = SpecifierSet(PROJECT["requires-python"])
    assert clause.operator == ">="
    return clause.version


def test_the_lowest_python_can_have_what_is_needed():
    """At the versions of constraints.txt, which are installed here."""
    asked = {name: metadata.metadata(name).get("Requires-Python") or "" for name in NEEDED}
    refused = {name: python for name, python in asked.items() if f"{lowest_python()}.9" not in SpecifierSet(python)}
    assert not refused, f"with Python {lowest_python()} pip finds no version"
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")}
    assert lowest_python() in named


@pytest.mark.parametrize("library", ["deepspeed", "transformers"])
def test_the_lowest_versions_fit_each_other(library):
    """Of those that are pinned to a minor version, and so are installed here as pyproject.toml has them."""
    for line in metadata.requires(library) or ():
        asked = Requirement(line)
        own = NEEDED.get(asked.name.replace("_", "-"))
        if own is not None and (asked.marker is None or asked.marker.evaluate({"extra": ""})):
            assert asked.specifier.contains(lowest(own)), f"{library} asks for {asked}, pyproject.toml for {own}"


def test_ranks_of_tests_run_the_package_that_is_tested(tmp_path):
    (tmp_path / "deca_ds").mkdir()
    (tmp_path / "deca_ds/__init__.py").touch()
    command = [sys.executable, REPOSITORY / "tests/preloaded.py", tmp_path / "socket"]
    told = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True, timeout=200
    )
    assert told.returncode == 1 and told.stdout.count("\n") == 1
    assert f"ranks would run deca_ds of {tmp_path}: set PYTHONPATH={REPOSITORY}" in told.stdout


def test_the_changelog_is_one_of_releases():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d|unreleased)", heading) for heading in headings)
    assert headings[0].startswith(f"[{deca_ds.__version__}]") and PROJECT["version"] == deca_ds.__version__
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= SECTIONS


def test_a_commit_is_checked_as_make_lint_does():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [(hook["entry"], hook["language"], hook["pass_filenames"]) for hook in hooks] == [
        ("make lint", "system", False)
    ]
    assert re.search(r"^lint:", (REPOSITORY / "Makefile").read_text(), re.M)


def test_the_dockerfile_finds_what_it_copies():
    text = (REPOSITORY / "Dockerfile").read_text()
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in shlex.split(line)[:-1]]
    assert sorted(copied) == sorted(allowed) and all((REPOSITORY / name).exists() for name in copied)
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", text, re.M)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_the_dockerfile_is_free_of_traps():
    hadolint = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint, which is in the extra `test`")
    said = subprocess.run([hadolint, REPOSITORY / "Dockerfile"], stdout=subprocess.PIPE, text=True, timeout=60)
    assert said.returncode == 0, said.stdout
