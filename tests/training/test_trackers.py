"""Weights & Biases and trackio, by packages of these names that note what they are called with."""

import importlib.machinery
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch.distributed import HashStore

from deca_ds.cli import main
from deca_ds.config.schema import LoggingConfig
from deca_ds.errors import ConfigError
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.progress import Progress
from deca_ds.training.metrics import Metrics
from deca_ds.training.trackers import CLOSE_S, START_S, check_logging, open_trackers
from deca_ds.watchdog.heartbeats import Heartbeats


class Run:
    def __init__(self, package, started):
        self.package, self.started, self.logged, self.finished, self.fails = package, started, [], False, None
        self.offline, self.url = False, "https://tracker.example/run"

    def define_metric(self, name, step_metric):
        self.step_metric = step_metric

    def log(self, numbers, step=None):
        if self.fails is not None:
            raise self.fails
        self.logged.append((numbers.pop(self.step_metric), numbers) if self.package == "wandb" else (step, numbers))

    def finish(self):
        print("* finishing")
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    """A module with the part of the interface that is used. runs: what it has started. mode, logged_in, refuses: how it
    answers."""
    name = request.param
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.runs, module.mode, module.logged_in, module.refuses = [], "online", True, None

    def init(**keys):
        print("* chatter")
        if module.refuses is not None:
            raise module.refuses
        module.runs.append(Run(name, keys))
        return module.runs[-1]

    module.init = init
    if name == "wandb":
        module.Error = type("Error", (Exception,), {})
        module.Settings = dict
        module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=module.mode))
        module.login = lambda prompt: module.logged_in
    monkeypatch.setitem(sys.modules, name, module)
    return module


def logging(package, **keys):
    return LoggingConfig(tracker=package.__name__, **keys)


def metrics(config, output, progress=None):
    rank = SimpleNamespace(client=1, is_leader=True, is_job_leader=True, progress=progress or Progress())
    shown = SimpleNamespace(step=lambda *_: None, evaluated=lambda *_: None, show=lambda: None, close=lambda: None)
    return Metrics(config, rank, output, range(8), shown)


def test_a_tracker_gets_the_numbers_of_the_metrics_files_and_nothing_else(package, tmp_path, capfd):
    written = metrics(logging(package, project="ours"), tmp_path / "my run")
    written.step(SimpleNamespace(index=3, block=0), {"loss": 1.5, "block": "layers 0-1"})
    own = {"own": {"loss": 1.25, "confusion": [["spam", "ham", 3]]}, "seconds": 0.5}
    written.evaluation(4, own, {"consensus_distance": 0.5, "mean": {"loss": 1.0}})
    written.close()
    client, job = package.runs
    assert client.logged == [(4, {"step/loss": 1.5}), (4, {"evaluation/own/loss": 1.25, "evaluation/seconds": 0.5})]
    assert job.logged == [(4, {"evaluation/consensus_distance": 0.5, "evaluation/mean/loss": 1.0})]
    assert client.finished and job.finished
    for run, name in ((client, "client_001"), (job, "job")):
        started = run.started
        assert started["project"] == "ours" and started["group"] == "my run" and started["resume"] == "allow"
        assert started["name"].startswith(f"my-run-{name}-") and "config" not in started
    said = capfd.readouterr()
    assert not said.out and said.err.count("also go to") == 1


def test_what_a_tracker_would_send_by_itself_is_off(package, tmp_path):
    open_trackers(logging(package), tmp_path, "job")
    started = package.runs[0].started
    if package.__name__ == "wandb":
        given = started["settings"]
        assert given["console"] == "off" and given["disable_git"] and not given["save_code"]
        assert given["host"] == ""
        assert given["x_disable_meta"] and given["x_disable_stats"] and given["x_disable_machine_info"]
        assert not given["x_save_requirements"] and started["dir"] == str(tmp_path.resolve())
    else:
        assert not started["auto_log_cpu"] and not started["auto_log_gpu"]


def test_a_job_that_resumes_continues_in_its_run_and_another_one_does_not(package, tmp_path):
    for output in ("run", "run", "elsewhere/run"):
        open_trackers(logging(package), tmp_path / output, "job")
    first, again, other = (run.started["name"] for run in package.runs)
    assert first == again != other


