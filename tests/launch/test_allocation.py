"""The hosts of a batch job, from made-up environments of each scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from deca_ds.errors import LaunchError
from deca_ds.launch.allocation import Allocation, expand_hosts, find_allocation, scheduler_of, unlisted_job

NODES = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4,3"}
FLUX = """#!/bin/sh
[ "$*" = "hostlist local" ] || { echo "flux: unknown $*" >&2; exit 1; }
[ -n "$FLUX_URI" ] || { echo "flux-hostlist: ERROR: no broker" >&2; exit 1; }
echo "corona[9-10]"
"""


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,2]", ["n08", "n09", "n10", "n2"]),
        ("gpu-[1,3]-ib,login", ["gpu-1-ib", "gpu-3-ib", "login"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ("a.b.example,n[1-2].example", ["a.b.example", "n1.example", "n2.example"]),
        ("n[1,1]", ["n1"]),
    ],
)
def test_a_list_of_hosts_is_expanded(text, hosts):
    assert expand_hosts(text, "X") == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[]", "n[3-1]", "n[a-b]", "n]1[", "n[1-2-3]"])
def test_what_is_no_list_of_hosts_is_told_with_its_place(text):
    with pytest.raises(LaunchError, match=r"(?s)host.*where: X.*--hostfile"):
        expand_hosts(text, "X")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "2", "PBS_NODEFILE": ""}, None),
        (NODES | {"SLURM_NTASKS": "7"}, Allocation("Slurm", {"n1": 4, "n2": 3}, True)),
        (NODES | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, Allocation("Slurm", {"n1": 4, "n2": 4}, True)),
        (NODES, Allocation("Slurm", {"n1": 1, "n2": 1}, False)),  # these are CPUs
        (NODES | {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}, Allocation("Slurm", {"n1": 1, "n2": 1}, False)),
        ({"PBS_NODEFILE": "twice"}, Allocation("PBS", {"x1": 2, "x2": 2}, True)),
        ({"PBS_NODEFILE": "once"}, Allocation("PBS", {"x1": 1, "x2": 1}, False)),
        ({"LSB_DJOB_HOSTFILE": "twice", "LSB_HOSTS": "z"}, Allocation("LSF", {"x1": 2, "x2": 2}, True)),
        ({"LSB_HOSTS": "a a b"}, Allocation("LSF", {"a": 2, "b": 1}, True)),
    ],
)
def test_each_scheduler_tells_the_hosts_of_its_job(environ, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("twice").write_text("x1\nx1\nx2\nx2\n")
    Path("once").write_text("x1\nx2\n")
    assert find_allocation(environ) == expected
    assert scheduler_of(environ) == (expected and expected.scheduler)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"SLURM_JOB_ID": "7"}, "a job of Slurm (SLURM_JOB_ID=7) without SLURM_JOB_NODELIST"),
        ({"PBS_JOBID": "7.a", "PBS_NODEFILE": ""}, "a job of PBS (PBS_JOBID=7.a) without PBS_NODEFILE"),
        ({"LSB_JOBID": "7"}, "a job of LSF (LSB_JOBID=7) without LSB_DJOB_HOSTFILE or LSB_HOSTS"),
        ({"PE_HOSTFILE": "/a"}, "a job of Grid Engine (PE_HOSTFILE=/a)"),
        (NODES | {"SLURM_JOB_ID": "7"}, None),
        ({"FLUX_JOB_ID": "f", "SLURM_JOB_ID": "7"}, None),  # flux is asked
        ({}, None),
    ],
)
def test_a_job_whose_hosts_nothing_tells_is_named(environ, told):
    assert unlisted_job(environ) == told


def test_flux_is_asked_for_its_hosts_also_inside_a_job_of_slurm(tmp_path, monkeypatch):
    inside = NODES | {"FLUX_ENCLOSING_ID": "f1"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"(?s)no program flux in PATH.*--hostfile"):
        find_allocation(inside)
    (tmp_path / "flux").write_text(FLUX)
    (tmp_path / "flux").chmod(0o755)
    monkeypatch.delenv("FLUX_URI", raising=False)
    with pytest.raises(LaunchError, match=r"ERROR: no broker"):
        find_allocation(inside)
    monkeypatch.setenv("FLUX_URI", "local:///x")
    with pytest.raises(LaunchError, match=r"does not tell the job's hosts within 0 s\n.*where: flux hostlist local"):
        find_allocation(inside, flux_s=0.0)
    assert find_allocation(inside) == Allocation("Flux", {"corona9": 1, "corona10": 1}, False)
    assert find_allocation(NODES | {"FLUX_URI": "local:///x"}).scheduler == "Slurm", "an instance of Slurm's step"


def test_a_list_that_cannot_be_read_or_is_empty_is_told(tmp_path):
    with pytest.raises(LaunchError, match=r"(?s)cannot read the list of the job's hosts.*where: PBS_NODEFILE.*PBS"):
        find_allocation({"PBS_NODEFILE": str(tmp_path / "gone")})
    (tmp_path / "none").touch()
    with pytest.raises(LaunchError, match=r"(?s)no hosts in it.*where: LSB_DJOB_HOSTFILE"):
        find_allocation({"LSB_DJOB_HOSTFILE": str(tmp_path / "none")})
