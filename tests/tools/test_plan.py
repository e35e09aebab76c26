"""What a dry run refuses before it loads anything, and what it tells."""

import io
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs import REPOSITORY
from rich.filesize import decimal
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from deca_ds.cli import main
from deca_ds.config import load_config
from deca_ds.errors import CheckpointError, ConfigError, DataError, UserError
from deca_ds.printing import wrapped
from deca_ds.tools.doctor.checks import BRIEF
from deca_ds.tools.doctor.needs import needs_of
from deca_ds.tools.plan import print_plan
from deca_ds.training import resume


@pytest.fixture(autouse=True)
def without_memory(monkeypatch):
    """Which takes half a second a plan, and has tests of its own."""
    for name in ("print_memory", "print_fit", "memory_json"):
        monkeypatch.setattr(f"deca_ds.tools.plan.{name}", lambda *_: None)


@pytest.fixture
def plan_in_words(capsys):
    """Print the plan of keys and changes of them, and return its words."""

    def plan(keys: list[str], *changes: str, world_size: int | None = None) -> str:
        print_plan(load_config(None, [*keys, *changes]), world_size)
        return " ".join(capsys.readouterr().out.split())

    return plan


def test_late_neighbours_need_a_symmetric_matrix(word_files, tmp_path):
    keys = [f"run.output={tmp_path / 'run'}", "model.path=/nowhere", "cluster.clients=3", "gossip.wait_s=2"]
    keys.append(f"data.train=[{word_files[0]}]")
    with pytest.raises(ConfigError, match=r"the mixing matrix is not symmetric .one_peer_exponential") as caught:
        print_plan(load_config(None, [*keys, "gossip.graph=one_peer_exponential"]))
    assert caught.value.where == "gossip.wait_s"
    directed = tmp_path / "w.txt"
    directed.write_text("1/2 1/2 0\n0 1/2 1/2\n1/2 0 1/2\n")
    with pytest.raises(ConfigError, match=rf"the mixing matrix is not symmetric .matrix {directed}"):
        print_plan(load_config(None, [*keys, f"gossip.matrix={directed}"]))


def test_a_folder_that_is_used_is_told_last_and_hides_no_mistake(tiny_model, word_files, tmp_path, capsys):
    (tmp_path / "DONE").touch()
    keys = [f"run.output={tmp_path}", f"model.path={tiny_model}", f"data.train=[{word_files[0]}]"]
    for mistake, message in (("algorithm.method=adamm", "is not known"), ("data.train=x.jsonl", "no such file")):
        with pytest.raises((ConfigError, DataError), match=message):
            print_plan(load_config(None, [*keys, mistake]))
    capsys.readouterr()
    print_plan(load_config(None, keys))
    told = " ".join(capsys.readouterr().out.split())
    assert "time: `deca plan` estimates how long steps and the run take with --gpu NAME" in told
    assert "steps:" in told and re.search(
        r"WARNING: the output folder '.*' is already used, .*run.resume=require", told
    )
    with pytest.raises(CheckpointError, match="no run to continue"):
        print_plan(load_config(None, [*keys, "run.resume=require"]))


def test_a_run_that_goes_on_in_the_folder_is_told_by_plan_and_doctor(tiny_model, word_files, tmp_path, monkeypatch):
    def taken(output: Path) -> None:
        raise ConfigError(f"{output.name} is taken")

    monkeypatch.setattr(resume, "check_free", taken)
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.train=[{word_files[0]}]"]
    config = load_config(None, keys)
    with pytest.raises(ConfigError, match="run is taken"):
        print_plan(config)
    assert needs_of(config, {"here": 1}).refused.what == "run is taken"


def test_ranks_write_no_colours_into_the_file_that_mpirun_writes(tiny_model, word_files, tmp_path, capsys, monkeypatch):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)  # so that stdout is taken for a terminal
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.train=[{word_files[0]}]"]
    print_plan(load_config(None, keys), world_size=1)
    told = capsys.readouterr().out
    assert "launch: 1 rank = 1 client x 1 rank" in told and "\x1b" not in told


