"""The trainer's command line, which `deca supervise` reads as well."""

from __future__ import annotations

import argparse

from deca_ds.config.arguments import add_config
from deca_ds.watchdog.restart import JOIN


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of a rank's arguments. program: its name in messages; None: the script's."""
    parser = argparse.ArgumentParser(
        prog=program, description="Train with DECA: block-wise Adam on ZeRO-3 clients that gossip."
    )
    add_config(parser)
    parser.add_argument(JOIN, action="store_true", help="rejoin a running job that has continued without this client")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    # what the deepspeed launcher adds; the rank is read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser
