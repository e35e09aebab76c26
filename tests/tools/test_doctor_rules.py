"""`deca doctor`'s checks on made-up facts: each is green where all is well, and yellow or red for what it looks for."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from jobs import REPOSITORY
from rich.console import Console

from deca_ds.errors import ConfigError
from deca_ds.tools.doctor.checks import CHECKS, judge
from deca_ds.tools.doctor.environment_file import lint
from deca_ds.tools.doctor.examine import rounds
from deca_ds.tools.doctor.facts import Clock, EnvironmentFile, Facts, HostFacts, MpiTrial, Needs
from deca_ds.tools.doctor.findings import HERE, Finding, State
from deca_ds.tools.doctor.network import chosen
from deca_ds.tools.doctor.sights import Folder, Interface, Sight
from deca_ds.tools.doctor.table import show, summary

GIB = 2**30
FAIL, WARN = State.FAIL, State.WARN
GPU = "NVIDIA H100 80GB HBM3, 550.54, 81559 MiB"
USED = Folder(at="/out", free=100 * GIB, error="", holds=["LOCK", "config.yaml"])
EACH = {"n0": GIB, "n1": GIB}
NEEDS = Needs(
    "out", "never", None, "auto", "auto", False, {}, EACH, EACH, {"n1": 90 * GIB}, {"n1": 2 * GIB}, [("n0", "n1")]
)


def sight(i: int, **changes: Any) -> Sight:
    every = Sight(
        hostname=f"n{i}", python="/venv/bin/python", version="3.12.1",
        packages={"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "numpy": "2.0", "mpi4py": "4.1"},
        code="abcd", code_at="/deca_ds", folder=True, gpus=[], gpu_error="", torch_gpus=-1, mpi="Open MPI v5.0.11",
        mpi_error="", mpirun="mpirun (Open MPI) 5.0.11",
        interfaces=[Interface(name=n, addresses=[a]) for n, a in (("lo", "127.0.0.1/8"), ("lan", f"10.0.0.{i}/24"))],
        names={"n0": ["10.0.0.0"], "n1": ["10.0.0.1"]}, variables={}, port="", fabric=[], files=65536, locked=-1,
        shared=8 * GIB, memory=64 * GIB,
    )  # fmt: skip
    return every | changes  # type: ignore[return-value]


def host(i: int, **changes: Any) -> HostFacts:
    output = Folder(at="/out", free=100 * GIB, error="", holds=[])
    both = frozenset({"n0", "n1"})
    every = HostFacts(2, [f"10.0.0.{i}"], sight(i), clock=Clock(0.01, 0.001), output=output, sees=both)
    return replace(every, **changes)


def facts(*, n0: HostFacts | None = None, n1: HostFacts | None = None, **changes: Any) -> Facts:
    """Two hosts, as far as nothing else is said all well."""
    hosts = {"n0": n0 or host(0), "n1": n1 or host(1)}
    links = {("n0", "n1"): {"round_trip_s": 1e-4, "bytes_per_s": 1e9}}
    every = Facts(hosts, sight(9), True, links=links, mpi=MpiTrial(2, 2), needs=NEEDS)  # type: ignore[arg-type]
    return replace(every, environment_files=[EnvironmentFile(".deepspeed_env", ["HF_HOME=/hf"])], **changes)


def seen(i: int, **changes: Any) -> HostFacts:
    return host(i, sight=sight(i, **changes))


def found(check: str, these: Facts) -> list[Finding]:
    return [finding for finding in judge(these) if finding.check == check]


@pytest.mark.parametrize("by", ["ssh", "srun"])
def test_where_all_is_well_every_check_says_so(by):
    findings = judge(facts(by_srun=by == "srun"))
    others = {"hosts", "variables", "srun" if by == "ssh" else "ssh"}
    assert {finding.check for finding in findings if finding.state == State.OK} == CHECKS.keys() - others
    assert all(finding.state == State.OK for finding in findings), findings


def silent(fault: str, said: str = "") -> HostFacts:
    return HostFacts(2, ["10.0.0.1"], fault=fault, said=said)


UNRESOLVED = "ssh: Could not resolve hostname n1: Name or service not known"
NO_STEP = "srun: error: Unable to create step"
NO_GLOO_NAME = {"n0": ["10.0.0.0"], "n1": ["127.0.1.1"]}
TWO_NETWORKS = [*sight(1)["interfaces"], Interface(name="ib0", addresses=["10.9.0.1/24"])]
OTHER_TORCH = {**sight(1)["packages"], "torch": "2.7.1"}
SPEEDS = {"n1": 5e7, "a": 1e9, "b": 1e9}
OTHER_NUMPY = {**sight(1)["packages"], "numpy": "1.26"}
BROKEN = [
    # check, facts, state, host, what, fix
    ("hosts", facts(unlisted="a job of Slurm"), WARN, "n1", "not the other hosts of a job of Slurm", "--hostfile"),
    ("name", facts(n1=host(1, addresses=[], sight=None)), FAIL, "n1", "n1 stands for no address", "/etc/hosts"),
    ("name", facts(n1=host(1, addresses=[])), WARN, "n1", "only ssh's configuration", "/etc/hosts"),
    ("name", facts(n0=seen(0, names={"n0": ["10.0.0.0"]})), WARN, "n1", "n0 cannot resolve n1", "/etc/hosts there"),
    ("own name", facts(n1=seen(1, names=NO_GLOO_NAME)), FAIL, "n1", "stands for 127.0.1.1", "GLOO_SOCKET_IFNAME"),
    ("own name", facts(n1=seen(1, hostname="x")), FAIL, "n1", "x stands for no address", "GLOO_SOCKET_IFNAME"),
    ("own name", facts(n1=seen(1, hostname="n0")), WARN, "n1", "has the host name n0, and so has n0", "hostnamectl"),
    ("hosts", facts(unlisted="a job of Slurm"), WARN, "n1", "not the other hosts of a job of Slurm", "--hostfile"),
    ("name", facts(n1=host(1, addresses=[], sight=None)), FAIL, "n1", "no address", "typing error in the hostfile"),
    ("ssh", facts(n1=silent("", UNRESOLVED)), FAIL, "n1", "resolve the name", "typing error in the hostfile, or add"),
    ("ssh", facts(n1=silent("ended with 255", "Host key verification failed.")), FAIL, "n1", "host key", "ssh n1"),
    (
        "ssh",
        facts(n1=silent("ended with 255", "@ REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.")),
        FAIL, "n1", "another one than before", "ssh-keygen -R n1",
    ),
    ("ssh", facts(n1=silent("", "root@n1: Permission denied (publickey).")), FAIL, "n1", "password", "ssh-copy-id"),
    ("ssh", facts(n1=silent("", "ssh: connect to host n1 port 22: Connection refused")), FAIL, "n1", "nothing", "sshd"),
    ("ssh", facts(n1=silent("", "ssh: connect to host n1: No route to host")), FAIL, "n1", "no conn", "firewall"),
    ("ssh", facts(n1=silent("no answer in time")), FAIL, "n1", "no answer in time", "ssh -o BatchMode=yes n1"),
    ("srun", facts(n1=silent("ended with 1", NO_STEP), by_srun=True), FAIL, "n1", NO_STEP, "--nodelist=n1"),
    ("name", facts(n1=host(1, addresses=[]), by_srun=True), WARN, "n1", "only Slurm knows n1", "/etc/hosts"),
    ("python", facts(n1=silent("", "sh: 1: exec: python3: not found")), FAIL, "n1", "nor any python3", "install"),
    ("python", facts(n1=seen(1, python="/usr/bin/python3")), FAIL, "n1", "no /venv/bin/python", "same path"),
    ("python", facts(n1=seen(1, version="3.10.2")), FAIL, "n1", "Python 3.10.2, here 3.12.1", "same Python"),
    ("python", facts(n1=seen(1, folder=False)), WARN, "n1", "working folder", "every host has"),
    ("packages", facts(n1=seen(1, packages={"torch": "2.13.0"})), FAIL, "n1", "lacks deepspeed", "constraints"),
    ("packages", facts(n1=seen(1, packages=OTHER_TORCH)), FAIL, "n1", "torch 2.7.1 (here 2.13.0)", "allow_mixed"),
    ("packages", facts(n1=seen(1, packages=OTHER_NUMPY)), WARN, "n1", "numpy 1.26", "same versions"),
    (
        "packages",
        facts(n1=seen(1, packages=OTHER_TORCH), needs=replace(NEEDS, mixed_versions=True)),
        WARN, "n1", "torch 2.7.1", "same versions",
    ),
    ("deca_ds", facts(n1=seen(1, code="ef01")), FAIL, "n1", "(ef01, here abcd) in /deca_ds", "same deca_ds"),
    ("deca_ds", facts(n1=seen(1, code="")), FAIL, "n1", "not installed", "install it"),
    ("accelerator", facts(n0=seen(0, gpus=[GPU] * 2, torch_gpus=2)), FAIL, "n1", "no GPU; others have", "nvidia-smi"),
    ("accelerator", facts(n1=seen(1, gpu_error="driver mismatch")), FAIL, "n1", "driver mismatch", "driver"),
    ("accelerator", facts(n1=seen(1, gpus=[GPU] * 2, torch_gpus=0)), FAIL, "n1", "use 0 of 2 GPUs", "torch build"),
    ("accelerator", facts(n1=seen(1, gpus=[GPU], torch_gpus=1)), WARN, "n1", "2 slots for 1 GPUs", "slots"),
    ("accelerator", facts(needs=replace(NEEDS, device="cuda")), FAIL, "n1", "run.device=cuda", "run.device=auto"),
    ("MPI", facts(n1=seen(1, mpirun="HYDRA Version: 4.1")), WARN, "n1", "but mpirun is of MPICH 4.1", "mpirun of"),
    ("MPI", facts(n1=seen(1, mpi="", mpi_error="no libmpi")), WARN, "n1", "no libmpi", "transport=torch"),
    (
        "MPI",
        facts(n1=seen(1, mpi="", mpi_error="no libmpi"), needs=replace(NEEDS, transport="mpi")),
        FAIL, "n1", "no libmpi", "install one",
    ),
    ("MPI world", facts(mpi=MpiTrial(2, 1)), WARN, HERE, "2 processes, each in a world of 1", "mpi4py for this MPI"),
    ("MPI world", facts(mpi=MpiTrial(2, None, "run as root")), WARN, HERE, "run as root", "ALLOW_RUN_AS_ROOT=1"),
    ("interfaces", facts(n1=seen(1, interfaces=TWO_NETWORKS)), WARN, "n1", "ib0 10.9.0.1/24", "IFNAME=lan"),
    (
        "interfaces",
        facts(n1=seen(1, variables={"GLOO_SOCKET_IFNAME": "eth0"})),
        FAIL, "n1", "GLOO_SOCKET_IFNAME=eth0 names no interface there (lan 10.0.0.1/24)", "every host has",
    ),
    ("port", facts(n0=seen(0, port="Address already in use")), FAIL, "n0", "port 29500", "--master_port"),
    ("links", facts(links={("n0", "n1"): {"error": "refused"}}), FAIL, "n1", "n0 to n1: refused", "ports between"),
    (
        "links",
        facts(links={("n0", "n1"): {"round_trip_s": 0.08, "bytes_per_s": 1e9}}),
        WARN, "n0", "80.00 ms", "gossip.every",
    ),
    (
        "links",
        facts(links={("n0", c): {"round_trip_s": 1e-4, "bytes_per_s": speed} for c, speed in SPEEDS.items()}),
        WARN, "n1", "50 MB/s, the others 1,000 MB/s", "cable",
    ),
    ("clock", facts(n1=host(1, clock=Clock(90.0, 0.1))), WARN, "n1", "90.0 s ahead", "synchronisation"),
    ("clock", facts(n1=host(1, clock=Clock(-3600.0, 0.1))), FAIL, "n1", "3600.0 s behind", "synchronisation"),
    ("plan", facts(mistake=ConfigError("no", where="x.y", fix="do")), FAIL, HERE, "no (x.y)", "do"),
    (
        "files",
        facts(n1=host(1, wrong_paths={"/m": "is not there"}), needs=replace(NEEDS, paths={"n1": [("model", "/m")]})),
        FAIL, "n1", "model: /m is not there", "copy it",
    ),
    (
        "output",
        facts(n1=host(1, output=Folder(at="/out", free=0, error="Read-only file system", holds=[]))),
        FAIL, "n1", "cannot write in /out: Read-only file system", "run.output",
    ),
    ("output", facts(n1=host(1, output=USED)), FAIL, "n1", "'out' is already used", "run.resume=require"),
    (
        "output",
        facts(needs=replace(NEEDS, resume="require", refused=ConfigError("no run", fix="do")), sees_first=True),
        FAIL, "n0", "no run", "do",
    ),
    (
        "disk", facts(n1=host(1, output=Folder(at="/out", free=GIB, error="", holds=[]))),
        FAIL, "n1", "plan needs 2.1 GB", "room",
    ),
    ("memory", facts(n1=seen(1, memory=GIB // 2)), FAIL, "n1", "536.9 MB of memory free", "more ranks"),
    (
        "memory", facts(n1=seen(1, gpus=[GPU], torch_gpus=1)), FAIL, "n1",
        "85.5 GB of GPU memory free, the ranks there hold at least 96.6 GB", "more ranks",
    ),
    (
        "memory", facts(n1=seen(1, gpus=[GPU, GPU], torch_gpus=2, memory=GIB)), FAIL, "n1",
        "1.1 GB of memory free, the ranks there hold at least 2.1 GB", "more ranks",
    ),
    ("limits", facts(n1=seen(1, shared=64 * 2**20)), WARN, "n1", "/dev/shm has 67.1 MB for 2 ranks", "shm-size"),
    ("limits", facts(n1=seen(1, files=256)), WARN, "n1", "256 files", "ulimit -n"),
    ("limits", facts(n1=seen(1, fabric=["mlx5_0"], locked=65536)), WARN, "n1", "mlx5_0 needs more", "memlock"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "these", "state", "host", "what", "fix"), BROKEN)
def test_what_is_wrong_is_told_of_its_host_with_one_fix(check, these, state, host, what, fix):
    told = [each for each in found(check, these) if each.state == state]
    assert any(each.host == host and what in each.what and fix in each.fix for each in told), found(check, these)
    innocent = {"n0", "n1"} - {host}
    if check not in ("links", "packages", "accelerator", "memory"):
        assert all(each.state != FAIL for each in found(check, these) if each.host in innocent)


def test_every_check_has_a_fault_in_this_file():
    assert {check for check, *_ in BROKEN} | {"variables", ".deepspeed_env"} == CHECKS.keys()


def test_a_folder_is_refused_only_where_a_start_would_look_at_it():
    """Other hosts have not got the run's configuration, and this machine may not share the first one's folder."""
    unseen = facts(needs=replace(NEEDS, resume="require", refused=ConfigError("no run")))
    resumed = facts(n1=host(1, output=USED), needs=replace(NEEDS, resume="auto"))
    killed = facts(n1=host(1, output=USED | {"holds": ["LOCK"]}))
    for fine in (unseen, resumed, killed):
        assert {each.state for each in found("output", fine)} == {State.OK}


def test_a_host_that_does_not_answer_has_no_other_finding():
    told = [
        each for each in judge(facts(n1=silent("no answer in time"))) if each.host == "n1" and each.state != State.OK
    ]
    assert [each.check for each in told] == ["ssh"]


def test_an_odd_mount_is_told_where_some_hosts_share_the_output():
    shares = [frozenset({"n0", "n1"}), frozenset({"n0", "n1"}), frozenset({"n2"})]
    hosts = {f"n{i}": host(i, sees=sees) for i, sees in enumerate(shares)}
    told = {each.host: (each.state, each.what) for each in found("output", replace(facts(), hosts=hosts))}
    assert told["n0"] == (WARN, "/out is shared with n1 only") and told["n2"] == (State.OK, "a disk of its own")
    apart = {name: replace(of, sees=frozenset({name})) for name, of in hosts.items()}
    assert {each.what for each in found("output", replace(facts(), hosts=apart))} == {"a disk of its own"}
    needed = found("disk", replace(facts(), hosts=apart))[0].what
    assert needed == "107.4 GB free, 1.1 GB needed", "each host's own share"


def test_a_variable_that_deepspeed_does_not_pass_on_is_warned_of():
    here = sight(9, variables={"GLOO_SOCKET_IFNAME": "lan"})
    assert [each.state for each in found("variables", facts(here=here))] == [WARN]
    passed = [EnvironmentFile("e", ["GLOO_SOCKET_IFNAME=lan"])]
    assert found("variables", replace(facts(here=here), environment_files=passed)) == []


def test_in_a_schedulers_job_no_hostfile_is_blamed():
    away = replace(silent("ended with 255", UNRESOLVED), addresses=[])
    for check in ("name", "ssh"):
        (told,) = [each for each in found(check, facts(n1=away, scheduler="LSF")) if each.host == "n1"]
        assert told.fix.startswith("add the host to /etc/hosts"), told


def test_a_host_that_srun_reaches_needs_no_ssh_and_perhaps_a_python():
    away = silent("ended with 127", "sh: 1: exec: python3: not found")
    by_srun = facts(n1=away, scheduler="Slurm", by_srun=True)
    assert [each.what for each in found("srun", by_srun)] == ["starts a task there"] * 2
    assert found("ssh", by_srun) == [] and [each.state for each in found("python", by_srun)] == [State.OK, FAIL]


def test_in_a_schedulers_job_ranks_need_no_ssh_and_get_the_variables_of_the_script():
    away = silent("ended with 255", "root@n1: Permission denied (publickey).")
    (told,) = [each for each in found("ssh", facts(n1=away, scheduler="Slurm")) if each.host == "n1"]
    assert told.state == WARN and "a job of Slurm needs no ssh" in told.what and "ssh-copy-id n1" in told.fix
    assert "or run on n1: deca doctor --hostfile FILE" in told.fix
    here = sight(9, variables={"GLOO_SOCKET_IFNAME": "lan"})
    assert found("variables", facts(here=here, scheduler="Slurm")) == []
    named = facts(here=here, n1=seen(1, interfaces=TWO_NETWORKS), scheduler="Slurm")
    assert {each.state for each in found("interfaces", named)} == {State.OK}
    (warned,) = [each for each in found("interfaces", replace(named, here=sight(9))) if each.host == "n1"]
    assert warned.state == WARN and "the job's script" in warned.fix and ".deepspeed_env" not in warned.fix
    assert summary(named, judge(named)).startswith("2 hosts of this Slurm job, 4 ranks: ")


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("HF_HOME=/data/hf", None),
        ("A=two words", None),
        ("", FAIL),
        ("# the cache", FAIL),
        ("export HF_HOME=/x", FAIL),
        ("HF_HOME", FAIL),
        ("RANK=0", FAIL),
        ("HF_TOKEN=hf_s3cret", WARN),
        ("WANDB_API_KEY=s3cret", WARN),
        ("A='x y'", WARN),
        ("A=$HOME/x", WARN),
    ],
)
def test_a_line_of_deepspeed_env_that_does_not_do_what_it_says_is_told(line, state):
    told = lint(line)
    assert (told and told[0]) == state
    assert "s3cret" not in str(told)
    (finding,) = found(".deepspeed_env", replace(facts(), environment_files=[EnvironmentFile("e", [line])]))
    assert finding.state == (state or State.OK) and (state is None or "e:1 " in finding.what)


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", ["eth0"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("GLOO_SOCKET_IFNAME", "eth0,ib9", []),
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "^eth", ["ib0"]),
        ("OMPI_MCA_btl_tcp_if_include", "10.2.0.0/16", ["ib0"]),
        ("OMPI_MCA_btl_tcp_if_include", "eth1,nonsense", ["eth1"]),
    ],
)
def test_interfaces_are_chosen_as_each_library_reads_its_variable(variable, value, names):
    there = {"eth0": "10.0.0.1/24", "eth1": "10.1.0.1/24", "ib0": "10.2.0.1/24"}
    assert chosen(value, variable, [Interface(name=n, addresses=[a]) for n, a in there.items()]) == names


def test_no_host_is_in_two_connections_at_once():
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("a", "c")]
    groups = rounds(pairs)
    assert sorted(pair for group in groups for pair in group) == sorted(pairs) and len(groups) == 3
    for group in groups:
        assert len({host for pair in group for host in pair}) == 2 * len(group)


def test_the_manual_has_a_row_for_every_check():
    page = (REPOSITORY / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["check", *CHECKS]


def test_many_hosts_take_several_tables_of_the_terminals_width():
    hosts = {f"node{i:02}": host(i) for i in range(12)}
    these = replace(facts(), hosts=hosts, needs=None)
    console = Console(width=80, file=io.StringIO())
    show(console, these, judge(these))
    printed = console.file.getvalue()
    rows = [line for line in printed.splitlines() if line.startswith(("│", "┃", "┏"))]
    assert all(len(line) == 80 for line in rows) and all(printed.count(f"┃ {name} ") == 1 for name in hosts)
    assert "12 hosts: " in printed
