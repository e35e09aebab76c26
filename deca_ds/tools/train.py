"""One rank of a job: the command that launchers start, `launchers/train.py --config run.yaml [--dry-run] [key=value
...]`, and the same for scripts."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import is_initialized

from deca_ds.checkpoint.done import is_done, is_marked_since, mark_done, mark_stopped, missing_clients
from deca_ds.config import Config, Given, load_config
from deca_ds.config.arguments import chosen
from deca_ds.config.checks import check_world
from deca_ds.config.resume import same_command
from deca_ds.elastic import Rejoin, join_job
from deca_ds.errors import EndedError, LaunchError, UserError
from deca_ds.launch import ClientLayout, Launch, read_launch
from deca_ds.launch.given import given
from deca_ds.launch.meet import meet
from deca_ds.launch.store import JobStore, open_job_store
from deca_ds.plural import named
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import COORDINATORS, DONE, LOCK
from deca_ds.tools.train_arguments import parser
from deca_ds.training.best import is_saved
from deca_ds.training.claim import check_held, leave_place, take_place
from deca_ds.training.next_commands import next_commands, stopped_commands
from deca_ds.training.scores import RunResult, evaluations
from deca_ds.training.summary import print_summary
from deca_ds.training.terminal import handlers_kept, on_interrupt, on_stop, own_streams
from deca_ds.watchdog.failure import tell_exit_code
from deca_ds.watchdog.guard import JobGuard, guarded
from deca_ds.watchdog.restart import tries_until
from deca_ds.watchdog.standing import Rejoining
from deca_ds.watchdog.stop import forget_request

if TYPE_CHECKING:
    from deca_ds.training.loop import Trainer

_HAS_TRAINED = threading.Event()  # this process, to the end of a job
_LONGER = "To train on, make algorithm.rounds or algorithm.epochs larger"
_INTERRUPTED = "interrupted: the job stops, and saves a checkpoint if it has trained; Ctrl-C again ends it at once"
_START_TIMEOUT_S = 600.0  # for ranks to find each other if the configuration cannot be read
_START_S = 60.0  # granted to ranks for starting, however short cluster.timeout_s is


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one rank of the job; returns the exit code. Failures end the process inside (see watchdog/guard.py)."""
    own_streams()
    arguments = parser(program).parse_intermixed_args(argv)
    try:
        _run(lambda: load_config(*chosen(arguments)), join=arguments.join, dry_run=arguments.dry_run)
    except UserError as error:
        print_wrapped(f"ERROR: {error}")
        tell_exit_code(error.code)
        return error.code
    except KeyboardInterrupt:  # before the guard, and so before any training
        print_wrapped("\nERROR: interrupted")
        return 128 + signal.SIGINT
    return 0


def train(config: Given, overrides: Sequence[str] = (), *, join: bool = False) -> RunResult:
    """Train as one rank of a job, as `deca train` does: every rank that the launcher starts calls this once, in its
    main thread. Under plain `python` the job is a single rank.

    config, overrides: see `load_config`. join: whether this client returns to a job that continues without it; true in
    any case where the process was started again for that, with --join as its last argument (`cluster.return_s`).

    Returns when the job is done or was told to stop, with the scores that this rank's client knows, as far as they are
    on this host; the environment and the handling of signals are as before then. Raises UserErrors until the ranks have
    found each other. After that an error that ends the job or this client ends the process, with a message and an exit
    code, and so does the end of a job from which clients have gone or to which they have come.
    """
    if is_initialized() or _HAS_TRAINED.is_set():
        raise LaunchError(
            "this process has a process group of torch.distributed already, from an earlier job or the script's own",
            where="deca_ds.train",
            fix="train once in a process, and leave the process group to it; start a process for each run",
        )
    with _environment_kept(), handlers_kept():
        typed, launch = _run(lambda: load_config(config, overrides), join=join or tries_until() > 0, dry_run=False)
    client = ClientLayout.of(check_world(typed, launch.world_size)).client_of(launch.rank)
    output = Path(typed.run.output)
    return RunResult(output, evaluations(output, client))


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the launcher's environment at the end: the body has libraries see a client's ranks as a world of their
    own."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _run(read: Callable[[], Config], *, join: bool, dry_run: bool) -> tuple[Config, Launch]:
    """Run one rank from its launch to the end of the job. read: gives the configuration."""
    # DeepSpeed still calls collectives by names that newer versions of torch have renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    launch, rejoin, rejoining = read_launch(), None, None
    config = _read_config(read, launch)
    if join:
        if isinstance(config, UserError):
            raise config
        told_over = partial(_told_over, config, launch, _time_ns(Path(config.run.output) / COORDINATORS))
        joined = _join(config, launch, told_over)
        if joined is None:
            return config, launch
        rejoin, store = joined
        return_s = max(0.0, tries_until() - time.time())
        rejoining = Rejoining(rejoin.invitation["host"], return_s, told_over)
    else:
        launch, store = _open_store(config, launch)
    with guarded(launch, store, rejoining) as guard:
        if isinstance(config, UserError):
            raise config
        if rejoin is None:
            guard.progress.enter("meeting the other ranks")
            meet(launch, store, config.cluster.meet_s)
        if dry_run:
            _plan(config, launch, store, guard)
        else:
            _train(config, launch, store, guard, rejoin)
    return config, launch


