"""The templates for clusters, started and stopped for real as far as nothing stands in for it (fake_slurm.py)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_slurm import Slurm
from jobs import BIN, REPOSITORY, run_command, steps_done, wait_until, whole_lines, word_job

from deca_ds.config import load_config
from deca_ds.config.schema import Config
from deca_ds.tools import supervise
from deca_ds.tools.train_arguments import parser

TEMPLATES = REPOSITORY / "examples/clusters"
SLURM = [TEMPLATES / "slurm_srun.sh", TEMPLATES / "slurm_mpirun.sh"]
SCRIPTS = [*sorted(TEMPLATES.glob("*.sh")), REPOSITORY / ".ci/run", *sorted(REPOSITORY.glob("offline/*.sh"))]
OUTPUT = "runs/my_run"

# Stands for the trainer, and for `deca supervise`: $DECA says what it does. Every rank writes its arguments, and the
# first that fails has the others killed: a file that is renamed into its place is whole at any time.
TRAINER = f"""
[ "$1" != supervise ] || {{ shift; exec "$@"; }}
[ "$1" != where ] || exec echo /deca
[ "$DECA" != stop ] || trap 'touch {OUTPUT}/STOPPED; exit 0' USR1 TERM
mkdir -p {OUTPUT}
echo "$@" > {OUTPUT}/arguments.$$
mv {OUTPUT}/arguments.$$ {OUTPUT}/arguments
case $DECA in
    fail) exit 3 ;;
    finish) touch {OUTPUT}/DONE ;;
    stop) while :; do sleep 0.05; done ;;
