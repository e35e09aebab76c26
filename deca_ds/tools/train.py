"""The command that launchers start: `launchers/train.py --config run.yaml [--dry-run] [key=value ...]`."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deca_ds.checkpoint.done import is_done, mark_done, mark_stopped
from deca_ds.config import Config, load_config
from deca_ds.config.arguments import chosen
from deca_ds.config.checks import check_world
from deca_ds.elastic import Visit, join_job
from deca_ds.errors import EndedError, UserError
from deca_ds.launch import ClientLayout, Launch, read_launch
from deca_ds.launch.given import given
from deca_ds.launch.meet import meet
from deca_ds.launch.store import JobStore, open_job_store
from deca_ds.tools.train_arguments import parser
from deca_ds.training.claim import check_held, leave_place, take_place
from deca_ds.training.summary import evaluations, next_commands, print_summary, stopped_commands
from deca_ds.training.terminal import on_interrupt, on_stop, own_streams
from deca_ds.watchdog.failure import tell_exit_code
from deca_ds.watchdog.guard import JobGuard, guarded
from deca_ds.watchdog.restart import tries_until
from deca_ds.watchdog.standing import Visitor
from deca_ds.watchdog.stop import forget_request

if TYPE_CHECKING:
    from deca_ds.training.loop import Trainer

_LONGER = "To train on, make algorithm.rounds or algorithm.epochs larger"
_INTERRUPTED = "interrupted: the job stops, and saves a checkpoint if it has trained; Ctrl-C again ends it at once"
_START_TIMEOUT_S = 600.0  # for ranks to find each other if the configuration cannot be read
_START_S = 60.0  # granted to ranks for starting, however short cluster.timeout_s is


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one rank of the job; returns the exit code. Failures end the process inside (see watchdog/guard.py)."""
    own_streams()
    arguments = parser(program).parse_intermixed_args(argv)
    # DeepSpeed still calls collectives by names that newer versions of torch have renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    visit, visitor = None, None
    try:
        launch = read_launch()
        config = _read_config(arguments, launch)
        if arguments.join:
            visit, store = _join(config, launch)
            visitor = Visitor(visit.invitation["host"], return_s=max(0.0, tries_until() - time.time()))
        else:
            launch, store = _open_store(config, launch)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        tell_exit_code(error.code)
        return error.code
    with guarded(launch, store, visitor) as guard:
        if isinstance(config, UserError):
            raise config
        if visit is None:
            guard.progress.enter("meeting the other ranks")
            meet(launch, store, config.cluster.meet_s)
        if arguments.dry_run:
            _plan(config, launch, store, guard)
        else:
            _train(config, launch, store, guard, visit)
    return 0


def _read_config(arguments: argparse.Namespace, launch: Launch) -> Config | UserError:
    """The configuration, or the mistake in it, which the guard then reports to the other ranks."""
    try:
        given().check(launch.world_size)
        return load_config(*chosen(arguments))
    except UserError as mistake:
        return mistake


def _open_store(config: Config | UserError, launch: Launch) -> tuple[Launch, JobStore]:
    """The launch without cluster.absent, and the job's store. It is opened even if the configuration is wrong, so that
    all ranks learn why the job ends."""
    patience_s, meet_s = _START_TIMEOUT_S, _START_S
    if not isinstance(config, UserError):
        patience_s, meet_s = max(_START_S, config.cluster.timeout_s), config.cluster.meet_s
        if config.cluster.absent:
            layout = ClientLayout.of(check_world(config, launch.world_size))
            launch = launch.without(config.cluster.absent, layout)
    return launch, open_job_store(launch, patience_s, meet_s)


def _join(config: Config | UserError, launch: Launch) -> tuple[Visit, JobStore]:
    """Ask the running job to let this client in again: the visit, and the job's store."""
    if isinstance(config, UserError):
        raise config
    layout, output = ClientLayout.of(check_world(config, launch.world_size)), Path(config.run.output)
    take_place(output, launch.rank)
    try:
        return join_job(launch, layout, output, _START_TIMEOUT_S, config.cluster.timeout_s, tries_until())
    except BaseException:
        leave_place(output, launch.rank)
        raise