def _read_config(read: Callable[[], Config], launch: Launch) -> Config | UserError:
    """Read the configuration; return it, or the mistake in it, which the guard then reports to the other ranks."""
    try:
        given().check(launch.world_size)
        return read()
    except UserError as mistake:
        return mistake


def _open_store(config: Config | UserError, launch: Launch) -> tuple[Launch, JobStore]:
    """Open the job's store; return the launch without cluster.absent, and the store. It is opened even if the
    configuration is wrong, so that all ranks learn why the job ends."""
    patience_s, meet_s = _START_TIMEOUT_S, _START_S
    if not isinstance(config, UserError):
        patience_s, meet_s = max(_START_S, config.cluster.timeout_s), config.cluster.meet_s
        if config.cluster.absent:
            layout = ClientLayout.of(check_world(config, launch.world_size))
            launch = launch.without(config.cluster.absent, layout)
    return launch, open_job_store(launch, patience_s, meet_s)


def _join(config: Config, launch: Launch, told_over: Callable[[], str | None]) -> tuple[Rejoin, JobStore] | None:
    """Ask the running job to let this client in again: the rejoin, and the job's store. None if the job has finished,
    which is printed. told_over: see Rejoining."""
    layout, output = ClientLayout.of(check_world(config, launch.world_size)), Path(config.run.output)
    take_place(output, launch.rank)
    try:
        joined = join_job(
            launch, layout, output, _START_TIMEOUT_S, config.cluster.timeout_s, tries_until(),
            is_over=lambda: told_over() is not None,
        )  # fmt: skip
    except BaseException:
        leave_place(output, launch.rank)
        raise
    if joined is None:
        leave_place(output, launch.rank)
        if told := told_over():
            print_wrapped(told, sys.stdout)
    return joined


def _told_over(config: Config, launch: Launch, addresses_ns: int) -> str | None:
    """Return what a rank that joins prints if the job has finished; None as long as that is not certain: a job that has
    stopped may be the smaller part of a split network.

    addresses_ns: when the addresses were written at which this rank asks to join. A DONE from before is of an earlier
    job, and so is one from before LOCK.
    """
    output, clients = Path(config.run.output), config.cluster.clients
    if _time_ns(output / DONE) < max(1, addresses_ns) or not is_marked_since(output, output / LOCK):
        return None
    layout = ClientLayout.of(check_world(config, launch.world_size))
    client = layout.client_of(launch.rank)
    if launch.rank != layout.leader_of(client):
        return ""
    without = _without([client] if client in missing_clients(output) else [])
    return f"nothing left to join: the job has finished{without}, {output} is DONE\n{next_commands(output, clients)}"


