"""Train with DECA. Started on every rank by `deepspeed`, mpirun or python; see docs/launching.md."""

import gc
import sys

gc.disable()  # until all is imported: looking for garbage among what modules make takes a second of each rank

from deca_ds.training.terminal import own_streams  # noqa: E402

own_streams()  # before any library takes hold of them

from deca_ds.tools.train import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
