"""A wheel, installed into an environment of its own and used away from the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import deca_ds
from deca_ds.tools.supervise import Supervisor

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "examples/demo"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.mark.multiprocess
def test_an_installed_wheel_trains_and_has_its_files(tmp_path):
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": quiet, "check": True, "text": True, "stdout": subprocess.PIPE}
    source = tmp_path / "source"
    source.mkdir()
    for name in ("deca_ds", "pyproject.toml", "README.md", "LICENSE"):  # a build leaves files behind
        (source / name).symlink_to(REPOSITORY / name)
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], **run)
    (wheel,) = tmp_path.glob("*.whl")
    fresh = tmp_path / "fresh"
    venv.create(fresh, symlinks=True)
    subprocess.run([*PIP, "--python", fresh / "bin/python", "install", "--no-deps", wheel], **run)
    (packages,) = fresh.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert {"py.typed", "launchers"} <= {path.name for path in (packages / "deca_ds").iterdir()}
    assert len(list(packages.glob("deca_ds/tools/report/page.*"))) == 4

    deca = fresh / "bin/deca"
    where = Path(subprocess.run([deca, "where"], **run).stdout.strip())
    assert (where / "train.py").is_file() and packages.resolve() in where.resolve().parents
    keys = [f"model.path={DEMO}/model", f"data.train={DEMO}/data/train.jsonl", "data.format=classification"]
    keys += ["model.init=random", "run.device=cpu", "algorithm.rounds=1", "algorithm.inner_steps=1"]
    keys += ["data.max_examples=40", "data.max_length=64", "data.batch_size=4", "data.micro_batch_size=4"]
    said = subprocess.run([deca, "train", "run.output=run", *keys], **run).stdout
    assert "done: run" in said and (tmp_path / "run/DONE").is_file()


def test_the_citation_has_the_version():
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == deca_ds.__version__


@pytest.mark.parametrize(
    ("job", "rank", "runs"),
    [
        (["mpirun", "-n", "2", "python", "launchers/train.py", "a=b"], ["-u", "launchers/train.py", "a=b"], True),
        (["mpirun", "-n", "2", "python", "launchers/train.py", "a=b"], ["-m", "pytest", "launchers/train.py"], False),
        (["mpirun", "-n", "2", "deca", "train", "a=b"], ["/venv/bin/deca", "train", "a=b"], True),
        (["mpirun", "-n", "2", "deca", "train", "a=b"], ["/venv/bin/deca", "status", "train"], False),
    ],
)
def test_a_supervisor_knows_the_ranks_of_both_ways_to_train(tmp_path, job, rank, runs):
    assert Supervisor(job, tmp_path, False, 5, 5.0).runs_trainer(rank) is runs
