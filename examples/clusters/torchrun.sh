#!/bin/bash
# One rank per GPU with torchrun. Run it on every host, with the name of one of them first; say how many there are and
# how many ranks each has:
#
#   HOSTS=2 RANKS=4 examples/clusters/torchrun.sh node1 my_run.yaml optimizer.lr=2e-5
#
# SIGTERM to any host's torchrun has all ranks save a checkpoint and stop; the same command continues from it.
set -euo pipefail

exec torchrun --nnodes "$HOSTS" --nproc-per-node "$RANKS" \
    --rdzv-backend c10d --rdzv-endpoint "$1:29400" --rdzv-id my_run \
    "$(deca where)/train.py" --config "${@:2}" run.resume=auto