esac
"""


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def shellcheck(*arguments: str | Path, text: str | None = None) -> str:
    program = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck, which is in the extra `test`")
    return subprocess.run([program, *arguments], input=text, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def trained(words: list[str]) -> Config:
    """What the trainer makes of its arguments."""
    arguments = parser().parse_intermixed_args(words)
    return load_config(arguments.config, arguments.overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_run.yaml").write_text("model: {path: model}\n")
    return tmp_path


@pytest.fixture
def slurm(folder: Path) -> Slurm:
    made = Slurm(folder)
    made.program("deca", TRAINER)
    made.program("mpirun", 'while [ "$1" != deca ]; do shift; done\nexec "$@"\n')
    return made


def test_shell_scripts_are_free_of_traps():
    assert shellcheck(*SCRIPTS) == ""


@pytest.mark.parametrize("script", SLURM, ids=name)
def test_slurm_a_job_goes_back_into_the_queue_only_where_it_was_stopped(slurm, script):
    arguments = ["my_run.yaml", "optimizer.lr=2e-5"]
    failed, requeued = slurm.start(script, arguments, DECA="fail")
    assert failed.code == 3 and not requeued, failed.output
    _, *words = (slurm.folder / OUTPUT / "arguments").read_text().split()
    words[words.index("my_run.yaml")] = str(slurm.folder / "my_run.yaml")
    config = trained(words)
    assert (config.run.output, config.run.resume, config.optimizer.lr) == (OUTPUT, "auto", 2e-5)
    done, requeued = slurm.start(script, arguments, DECA="finish")
    assert done.code == 0 and not requeued, done.output


@pytest.mark.multiprocess
def test_slurm_a_run_that_is_preempted_twice_comes_to_its_end(tmp_path, tiny_model, word_files):
    """It stops under srun, then under mpirun, and ends under srun: each start continues where the last one stopped."""
    slurm = Slurm(tmp_path)
    worker = REPOSITORY / "tests/integration/gated_worker.py"
    train = shlex.join(map(str, (sys.executable, REPOSITORY / "tests", worker)))
    slurm.program("deca", f'shift\nexec {train} "$@"\n')
    (tmp_path / "my_run.yaml").write_text("cluster: {clients: 2}\n")
    keys = {"algorithm.rounds": 1, "algorithm.inner_steps": 6, "evaluation.every": 0, "evaluation.max_examples": 4}
    arguments = ["my_run.yaml", *word_job(tiny_model, word_files[:2], **keys)]
    metrics = tmp_path / OUTPUT / "metrics/client_001.jsonl"

    def comes_to(step: int):
        return lambda process: wait_until(lambda: steps_done(metrics) >= step, f"at step {step}", process=process)

    for script, until in zip(SLURM, (3, 12), strict=True):
        stopped, requeued = slurm.start(script, arguments, warn=comes_to(until), GATE=f"{until + 1}:")
        assert stopped.code == 0 and requeued, stopped.output[-4000:]
        assert (tmp_path / OUTPUT / "STOPPED").exists()
    done, requeued = slurm.start(SLURM[0], arguments, GATE="25:")
    assert done.code == 0 and not requeued, done.output[-4000:]
    assert (tmp_path / OUTPUT / "DONE").exists() and not (tmp_path / OUTPUT / "STOPPED").exists()
    assert [line["step"] for line in whole_lines(metrics) if line["kind"] == "step"] == list(range(1, 25))
    starts = json.loads((tmp_path / OUTPUT / "starts.json").read_text())
    assert [start["transport"] for start in starts] == ["torch", "mpi", "torch"]
    assert [start["step"] for start in starts] == sorted({start["step"] for start in starts})


def test_kubernetes_the_job_is_one_of_v2beta1():
    jsonschema = pytest.importorskip("jsonschema", reason="in the extra `test`")
    job = yaml.safe_load((TEMPLATES / "kubernetes.yaml").read_text())
    schema = json.loads(Path(__file__).with_name("mpijob_v2beta1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "spec": {**job["spec"], "slots": 4}}, schema)
    replicas = job["spec"]["mpiReplicaSpecs"]
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    (worker,) = replicas["Worker"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]
    script = launcher(job)
    assert f"mpirun -n {job['spec']['slotsPerWorker'] * replicas['Worker']['replicas']} " in script
    assert shellcheck("-s", "bash", "-", text=script) == ""


def launcher(job: dict) -> str:
    """The script of its container."""
    (container,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    return script


@pytest.mark.parametrize(("does", "code"), [("fail", 1), ("finish", 0), ("stop", 1)])
def test_kubernetes_the_launcher_has_succeeded_only_where_the_run_is_done(slurm, folder, does, code):
    """mpirun is the real one."""
    (slurm.bin / "mpirun").unlink()
    (folder / "hostfile").write_text("localhost slots=8\n")
    script = launcher(yaml.safe_load((TEMPLATES / "kubernetes.yaml").read_text()))
    for there, here in (("/deca/", f"{folder}/"), ("/etc/mpi", str(folder)), ("/config", str(folder))):
        script = script.replace(there, here)

    def during(process: subprocess.Popen) -> None:
        if does == "stop":
            wait_until((folder / OUTPUT / "arguments").exists, "started", process=process)
            os.kill(process.pid, signal.SIGTERM)

    deca, _, *command = shlex.split(script.partition("&")[0].replace("\\\n", ""))
    assert deca == "deca"
    supervise.check_resumes(supervise.configuration_of(command))
    path = os.pathsep.join(map(str, (slurm.bin, BIN, os.environ["PATH"])))
    finished = run_command(["bash", "-c", script], cwd=folder, during=during, PATH=path, DECA=does)
    assert finished.code == code, finished.output
    _, *words = (folder / OUTPUT / "arguments").read_text().split()
    assert trained(words).run.output == str(folder / OUTPUT)


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_templates_without_a_scheduler_pass_arguments_that_launcher_and_trainer_understand(slurm, folder, launcher):
    """The launcher's and the trainer's arguments are understood."""
    from torch.distributed.run import get_args_parser

    slurm.program("deca", '[ "$1" != where ] || exec echo /deca\necho deca "$@"\n')
    slurm.program("torchrun", 'echo "$@"\n')
    script = TEMPLATES / f"{launcher}.sh"
    path = os.pathsep.join(map(str, (slurm.bin, os.environ["PATH"])))
    given = [str(folder / "my_run.yaml"), "optimizer.lr=2e-5", "checkpoint.every=500"]
    ran = run_command(["bash", str(script), "node1", *given], cwd=folder, PATH=path, HOSTS="2", RANKS="4")
    assert ran.code == 0, ran.output
    if launcher == "torchrun":
        arguments = get_args_parser().parse_args(ran.output.split())
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.rdzv_endpoint) == ("2", "4", "node1:29400")
        assert arguments.training_script == "/deca/train.py"
        config = trained(arguments.training_script_args)
    else:
        deca, supervised, *command = ran.output.split()
        assert (deca, supervised, command[:3]) == ("deca", "supervise", ["mpirun", "--hostfile", "node1"])
        config = supervise.configuration_of(command)
        supervise.check_resumes(config)
    assert (config.run.resume, config.optimizer.lr) == ("auto", 2e-5)


def test_each_template_says_how_it_is_started():
    for path in TEMPLATES.iterdir():
        assert re.search(rf"^#   .*{re.escape(name(path))}", path.read_text(), re.MULTILINE), path


def test_a_supervised_job_may_name_its_configuration_as_any_other():
    command = ["mpirun", "-n", "2", "python", "launchers/train.py"]
    run, key = str(REPOSITORY / "examples" / "two_clients_text.yaml"), "run.seed=7"
    assert supervise.configuration_of([*command, run, key]) == supervise.configuration_of(
        [*command, "--config", run, key]
    )
