"""What the processes above a rank tell about its launch: the hostfile, and which host has which rank."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from deca_ds.errors import LaunchError
from deca_ds.launch import given as module
from deca_ds.launch.given import Command, Given, look_at_hosts, look_for_files

RUNNER = ["/venv/bin/python", "/venv/bin/deepspeed"]


def started(info: dict[str, list[int]]) -> Command:
    encoded = base64.urlsafe_b64encode(json.dumps(info).encode()).decode()
    words = ["python", "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", "launchers/train.py"]
    return Command(words, "/work")


LOCAL = started({"localhost": [0]})


@pytest.mark.parametrize(
    ("words", "hostfile"),
    [
        ([*RUNNER, "--hostfile", "hosts", "launchers/train.py"], "/work/hosts"),
        ([*RUNNER, "-H", "/etc/hosts.ds", "launchers/train.py"], "/etc/hosts.ds"),
        ([*RUNNER, "--hostfile=hosts", "--master_port", "1", "launchers/train.py"], "/work/hosts"),
        (["python", "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "train.py"], "/work/hosts"),
        (["mpirun", "-n", "2", "-hostfile", "hosts", "python", "train.py"], "/work/hosts"),
        ([*RUNNER, "launchers/train.py", "--hostfile", "of_the_script"], None),
        (["bash", "-c", "deepspeed --hostfile hosts"], None),
    ],
)
def test_the_hostfile_is_the_launchers(words, hostfile):
    found = Given.of([LOCAL, Command(words, "/work"), Command(["bash"], "/")])
    assert found.hostfile == (None if hostfile is None else Path(hostfile))


def test_the_world_info_of_deepspeed_tells_the_host_of_each_rank():
    assert Given.of([started({"n0": [0, 1], "n1": [0]})]).hosts == ("n0", "n0", "n1")
    assert Given.of([Command(["x", "--world_info=%%%"], "/")]) == Given()
    assert Given(hosts=("n0", "n1")).host(1) == "rank 1 on n1" and Given().host(1) == "rank 1"


def test_a_hostfile_that_deepspeed_did_not_find_is_told(tmp_path):
    runner = Command([*RUNNER, "--hostfile", "hostz", "train.py"], str(tmp_path))
    missing = Given.of([LOCAL, runner])
    with pytest.raises(LaunchError, match=r"hostfile '.*hostz', which is not there, and so started 1 rank on"):
        missing.check(1)
    Given.of([started({"n0": [0], "n1": [0]}), runner]).check(2)  # removed since it was read
    Given.of([LOCAL, Command([*RUNNER, "--hostfile", "/dev/null", "train.py"], "/")]).check(1)  # meant to be none
    (tmp_path / "hostz").write_text("n0 slots=4x\n")
    with pytest.raises(LaunchError, match=r"'n0 slots=4x' is no host(.|\n)*hostz:1"):
        missing.check(1)
    (tmp_path / "hostz").write_text("n0 slots=4\n")
    missing.check(1)
    (tmp_path / "hostz").write_text("n0:4\n")  # mpirun's own way to write it
    Given.of([Command(["mpirun", "--hostfile", "hostz", "python", "train.py"], str(tmp_path))]).check(4)


def test_the_hint_names_the_hostfile_and_none_where_all_ranks_are_here(monkeypatch):
    monkeypatch.setattr(module, "given", lambda: Given(Path("/work/hosts")))
    assert look_at_hosts("do x") == "do x. `deca doctor --hostfile /work/hosts` looks at every host"
    monkeypatch.setattr(module, "given", Given)
    assert "--hostfile HOSTS`" in look_at_hosts("do x")
    monkeypatch.setattr(module, "given", lambda: Given.of([LOCAL, Command([*RUNNER, "train.py"], "/work")]))
    assert look_at_hosts("do x") == "do x. `deca doctor` looks at this host"


@pytest.mark.parametrize(
    ("variable", "scheduler"),
    [("SLURM_JOB_NODELIST", "Slurm"), ("FLUX_JOB_ID", "Flux"), ("PBS_NODEFILE", "PBS"), ("LSB_HOSTS", "LSF")],
)
def test_in_a_schedulers_job_the_hint_needs_no_hostfile(variable, scheduler, monkeypatch):
    monkeypatch.setenv(variable, "x")
    monkeypatch.setattr("sys.argv", ["/venv/bin/deca", "train", "--config", "run.yaml"])
    monkeypatch.setattr(module, "given", Given)
    told = f"`deca doctor --config run.yaml` in a {scheduler} job on the same hosts looks at every one of them"
    assert look_for_files() == told
    monkeypatch.setattr(module, "given", lambda: Given(Path("/work/hosts")))
    assert "--hostfile /work/hosts" in look_for_files(), "the launcher's own hosts"


def test_the_hint_at_a_missing_file_repeats_what_is_trained(monkeypatch):
    monkeypatch.setattr(module, "given", lambda: Given(Path("/work/hosts")))
    keys = ["--config", "my run.yaml", "model.path=x"]
    for words in (["launchers/train.py", "--local_rank=1", *keys, "--dry-run"], ["/venv/bin/deca", "train", *keys]):
        monkeypatch.setattr("sys.argv", words)
        assert look_for_files() == (
            "`deca doctor --hostfile /work/hosts --config 'my run.yaml' model.path=x` looks at every host"
        )
    monkeypatch.setattr("sys.argv", ["/work/own_script.py", "train"])
    assert "/work/hosts --config RUN.yaml`" in look_for_files()