CLASSES = ["data.format=classification"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.format=messages"], "the tokenizer has no chat template"),
        (
            ["data.format=classification", "data.label_names={0: w1, 1: W1 w2 w3, 2: w3}", "data.max_length=4"],
            "too many",
        ),
        (["data.format=classification", "data.label_names={1: w1, '1.0': w2}"], "the label '1' has two words"),
    ],
)
def test_what_needs_no_rows_is_told_of_files_that_nobody_opens(tiny_model, tmp_path, changes, message):
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", "cluster.clients=2"]
    with pytest.raises(UserError, match=message):
        print_plan(load_config(None, [*keys, "data.per_client=[/there/a.jsonl,/there/b.jsonl]", *changes]))


def test_rounded_masters_are_told_with_the_memory_of_exact_ones(tiny_model, word_files, tmp_path, plan_in_words):
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.train=[{word_files[0]}]"]
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    plan = partial(plan_in_words, keys)

    half, rounded = "model.dtype=bfloat16", "model.masters=rounded"
    assert "masters:" not in plan() and "masters:" not in plan(half)  # exact ones are in the table of memory
    for ranks in (1, 2):
        told = plan(half, rounded, world_size=ranks)
        assert "masters: rounded, so changes of less than half a bfloat16's last place are lost" in told
        assert f"model.masters=exact takes {decimal(2 * parameters // ranks)} of host memory per rank" in told


def test_the_length_is_told_in_rounds_epochs_and_tokens(tiny_model, word_files, tmp_path, plan_in_words):
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", "cluster.clients=2", "data.batch_size=4"]
    shared, own = f"data.train=[{word_files[0]}]", f"data.per_client=[{word_files[0]},{word_files[1]}]"
    plan = partial(plan_in_words, keys)

    told = plan(shared, "algorithm.epochs=9")
    rounds, blocks = map(int, re.search(r"steps: (\d+) rounds? x (\d+) blocks x 48 inner steps = ", told).groups())
    epochs, asked = re.search(r"length: (\S+) epochs \((\S+), in whole rounds of \S+, ", told).groups()
    assert (
        asked == "algorithm.epochs=9" and float(epochs) >= 9 and f"{2 * 4 * 48 * rounds * blocks:,} sequences" in told
    )
    assert "WARNING: client" in plan(shared, "algorithm.rounds=500")
    told = plan(own, "algorithm.epochs=9")
    assert f"steps: algorithm.epochs=9 of what the clients' files hold, in whole rounds of {blocks} blocks" in told
    assert "length:" not in told and "disk: " in told


def test_the_traffic_is_told_by_what_goes_over_the_wire(tiny_model, word_files, tmp_path, plan_in_words):
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.train=[{word_files[0]}]"]
    keys += ["cluster.clients=3", "blocks.layers_per_block=null"]
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    plan = partial(plan_in_words, keys)

    assert f"float32, 4 bytes a parameter; an averaging of the largest block sends {decimal(4 * parameters)}" in plan()
    told = plan("gossip.wire=bfloat16", "algorithm.method=gt-adam")
    assert "bfloat16, 2 bytes a parameter of 2 tensors; " in told and f"sends {decimal(2 * 2 * parameters)}" in told
    assert "traffic:" not in plan("gossip.graph=isolated")
    gasloc = ("algorithm.method=gasloc", "gossip.every=4", "gossip.graph=ring", "algorithm.outer_momentum=0.6")
    told = plan(*gasloc)
    assert "algorithm.outer_momentum=0.6 is large for this graph" in told
    assert "; without the momentum that the method adds, after every averaging all clients have the same block" in told
    assert "large for this graph" not in plan(*gasloc[1:], "algorithm.method=diloco")


def test_the_time_is_that_of_all_steps_and_evaluations(tiny_model, word_files, tmp_path, capsys):
    keys = [
        f"run.output={tmp_path / 'run'}",
        f"model.path={tiny_model}",
        "cluster.clients=2",
        "data.client_holdout=0.2",
    ]
    files = ",".join(map(str, word_files[:2]))
    keys += ["algorithm.epochs=9"]
    shared, own = [*keys, f"data.train=[{files}]"], [*keys, f"data.per_client=[{files}]"]

    def plan(keys: list[str], *changes: str, as_json: bool = True) -> str:
        print_plan(load_config(None, [*keys, *changes]), gpu="H100", as_json=as_json)
        return capsys.readouterr().out

    ends, every = json.loads(plan(shared)), json.loads(plan(shared, "evaluation.every=1"))
    steps, step = ends["length"]["steps"], ends["seconds_of_a_step"]["step"]
    evaluation = (every["seconds_of_the_run"] - ends["seconds_of_the_run"]) / (steps - 1)
    assert evaluation > 0 and ends["seconds_of_the_run"] == pytest.approx(steps * step + 2 * evaluation)
    assert json.loads(plan(own))["seconds_of_the_run"] is None
    told = plan(shared, as_json=False)
    assert f"│ {steps:,} steps " in told and "│ 2 evaluations " in told and "│ the run " in told
    assert "left out: loading" in told


