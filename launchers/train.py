"""Train with DECA. Started on every rank by `deepspeed`, mpirun or python; see README.md."""

import sys

from deca_ds.training.main import main

if __name__ == "__main__":
    sys.exit(main())
