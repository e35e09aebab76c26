"""The export command, shared by `deca export` and launchers/export.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from deca_ds.checkpoint.done import missing_clients
from deca_ds.config.paths import argument as path_argument
from deca_ds.config.paths import look_for
from deca_ds.errors import CheckpointError, ConfigError
from deca_ds.plural import several
from deca_ds.printing import print_line
from deca_ds.run_folder import CHECKPOINTS, CLIENT_METRICS, METRICS, numbered
from deca_ds.training.next_commands import BEST, NEWEST
from deca_ds.training.scores import best_of, evaluations

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from deca_ds.checkpoint.export import ExportReport
    from deca_ds.tools.push import Repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run` reads."""
    parser.add_argument("run", type=path_argument, help="output folder of a run (run.output)")
    parser.add_argument("output", type=path_argument, help="new folder for the Hugging Face model")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--client", type=int, metavar="N", help="export client N's model (clients count from 0)")
    which.add_argument("--mean", action="store_true", help="export the mean of all clients' models (the default)")
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        metavar="STEP",
        help="export a checkpoint in place of the trained model: the one after STEP inner steps, the newest one "
        "(newest), or that of the evaluation with the lowest loss (best)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="data type of the weights; default: the model's"
    )
    parser.add_argument(
        "--max-shard-size",
        default="500MB",
        metavar="SIZE",
        help="largest size of a weight file, which bounds the memory (default 500MB)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that came with the model; only if you trust it"
    )
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the trained model's name on the hub, for the card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to this model repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: let everybody read it; default: private")


def run(args: argparse.Namespace, api: HfApi | None = None) -> int:
    """Export with a progress bar, print a summary, and push where asked; returns the exit status 0. Raises UserError.

    api: the hub; None: the one that the hub library is set up for.
    """
    if not args.run.is_dir():  # told at once, before the imports below
        raise CheckpointError(f"there is no folder {str(args.run)!r}", where="RUN", fix=look_for(str(args.run)))
    repository = _repository(args, api)
    console = Console()
    report = _export(args, console)
    size = f"{report.parameters:,} parameters, {report.bytes / 1e6:,.1f} MB in {several(report.files, 'file')}"
    print_line(console, f"exported {report.source}: {size}")
    print_line(console, f"verified and written to {report.output} in {report.seconds:.1f} s")
    if report.stops:
        print_line(console, f"note: {report.stops}")
    if report.note:
        print_line(console, f"note: {report.note}; its saved model is complete")
    if repository is not None:
        print_line(console, f"pushing to {repository.name} ({'public' if repository.public else 'private'})")
        print_line(console, f"pushed: {repository.fill(report.output)}")
    return 0


def _repository(args: argparse.Namespace, api: HfApi | None) -> Repository | None:
    """Return where to push, which has been found to be possible; None if nothing is to be pushed."""
    from huggingface_hub import HfApi

    from deca_ds.tools.push import Repository

    if args.public and not args.push:
        raise ConfigError("--public says who may read what is pushed", where="--public", fix="add --push OWNER/NAME")
    if not args.push:
        return None
    repository = Repository(args.push, api or HfApi(), public=args.public)
    repository.check()
    return repository


def _export(args: argparse.Namespace, console: Console) -> ExportReport:
    """Export with a progress bar."""
    from deca_ds.checkpoint.export import export_model
    from deca_ds.tools.card import Card

    step, missing = _chosen_step(args)
    columns = TextColumn("export"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("export", total=None)
        return export_model(
            args.run,
            args.output,
            client=args.client,
            checkpoint=step,
            dtype=args.dtype,
            max_shard_bytes=parse_size(args.max_shard_size),
            trust_remote_code=args.trust_remote_code,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            card=Card(args.run, args.client, missing, args.base_model, step),
        )


def _chosen_step(args: argparse.Namespace) -> tuple[int | None, list[int]]:
    """Return the step of the checkpoint to export, None for the trained model, and the clients that its mean lacks."""
    from deca_ds.checkpoint.open_steps import find_checkpoint

    if args.checkpoint is None:
        return None, missing_clients(args.run) if args.client is None else []
    wanted = _best_step(args.run) if args.checkpoint == BEST else args.checkpoint
    saved = find_checkpoint(args.run / CHECKPOINTS, None if wanted == NEWEST else wanted, args.client)
    missing = set(range(saved.clients_of_run)) - set(saved.clients) if args.client is None else set()
    return saved.step, sorted(missing)


def _checkpoint(text: str) -> int | str:
    if text not in (BEST, NEWEST) and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of inner steps nor {BEST!r} or {NEWEST!r}")
    return int(text) if text.isdecimal() else text


def _best_step(run: Path) -> int:
    client = min(numbered(run / METRICS, CLIENT_METRICS), default=0)
    best = best_of(evaluations(run, client))
    if best is None or not best.step:
        found = "no evaluation found a loss" if best is None else "the model was best before its first inner step"
        raise CheckpointError(
            f"there is no best checkpoint: {found}", where=str(run / METRICS), fix="export another checkpoint"
        )
    return best.step


def parse_size(text: str) -> int:
    """Return the bytes of "500MB", "2GB", "1GiB". Raises ConfigError for anything else and for less than a byte."""
    from accelerate.utils import convert_file_size_to_int

    try:
        size: int = convert_file_size_to_int(text.upper())  # a small b would mean bits
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"not a size: {text!r}", where="--max-shard-size", fix="write it like 500MB, 2GB or 1GiB")
    return size