def _train(config: Config, launch: Launch, store: JobStore, guard: JobGuard, visit: Visit | None) -> None:
    """Start, train and end."""
    from deca_ds.training.start import start

    gc.freeze()  # what has been imported stays; no collection needs to look at it again
    gc.enable()  # deca_ds/launchers/train.py has disabled it
    is_first = launch.rank == launch.first

    def hear_signals() -> None:
        on_stop(guard.hear)
        on_interrupt(guard.hear, _INTERRUPTED if is_first else "")

    all_start = visit is None and config.cluster.on_failure == "stop"
    if not all_start:
        on_stop(partial(_end_before_training, guard))
    else:
        hear_signals()
        guard.let_stop_before_training(lambda: _end_early(guard.output) if is_first else None)
    try:
        trainer = start(config, launch, store, guard, visit)
    except BaseException:
        leave_place(Path(config.run.output), launch.rank)
        raise
    if trainer is None:
        if is_first:
            print(f"nothing left to do: {config.run.output} is DONE. {_LONGER}\n"
                  f"{next_commands(Path(config.run.output), config.cluster.clients)}", flush=True)  # fmt: skip
        return
    if not all_start:
        hear_signals()
    finished = trainer.train()
    guard.progress.enter("the end")
    missing = trainer.cluster.members.missing
    trainer.meet()
    trainer.metrics.close()
    check_held(trainer.output)
    if trainer.cluster.is_job_leader:
        end = _end_done if finished else _end_stopped
        end(trainer, missing)
        forget_request(trainer.output)
    if finished and not config.checkpoint.every:  # it was for a failure before this
        trainer.meet()
        trainer.checkpoints.forget()
    if trainer.agent is not None and trainer.agent.returns:
        guard.come_back("is in the smaller part of the network, or alone")


def _end_before_training(guard: JobGuard, number: int, *_: Any) -> None:
    """A signal handler for jobs whose clients may die, whose ranks cannot stop together yet: this rank fails, and all
    learn why."""
    what = f"{signal.Signals(number).name} came before training began: nothing was trained"
    guard.early_end.interrupt(EndedError(f"{what}\n  fix:   give the same command again, with run.resume=auto"))


def _end_done(trainer: Trainer, missing: Sequence[int]) -> None:
    """Mark the run's folder as DONE, and print the results and the next commands. missing: clients."""
    mark_done(trainer.output, _steps(trainer), missing)
    print_summary(evaluations(trainer.output, trainer.cluster.client))
    clients, best = trainer.config.cluster.clients, trainer.config.checkpoint.best
    commands = next_commands(trainer.output, clients, best=best)
    print(f"done{_without(missing)}: {trainer.output}\n{commands}", flush=True)


def _end_stopped(trainer: Trainer, missing: Sequence[int]) -> None:
    """Mark the run's folder as STOPPED, and print how to continue. missing: clients."""
    config, steps = trainer.config, _steps(trainer) + trainer.stopped_early
    mark_stopped(trainer.output, steps, missing)
    how = "the same command with run.resume=require"
    if trainer.stopped_early:
        how += " evaluation.patience=0"
    if set(missing) - set(config.cluster.absent):
        how += ", from the newest checkpoint that all clients wrote"
        if trainer.cluster.transport == "torch":
            how += f"; from here, without them: cluster.absent=[{','.join(map(str, missing))}]"
    commands = stopped_commands(trainer.output, best=config.checkpoint.best)
    print(f"stopped after {steps}{_without(missing)}; to go on: {how}\n{commands}", flush=True)


def _end_early(output: Path | None) -> None:
    """The same if the job stops before any training. output: None before the run's folder is taken."""
    how = "the same command"
    if output is not None:
        if not is_done(output):  # of a finished run that was to be longer
            mark_stopped(output, "before training began")
        forget_request(output)
        how += " with run.resume=auto"
    print(f"stopped before training began: nothing was trained; to go on: {how}", flush=True)


def _steps(trainer: Trainer) -> str:
    return f"{trainer.done} of {len(trainer.schedule)} inner steps"


def _without(missing: Sequence[int]) -> str:
    return f" without client {', '.join(map(str, missing))}" if missing else ""


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
