"""The command `deca where`, for launchers that start a file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no argument: the command takes none."""


def run(_: argparse.Namespace) -> int:
    """Print the folder of train.py; returns the exit status 0."""
    print(Path(__file__).parent)
    return 0
