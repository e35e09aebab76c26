"""The start of a run on one rank, from its configuration to its Trainer: cheapest checks first, and nothing is written
before everything has been checked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore

from deca_ds.checkpoint.part import Part
from deca_ds.config import Config
from deca_ds.config.checks import check_world
from deca_ds.config.paths import check_model_path, check_writable
from deca_ds.config.resume import check_folder
from deca_ds.data import validate_data_config
from deca_ds.elastic import Invitation, Rejoin, check_absent
from deca_ds.errors import CheckpointError
from deca_ds.gossip import MixingSchedule, build_mixing
from deca_ds.gossip.late import check_wait
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.compare_ranks import compare_software, software
from deca_ds.launch.store import JobStore
from deca_ds.launch.world import check_on_failure, connect
from deca_ds.run_folder import MODEL
from deca_ds.training.build import build
from deca_ds.training.chosen_method import build_schedule, check_method
from deca_ds.training.claim import take_for_job
from deca_ds.training.connect import Job, connect_clients
from deca_ds.training.length import check_place
from deca_ds.training.loop import Trainer
from deca_ds.training.resume import choose, leave_behind, look_at_output
from deca_ds.training.template_date import agree_on_date, with_date
from deca_ds.training.trackers import check_logging
from deca_ds.training.ways_to_start import NewRun, RejoinedRun, ResumedRun, Start
from deca_ds.watchdog.guard import JobGuard


def start(
    config: Config, launch: Launch, store: JobStore, guard: JobGuard, rejoin: Rejoin | None = None
) -> Trainer | None:
    """Check the configuration, connect to the other ranks and build the trainer; None if the run has nothing left to
    do.

    rejoin: given if this client comes back. Raises UserErrors, before anything is written; only those about the model
    come after the output folder is made.
    """
    way: Start | None
    if rejoin is None:
        config, mixing = check_together(config, launch, store, guard)
        way = begin_or_resume(config, launch, store, guard, mixing)
    else:
        invitation = Invitation.read(rejoin.invitation)
        config, mixing = _check_rejoin(config, launch, guard, invitation)
        own = PrefixStore(f"rejoin/{invitation.rejoin_id}", store.store)
        store = JobStore(own, store.address, store.timeout, guard.progress)
        way = RejoinedRun(invitation)
    if way is None:
        return None
    cluster = connect(config, launch, store, guard.progress, joins=way.joins)
    connected = connect_clients(config, cluster, guard, rejoin)
    return build(Job(config, cluster, connected, guard, mixing), way)


def check_together(config: Config, launch: Launch, store: JobStore, guard: JobGuard) -> tuple[Config, MixingSchedule]:
    """Check all that a start checks before the ranks connect, except whether run.output is used; every rank checks the
    files of its own host. All ranks call this. Returns the configuration with its date. Raises UserErrors."""
    mixing = _mixing(config)
    guard.progress.enter("comparing the ranks")
    compare_software(config, launch, store, [matrix.tobytes() for matrix in mixing.matrices])
    config = agree_on_date(config, launch, store)
    _check(config, launch, guard, mixing)
    return config, mixing


def _check_rejoin(
    config: Config, launch: Launch, guard: JobGuard, invitation: Invitation
) -> tuple[Config, MixingSchedule]:
    """Check the same for a client that comes back, which compares itself with the job."""
    mixing = _mixing(config)
    guard.progress.enter("comparing the ranks")
    config = with_date(config, invitation.date)
    invitation.compare_software(config, launch, software(config, [matrix.tobytes() for matrix in mixing.matrices]))
    _check(config, launch, guard, mixing)
    return config, mixing


def _mixing(config: Config) -> MixingSchedule:
    return build_mixing(config.gossip, config.cluster.clients, config.run.seed)


def _check(config: Config, launch: Launch, guard: JobGuard, mixing: MixingSchedule) -> None:
    """Check the configuration by itself, then this host's files."""
    guard.progress.enter("checking the configuration")
    layout = ClientLayout.of(check_world(config, launch.world_size))
    guard.progress.watch(layout, config.cluster.timeout_s)
    check_method(config)
    check_logging(config.logging, reports=layout.shard_of(launch.rank) == 0)
    check_wait(config.gossip.wait_s, mixing)
    check_absent(config.cluster, mixing)
    check_on_failure(config, launch, edges=any(mixing.sends(t) for t in range(mixing.period)))
    check_model_path(config.model)
    validate_data_config(config, client=layout.client_of(launch.rank))
    check_writable(Path(config.run.output), "run.output")


def begin_or_resume(
    config: Config, launch: Launch, store: JobStore, guard: JobGuard, mixing: MixingSchedule
) -> NewRun | ResumedRun | None:
    """Choose between a new run and one that continues: from the newest checkpoint that all ranks can use, or from the
    end of a run that is to be longer. Returns None if the run has come to its end. All ranks call this. Raises
    UserErrors, before it changes anything but the file LOCK and heartbeats."""
    output, own = Path(config.run.output), None
    # other hosts have not got the run's configuration
    if config.run.resume == "never" or launch.rank == launch.first:
        own = look_at_output(config)
    if config.run.resume == "never":
        return NewRun()
    begun: dict[str, Any] | None = store.gather(launch, "output/begun", own)[launch.first]
    if begun is not None:
        if begun["ends"]:
            return None
        take_for_job(output, launch, store, partial(check_folder, config), guard.show_life)
    guard.progress.enter("verifying the checkpoints", works=True)
    own_part = _part_of(ClientLayout.of(check_world(config, launch.world_size)), launch.rank)
    finished = begun is not None and begun["finished"]
    resumption = choose(config, launch, store, own_part, mixing, finished=finished)
    if resumption.saved is not None and begun is not None:
        if begun["blocks"] is not None:
            check_place(build_schedule(config, begun["blocks"], begun["rounds"]), resumption.place)
        return ResumedRun(resumption, begun["rounds"])
    if finished:
        raise CheckpointError(
            "the run has finished, but its trained model is not there to continue from",
            where=str(output / MODEL),
            fix="bring it back, or name a new folder in run.output",
        )
    leave_behind(config, resumption, launch, store, own_part)
    if begun is not None:  # how the run had ended before is no longer told there
        guard.write_to(output)
    return NewRun()


def _part_of(layout: ClientLayout, rank: int) -> Part:
    client = layout.client_of(rank)
    return Part(client, layout.shard_of(rank), len(layout.ranks_of(client)))
