import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
from jobs import REPOSITORY
from torch.distributed import HashStore

from deca_ds.checkpoint.done import mark_done
from deca_ds.config import Config, load_config
from deca_ds.elastic import save_addresses
from deca_ds.engine.explain import explained
from deca_ds.errors import DataError, EndedError, LaunchError, exit_code, public_message, whole_message
from deca_ds.launch import Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.run_folder import COORDINATORS, DONE, FAILED, LOCK, STOPPED
from deca_ds.tools import train
from deca_ds.training.start import check_together
from deca_ds.watchdog.early_end import EarlyEnd


@pytest.mark.parametrize(
    ("key", "timeout_s", "meet_s"),
    [("timeout_s=90", 90, 60), ("timeout_s=5", 60, 60), ("meet_s=20", 600, 20), ("timeout=5", 600, 60)],
)
def test_ranks_look_for_each_other_as_long_as_the_configuration_says(monkeypatch, capsys, key, timeout_s, meet_s):
    """One that makes no sense is told by the rank that hosts the store, once the others are there."""

    def nobody(launch, *given):
        raise LaunchError("nobody came for {:g} s of {:g} s".format(*reversed(given)))

    monkeypatch.setattr(train, "open_job_store", nobody)
    assert train.main(["model.path=x", f"cluster.{key}"]) == 2
    assert f"nobody came for {meet_s} s of {timeout_s} s" in capsys.readouterr().err