def test_a_tracker_that_does_not_start_is_an_error(package, tmp_path):
    package.refuses = ValueError("no such project")
    with pytest.raises(ConfigError, match=rf"logging.tracker={package.__name__} does not start: no such project"):
        metrics(logging(package), tmp_path)


def test_a_tracker_that_fails_later_does_not_end_the_run(package, tmp_path, capsys):
    written = metrics(logging(package), tmp_path)
    for run in package.runs:
        run.fails = ConnectionResetError("Connection lost")
    for index in range(3):
        written.step(SimpleNamespace(index=index, block=0), {"loss": 1.5})
    written.close()
    assert len((tmp_path / "metrics" / "client_001.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("gets no more") == 1


def test_a_service_that_is_slow_to_answer_is_no_standstill(package, tmp_path, monkeypatch):
    """With both files of a rank, where its wait is the longest that it may be and cluster.timeout_s is shorter."""
    now, store = [1000.0], HashStore()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen = Heartbeats(Launch("deepspeed", 0, 2, 0, None), lambda: [0, 1])
    seen.progress.watch(ClientLayout.of([1, 1]), 20.0)
    stalls = []

    def wait(seconds):
        for _ in range(seconds):
            now[0] += 1
            seen.beat(store)
            stalls.append(seen.stalled(store) or (seen.own().idle_s > 0 and "it stands still"))

    monkeypatch.setattr(package, "init", lambda start=package.init, **keys: (wait(START_S), start(**keys))[1])
    monkeypatch.setattr(Run, "finish", lambda self: wait(CLOSE_S))
    written = metrics(logging(package), tmp_path, seen.progress)
    seen.progress.enter("the end")
    written.close()
    assert len(stalls) == 2 * (START_S + CLOSE_S) and not any(stalls)
    wait(20)
    assert seen.own().idle_s == 20, "nothing is granted beyond"


def test_a_rank_that_takes_over_the_job_continues_without_a_tracker_that_does_not_start(package, tmp_path, capsys):
    rank = SimpleNamespace(client=1, is_leader=True, is_job_leader=False, progress=Progress())
    written = Metrics(logging(package), rank, tmp_path, range(8), SimpleNamespace(show=lambda: None))
    rank.is_job_leader, package.refuses = True, OSError("no network")
    written.membership(3, {"left": [1]})
    assert (tmp_path / "metrics" / "job.jsonl").read_text().count("\n") == 1
    assert "does not start: no network" in capsys.readouterr().err


def test_an_account_is_asked_for_where_one_is_needed(package, monkeypatch):
    package.logged_in = False
    check_logging(logging(package))
    if package.__name__ == "trackio":
        check_logging(logging(package), reports=True)
        return
    with pytest.raises(ConfigError, match=r"nobody is logged in(.|\n)*WANDB_MODE=offline"):
        check_logging(logging(package), reports=True)
    package.mode = "offline"
    check_logging(logging(package), reports=True)

    def refuse(prompt):
        raise package.Error("the key is not valid")

    monkeypatch.setattr(package, "mode", "online")
    monkeypatch.setattr(package, "login", refuse)
    with pytest.raises(ConfigError, match="the key is not valid"):
        check_logging(logging(package), reports=True)


@pytest.mark.parametrize("setting", ["tensorboard=true", "tracker=wandb", "tracker=trackio"])
def test_a_missing_package_is_told_before_anything_is_loaded(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("deca_ds.training.trackers.find_spec", lambda name: None)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: /missing}}\ndata: {{train: [/missing.jsonl]}}\nrun: {{output: {tmp_path / 'run'}}}\n"
    )
    assert main(["plan", "--config", str(config), f"logging.{setting}"]) == 2
    package = setting.split("=")[1].replace("true", "tensorboard")
    said = capsys.readouterr().err
    assert f"logging.{setting}, but {package} is not installed" in said
    assert f"pip install 'deca_ds[{package}]'" in said and not Path(tmp_path / "run").exists()
