"""Train with DECA, as `deca train` does. Started on every rank by `deepspeed`, mpirun or python."""

import sys

from deca_ds.launchers.train import main

if __name__ == "__main__":
    sys.exit(main())