@pytest.mark.parametrize("first_import", ["rich", "torch"])
def test_ctrl_c_while_modules_are_imported_ends_a_rank_without_a_traceback(tmp_path, first_import):
    (tmp_path / f"{first_import}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "launchers" / "train.py", "model.path=x"],
        capture_output=True, text=True, timeout=100, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_before_the_ranks_meet_is_told_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_job_store", interrupted)
    assert train.main(["model.path=x"]) == 130
    assert capsys.readouterr().err.strip() == "ERROR: interrupted"


def test_a_rank_that_cannot_join_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    """In a folder of something else, as in that of a run which refuses it."""
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    keys = ["model.path=x", "cluster.clients=2", "cluster.on_failure=continue", f"run.output={tmp_path}"]
    (tmp_path / "notes").touch()
    assert train.main([*keys, "--join"]) == 2
    assert "there are no addresses of a job to join" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.fixture
def joins(tmp_path, monkeypatch) -> Callable[[], int]:
    """Starts rank 1 of two clients again, with --join, in the folder of a job that answers nobody."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    (tmp_path / LOCK).touch()
    save_addresses(tmp_path, {0: address, 1: address})
    keys = ["model.path=x", "cluster.clients=2", "cluster.on_failure=continue", f"run.output={tmp_path}"]
    return lambda: train.main([*keys, "--join"])


@pytest.mark.parametrize("missing", [[1], []])
def test_who_comes_back_after_the_end_is_told_so_and_does_not_fail(joins, tmp_path, capsys, missing):
    mark_done(tmp_path, 8, missing)
    assert joins() == 0
    said = capsys.readouterr()
    without = " without client 1" if missing else ""
    assert f"nothing left to join: the job has finished{without}, {tmp_path} is DONE\n" in said.out
    assert f"deca export {tmp_path} MODEL" in said.out and not said.err
    assert not (tmp_path / "heartbeats").exists(), "nobody has the place of the rank"


@pytest.mark.parametrize("written", [LOCK, COORDINATORS, STOPPED, FAILED, None])
def test_who_comes_back_after_an_end_that_is_not_certain_is_told_what_may_be_and_fails(
    joins, tmp_path, capsys, written
):
    """A job is loading that continues the run, or has been started elsewhere; or it may be a part of a split network
    that has stopped."""
    if written in (LOCK, COORDINATORS):
        mark_done(tmp_path, 8, [1])
        later = (tmp_path / DONE).stat().st_mtime_ns + 1
        os.utime(tmp_path / written, ns=(later, later))
    elif written is not None:
        (tmp_path / written).write_text("3 of 8 inner steps\nmissing clients: 1\n")
    assert joins() == 1
    said = capsys.readouterr()
    assert "no other client answers: the job has ended, or it is out of reach from here" in said.err and not said.out


def test_of_the_ranks_that_come_back_after_the_end_one_says_so(joins, tmp_path, capsys, monkeypatch):
    mark_done(tmp_path, 8, [1])
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, says in ((2, True), (3, False)):
        monkeypatch.setenv("RANK", str(rank))
        assert joins() == 0
        said = capsys.readouterr()
        assert ("nothing left to join" in said.out) == says and not said.err


def test_a_launched_dry_run_looks_for_every_client_s_file(tiny_model, word_files, tmp_path):
    files, shared = [word_files[0], tmp_path / "absent.jsonl"], HashStore()
    keys = [f"model.path={tiny_model}", "cluster.clients=2", f"data.per_client=[{files[0]},{files[1]}]"]
    config = load_config(None, [*keys, f"run.output={tmp_path / 'run'}"])

    def rank(number: int) -> object:
        progress = Progress()
        store = JobStore(shared, None, timedelta(seconds=60), progress)
        check = train._plan if number else check_together  # no plan is printed before all have passed
        return check(config, Launch("deepspeed", number, 2, 0, None), store, SimpleNamespace(progress=progress))

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(rank, 0), threads.submit(rank, 1)
    assert first.result()[0].data.per_client == config.data.per_client
    with pytest.raises(DataError, match=r"(?s)no such file.*absent\.jsonl.*data\.per_client\[1\], of client 1"):
        second.result()


def test_a_signal_before_training_is_told_as_a_failure_once_wherever_it_comes():
    """Not as what a library, or we, make of errors there; and not while this rank ends already."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        guard = SimpleNamespace(early_end=EarlyEnd(threading.Lock(), None, None))
        train.on_stop(partial(train._end_before_training, Config(), guard))
        with pytest.raises(EndedError, match="SIGUSR1 came before training began") as caught, explained("x", "y"):
            signal.raise_signal(signal.SIGUSR1)
        assert exit_code(caught.value) == 1
        assert public_message(caught.value) == whole_message(caught.value) == str(caught.value)
        signal.raise_signal(signal.SIGTERM)  # while it tells the others
        guard.early_end = EarlyEnd(threading.Lock(), None, None)
        guard.early_end.forbid()  # by a rank that fails
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("given", "until", "joins"), [(False, 0.0, False), (True, 0.0, True), (False, 1e12, True)])
def test_a_script_that_was_started_again_to_return_joins(monkeypatch, tmp_path, given, until, joins):
    """By cluster.return_s: it need not read its own --join."""
    seen = []

    def run(read, *, join, dry_run):
        seen.append((join, dry_run))
        return read(), Launch("python", 0, 1, 0, None)

    monkeypatch.setattr(train, "_run", run)
    monkeypatch.setattr(train, "tries_until", lambda: until)
    keys = ["model.path=x", f"run.output={tmp_path}", "data.train=[x]", "cluster.clients=1"]
    result = train.train({}, keys, join=given)
    assert seen == [(joins, False)]
    assert (result.output, result.evaluations, result.best) == (tmp_path, [], None)


@pytest.mark.parametrize(("best", "named"), [({}, "newest"), ({"step": 0}, "newest"), ({"step": 4}, "best")])
def test_a_stopped_run_names_a_checkpoint_that_is_there(tmp_path, capsys, best, named):
    """Before training the model may have been best: that is no checkpoint."""
    config = load_config(
        None, ["model.path=x", "checkpoint.best=true", "evaluation.every=2", "data.client_holdout=0.1"]
    )
    cluster, state = SimpleNamespace(transport="torch"), SimpleNamespace(best=best)
    trainer = SimpleNamespace(
        config=config, cluster=cluster, state=state, output=tmp_path, done=6, schedule=range(8), stopped_early=""
    )
    train._end_stopped(trainer, [])
    assert f"MODEL --checkpoint {named} " in capsys.readouterr().out


def test_a_process_trains_once_also_where_its_world_has_been_closed(monkeypatch):
    trained = threading.Event()
    trained.set()
    monkeypatch.setattr(train, "_HAS_TRAINED", trained)
    with pytest.raises(LaunchError, match="train once in a process"):
        train.train(None)
