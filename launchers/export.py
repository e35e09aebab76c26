"""Turn a finished run into a Hugging Face directory: python launchers/export.py RUN OUTPUT [--client N]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deca_ds.errors import UserError
from deca_ds.tools.export import add_arguments, run
from deca_ds.training.terminal import own_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a mistake the user can fix, which is then on stderr."""
    own_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