def test_a_model_that_needs_all_logits_is_told_with_their_memory(tiny_model, word_files, tmp_path, plan_in_words):
    keys = [f"run.output={tmp_path / 'run'}", f"data.train=[{word_files[0]}]", f"model.tokenizer={tiny_model}"]
    keys += ["data.micro_batch_size=2", "data.max_length=32"]
    assert "logits:" not in plan_in_words(keys, f"model.path={tiny_model}")
    vocabulary = AutoConfig.from_pretrained(tiny_model).vocab_size
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    BertConfig(**sizes, vocab_size=vocabulary, is_decoder=True).save_pretrained(tmp_path / "bert")
    told = f"BertLMHeadModel is not a body and one linear head, .* {decimal(4 * 2 * 32 * vocabulary)} in float32"
    assert re.search(told, plan_in_words(keys, f"model.path={tmp_path / 'bert'}"))


def test_the_disk_is_told_and_compared_with_what_is_free(tiny_model, word_files, tmp_path, capsys, monkeypatch):
    keys = [f"run.output={tmp_path / 'run'}", f"model.path={tiny_model}", "cluster.clients=3"]
    keys += [f"data.train=[{word_files[0]}]", "checkpoint.every=10", "algorithm.inner_steps=4"]
    # a float32 model, and of the one that is written also what is new, so that it is more than three of them
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())

    def plan(free: float, *changes: str) -> tuple[str, str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free)))
        print_plan(load_config(None, [*keys, *changes]))
        told, _, warning = " ".join(capsys.readouterr().out.split()).partition("are free at")
        return told, warning

    told, warning = plan(1e12)
    assert f"the trained model takes {4 * parameters / 1000:,.1f} kB" in told and not warning
    assert "checkpoints (every 10 inner steps, keep 2) up to" in told
    told, warning = plan(3 * 2 * 4 * parameters)
    assert "WARNING" in told and warning.startswith(f" {tmp_path} for run.output")
    told, warning = plan(3 * 2 * 4 * parameters, "checkpoint.every=0", "algorithm.inner_steps=1")
    assert "(one, at the end or when told to stop)" in told and not warning
    assert plan(3 * 2 * 4 * parameters - 1, "checkpoint.every=0", "algorithm.inner_steps=1")[1]


def test_the_manual_shows_the_first_lines_of_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    print_plan(load_config(Path("examples/demo/demo.yaml"), [f"run.output={tmp_path / 'run'}"]))
    printed = capsys.readouterr().out.splitlines()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(stream := io.StringIO(), "isatty", lambda: True, raising=False)
    lines = [line for text in printed for line in wrapped(text.rstrip(), stream).splitlines() if line]
    page = (REPOSITORY / "docs/launching.md").read_text(encoding="utf-8")
    (shown,) = re.findall(
        r"The first lines of `deca plan examples/demo/demo.yaml`:\n\n```text\n(.*?)\n```", page, re.DOTALL
    )
    assert shown.splitlines() == lines[: len(shown.splitlines())]