def _time_ns(path: Path) -> int:
    """Return when a file was written, in nanoseconds since 1970; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _train(config: Config, launch: Launch, store: JobStore, guard: JobGuard, rejoin: Rejoin | None) -> None:
    """Start, train and end."""
    from deca_ds.training.start import start

    gc.freeze()  # what has been imported stays; no collection needs to look at it again
    gc.enable()  # deca_ds/launchers/train.py has disabled it
    is_first = launch.rank == launch.first

    def hear_signals() -> None:
        on_stop(guard.hear)
        on_interrupt(guard.hear, _INTERRUPTED if is_first else "")

    all_start = rejoin is None and config.cluster.on_failure == "stop"
    if not all_start:
        on_stop(partial(_end_before_training, config, guard))
    else:
        hear_signals()
        guard.let_stop_before_training(lambda: _end_early(config, guard.output) if is_first else None)
    try:
        trainer = start(config, launch, store, guard, rejoin)
    except BaseException:
        leave_place(Path(config.run.output), launch.rank)
        raise
    if trainer is None:
        if is_first:
            print_wrapped(f"nothing left to do: {config.run.output} is DONE. {_LONGER}", sys.stdout)
            print_wrapped(next_commands(Path(config.run.output), config.cluster.clients), sys.stdout)
        return
    if not all_start:
        hear_signals()
    _end(trainer, guard, finished=trainer.train())


def _end(trainer: Trainer, guard: JobGuard, *, finished: bool) -> None:
    """End the job together: close the metrics, and have the job's leader mark the folder and print the results; a
    client that was cut off returns instead. finished: all steps are done."""
    guard.progress.enter("the end")
    missing = trainer.cluster.members.missing
    trainer.meet()
    trainer.metrics.close()
    check_held(trainer.output)
    if trainer.cluster.is_job_leader:
        end = _end_done if finished else _end_stopped
        end(trainer, missing)
        forget_request(trainer.output)
    if finished and not trainer.config.checkpoint.every:  # it was for a failure before this
        trainer.meet()
        trainer.checkpoints.forget()
    if trainer.agent is not None and trainer.agent.rejoins:
        guard.come_back("is in the smaller part of the network, or alone")
    trainer.cluster.close_world()
    _HAS_TRAINED.set()


def _end_before_training(config: Config, guard: JobGuard, number: int, *_: Any) -> None:
    """Fail, so that all ranks learn why; a signal handler for jobs whose clients may die, before their ranks can stop
    together."""
    what = f"{signal.Signals(number).name} came before training began: nothing was trained"
    guard.early_end.interrupt(EndedError(f"{what}\n  fix:   give {same_command(config.run.resume, trained=False)}"))


def _end_done(trainer: Trainer, missing: Sequence[int]) -> None:
    """Mark the run's folder as DONE, and print the results and the next commands. missing: clients."""
    config = trainer.config
    mark_done(trainer.output, len(trainer.schedule), missing)
    print_summary(evaluations(trainer.output, trainer.cluster.client))
    best, lost = _has_best(trainer), bool(_lost(missing, config))
    commands = next_commands(trainer.output, config.cluster.clients, best=best, lost=lost)
    print_wrapped(f"done{_without(missing)}: {trainer.output}\n{commands}", sys.stdout)


def _end_stopped(trainer: Trainer, missing: Sequence[int]) -> None:
    """Mark the run's folder as STOPPED, and print how to continue. missing: clients."""
    config, steps = trainer.config, (trainer.done, len(trainer.schedule))
    how = same_command(config.run.resume, trained=True)
    if trainer.stopped_early:
        how += f" {'and' if ' with ' in how else 'with'} evaluation.patience=0"
    lost = _lost(missing, config)
    if lost:
        how += ", from the newest checkpoint that all clients wrote"
        if trainer.cluster.transport == "torch":
            how += f"; from here, without them: cluster.absent=[{','.join(map(str, missing))}]"
    mark_stopped(trainer.output, how, missing, steps=steps, why=trainer.stopped_early)
    commands = stopped_commands(trainer.output, best=_has_best(trainer), lost=bool(lost))
    why = f", because {trainer.stopped_early}" if trainer.stopped_early else ""
    stopped = f"stopped after {steps[0]} of {steps[1]} inner steps{why}{_without(missing)}"
    print_wrapped(f"{stopped}; to continue: {how}\n{commands}", sys.stdout)


def _end_early(config: Config, output: Path | None) -> None:
    """Mark the run's folder, and print how to continue, if the job stops before any training. output: None before the
    run's folder is taken."""
    how = "the same command"
    if output is not None:
        how = same_command(config.run.resume, trained=False)
        if not is_done(output):  # of a finished run that was to be longer
            mark_stopped(output, how)
        forget_request(output)
    print_wrapped(f"stopped before training began: nothing was trained; to continue: {how}", sys.stdout)


def _lost(missing: Sequence[int], config: Config) -> set[int]:
    """Return the missing clients that have taken part, or were to."""
    return set(missing) - set(config.cluster.absent)


def _has_best(trainer: Trainer) -> bool:
    return trainer.config.checkpoint.best and is_saved(trainer.state.best)


def _without(missing: Sequence[int]) -> str:
    return f" without {named('client', missing)}" if missing else ""


def _plan(config: Config, launch: Launch, store: JobStore, guard: JobGuard) -> None:
    """Check on every rank what a real start checks there, then print the plan on the first rank. Under plain python
    the number of ranks of the real launch is unknown, and only the plan is printed."""
    from deca_ds.tools.plan import print_plan

    if launch.launcher == "python":
        print_plan(config)
        return
    from deca_ds.training.start import check_together

    config, _ = check_together(config, launch, store, guard)
    store.gather(launch, "plan/checked", None)
    if launch.rank == launch.first:
        guard.progress.enter("making the plan", works=True)
        print_plan(config, launch.world_size)
