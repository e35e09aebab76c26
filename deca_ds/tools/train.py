"""The command that launchers start: `launchers/train.py --config run.yaml [--dry-run] [key=value ...]`."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from deca_ds.checkpoint.done import mark_done, mark_stopped
from deca_ds.config import Config, load_config
from deca_ds.config.checks import check_world
from deca_ds.config.paths import argument as path_argument
from deca_ds.elastic.rejoin import join_job
from deca_ds.errors import UserError
from deca_ds.launch import ClientLayout, Launch, read_launch
from deca_ds.launch.given import given
from deca_ds.launch.meet import meet
from deca_ds.launch.store import JobStore, open_job_store
from deca_ds.training.claim import check_held
from deca_ds.training.summary import evaluations, next_commands, print_summary, stopped_commands
from deca_ds.training.terminal import on_interrupt, on_stop, own_streams
from deca_ds.watchdog.guard import JobGuard, guarded
from deca_ds.watchdog.restart import JOIN, tries_until
from deca_ds.watchdog.role import Visitor
from deca_ds.watchdog.stop import forget_request

_LONGER = "To train on, make algorithm.rounds or algorithm.epochs larger"
_INTERRUPTED = "interrupted: the job saves a checkpoint and stops after this inner step; Ctrl-C again ends it at once"
_START_TIMEOUT_S = 600.0  # for ranks to find each other, where there is no configuration to tell
_START_S = 60.0  # that ranks may need to start, however short cluster.timeout_s is


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """program: its name in messages; None: the script's."""
    parser = argparse.ArgumentParser(
        prog=program, description="Train with DECA: block-wise Adam on ZeRO-3 clients that gossip."
    )
    parser.add_argument("--config", type=path_argument, help="YAML file with the run's configuration")
    parser.add_argument(JOIN, action="store_true", help="return to a running job that goes on without this client")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    # what the deepspeed launcher adds; the rank is read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys that replace the file's")
    return parser


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one rank of the job; returns the exit code. Failures end the process inside (see watchdog/guard.py)."""
    own_streams()
    arguments = parser(program).parse_intermixed_args(argv)
    # DeepSpeed still calls collectives by names that newer versions of torch have renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        launch = read_launch()
        config: Config | UserError  # the mistake in it, for the guard to tell the other ranks, too
        try:
            given().check(launch.world_size)
            config = load_config(arguments.config, arguments.overrides)
        except UserError as mistake:
            config = mistake
        visit = None
        if arguments.join:
            if isinstance(config, UserError):
                raise config
            layout = ClientLayout.of(check_world(config, launch.world_size))
            visit, store = join_job(
                launch, layout, Path(config.run.output), _START_TIMEOUT_S, config.cluster.timeout_s, tries_until()
            )
        else:
            patience_s, meet_s = _START_TIMEOUT_S, _START_S
            if not isinstance(config, UserError):
                patience_s, meet_s = max(_START_S, config.cluster.timeout_s), config.cluster.meet_s
                if config.cluster.absent:
                    layout = ClientLayout.of(check_world(config, launch.world_size))
                    launch = launch.without(config.cluster.absent, layout)
            store = open_job_store(launch, patience_s, meet_s)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return error.code
    visitor = None
    if visit is not None:
        visitor = Visitor(visit.invitation["host"], return_s=max(0.0, tries_until() - time.time()))
    with guarded(launch, store, visitor) as guard:
        if isinstance(config, UserError):
            raise config
        if visit is None:
            guard.progress.enter("meeting the other ranks")
            meet(launch, store, config.cluster.meet_s)
        if arguments.dry_run:
            _plan(config, launch, store, guard)
            return 0
        from deca_ds.training.setup import start

        gc.freeze()  # what has been imported stays; no collection needs to look at it again
        gc.enable()  # deca_ds/launchers/train.py has disabled it
        trainer = start(config, launch, store, guard, visit)
        if trainer is None:
            if launch.rank == launch.first:
                print(f"nothing left to do: {config.run.output} is DONE. {_LONGER}\n"
                      f"{next_commands(Path(config.run.output))}", flush=True)  # fmt: skip
            return 0
        on_stop(guard.stop.ask)
        on_interrupt(guard.stop.ask, _INTERRUPTED if launch.rank == launch.first else "")
        finished = trainer.train()
        guard.progress.enter("the end")
        members = trainer.cluster.members
        trainer.meet()
        trainer.metrics.close()
        check_held(trainer.output)
        if trainer.cluster.is_job_leader:
            steps = f"{trainer.done} of {len(trainer.schedule)} inner steps"
            without = f" without client {', '.join(map(str, members.missing))}" if members.missing else ""
            if finished:
                mark_done(trainer.output, steps, members.missing)
                print_summary(evaluations(trainer.output, trainer.cluster.client))
                commands = next_commands(trainer.output, best=config.checkpoint.best)
                print(f"done{without}: {trainer.output}\n{commands}", flush=True)
            else:
                steps += trainer.stopped_early
                mark_stopped(trainer.output, steps, members.missing)
                how = "the same command with run.resume=require"
                if trainer.stopped_early:
                    how += " evaluation.patience=0"
                if set(members.missing) - set(config.cluster.absent):
                    how += ", from the newest checkpoint that all clients wrote"
                    if trainer.cluster.transport == "torch":
                        how += f"; from here, without them: cluster.absent=[{','.join(map(str, members.missing))}]"
                commands = stopped_commands(trainer.output, best=config.checkpoint.best)
                print(f"stopped after {steps}{without}; to go on: {how}\n{commands}", flush=True)
            forget_request(trainer.output)
        if finished and not config.checkpoint.every:  # it was for a failure before this
            trainer.meet()
            trainer.checkpoints.forget()
        if trainer.agent is not None and trainer.agent.returns:
            guard.come_back("is in the smaller part of the network, or alone")
    return 0


def _plan(config: Config, launch: Launch, store: JobStore, guard: JobGuard) -> None:
    """Check on every rank what a start checks there, then print the plan on the first. A plain python start is no
    launch: how many ranks there will be, and where, is not known."""
    from deca_ds.tools.plan import print_plan

    if launch.launcher == "python":
        print_plan(config)
        return
    from deca_ds.training.setup import check_together

    config, _, _ = check_together(config, launch, store, guard)
    store.gather(launch, "plan/checked", None)
    if launch.rank == launch.first:
        guard.progress.enter("making the plan", works=True)
        print_plan(config, launch.world_size)