def test_a_hostfile_tells_which_client_comes_where(tiny_model, word_files, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tiny_model}}}\ndata: {{train: [{word_files[0]}]}}\n")
    keys = [f"run.output={tmp_path / 'run'}", "cluster.clients=2", "data.batch_size=4", "data.micro_batch_size=1"]
    keys += ["data.max_length=16"]

    def plan(hosts: str) -> tuple[int, str]:
        (tmp_path / "hosts").write_text(hosts)
        command = ["plan", "--config", str(tmp_path / "run.yaml"), "--hostfile", str(tmp_path / "hosts"), *keys]
        code = main([*command, "--no-ssh"])
        told = capsys.readouterr()
        return code, " ".join((told.out + told.err).split())

    code, told = plan("a slots=2\nb slots=2\n")
    assert code == 0 and "client 0: a client 1: b" in told and "spread over" not in told
    code, told = plan("a slots=3\nb slots=1\n")
    assert code == 0 and "client 0: a client 1: a, b" in told
    assert "client 1 is spread over a, b, and others use a, too" in told
    keys += ["cluster.on_failure=continue", "cluster.absent=[1]", "cluster.min_clients=1"]
    code, told = plan("a slots=2\n")
    assert code == 0 and "at the start: client 1 absent, spectral gap 1" in told
    code, told = plan("a slots=3\n")
    assert code == 2 and "3 ranks cannot be divided among 2 clients" in told
    code, told = plan("a: 3\n")
    assert code == 2 and "'a: 3' is no host" in told and f"{tmp_path / 'hosts'}:1" in told


def test_a_hostfile_has_each_host_looked_at(tiny_model, word_files, tmp_path, with_ssh, sh_alone, monkeypatch, capsys):
    """Two of the hosts are this machine behind an `ssh`, and the third one is not there."""
    data = f"{{per_client: [{word_files[0]}, {word_files[1]}], batch_size: 2, micro_batch_size: 1}}"
    (tmp_path / "run.yaml").write_text(f"cluster: {{clients: 2}}\nmodel: {{path: {tiny_model}}}\ndata: {data}\n")

    def plan(hosts: str, *arguments: str) -> tuple[int, str]:
        (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts.split()))
        code = main(["plan", "run.yaml", "run.output=out", "--hostfile", "hosts", *arguments])
        told = capsys.readouterr()
        return code, told.out + told.err

    code, told = plan("127.0.0.1 127.0.0.2", "--json")
    hosts = json.loads(told)["hosts"]
    found = {(each["check"], each["host"]): each["what"] for each in hosts["findings"]}
    assert (code, hosts["ok"], hosts["hosts"]) == (0, True, ["127.0.0.1", "127.0.0.2"])
    assert {check for check, _ in found} == set(BRIEF)
    assert found["files", "127.0.0.1"] == "3 paths", "configuration, model, the client's own file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "hosts", "run.yaml"], "nothing is written"
    code, told = plan("127.0.0.1 127.0.0.3")
    assert code == 2 and told.index("client 1: 127.0.0.3") < told.index("FAIL ssh, 127.0.0.3")
    assert "fix: ssh-copy-id 127.0.0.3" in told and "--no-ssh makes the plan without" in told
    code, told = plan("127.0.0.1 127.0.0.2", f"data.per_client=[{word_files[0]},gone.jsonl]")
    assert code == 2 and "FAIL files, 127.0.0.2: data.per_client: gone.jsonl is not there" in " ".join(told.split())
    assert "--no-ssh" not in told, "all hosts are there"
    monkeypatch.setenv("PATH", sh_alone)
    code, told = plan("localhost", "cluster.clients=1", f"data.per_client=[{word_files[0]}]", "--json")
    assert code == 0 and json.loads(told)["hosts"]["ok"], "without ssh"
    code, told = plan("127.0.0.1 127.0.0.2")
    assert code == 2 and "cannot start ssh" in told and "openssh-client" in told
    code, told = plan("a b", "--no-ssh", "--json")
    assert code == 0 and json.loads(told)["hosts"] is None


@pytest.mark.parametrize("command", ["plan", "simulate", "doctor", "data"])
def test_a_command_takes_its_configuration_with_and_without_the_option(command, tmp_path, capsys):
    """And keys before and behind it."""
    config = tmp_path / "run.yaml"
    config.write_text("optimizer:\n  lr: 0.1\n")
    for named in (["--config", str(config)], [f"--config={config}"], [str(config)]):
        assert main([command, "model.path=x", *named, "optimizer.rate=3"]) == 2
        assert "optimizer.rate" in "".join(capsys.readouterr())
    assert main([command, "--config", str(config), "other.yaml"]) == 2
    assert f"two configurations: '{config}' and 'other.yaml'" in capsys.readouterr().err
