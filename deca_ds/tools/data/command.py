"""`deca data RUN.yaml`: its arguments, and from them to what is printed."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deca_ds.config.arguments import add_config, chosen
from deca_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deca_ds.config import Config
    from deca_ds.tools.data.look import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--client", type=int, metavar="N", help="look at this client's data only, and at its files")
    parser.add_argument(
        "--examples", type=int, default=2, metavar="K", help="show so many sequences of each client (default 2)"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="read the first N rows of each file and no more (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, texts in full")


def run(arguments: argparse.Namespace) -> int:
    """Print it. Raises UserErrors, the data's own among them."""
    from deca_ds.config import load_config

    config = load_config(*chosen(arguments))
    _check(arguments, config.cluster.clients)

    from datasets import disable_progress_bars
    from rich.console import Console

    from deca_ds.tools.data.as_json import as_json
    from deca_ds.tools.data.show import show

    disable_progress_bars()
    found = _look(config, arguments)
    if arguments.json:
        print(as_json(found))
    else:
        show(Console(), found)
    return 0


def _check(arguments: argparse.Namespace, clients: int) -> None:
    """Raise ConfigError for numbers out of range. clients: of the configuration."""
    if arguments.client is not None and not 0 <= arguments.client < clients:
        raise ConfigError(
            f"there is no client {arguments.client}",
            where="--client",
            fix="set it to 0, the only one" if clients == 1 else f"name one from 0 to {clients - 1}",
        )
    if arguments.examples < 0:
        raise ConfigError(f"--examples {arguments.examples} is no number of them", fix="give 0 or more")
    if arguments.sample is not None and arguments.sample < 1:
        raise ConfigError(f"--sample {arguments.sample} is no number of rows", fix="give 1 or more")


def _look(config: Config, arguments: argparse.Namespace) -> Found:
    """Prepare the data as a run would, in a folder that is removed again. Raises UserErrors."""
    from deca_ds.engine.tokenizer import load_tokenizer
    from deca_ds.tools.data.look import look

    tokenizer = load_tokenizer(config.model)
    with tempfile.TemporaryDirectory(prefix="deca_ds-data-") as scratch:
        try:
            return look(config, tokenizer, Path(scratch), arguments.client, arguments.sample, arguments.examples)
        except DataError as error:
            if arguments.sample is None:
                raise
            what = f"{error.what} (in the first {arguments.sample} rows of each file)"
            raise DataError(
                what, where=error.where, fix=f"{error.fix or 'look at the row'}; or a larger --sample"
            ) from error
